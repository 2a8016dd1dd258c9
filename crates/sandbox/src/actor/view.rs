//! What is told of a sandbox, from its record and its place.

use crate::machine::State;
use crate::place::Place;
use crate::record::SandboxRecord;
use crate::view::{Ending, ForkStages, NetworkView, SandboxStatus, SandboxView};

pub(super) fn view_of(
    record: &SandboxRecord,
    place: &Place,
    stages: ForkStages,
    ending: Option<Ending>,
) -> SandboxView {
    let (status, ended) = match &record.state {
        State::Starting | State::Greeting => (SandboxStatus::Starting, None),
        State::Running | State::Branching { paused: false } => (SandboxStatus::Running, None),
        State::Paused | State::Branching { paused: true } => (SandboxStatus::Paused, None),
        State::Stopping { why } => (SandboxStatus::Stopping, Some(why.clone())),
        State::Ended { why } => (SandboxStatus::Ended, Some(why.clone())),
    };
    SandboxView {
        id: record.id.clone(),
        tag: record.tag.clone(),
        index: record.index,
        status,
        ended,
        ending,
        pid: record.process.map(|p| p.pid),
        vcpus: place.vcpus(),
        engine: record.engine.clone(),
        created_at_unix: record.created_at_unix,
        deadline_unix: record.deadline_unix,
        metadata: record.metadata.clone(),
        memory_limit_mib: record.memory_limit_mib,
        limits: place.limits(),
        not_enforced: place.not_enforced().to_vec(),
        network: NetworkView {
            netns: place.netns(),
            address: place.outer(),
            policy: place.policy(),
        },
        stages,
        branches: record.branches,
    }
}
