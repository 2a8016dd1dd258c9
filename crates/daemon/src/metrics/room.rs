//! How much a node takes on, and what it refused.

use std::sync::Mutex;

use forkd_sandbox::{Resource, Room};
use prometheus::{IntCounterVec, IntGauge, IntGaugeVec};

use super::{Maker, int};

/// The families of admission.
#[derive(Debug)]
pub(super) struct RoomMetrics {
    vcpus: IntGauge,
    memory_available_bytes: IntGauge,
    disk_available_bytes: IntGauge,
    bounds: IntGaugeVec,
    refusals: IntCounterVec,
    /// Held while counters catch up with the node's own.
    catching_up: Mutex<()>,
}

impl RoomMetrics {
    pub(super) fn new(make: &Maker) -> Self {
        Self {
            vcpus: make.gauge("forkd_vcpus", "Virtual CPUs of sandboxes that have not ended."),
            memory_available_bytes: make.gauge(
                "forkd_memory_available_bytes",
                "Memory that can be used, of the host and of the daemon's control group.",
            ),
            disk_available_bytes: make.gauge(
                "forkd_disk_available_bytes",
                "Disk that can be used where snapshots are.",
            ),
            bounds: make.gauges(
                "forkd_admission_bound",
                "What admission allows at most of sandboxes and vcpus, or leaves free of memory and disk, in bytes.",
                &["resource"],
            ),
            refusals: make.counters(
                "forkd_admission_refused_total",
                "Requests refused for want of room, by what was short.",
                &["resource"],
            ),
            catching_up: Mutex::new(()),
        }
    }

    /// How much room there is, and was not.
    pub(super) fn set(&self, room: &Room) {
        let bytes = |mib: u64| int(mib.saturating_mul(1024 * 1024));
        self.vcpus.set(int(room.vcpus));
        self.memory_available_bytes
            .set(bytes(room.memory_available_mib.unwrap_or(0)));
        self.disk_available_bytes
            .set(bytes(room.disk_available_mib.unwrap_or(0)));
        let _one = self.catching_up.lock();
        for (resource, refused) in Resource::ALL.into_iter().zip(room.refused) {
            let bound = match resource {
                Resource::Sandboxes => Some(room.bounds.sandboxes_max.into()),
                Resource::Vcpus => room.vcpus_max.map(int),
                Resource::Disk => Some(bytes(room.bounds.disk_reserve_mib)),
                Resource::Memory => Some(bytes(room.bounds.memory_reserve_mib)),
            };
            if let Some(bound) = bound {
                self.bounds.with_label_values(&[resource.name()]).set(bound);
            }
            let counter = self.refusals.with_label_values(&[resource.name()]);
            counter.inc_by(refused.saturating_sub(counter.get()));
        }
    }
}
