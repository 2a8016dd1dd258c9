//! One slot: made, given a policy, removed.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use forkd_host::net::netns::{self, Netns};
use forkd_host::net::nft;
use forkd_host::net::route::{self, Route};
use forkd_host::net::tap;
use ipnet::Ipv4Net;

use crate::address::{self, GATEWAY, GATEWAY_MAC, GUEST_PREFIX, HOST, TAP, UPLINK};
use crate::policy::Policy;
use crate::rules;

/// Why there is no slot.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its namespace.
    #[error(transparent)]
    Netns(#[from] netns::Error),
    /// Its devices, addresses or routes.
    #[error("the network of slot {index} cannot be set up")]
    Route {
        /// The slot.
        index: u32,
        /// Why.
        #[source]
        source: route::Error,
    },
    /// The guest's device.
    #[error(transparent)]
    Tap(#[from] tap::Error),
    /// Its rules.
    #[error("the rules of slot {index} are not in force")]
    Rules {
        /// The slot.
        index: u32,
        /// Why.
        #[source]
        source: nft::Error,
    },
    /// A setting of its namespace.
    #[error("cannot set {setting} in slot {index}; in a container /proc/sys must be writable")]
    Setting {
        /// The slot.
        index: u32,
        /// The file below /proc/sys.
        setting: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its name server's address.
    #[error("cannot answer names in slot {index}")]
    Names {
        /// The slot.
        index: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A prepared network of one guest. [`Slot::remove`] takes it away; dropping it leaves it there.
#[derive(Debug)]
pub struct Slot {
    index: u32,
    netns: Netns,
    /// None where the VM alone has it: after a restart of whoever made the slot.
    tap: Option<OwnedFd>,
    names: Option<NameSockets>,
    generation: AtomicU32,
}

/// Where the guest asks for names: sockets in the slot's namespace.
#[derive(Debug)]
pub struct NameSockets {
    /// For most questions.
    pub udp: UdpSocket,
    /// For long answers.
    pub tcp: TcpListener,
}

/// The settings of a slot's namespace. It forwards, and knows only version 4: a guest gets no address of version 6.
const SETTINGS: [(&str, &str); 3] = [
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/disable_ipv6", "1"),
    ("net/ipv6/conf/default/disable_ipv6", "1"),
];

/// The generation of a slot's first rules. Zero is what connections bear that nobody permitted.
const FIRST: u32 = 1;

impl Slot {
    /// Makes slot `index` with the default policy; nothing of this number may exist. What was made of it is removed
    /// again when a step fails.
    pub fn make(index: u32, refused: &[Ipv4Net]) -> Result<Self, Error> {
        let made = Self::build(index, refused);
        let foreign = matches!(made, Err(Error::Netns(netns::Error::Exists { .. })));
        if made.is_err() && !foreign {
            // The error that led here is the one to tell; the sweep of the next start takes what is left.
            let _ = remove(index);
        }
        made
    }

    fn build(index: u32, refused: &[Ipv4Net]) -> Result<Self, Error> {
        let netns = Netns::create(&address::netns(index))?;
        let rules = rules::slot(address::outer(index), &Policy::default(), refused, FIRST);
        // Rules first: not for an instant does anything pass without them.
        let (route, tap) = netns.enter(|| {
            settle(index)?;
            let ruled = nft::apply(&rules);
            ruled.map_err(|source| Error::Rules { index, source })?;
            let route = Route::open().map_err(|source| Error::Route { index, source })?;
            Ok::<_, Error>((route, tap::open(TAP)?))
        })??;
        connect(index, route, &netns).map_err(|source| Error::Route { index, source })?;
        let names = netns.enter(NameSockets::bind)?;
        let names = names.map_err(|source| Error::Names { index, source })?;
        Ok(Self {
            index,
            netns,
            tap: Some(tap),
            names: Some(names),
            generation: AtomicU32::new(FIRST),
        })
    }

    /// Takes over a slot that an earlier process made, and whose guest goes on; `None` when there is none. Its policy is
    /// to be applied again, and its names are to be answered again: what was learnt of them is forgotten.
    pub fn adopt(index: u32) -> Result<Option<Self>, Error> {
        let Some(netns) = Netns::open(&address::netns(index))? else {
            return Ok(None);
        };
        // Another generation than any before, or what was permitted long ago would never be judged again.
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let generation = u32::try_from(since.as_secs() & 0x7fff_ffff).unwrap_or(FIRST);
        Ok(Some(Self {
            index,
            netns,
            tap: None,
            names: None,
            generation: AtomicU32::new(generation),
        }))
    }

    /// Opens the sockets that a slot which was taken over has not. It must have its tap: the address is that device's.
    pub fn bind_names(&mut self) -> Result<(), Error> {
        let index = self.index;
        let names = self.netns.enter(NameSockets::bind)?;
        self.names = Some(names.map_err(|source| Error::Names { index, source })?);
        Ok(())
    }

    /// Its number.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The name of its namespace.
    pub fn netns(&self) -> &str {
        self.netns.name()
    }

    /// The guest's device, for a VM to use: a duplicate, because the device goes with the last of them.
    pub fn tap(&self) -> io::Result<OwnedFd> {
        let tap = self.tap.as_ref().ok_or(io::ErrorKind::NotFound)?;
        tap.as_fd().try_clone_to_owned()
    }

    /// The sockets to answer names on; given once.
    pub fn take_names(&mut self) -> Option<NameSockets> {
        self.names.take()
    }

    /// Puts a policy into force, in place of the one before, at once and as a whole. Connections that were allowed
    /// and are no more end.
    pub fn apply(&self, policy: &Policy, refused: &[Ipv4Net]) -> Result<(), Error> {
        let generation = self
            .generation
            .fetch_add(1, Ordering::Relaxed)
            .wrapping_add(1)
            .max(FIRST);
        let rules = rules::slot(address::outer(self.index), policy, refused, generation);
        self.rule(&rules)
    }

    /// Changes rules of the slot.
    pub fn rule(&self, rules: &str) -> Result<(), Error> {
        let index = self.index;
        let ruled = self.netns.enter(|| nft::apply(rules))?;
        ruled.map_err(|source| Error::Rules { index, source })
    }
}

impl NameSockets {
    fn bind() -> io::Result<Self> {
        let to = SocketAddr::new(IpAddr::V4(GATEWAY), 53);
        let (udp, tcp) = (UdpSocket::bind(to)?, TcpListener::bind(to)?);
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        Ok(Self { udp, tcp })
    }
}

fn settle(index: u32) -> Result<(), Error> {
    for (setting, value) in SETTINGS {
        let written = fs::write(format!("/proc/sys/{setting}"), value);
        match written {
            // A kernel without version 6 has nothing to switch off.
            Err(e) if e.kind() == io::ErrorKind::NotFound && setting.contains("ipv6") => {}
            written => written.map_err(|source| Error::Setting {
                index,
                setting,
                source,
            })?,
        }
    }
    Ok(())
}

fn connect(index: u32, mut inside: Route, netns: &Netns) -> Result<(), route::Error> {
    let (host, outer) = (IpAddr::V4(HOST), IpAddr::V4(address::outer(index)));
    let veth = address::veth(index);
    let mut outside = Route::open()?;
    // Of a slot that was removed while something held its namespace.
    outside.delete_link(&veth)?;
    outside.add_veth(&veth, UPLINK, netns)?;
    outside.add_address(&veth, host, 32)?;
    outside.set_up(&veth)?;
    outside.add_route((outer, 32), &veth, None)?;

    inside.set_up("lo")?;
    inside.set_mac(TAP, GATEWAY_MAC)?;
    inside.add_address(TAP, IpAddr::V4(GATEWAY), GUEST_PREFIX)?;
    inside.set_up(TAP)?;
    inside.add_address(UPLINK, outer, 32)?;
    inside.set_up(UPLINK)?;
    inside.add_route((host, 32), UPLINK, None)?;
    let everywhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    inside.add_route((everywhere, 0), UPLINK, Some(host))
}

/// Removes slot `index`, whatever there is of it.
pub fn remove(index: u32) -> Result<(), Error> {
    let unlinked = Route::open().and_then(|mut route| route.delete_link(&address::veth(index)));
    netns::delete(&address::netns(index))?;
    unlinked.map_err(|source| Error::Route { index, source })
}
