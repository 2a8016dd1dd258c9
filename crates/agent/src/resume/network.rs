//! Gives the guest's network device the address of its fork.

use std::io;
use std::net::Ipv4Addr;

use forkd_wire::agent::GuestNetwork;

use crate::sys;

const CLASS: &str = "/sys/class/net";
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

/// Applies address, route and name servers to the first Ethernet device.
pub(super) fn apply(network: &GuestNetwork) -> Result<(), Error> {
    let (ip, prefix) = address(&network.address)?;
    let gateway: Ipv4Addr = parse("gateway", &network.gateway)?;
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
    // Switched off, the kernel forgets its neighbours: the gateway's address is the parent's too, but at another
    // device.
    sys::set_link(&device, false).map_err(failed("link"))?;
    if let Some(mac) = mac {
        sys::set_mac(&device, mac).map_err(failed("MAC address"))?;
    }
    sys::set_address(&device, ip, prefix).map_err(failed("address"))?;
    sys::set_link(&device, true).map_err(failed("link"))?;
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

fn parse<T: std::str::FromStr>(what: &'static str, value: &str) -> Result<T, Error> {
    value.parse().map_err(|_| Error::Value {
        what,
        value: value.to_owned(),
    })
}

fn address(text: &str) -> Result<(Ipv4Addr, u8), Error> {
    let wrong = || Error::Value {
        what: "address with prefix length",
        value: text.to_owned(),
    };
    let (ip, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let prefix = prefix
        .parse()
        .ok()
        .filter(|prefix| *prefix <= 32)
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
            address("10.42.0.2/24").unwrap(),
            (Ipv4Addr::new(10, 42, 0, 2), 24)
        );
        assert!(address("10.42.0.2").is_err());
        assert!(address("10.42.0.2/33").is_err());
        assert_eq!(mac("06:00:0a:2a:00:02").unwrap(), [6, 0, 10, 42, 0, 2]);
        assert!(mac("06:00:0a:2a:00").is_err());
        assert!(mac("06:00:0a:2a:00:zz").is_err());
    }
}
