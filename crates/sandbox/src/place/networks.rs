//! The networks that places have: a pool of slots, and what their guests ask for names.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use forkd_slot::policy::{Mode, Policy};
use forkd_slot::pool::{Config as PoolConfig, Pool};
use forkd_slot::registry::{self, Registry};
use forkd_slot::slot::Slot;
use forkd_slot::{dns, host};
use forkd_wire::error::ErrorCode;
use ipnet::IpNet;
use tracing::warn;

use super::{Isolation, PlaceRecord};
use crate::Error;
use forkd_host::chain;

/// How long a fork waits for a slot when none is ready.
const SLOT_PATIENCE: Duration = Duration::from_secs(20);
/// Where the servers that names are asked of are written down.
const RESOLV_CONF: &str = "/etc/resolv.conf";

#[derive(Debug)]
pub(super) struct Networks {
    pub(super) pool: Pool,
    pub(super) upstream: Vec<SocketAddr>,
    pub(super) refused: Vec<IpNet>,
    /// Whether this host can give networks; tried when the first is wanted.
    usable: OnceLock<Result<(), String>>,
}

impl Networks {
    pub(super) fn open(
        config: &Isolation,
        owner: &Path,
        in_use: &[PlaceRecord],
    ) -> Result<Option<Self>, String> {
        if !config.network {
            return Ok(None);
        }
        // Whether the node is gone is told by this path, from wherever somebody looks.
        let owner = std::path::absolute(owner).map_err(|e| e.to_string())?;
        let registry = Registry::open(Path::new(registry::DIRECTORY), &owner.display().to_string())
            .map_err(|e| chain(&e))?;
        let pool = PoolConfig {
            registry,
            ready: config.slots_ready,
            max: config.slots_max,
            refused: config.refused.clone(),
        };
        let in_use: Vec<u32> = in_use.iter().filter_map(|record| record.slot).collect();
        let pool = Pool::open(pool, &in_use).map_err(|e| chain(&e))?;
        let upstream = dns::servers(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default());
        Ok(Some(Self {
            pool,
            upstream,
            refused: config.refused.clone(),
            usable: OnceLock::new(),
        }))
    }

    /// Why this host cannot give networks, if it cannot. The first call tries, and takes some milliseconds.
    pub(super) fn problem(&self) -> Option<&str> {
        let tried = self.usable.get_or_init(|| {
            host::prepare().map_err(|e| chain(&e))?;
            self.pool.probe().map_err(|e| chain(&e))
        });
        tried.as_ref().err().map(String::as_str)
    }

    /// As [`Networks::problem`], if that was asked before.
    pub(super) fn known_problem(&self) -> Option<&str> {
        self.usable.get()?.as_ref().err().map(String::as_str)
    }

    pub(super) fn take(&self, policy: &Policy) -> Result<Slot, Error> {
        let slot = self.pool.lease(SLOT_PATIENCE).map_err(|e| {
            let code = match e {
                forkd_slot::pool::Error::Exhausted { .. } => ErrorCode::InsufficientResources,
                forkd_slot::pool::Error::Closed => ErrorCode::ShuttingDown,
                forkd_slot::pool::Error::Failed(_) => ErrorCode::Internal,
            };
            Error::new(code, e.to_string())
        })?;
        // Without network the guest's device leads nowhere, so there is nothing to rule.
        if policy.mode() == Mode::Nat
            && *policy != Policy::default()
            && let Err(e) = slot.apply(policy, &self.refused)
        {
            self.pool.release(slot.index());
            return Err(slot_error(e));
        }
        Ok(slot)
    }

    /// Whatever cannot be taken over of it, the slot is this sandbox's until it ends.
    pub(super) fn adopt(&self, index: u32, policy: &Policy) -> Option<Slot> {
        let lost = |error: &forkd_slot::slot::Error| {
            warn!(
                slot = index,
                error = chain(error),
                "a sandbox's network cannot be taken over"
            );
        };
        let mut slot = match Slot::adopt(index) {
            Ok(Some(slot)) => slot,
            Ok(None) => {
                self.pool.release(index);
                return None;
            }
            Err(e) => {
                lost(&e);
                return None;
            }
        };
        // Without network nobody holds the tap any more.
        if policy.mode() == Mode::Nat {
            let taken = slot.bind_names();
            if let Err(e) = taken.and_then(|()| slot.apply(policy, &self.refused)) {
                lost(&e);
            }
        }
        Some(slot)
    }
}

pub(super) fn slot_error(error: forkd_slot::slot::Error) -> Error {
    Error::new(
        ErrorCode::Internal,
        "the network rules of a sandbox are not in force",
    )
    .with_source(error)
}

pub(super) fn no_network(why: &str) -> Error {
    let text = format!("there is no network for this sandbox: {why}");
    Error::new(ErrorCode::Incompatible, text)
        .with_remedy("see `forkd doctor`, or ask for the network mode none")
}
