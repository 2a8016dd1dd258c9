//! From the heart's views to the interface's types.

use std::time::Duration;

use forkd_sandbox::Room;
use forkd_sandbox::spec::{self, Warm};
use forkd_sandbox::view::{self, SandboxView, SnapshotView};
use forkd_slot::policy::{Mode, Policy, Rule};
use forkd_wire::api::node::NodeRoom;
use forkd_wire::api::sandbox::{
    GUEST_ADDR, IoLimit, MemoryUse, NetworkMode, NetworkPolicy, SandboxEnding, SandboxInfo,
    SandboxStages, SandboxState,
};
use forkd_wire::api::snapshot::{
    CreateSnapshot, SnapshotInfo, SnapshotStages, SnapshotState, SnapshotStep,
};

use crate::ApiError;

/// Milliseconds with microseconds behind the point.
pub(crate) fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

pub(crate) fn snapshot(view: SnapshotView) -> SnapshotInfo {
    let layered = view.layered;
    let micros = |pause: Duration| u64::try_from(pause.as_micros()).unwrap_or(u64::MAX);
    SnapshotInfo {
        tag: view.tag,
        dir: view.dir.display().to_string(),
        created_at_unix: view.created_at_unix,
        status: snapshot_state(view.status),
        bootable: view.bootable,
        branched_from: view.branched_from.map(Into::into),
        pause_ms: view.pause.map(|pause| micros(pause).div_ceil(1000)),
        pause_us: view.pause.map(micros),
        diff_ms: None,
        diff_physical_bytes: layered.then_some(view.physical_bytes),
        diff_logical_bytes: layered.then_some(view.memory_logical_bytes),
        warning: view.problem,
        id: view.id,
        engine: view.engine,
        image: view.image,
        image_digest: view.image_digest,
        warm: view.warm,
        labels: view.labels,
        memory_mib: view.memory_mib,
        vcpus: view.vcpus,
        parent_tag: view.parent,
        layered,
        physical_bytes: view.physical_bytes,
        stages: None,
    }
}

pub(crate) fn snapshot_state(status: view::SnapshotStatus) -> SnapshotState {
    match status {
        view::SnapshotStatus::Writing => SnapshotState::Writing,
        view::SnapshotStatus::Ready => SnapshotState::Ready,
        view::SnapshotStatus::Failed => SnapshotState::Failed,
    }
}

pub(crate) fn snapshot_stages(stages: view::SnapshotStages) -> SnapshotStages {
    SnapshotStages {
        boot_ms: millis(stages.boot),
        warm_ms: millis(stages.warm),
        save_ms: millis(stages.save),
    }
}

pub(crate) fn snapshot_step(step: view::SnapshotStep) -> SnapshotStep {
    match step {
        view::SnapshotStep::Booting => SnapshotStep::Booting,
        view::SnapshotStep::Warming => SnapshotStep::Warming,
        view::SnapshotStep::Saving => SnapshotStep::Saving,
        view::SnapshotStep::Publishing => SnapshotStep::Publishing,
    }
}

pub(crate) fn warm(request: &CreateSnapshot) -> Result<Warm, ApiError> {
    match (&request.warm, &request.warm_cmd) {
        (None, None) => Ok(Warm::Nothing),
        (Some(code), None) => Ok(Warm::Python(code.clone())),
        (None, Some(command)) => Ok(Warm::Command(command.clone())),
        (Some(_), Some(_)) => Err(ApiError::invalid("give either warm or warm_cmd, not both")),
    }
}

