//! What all slots need of the host: forwarding, and rules that no slot's policy can lift.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use forkd_host::net::nft;

use crate::address::VETH_PREFIX;
use crate::rules;

const FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
const FORWARD6: &str = "/proc/sys/net/ipv6/conf/all/forwarding";
const OFF6: &str = "/proc/sys/net/ipv6/conf/all/disable_ipv6";
const LINKS6: &str = "/proc/sys/net/ipv6/conf";
const ROUTES6: &str = "/proc/thread-self/net/ipv6_route";

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

/// The ways out that a host has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ways {
    /// Whether there is one of version 6, besides that of version 4.
    pub v6: bool,
}

/// Whether guests have version 6 on this host, and what is in the way if not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum V6 {
    /// They have it.
    Yes,
    /// The kernel has none.
    Absent,
    /// The host has switched it off.
    Off,
    /// The host itself reaches nothing by it.
    NoRoute,
    /// Forwarding is off and this process may not switch it on.
    NoForwarding,
}

impl V6 {
    /// Looks at this host. Changes nothing.
    pub fn look() -> Self {
        if !Path::new(LINKS6).is_dir() {
            return Self::Absent;
        }
        let routes = fs::read_to_string(ROUTES6).unwrap_or_default();
        let may_forward = || File::options().write(true).open(FORWARD6).is_ok();
        if is_on(OFF6) {
            Self::Off
        } else if !has_default_route(&routes) {
            Self::NoRoute
        } else if !is_on(FORWARD6) && !may_forward() {
            Self::NoForwarding
        } else {
            Self::Yes
        }
    }
}

/// Puts the rules into force, then lets packets through. In this order: forwarding without rules would open the host.
pub fn prepare() -> Result<Ways, Error> {
    nft::apply(&rules::host()).map_err(Error::Rules)?;
    if !is_on(FORWARD) {
        fs::write(FORWARD, "1").map_err(Error::Forward)?;
    }
    let routes = fs::read_to_string(ROUTES6).unwrap_or_default();
    if !has_default_route(&routes) {
        tracing::info!("this host has no default route of version 6: guests have none either");
        return Ok(Ways::default());
    }
    match forward6() {
        Ok(()) => Ok(Ways { v6: true }),
        Err(error) => {
            tracing::warn!(%error, "cannot switch on {FORWARD6}: guests have no network of version 6");
            Ok(Ways::default())
        }
    }
}

fn is_on(setting: &str) -> bool {
    fs::read_to_string(setting).is_ok_and(|text| text.trim() == "1")
}

/// Switches forwarding of version 6 on. A host that forwards takes no advice from routers any more and forgets the routes
/// that it had from them, unless told to go on: links that listened before are told so.
fn forward6() -> io::Result<()> {
    if is_on(FORWARD6) {
        return Ok(());
    }
    for link in fs::read_dir(LINKS6)? {
        let link = link?;
        let name = link.file_name().to_string_lossy().into_owned();
        let is_one = !matches!(name.as_str(), "all" | "default" | "lo");
        let accepts = link.path().join("accept_ra");
        if is_one && !name.starts_with(VETH_PREFIX) && is_on(&accepts.to_string_lossy()) {
            fs::write(accepts, "2")?;
        }
    }
    fs::write(FORWARD6, "1")
}

/// Whether a table of routes, in the words of `/proc/net/ipv6_route`, has one to everywhere that leads anywhere.
fn has_default_route(table: &str) -> bool {
    // RTF_REJECT; linux/ipv6_route.h.
    const REJECT: u32 = 0x0200;
    table.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [to, prefix, _, _, _, _, _, _, flags, link] = words.as_slice() else {
            return false;
        };
        let leads = u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & REJECT == 0);
        to.bytes().all(|digit| digit == b'0') && *prefix == "00" && *link != "lo" && leads
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_out_is_a_default_route_that_leads_somewhere() {
        let zero = "0".repeat(32);
        let line = |to: &str, prefix: &str, flags: &str, link: &str| {
            format!("{to} {prefix} {zero} 00 {zero} 00000400 00000002 00000000 {flags} {link}\n")
        };
        let global = line(&zero, "00", "00000003", "eth0");
        let local = line(&format!("fe80{}", "0".repeat(28)), "40", "00000001", "eth0");
        let refused = line(&zero, "00", "00200200", "eth0");
        let own = line(&zero, "00", "80200001", "lo");
        assert!(has_default_route(&format!("{local}{global}")));
        for nowhere in ["", "nonsense", &local, &refused, &own] {
            assert!(!has_default_route(nowhere), "{nowhere}");
        }
    }
}
