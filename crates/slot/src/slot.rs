//! One slot: made, given a policy, removed.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use forkd_host::net::netns::{self, Netns};
use forkd_host::net::nft;
use forkd_host::net::route::{self, Route};
use forkd_host::net::settings::Settings;
use forkd_host::net::tap;
use ipnet::IpNet;

use crate::address::{
    self, GATEWAY, GATEWAY_MAC, GATEWAY6, GUEST_PREFIX, GUEST6, HOST, HOST_MAC, HOST6, TAP, UPLINK,
};
use crate::host::Ways;
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
    #[error(
        "cannot set /proc/sys/net/{OF_V6}/{setting} in slot {index}; in a container /proc/sys must be writable"
    )]
    Setting {
        /// The slot.
        index: u32,
        /// The file in the directory of settings of version 6.
        setting: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It was made ahead, but a guest has been there.
    #[error("slot {index} has been used by somebody else")]
    Used {
        /// The slot.
        index: u32,
    },
    /// Its device cannot be left for others, or taken over from them.
    #[error("cannot hand over the device of slot {index}")]
    HandOver {
        /// The slot.
        index: u32,
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

impl Error {
    /// Whether there is a namespace of this number already, which then is not ours.
    pub fn is_taken(&self) -> bool {
        matches!(self, Self::Netns(netns::Error::Exists { .. }))
    }
}

/// A prepared network of one guest. [`Slot::remove`] takes it away; dropping it leaves it there.
#[derive(Debug)]
pub struct Slot {
    index: u32,
    netns: Netns,
    /// None where the VM alone has it: after a restart of whoever made the slot, and when it opens it itself.
    tap: Mutex<Option<OwnedFd>>,
    names: Option<NameSockets>,
    generation: AtomicU32,
    ways: Ways,
}

/// Where the guest asks for names: sockets in the slot's namespace.
#[derive(Debug)]
pub struct NameSockets {
    /// For most questions.
    pub udp: UdpSocket,
    /// For long answers.
    pub tcp: TcpListener,
}

/// Where a namespace's settings of version 6 are.
const OF_V6: &str = "ipv6/conf";
/// Those of a slot without version 6.
const WITHOUT_V6: [(&str, &str); 2] = [("all/disable_ipv6", "1"), ("default/disable_ipv6", "1")];
/// Those of a slot with version 6. It takes no advice from routers, and does not wait for others to object to addresses
/// that nobody else can have.
const WITH_V6: [(&str, &str); 6] = [
    ("all/disable_ipv6", "0"),
    ("default/disable_ipv6", "0"),
    ("all/forwarding", "1"),
    ("default/accept_ra", "0"),
    ("default/accept_redirects", "0"),
    ("default/accept_dad", "0"),
];

/// The generation of a slot's first rules. Zero is what connections bear that nobody permitted.
const FIRST: u32 = 1;

impl Slot {
    /// Makes slot `index` with the default policy; nothing of this number may exist. What was made of it is removed
    /// again when a step fails.
    pub fn make(index: u32, refused: &[IpNet], ways: Ways) -> Result<Self, Error> {
        let made = Self::build(index, refused, ways).and_then(|mut slot| {
            slot.bind_names()?;
            Ok(slot)
        });
        if made.as_ref().is_err_and(|e| !e.is_taken()) {
            // The error that led here is the one to tell; the sweep of the next start takes what is left.
            let _ = remove(index);
        }
        made
    }

    /// Makes slot `index` as [`Slot::make`] does, but for the names, and leaves it behind, complete with its device, for
    /// whoever [takes](Slot::take_ready) it.
    pub fn make_ready(index: u32, ways: Ways) -> Result<(), Error> {
        let made = Self::build(index, &[], ways).and_then(Slot::leave);
        if made.as_ref().is_err_and(|e| !e.is_taken()) {
            // As above.
            let _ = remove(index);
        }
        made
    }

    fn build(index: u32, refused: &[IpNet], ways: Ways) -> Result<Self, Error> {
        let rules = rules::new_slot(index, &Policy::default(), refused, FIRST);
        // Rules first: not for an instant does anything pass without them.
        let (netns, made) = Netns::create_with(&address::netns(index), || {
            settle(index, ways)?;
            let ruled = nft::apply(&rules);
            ruled.map_err(|source| Error::Rules { index, source })?;
            let route = Route::open().map_err(|source| Error::Route { index, source })?;
            Ok::<_, Error>((route, tap::open(TAP)?))
        })?;
        let (route, tap) = made?;
        connect(index, route, &netns, ways).map_err(|source| Error::Route { index, source })?;
        Ok(Self {
            index,
            netns,
            tap: Mutex::new(Some(tap)),
            names: None,
            generation: AtomicU32::new(FIRST),
            ways,
        })
    }

    /// Lets go of it, and leaves its device there.
    pub(crate) fn leave(self) -> Result<(), Error> {
        let index = self.index;
        self.let_go_of_tap()
            .map(drop)
            .map_err(|source| Error::HandOver { index, source })
    }

    /// Takes a slot that was left ready; `None` when it is gone. Its rules are made anew, and it must be unused: nobody
    /// has its device, and no guest ever sent anything.
    pub fn take_ready(index: u32, refused: &[IpNet], ways: Ways) -> Result<Option<Self>, Error> {
        let Some(netns) = Netns::open(&address::netns(index))? else {
            return Ok(None);
        };
        let (tap, has) = netns.enter(|| match frames_received(TAP)? {
            0 => Ok((tap::open(TAP)?, ways_here())),
            _ => Err(Error::Used { index }),
        })??;
        tap::keep(&tap, false).map_err(|source| Error::HandOver { index, source })?;
        let mut slot = Self {
            index,
            netns,
            tap: Mutex::new(Some(tap)),
            names: None,
            generation: AtomicU32::new(FIRST),
            ways: Ways {
                v6: has.v6 && ways.v6,
            },
        };
        slot.apply(&Policy::default(), refused)?;
        slot.bind_names()?;
        Ok(Some(slot))
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
        let ways = netns.enter(ways_here)?;
        Ok(Some(Self {
            index,
            netns,
            tap: Mutex::new(None),
            names: None,
            generation: AtomicU32::new(generation),
            ways,
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

    /// The ways out that its guest has.
    pub fn ways(&self) -> Ways {
        self.ways
    }

    /// The name of its namespace.
    pub fn netns(&self) -> &str {
        self.netns.name()
    }

    /// The guest's device, for a VM to use: a duplicate, because the device goes with the last of them.
    pub fn tap(&self) -> io::Result<OwnedFd> {
        let tap = self.tap.lock().unwrap_or_else(PoisonError::into_inner);
        let tap = tap.as_ref().ok_or(io::ErrorKind::NotFound)?;
        tap.as_fd().try_clone_to_owned()
    }

    /// Lets go of the guest's device, which stays, so that a VM can open it by the name that is answered. It is in
    /// the slot's namespace.
    pub fn let_go_of_tap(&self) -> io::Result<&'static str> {
        let mut tap = self.tap.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = tap.as_ref() {
            tap::keep(open, true)?;
            *tap = None;
        }
        Ok(TAP)
    }

    /// Its namespace, for a VM to run in.
    pub fn namespace(&self) -> io::Result<OwnedFd> {
        self.netns.as_fd().try_clone_to_owned()
    }

    /// The sockets to answer names on; given once.
    pub fn take_names(&mut self) -> Option<NameSockets> {
        self.names.take()
    }

    /// Puts a policy into force, in place of the one before, at once and as a whole. Connections that were allowed
    /// and are no more end.
    pub fn apply(&self, policy: &Policy, refused: &[IpNet]) -> Result<(), Error> {
        let generation = self
            .generation
            .fetch_add(1, Ordering::Relaxed)
            .wrapping_add(1)
            .max(FIRST);
        let rules = rules::slot(self.index, policy, refused, generation);
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

/// How many frames a device of this thread's namespace has received.
fn frames_received(device: &str) -> Result<u64, Error> {
    let table = fs::read_to_string("/proc/thread-self/net/dev");
    let frames = |table: String| {
        let of_device = |line: &str| {
            let (name, numbers) = line.split_once(':')?;
            // Bytes come first.
            (name.trim() == device).then_some(numbers.split_whitespace().nth(1)?.parse().ok()?)
        };
        table.lines().find_map(of_device)
    };
    let missing = || {
        Error::Tap(tap::Error::Make {
            name: device.to_owned(),
            source: io::ErrorKind::NotFound.into(),
        })
    };
    table.ok().and_then(frames).ok_or_else(missing)
}

/// Who uses a slot now, whether or not anybody knows of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// A process runs as the slot's user.
    Process(u32),
    /// A process holds the guest's device.
    Device,
}

/// Who uses a slot now. `processes` are those of [`address::user`]s.
pub fn user_of(index: u32, processes: &BTreeMap<u32, u32>) -> Result<Option<User>, Error> {
    if let Some(pid) = processes.get(&address::user(index)) {
        return Ok(Some(User::Process(*pid)));
    }
    let Some(netns) = Netns::open(&address::netns(index))? else {
        return Ok(None);
    };
    let is_held = netns.enter(|| -> Result<bool, Error> {
        let links = Route::open().and_then(|mut route| route.links());
        let links = links.map_err(|source| Error::Route { index, source })?;
        if !links.iter().any(|link| link.name == TAP) {
            return Ok(false);
        }
        match tap::open(TAP) {
            Err(e) if e.is_in_use() => Ok(true),
            opened => Ok(opened.map(|_| false)?),
        }
    });
    match is_held {
        Ok(held) => Ok(held?.then_some(User::Device)),
        // A name that a crash left without a namespace.
        Err(netns::Error::Step { .. }) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// The ways out of the slot whose namespace this thread is in.
fn ways_here() -> Ways {
    let off = fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6");
    Ways {
        v6: off.is_ok_and(|off| off.trim() == "0"),
    }
}

fn settle(index: u32, ways: Ways) -> Result<(), Error> {
    let failed = |setting| {
        move |source| Error::Setting {
            index,
            setting,
            source,
        }
    };
    let settings = match Settings::open(OF_V6) {
        // A kernel without version 6 has nothing to switch off.
        Err(e) if e.kind() == io::ErrorKind::NotFound && !ways.v6 => return Ok(()),
        opened => opened.map_err(failed(""))?,
    };
    let values: &[_] = if ways.v6 { &WITH_V6 } else { &WITHOUT_V6 };
    for (setting, value) in values {
        let written = settings.write(setting, value);
        written.map_err(failed(setting))?;
    }
    Ok(())
}

/// Keeps version 6 from the host's end of a slot that has none: every address and route of it would make each change of
/// any device take longer.
fn without_v6(veth: &str) {
    let off = Settings::open(OF_V6)
        .and_then(|settings| settings.write(&format!("{veth}/disable_ipv6"), "1"));
    // Then it only takes longer.
    let _ = off;
}

/// Connects a slot to the host. Both ends are told of each other: nobody asks, no neighbour counts against the kernel's
/// limit of those that it found itself, and the host's end needs no address. Every address and route of version 6 there
/// would make each removal of any device longer.
fn connect(index: u32, mut inside: Route, netns: &Netns, ways: Ways) -> Result<(), route::Error> {
    let (host, outer) = (IpAddr::V4(HOST), IpAddr::V4(address::outer(index)));
    let (veth, mac) = (address::veth(index), address::outer_mac(index));
    let mut outside = Route::open()?;
    // Of a slot that was removed while something held its namespace.
    outside.delete_link(&veth)?;
    outside.add_pair((&veth, Some(HOST_MAC)), (UPLINK, Some(mac)), netns)?;
    match ways.v6 {
        true => outside.no_link_local(&veth)?,
        false => without_v6(&veth),
    }
    outside.set_up(&veth)?;
    outside.add_route((outer, 32), &veth, None)?;
    outside.add_neighbour(outer, mac, &veth)?;

    inside.set_up("lo")?;
    inside.set_mac(TAP, GATEWAY_MAC)?;
    inside.add_address(TAP, IpAddr::V4(GATEWAY), GUEST_PREFIX)?;
    inside.set_up(TAP)?;
    inside.forward(TAP)?;
    inside.add_address(UPLINK, outer, 32)?;
    inside.set_up(UPLINK)?;
    inside.forward(UPLINK)?;
    inside.add_neighbour(host, HOST_MAC, UPLINK)?;
    inside.add_route((host, 32), UPLINK, None)?;
    let everywhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    inside.add_route((everywhere, 0), UPLINK, Some(host))?;
    if ways.v6 {
        connect6(index, &mut inside, &mut outside)?;
    }
    Ok(())
}

/// Every address stands alone, so that nobody is looked for but the guest.
fn connect6(index: u32, inside: &mut Route, outside: &mut Route) -> Result<(), route::Error> {
    let (host, outer) = (IpAddr::V6(HOST6), IpAddr::V6(address::outer6(index)));
    let (veth, mac) = (address::veth(index), address::outer_mac(index));
    outside.add_route((outer, 128), &veth, None)?;
    outside.add_neighbour(outer, mac, &veth)?;
    inside.add_address(TAP, IpAddr::V6(GATEWAY6), 128)?;
    inside.add_route((IpAddr::V6(GUEST6), 128), TAP, None)?;
    inside.add_address(UPLINK, outer, 128)?;
    inside.add_neighbour(host, HOST_MAC, UPLINK)?;
    inside.add_route((host, 128), UPLINK, None)?;
    let everywhere = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    inside.add_route((everywhere, 0), UPLINK, Some(host))
}

/// Removes slot `index`, whatever there is of it.
pub fn remove(index: u32) -> Result<(), Error> {
    match remove_all(&[index]).pop() {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

/// Removes slots, whatever there is of each, and tells which of them could not be removed and why. All at once costs
/// hardly more than one: for every removal of a device the kernel waits until no processor uses it, and for a group of
/// them it waits once.
pub fn remove_all(indices: &[u32]) -> Vec<(u32, Error)> {
    let together = Route::open().and_then(|mut outside| unlink_together(&mut outside, indices));
    let mut left = Vec::new();
    for index in indices {
        let unlinked = match &together {
            Ok(()) => Ok(()),
            // One by one, then.
            Err(_) => Route::open()
                .and_then(|mut outside| outside.delete_link(&address::veth(*index)))
                .map_err(|source| Error::Route {
                    index: *index,
                    source,
                }),
        };
        let unnamed = netns::delete(&address::netns(*index)).map_err(Error::from);
        left.extend(unnamed.and(unlinked).err().map(|e| (*index, e)));
    }
    left
}

/// Deletes the devices of slots by a group that is nobody else's.
fn unlink_together(outside: &mut Route, indices: &[u32]) -> Result<(), route::Error> {
    if let [index] = indices {
        return outside.delete_link(&address::veth(*index));
    }
    let group = random_group();
    for index in indices {
        outside.set_group(&address::veth(*index), group)?;
    }
    outside.delete_group(group)
}

/// The number of a group of devices that nobody has: administrators number theirs by hand, from the low end.
fn random_group() -> u32 {
    use std::hash::{BuildHasher, RandomState};
    let random = RandomState::new().hash_one(std::process::id());
    (random >> 32) as u32 | 1 << 31
}
