//! What all slots need of the host: forwarding, and rules that no slot's policy can lift.

use std::fs;
use std::io;

use forkd_host::net::nft;

use crate::rules;

const FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

/// Why slots have no way out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The rules.
    #[error("the host's rules for sandboxes are not in force")]
    Rules(#[source] nft::Error),
    /// Forwarding.
    #[error(
        "cannot switch on forwarding ({FORWARD}); write 1 there, or make /proc/sys writable in the container"
    )]
    Forward(#[source] io::Error),
}

/// Puts the rules into force, then lets packets through. In this order: forwarding without rules would open the host.
pub fn prepare() -> Result<(), Error> {
    nft::apply(&rules::host()).map_err(Error::Rules)?;
    if fs::read_to_string(FORWARD).is_ok_and(|text| text.trim() == "1") {
        return Ok(());
    }
    fs::write(FORWARD, "1").map_err(Error::Forward)
}