pub(crate) fn sandbox(view: SandboxView) -> SandboxInfo {
    SandboxInfo {
        not_enforced: view.not_enforced,
        cpu_limit_milli: view.limits.cpu_milli,
        pids_limit: view.limits.pids,
        io_limit: io_limit(view.limits.io),
        id: view.id,
        snapshot_tag: view.tag,
        network: network(&view.network.policy),
        network_address: view.network.address.map(|address| address.to_string()),
        netns: view.network.netns,
        guest_addr: GUEST_ADDR.to_owned(),
        created_at_unix: view.created_at_unix,
        pid: view.pid,
        memory_limit_mib: view.memory_limit_mib,
        has_branched: view.branches > 0,
        last_branch_memory_path: None,
        branch_count: view.branches,
        state: sandbox_state(view.status),
        ended: view.ended,
        ending: view.ending.map(sandbox_ending),
        engine: view.engine,
        index: view.index,
        deadline_unix: view.deadline_unix,
        metadata: view.metadata,
        stages: SandboxStages {
            forked_ms: millis(view.stages.forked),
            ready_ms: millis(view.stages.ready),
        },
    }
}

fn io_limit(limit: spec::IoLimit) -> Option<IoLimit> {
    limit.is_some().then_some(IoLimit {
        read_bytes_per_sec: limit.read_bytes,
        write_bytes_per_sec: limit.write_bytes,
        read_iops: limit.reads,
        write_iops: limit.writes,
    })
}

pub(crate) fn io_limit_of(body: IoLimit) -> spec::IoLimit {
    spec::IoLimit {
        read_bytes: body.read_bytes_per_sec,
        write_bytes: body.write_bytes_per_sec,
        reads: body.read_iops,
        writes: body.write_iops,
    }
}

fn sandbox_ending(ending: view::Ending) -> SandboxEnding {
    match ending {
        view::Ending::Killed => SandboxEnding::Killed,
        view::Ending::TimedOut => SandboxEnding::TimedOut,
        view::Ending::Undone => SandboxEnding::Undone,
        view::Ending::Closed => SandboxEnding::Closed,
        view::Ending::Exited => SandboxEnding::Exited,
        view::Ending::OutOfMemory => SandboxEnding::Oom,
    }
}

fn network(policy: &Policy) -> NetworkPolicy {
    let texts = |rules: &[Rule]| rules.iter().map(ToString::to_string).collect();
    NetworkPolicy {
        mode: match policy.mode() {
            Mode::None => NetworkMode::None,
            Mode::Nat => NetworkMode::Nat,
        },
        allow: texts(policy.allow()),
        deny: texts(policy.deny()),
    }
}

pub(crate) fn policy(body: &NetworkPolicy) -> Result<Policy, ApiError> {
    let mode = match body.mode {
        NetworkMode::None => Mode::None,
        NetworkMode::Nat => Mode::Nat,
    };
    let rules = |texts: &[String]| -> Result<Vec<Rule>, _> {
        texts.iter().map(|text| text.parse()).collect()
    };
    let policy = rules(&body.allow).and_then(|allow| Policy::new(mode, allow, rules(&body.deny)?));
    policy.map_err(|error| ApiError::invalid(error.to_string()))
}

pub(crate) fn sandbox_state(status: view::SandboxStatus) -> SandboxState {
    match status {
        view::SandboxStatus::Starting => SandboxState::Starting,
        view::SandboxStatus::Running => SandboxState::Running,
        view::SandboxStatus::Paused => SandboxState::Paused,
        view::SandboxStatus::Stopping => SandboxState::Stopping,
        view::SandboxStatus::Ended => SandboxState::Ended,
    }
}

pub(crate) fn room(room: Room) -> NodeRoom {
    NodeRoom {
        sandboxes: room.sandboxes,
        sandboxes_max: room.bounds.sandboxes_max.into(),
        vcpus: room.vcpus,
        vcpus_max: room.vcpus_max,
        memory_available_mib: room.memory_available_mib,
        memory_reserve_mib: room.bounds.memory_reserve_mib,
        disk_available_mib: room.disk_available_mib,
        disk_reserve_mib: room.bounds.disk_reserve_mib,
        full: room.full,
    }
}

pub(crate) fn memory(memory: view::MemoryUse) -> MemoryUse {
    MemoryUse {
        pss_kib: memory.pss_kib,
        private_kib: memory.private_kib,
    }
}
