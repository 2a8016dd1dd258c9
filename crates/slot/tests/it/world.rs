//! A host, the world beyond it, and guests made of nothing but a namespace.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use forkd_host::net::netns::{self, Netns};
use forkd_host::net::route::Route;
use forkd_slot::pool::{Config, Pool};
use forkd_slot::registry::Registry;
use tempfile::TempDir;

/// How long a connection may take that ought to be made, and one that ought not.
pub(crate) const SOON: Duration = Duration::from_millis(1500);

/// A host with an uplink to the world.
pub(crate) struct World {
    pub(crate) host: Netns,
    pub(crate) world: Netns,
    /// The node's own files.
    node: TempDir,
    /// Where the numbers of this host's slots are kept.
    slots: Arc<TempDir>,
}

/// The host's address in the world.
pub(crate) const HOST: &str = "192.88.99.1";
/// A machine of the world, its metadata service, somebody's private machine, a denied one.
pub(crate) const PUBLIC: &str = "93.184.215.14";
pub(crate) const OTHER: &str = "93.184.215.15";
pub(crate) const METADATA: &str = "169.254.169.254";
pub(crate) const PRIVATE: &str = "10.7.0.1";
/// The same of version 6, and addresses that hold one of version 4 or are no address of a machine.
pub(crate) const HOST6: &str = "2a00:5::1";
pub(crate) const PUBLIC6: &str = "2606:2800:220:1::14";
pub(crate) const OTHER6: &str = "2606:2800:220:1::15";
pub(crate) const METADATA6: &str = "fd00:ec2::254";
pub(crate) const PRIVATE6: &str = "fd12:3456::1";
pub(crate) const NAT64: &str = "64:ff9b::a07:1";
pub(crate) const SIX_TO_FOUR: &str = "2002:a07:1::1";
pub(crate) const TEREDO: &str = "2001:0:a07:1::1";
pub(crate) const DOCUMENTATION: &str = "2001:db8::1";
const WORLD: [&str; 4] = [PUBLIC, OTHER, METADATA, PRIVATE];
pub(crate) const WORLD6: [&str; 8] = [
    PUBLIC6,
    OTHER6,
    METADATA6,
    PRIVATE6,
    NAT64,
    SIX_TO_FOUR,
    TEREDO,
    DOCUMENTATION,
];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Has addresses of version 6 count at once: nobody objects.
fn at_once(netns: &Netns) {
    let write = || std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0");
    netns.enter(write).unwrap().unwrap();
}

impl World {
    pub(crate) fn new() -> World {
        World::with(Arc::new(tempfile::tempdir().unwrap()), true)
    }

    /// A host whose world has version 4 alone.
    pub(crate) fn without_v6() -> World {
        World::with(Arc::new(tempfile::tempdir().unwrap()), false)
    }

    /// Another node of the same host.
    pub(crate) fn beside(other: &World) -> World {
        World::with(Arc::clone(&other.slots), true)
    }

    fn with(slots: Arc<TempDir>, v6: bool) -> World {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "forkd-test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let make = |what: &str| {
            Netns::create(&format!("{name}-{what}"))
                .expect("these tests need root and network namespaces")
        };
        let (host, world) = (make("host"), make("world"));
        for netns in [&host, &world] {
            at_once(netns);
        }
        let mut here = host.enter(Route::open).unwrap().unwrap();
        let mut there = world.enter(Route::open).unwrap().unwrap();
        here.add_veth("uplink0", "eth0", &world).unwrap();
        for (route, link) in [(&mut here, "uplink0"), (&mut there, "eth0")] {
            route.set_up("lo").unwrap();
            route.set_up(link).unwrap();
        }
        here.add_address("uplink0", ip(HOST), 24).unwrap();
        let everything = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        here.add_route(everything, "uplink0", Some(ip("192.88.99.2")))
            .unwrap();
        there.add_address("eth0", ip("192.88.99.2"), 24).unwrap();
        for address in WORLD {
            there.add_address("eth0", ip(address), 32).unwrap();
        }
        if v6 {
            here.add_address("uplink0", ip(HOST6), 64).unwrap();
            there.add_address("eth0", ip("2a00:5::2"), 64).unwrap();
            for address in WORLD6 {
                there.add_address("eth0", ip(address), 128).unwrap();
            }
            here.add_route((ip("::"), 0), "uplink0", Some(ip("2a00:5::2")))
                .unwrap();
        }
        host.enter(forkd_slot::host::prepare).unwrap().unwrap();
        let node = tempfile::tempdir().unwrap();
        std::fs::write(node.path().join("state.db"), "").unwrap();
        World {
            host,
            world,
            node,
            slots,
        }
    }

    /// The directory of the registry.
    pub(crate) fn slots(&self) -> &Path {
        self.slots.path()
    }

    /// The file whose loss ends the node for good.
    pub(crate) fn state(&self) -> PathBuf {
        self.node.path().join("state.db")
    }

    pub(crate) fn registry(&self) -> Registry {
        Registry::open(self.slots(), self.state().to_str().unwrap()).unwrap()
    }

    /// A pool on this host; its threads stay there.
    pub(crate) fn pool(&self, ready: u32, max: u32, in_use: &[u32]) -> Pool {
        let config = Config {
            registry: self.registry(),
            ready,
            max,
            refused: vec![],
        };
        self.host
            .enter(|| Pool::open(config, in_use))
            .unwrap()
            .unwrap()
    }

    /// Answers connections there with a word.
    pub(crate) fn listen(&self, netns: &Netns, address: &str, port: u16) {
        let to = SocketAddr::new(ip(address), port);
        let listener = netns.enter(|| TcpListener::bind(to)).unwrap().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                std::thread::spawn(move || {
                    let mut byte = [0];
                    while stream.read(&mut byte).is_ok_and(|n| n > 0)
                        && stream.write_all(&byte).is_ok()
                    {}
                });
            }
        });
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let registry = self.registry();
        let own = registry.ours().unwrap();
        // With the last node of the host goes whatever waits for any.
        let all = match Arc::strong_count(&self.slots) {
            1 => registry.claims().unwrap().iter().map(|c| c.index).collect(),
            _ => own,
        };
        for index in all {
            forkd_slot::slot::remove(index).unwrap();
            registry.release(index).unwrap();
        }
        for netns in [&self.host, &self.world] {
            netns::delete(netns.name()).unwrap();
        }
    }
}

