//! What real guests reach: a host of the test's own, and a world beyond it.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};

use forkd_host::net::netns::{self, Netns};
use forkd_host::net::route::Route;
use serde_json::Value;

use super::world::{Daemon, World};

const HOST: &str = "192.88.99.1";
const PUBLIC: &str = "93.184.215.14";
const OTHER: &str = "93.184.215.15";
const METADATA: &str = "169.254.169.254";
const PRIVATE: &str = "10.7.0.1";
const HOST6: &str = "2a00:5::1";
const PUBLIC6: &str = "2606:2800:220:1::14";
const PRIVATE6: &str = "fd12:3456::1";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Two namespaces: the node's, and the world's with a few machines and the name servers of this host.
struct Nets {
    host: Netns,
    world: Netns,
}

impl Nets {
    fn new() -> Nets {
        let make =
            |what: &str| Netns::create(&format!("fkt-{}-{what}", std::process::id())).unwrap();
        let (host, world) = (make("host"), make("world"));
        for netns in [&host, &world] {
            // Addresses of version 6 count at once: nobody objects.
            let write = || std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0");
            netns.enter(write).unwrap().unwrap();
        }
        let mut here = host.enter(Route::open).unwrap().unwrap();
        let mut there = world.enter(Route::open).unwrap().unwrap();
        here.add_veth("uplink0", "eth0", &world).unwrap();
        for (route, link) in [(&mut here, "uplink0"), (&mut there, "eth0")] {
            route.set_up("lo").unwrap();
            route.set_up(link).unwrap();
        }
        here.add_address("uplink0", ip(HOST), 24).unwrap();
        here.add_route((ip("0.0.0.0"), 0), "uplink0", Some(ip("192.88.99.2")))
            .unwrap();
        there.add_address("eth0", ip("192.88.99.2"), 24).unwrap();
        for address in [PUBLIC, OTHER, METADATA, PRIVATE] {
            there.add_address("eth0", ip(address), 32).unwrap();
            echo(&world, (ip(address), 80).into());
        }
        here.add_address("uplink0", ip(HOST6), 64).unwrap();
        there.add_address("eth0", ip("2a00:5::2"), 64).unwrap();
        here.add_route((ip("::"), 0), "uplink0", Some(ip("2a00:5::2")))
            .unwrap();
        for address in [PUBLIC6, PRIVATE6] {
            there.add_address("eth0", ip(address), 128).unwrap();
            echo(&world, (ip(address), 80).into());
        }
        let nets = Nets { host, world };
        nets.serve_names(&mut there);
        nets
    }

    /// Answers every question for a name, where this host's own name servers would be.
    fn serve_names(&self, there: &mut Route) {
        let text = std::fs::read_to_string("/etc/resolv.conf").unwrap();
        let servers = text
            .lines()
            .filter_map(|line| line.strip_prefix("nameserver "));
        for server in servers.filter_map(|text| text.trim().parse::<IpAddr>().ok()) {
            let netns = if server.is_loopback() {
                &self.host
            } else {
                &self.world
            };
            if !server.is_loopback() {
                let whole = if server.is_ipv4() { 32 } else { 128 };
                there.add_address("eth0", server, whole).unwrap();
            }
            let socket = netns
                .enter(|| UdpSocket::bind((server, 53)))
                .unwrap()
                .unwrap();
            std::thread::spawn(move || {
                let mut query = [0; 512];
                while let Ok((length, from)) = socket.recv_from(&mut query) {
                    let _ = socket.send_to(&answer(&query[..length]), from);
                }
            });
        }
    }
}

impl Drop for Nets {
    fn drop(&mut self) {
        for netns in [&self.host, &self.world] {
            netns::delete(netns.name()).unwrap();
        }
    }
}

/// The answer to a query for an address: OTHER, for five seconds; to any other query, none. RFC 1035 §4.1.
fn answer(query: &[u8]) -> Vec<u8> {
    let name = query[12..].iter().position(|byte| *byte == 0).unwrap();
    let question = &query[12..12 + name + 5];
    let is_address = question[name + 1..name + 3] == [0, 1];
    let mut answer = query[..2].to_vec();
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
    answer.extend(question);
    if is_address {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4]);
        answer.extend([93, 184, 215, 15]);
    }
    answer
}

/// Sends back what is sent there.
fn echo(netns: &Netns, to: SocketAddr) {
    let listener = netns.enter(|| TcpListener::bind(to)).unwrap().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut bytes = [0; 64];
                while let Ok(length @ 1..) = stream.read(&mut bytes) {
                    let _ = stream.write_all(&bytes[..length]);
                }
            });
        }
    });
}

