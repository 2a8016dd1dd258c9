//! Gives the guest's network device the address of its fork.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use forkd_wire::agent::{GuestNetwork, GuestNetwork6};

use crate::sys;

const CLASS: &str = "/sys/class/net";
const SETTINGS6: &str = "/proc/sys/net/ipv6/conf";
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// `ARPHRD_ETHER`, as `/sys` prints it.
const ETHERNET: &str = "1";

/// What keeps the network from being configured.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("{value:?} is no {what}")]
    Value { what: &'static str, value: String },
    #[error(
        "the guest has no network device; was its kernel given the module virtio_net, and was the \
         snapshot made with a network?"
    )]
    NoDevice,
    #[error("cannot set the {what} of {device}: {source}")]
    Device {
        what: &'static str,
        device: String,
        source: io::Error,
    },
    #[error("cannot write {RESOLV_CONF}: {0}")]
    Resolver(io::Error),
}

/// Applies address, route and name servers to the first Ethernet device, unless a fork has from its parent what it
/// needs: `last` is what the device was last told. To find the device and set it anew takes milliseconds, tens of them in
/// a guest without hardware virtualisation.
pub(super) fn apply(
    last: &Mutex<Option<GuestNetwork>>,
    network: &GuestNetwork,
) -> Result<(), Error> {
    let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
    if network.gateway_mac.is_some() && last.as_ref() == Some(network) {
        return Ok(());
    }
    *last = None;
    set_up(network)?;
    *last = Some(network.clone());
    Ok(())
}

fn set_up(network: &GuestNetwork) -> Result<(), Error> {
    let (ip, prefix) = address::<Ipv4Addr>(&network.address, 32)?;
    let gateway: Ipv4Addr = parse("gateway", &network.gateway)?;
    let v6 = network.v6.as_ref().map(V6::read).transpose()?;
    let mac = network.mac.as_deref().map(mac).transpose()?;
    let device = device().ok_or(Error::NoDevice)?;
    let failed = |what| {
        let device = device.clone();
        move |source| Error::Device {
            what,
            device,
            source,
        }
    };
    // Switched off, the kernel forgets its neighbours: the gateway's address is the parent's too, but perhaps at
    // another device.
    sys::set_link(&device, false).map_err(failed("link"))?;
    if let Some(mac) = mac {
        sys::set_mac(&device, mac).map_err(failed("MAC address"))?;
    }
    sys::set_address(&device, ip, prefix).map_err(failed("address"))?;
    let v6 = v6.filter(|_| quiet(&device));
    sys::set_link(&device, true).map_err(failed("link"))?;
    if let Some(v6) = &v6 {
        v6.apply(&device).map_err(failed("address of IPv6"))?;
    }
    sys::add_default_route(gateway).map_err(failed("default route"))?;
    let mut text = String::new();
    for server in &network.dns {
        let server: std::net::IpAddr = parse("name server", server)?;
        text.push_str(&format!("nameserver {server}\n"));
    }
    if text.is_empty() {
        return Ok(());
    }
    // Images often have a link here, to a file of a resolver that does not run.
    let _ = std::fs::remove_file(RESOLV_CONF);
    std::fs::write(RESOLV_CONF, text).map_err(Error::Resolver)
}

/// What the guest is to have of IPv6. Switching the device off took what the parent had.
struct V6 {
    ip: Ipv6Addr,
    prefix: u8,
    gateway: Ipv6Addr,
}

impl V6 {
    fn read(network: &GuestNetwork6) -> Result<Self, Error> {
        let (ip, prefix) = address(&network.address, 128)?;
        let gateway = parse("gateway", &network.gateway)?;
        Ok(Self {
            ip,
            prefix,
            gateway,
        })
    }

    fn apply(&self, device: &str) -> io::Result<()> {
        sys::add_address6(device, self.ip, self.prefix)?;
        sys::add_default_route6(device, self.gateway)
    }
}

/// Lets a device use its addresses of IPv6 at once, and not wait for routers' advice, which nobody gives. `false` where
/// the guest's kernel has no IPv6: the guest then goes without.
fn quiet(device: &str) -> bool {
    let directory: PathBuf = Path::new(SETTINGS6).join(device);
    let set = |name: &str, value: &str| std::fs::write(directory.join(name), value);
    // Without them an address counts a second later, no more.
    let _ = set("accept_dad", "0").and_then(|()| set("accept_ra", "0"));
    set("disable_ipv6", "0").is_ok()
}

fn parse<T: FromStr>(what: &'static str, value: &str) -> Result<T, Error> {
    value.parse().map_err(|_| Error::Value {
        what,
        value: value.to_owned(),
    })
}

fn address<T: FromStr>(text: &str, max: u8) -> Result<(T, u8), Error> {
    let wrong = || Error::Value {
        what: "address with prefix length",
        value: text.to_owned(),
    };
    let (ip, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let prefix = prefix
        .parse()
        .ok()
        .filter(|prefix| *prefix <= max)
        .ok_or_else(wrong)?;
    Ok((ip.parse().map_err(|_| wrong())?, prefix))
}

fn mac(text: &str) -> Result<[u8; 6], Error> {
    let wrong = || Error::Value {
        what: "MAC address",
        value: text.to_owned(),
    };
    let byte = |part: &str| u8::from_str_radix(part, 16).map_err(|_| wrong());
    let bytes: Vec<u8> = text.split(':').map(byte).collect::<Result<_, _>>()?;
    bytes.try_into().map_err(|_| wrong())
}

fn device() -> Option<String> {
    let mut names: Vec<_> = std::fs::read_dir(CLASS).ok()?.flatten().collect();
    names.sort_by_key(std::fs::DirEntry::file_name);
    let ethernet = |entry: &std::fs::DirEntry| {
        let kind = std::fs::read_to_string(entry.path().join("type")).unwrap_or_default();
        kind.trim() == ETHERNET && entry.path().join("device").exists()
    };
    names
        .iter()
        .find(|entry| ethernet(entry))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_checked() {
        assert_eq!(
            address::<Ipv4Addr>("10.42.0.2/24", 32).unwrap(),
            (Ipv4Addr::new(10, 42, 0, 2), 24)
        );
        for wrong in ["10.42.0.2", "10.42.0.2/33", "fd00::2/24"] {
            assert!(address::<Ipv4Addr>(wrong, 32).is_err(), "{wrong}");
        }
        let network = |address: &str, gateway: &str| GuestNetwork6 {
            address: address.to_owned(),
            gateway: gateway.to_owned(),
        };
        let v6 = V6::read(&network("fd00::2/64", "fd00::1")).unwrap();
        assert_eq!((v6.prefix, v6.gateway), (64, "fd00::1".parse().unwrap()));
        assert!(V6::read(&network("fd00::2/129", "fd00::1")).is_err());
        assert!(V6::read(&network("fd00::2/64", "10.42.0.1")).is_err());
        assert_eq!(mac("06:00:0a:2a:00:02").unwrap(), [6, 0, 10, 42, 0, 2]);
        assert!(mac("06:00:0a:2a:00").is_err());
        assert!(mac("06:00:0a:2a:00:zz").is_err());
    }
}