/// A guest in place of a VM: a namespace whose device is bridged to the slot's tap by a thread that copies frames.
pub(crate) struct Guest {
    netns: Netns,
}

impl Guest {
    /// Connects a guest to a slot's tap.
    pub(crate) fn on(slot: &forkd_slot::slot::Slot) -> Guest {
        let name = format!("forkd-test-guest-{}-{}", std::process::id(), slot.index());
        let netns = Netns::create(&name).unwrap();
        at_once(&netns);
        let card = netns
            .enter(|| forkd_host::net::tap::open("eth0"))
            .unwrap()
            .unwrap();
        let mut route = netns.enter(Route::open).unwrap().unwrap();
        route.set_up("lo").unwrap();
        route
            .add_address("eth0", forkd_slot::address::GUEST.into(), 24)
            .unwrap();
        route.set_up("eth0").unwrap();
        let everything = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        route
            .add_route(
                everything,
                "eth0",
                Some(forkd_slot::address::GATEWAY.into()),
            )
            .unwrap();
        if slot.ways().v6 {
            use forkd_slot::address::{GATEWAY6, GUEST_PREFIX6, GUEST6};
            route
                .add_address("eth0", GUEST6.into(), GUEST_PREFIX6)
                .unwrap();
            route
                .add_route((ip("::"), 0), "eth0", Some(GATEWAY6.into()))
                .unwrap();
        }
        let tap = std::fs::File::from(slot.tap().unwrap());
        let card = std::fs::File::from(card);
        for (mut from, mut to) in [
            (tap.try_clone().unwrap(), card.try_clone().unwrap()),
            (card, tap),
        ] {
            std::thread::spawn(move || {
                let mut frame = vec![0; 70_000];
                while let Ok(length) = from.read(&mut frame) {
                    // A frame that the other side does not take is lost, as on a wire.
                    let _ = to.write(&frame[..length]);
                }
            });
        }
        Guest { netns }
    }

    pub(crate) fn connect(&self, address: &str, port: u16) -> Option<TcpStream> {
        let to = SocketAddr::new(ip(address), port);
        let stream = self
            .netns
            .enter(|| TcpStream::connect_timeout(&to, SOON))
            .unwrap()
            .ok()?;
        stream.set_read_timeout(Some(SOON)).unwrap();
        Some(stream)
    }

    /// Whether a word comes back from there.
    pub(crate) fn reaches(&self, address: &str, port: u16) -> bool {
        self.connect(address, port)
            .is_some_and(|mut stream| echoes(&mut stream))
    }

    pub(crate) fn netns(&self) -> &Netns {
        &self.netns
    }

    pub(crate) fn udp(&self) -> UdpSocket {
        self.netns
            .enter(|| UdpSocket::bind("0.0.0.0:0"))
            .unwrap()
            .unwrap()
    }
}

/// Whether a connection still carries a word there and back.
pub(crate) fn echoes(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    stream.write_all(b"x").is_ok() && stream.read_exact(&mut byte).is_ok() && byte == *b"x"
}

impl Drop for Guest {
    fn drop(&mut self) {
        netns::delete(self.netns.name()).unwrap();
    }
}