/// Which of these a guest reaches, by what comes back.
fn reached(world: &World, daemon: &Daemon, id: &str, hosts: &[&str]) -> Vec<String> {
    let code = format!(
        "import socket, threading\n\
         reached = []\n\
         def attempt(host):\n\
         \x20   try:\n\
         \x20       with socket.create_connection((host, 80), 6) as s:\n\
         \x20           s.sendall(b'x')\n\
         \x20           if s.recv(1) == b'x': reached.append(host)\n\
         \x20   except OSError: pass\n\
         threads = [threading.Thread(target=attempt, args=(host,)) for host in {hosts:?}]\n\
         for t in threads: t.start()\n\
         for t in threads: t.join()\n\
         ' '.join(host for host in {hosts:?} if host in reached)"
    );
    let said = daemon.run(world, ["eval", id, "--", &code]).ok();
    let said = said.trim().trim_matches('\'');
    said.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn guests_reach_what_they_may_through_forks_branches_and_restarts() {
    let Some(world) = World::seeded() else { return };
    let nets = Nets::new();
    let host = Netns::open(nets.host.name()).unwrap().unwrap();
    // Whatever is started in here is started on the test's own host.
    host.enter(|| a_day_on_the_network(&world)).unwrap();
    world.assert_clean(&["seed"]);
}

fn a_day_on_the_network(world: &World) {
    let daemon = world.serve_networked();
    let ids = daemon.fork(world, "seed", 2);
    let (one, two) = (ids[0].as_str(), ids[1].as_str());
    let list: Value = serde_json::from_str(&daemon.run(world, ["ls", "--json"]).ok()).unwrap();
    let next_door = list[1]["network_address"].as_str().unwrap().to_owned();
    assert!(
        list[0]["netns"]
            .as_str()
            .unwrap()
            .starts_with("forkd-child-"),
        "{list}"
    );
    let everything = [
        PUBLIC,
        OTHER,
        METADATA,
        PRIVATE,
        HOST,
        "10.43.0.1",
        next_door.as_str(),
        PUBLIC6,
        PRIVATE6,
        HOST6,
        "some.example.com",
    ];
    assert_eq!(
        reached(world, &daemon, one, &everything),
        [PUBLIC, OTHER, PUBLIC6, "some.example.com"],
        "with the default"
    );

    daemon
        .run(
            world,
            [
                "network",
                one,
                "--deny",
                "all",
                "--allow",
                "*.example.com:80",
                "--allow",
                PRIVATE,
                "--allow",
                PRIVATE6,
            ],
        )
        .ok();
    assert_eq!(
        reached(
            world,
            &daemon,
            one,
            &[
                PUBLIC,
                PRIVATE,
                METADATA,
                PUBLIC6,
                PRIVATE6,
                "other.example.net"
            ]
        ),
        [PRIVATE, PRIVATE6],
        "with a list"
    );
    assert_eq!(
        reached(world, &daemon, one, &["some.example.com", OTHER]),
        ["some.example.com", OTHER]
    );
    assert_eq!(
        reached(world, &daemon, two, &[PUBLIC, OTHER]),
        [PUBLIC, OTHER],
        "the neighbour"
    );
    daemon
        .run(world, ["network", one, "--allow", "10.0.0.0/33"])
        .fails(1, &["10.0.0.0/33", "is no rule"]);

    let none = daemon
        .run(world, ["fork", "--tag", "seed", "--net", "none"])
        .ok();
    assert_eq!(
        reached(world, &daemon, none.trim(), &[PUBLIC, "10.42.0.1"]),
        Vec::<String>::new()
    );

    daemon.kill_hard();
    let daemon = world.serve_networked();
    let shown = daemon.run(world, ["network", one]).ok();
    assert!(shown.contains("deny all"), "{shown}");
    assert_eq!(
        reached(world, &daemon, one, &[PUBLIC, PRIVATE, PUBLIC6, PRIVATE6]),
        [PRIVATE, PRIVATE6],
        "after a restart"
    );
    assert_eq!(
        reached(world, &daemon, two, &[PUBLIC, PUBLIC6]),
        [PUBLIC, PUBLIC6],
        "after a restart"
    );

    let open = "import socket; inherited = socket.create_connection(('93.184.215.14', 80), 6)";
    daemon.run(world, ["eval", two, "--", open]).ok();
    let tag = daemon.run(world, ["branch", two]).ok();
    let branched = daemon.fork(world, tag.trim(), 1);
    assert_eq!(
        reached(world, &daemon, &branched[0], &[PUBLIC, PUBLIC6]),
        [PUBLIC, PUBLIC6],
        "in a branch"
    );
    let talk = "inherited.settimeout(6); inherited.sendall(b'x'); inherited.recv(1)";
    assert!(
        daemon
            .run(world, ["eval", two, "--", talk])
            .ok()
            .contains("b'x'"),
        "the parent's connection goes on"
    );
    let said = daemon.run(world, ["eval", &branched[0], "--", talk]);
    assert_ne!(said.code, Some(0), "a connection was inherited: {said:#?}");

    daemon.run(world, ["kill", "--all"]).ok();
    daemon.run(world, ["rmi", tag.trim()]).ok();
    daemon.stop();
}
