//! Who reaches whom.

use std::io::Write;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use forkd_slot::address::{GATEWAY_MAC, GATEWAY6, GUEST, GUEST6, TAP};
use forkd_slot::policy::{Mode, Policy};

use crate::world::{
    DOCUMENTATION, Guest, HOST, HOST6, METADATA, METADATA6, NAT64, OTHER, OTHER6, PRIVATE,
    PRIVATE6, PUBLIC, PUBLIC6, SIX_TO_FOUR, SOON, TEREDO, WORLD6, World, echoes,
};

fn policy(allow: &[&str], deny: &[&str]) -> Policy {
    let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    Policy::new(Mode::Nat, rules(allow), rules(deny)).unwrap()
}

/// A row: whom, at which port, and whether it is reached under each policy.
type Row<'a, const N: usize> = (&'a str, u16, [bool; N]);

/// Puts each policy into force and tries every row of the matrix.
fn try_all<const N: usize>(
    slot: &forkd_slot::slot::Slot,
    guest: &Guest,
    policies: &[Policy; N],
    matrix: &[Row<'_, N>],
) {
    for (column, policy) in policies.iter().enumerate() {
        slot.apply(policy, &[]).unwrap();
        std::thread::scope(|scope| {
            for (address, port, expected) in matrix {
                let expected = expected[column];
                scope.spawn(move || {
                    assert_eq!(
                        guest.reaches(address, *port),
                        expected,
                        "{address}:{port} under {policy:?}"
                    );
                });
            }
        });
    }
}

#[test]
fn the_matrix_of_who_reaches_whom() {
    let world = World::new();
    for address in [PUBLIC, OTHER, METADATA, PRIVATE] {
        for port in [80, 443] {
            world.listen(&world.world, address, port);
        }
    }
    world.listen(&world.host, "0.0.0.0", 8889);
    let pool = world.pool(2, 4, &[]);
    let (slot, neighbour) = (
        pool.lease(SOON * 10).unwrap(),
        pool.lease(SOON * 10).unwrap(),
    );
    let (guest, other) = (Guest::on(&slot), Guest::on(&neighbour));
    let next_door = forkd_slot::address::outer(neighbour.index()).to_string();

    // Reached with: the default, everything allowed, a list, some denied, no network.
    let matrix = [
        (PUBLIC, 80, [true, true, true, false, false]),
        (PUBLIC, 443, [true, true, false, false, false]),
        (OTHER, 443, [true, true, false, true, false]),
        (OTHER, 80, [true, true, false, false, false]),
        (PRIVATE, 80, [false, true, true, false, false]),
        (METADATA, 80, [false; 5]),
        (HOST, 8889, [false; 5]),
        ("10.43.0.1", 8889, [false; 5]),
        (next_door.as_str(), 80, [false; 5]),
        ("10.42.0.1", 80, [false; 5]),
    ];
    let policies = [
        Policy::default(),
        policy(&["all", "169.254.169.254", "10.43.0.0/16"], &[]),
        policy(&["93.184.215.14:80", "10.7.0.0/16"], &["all"]),
        policy(&[], &["93.184.215.14", "all:80"]),
        Policy::NONE,
    ];
    try_all(&slot, &guest, &policies, &matrix);
    assert!(
        other.reaches(PUBLIC, 443),
        "the neighbour's network is not its own"
    );
}

#[test]
fn the_matrix_of_version_6() {
    let world = World::new();
    for address in WORLD6 {
        for port in [80, 443] {
            world.listen(&world.world, address, port);
        }
    }
    world.listen(&world.host, "::", 8889);
    let pool = world.pool(2, 4, &[]);
    let (slot, neighbour) = (
        pool.lease(SOON * 10).unwrap(),
        pool.lease(SOON * 10).unwrap(),
    );
    let (guest, other) = (Guest::on(&slot), Guest::on(&neighbour));
    world.listen(other.netns(), "::", 80);
    let next_door = forkd_slot::address::outer6(neighbour.index()).to_string();
    let (gateway, host) = (GATEWAY6.to_string(), forkd_slot::address::HOST6.to_string());
    // They answer others: what is not reached below is refused, not absent.
    let from_host = |address: &str, port| {
        let to = SocketAddr::new(address.parse().unwrap(), port);
        let connect = || TcpStream::connect_timeout(&to, SOON);
        world.host.enter(connect).unwrap().is_ok()
    };
    assert!(WORLD6.iter().all(|address| from_host(address, 443)));
    assert!(from_host(HOST6, 8889));

    // Reached with: the default, everything allowed, a list, some denied, no network.
    let matrix = [
        (PUBLIC6, 80, [true, true, true, false, false]),
        (PUBLIC6, 443, [true, true, false, false, false]),
        (OTHER6, 443, [true, true, false, true, false]),
        (OTHER6, 80, [true, true, false, false, false]),
        (PRIVATE6, 80, [false, true, true, false, false]),
        (DOCUMENTATION, 443, [false, true, false, false, false]),
        (METADATA6, 80, [false; 5]),
        (NAT64, 80, [false; 5]),
        (SIX_TO_FOUR, 80, [false; 5]),
        (TEREDO, 80, [false; 5]),
        (HOST6, 8889, [false; 5]),
        (&host, 8889, [false; 5]),
        (&next_door, 80, [false; 5]),
        (&gateway, 80, [false; 5]),
    ];
    let policies = [
        Policy::default(),
        policy(
            &[
                "all",
                METADATA6,
                "fd66:6f72:6b64::/48",
                "64:ff9b::/96",
                "2002::/16",
                "2001::/32",
                HOST6,
            ],
            &[],
        ),
        policy(&["[2606:2800:220:1::14]:80", "fd12::/16"], &["all"]),
        policy(&[], &[PUBLIC6, "all:80"]),
        Policy::NONE,
    ];
    try_all(&slot, &guest, &policies, &matrix);
    assert!(
        other.reaches(PUBLIC6, 443),
        "the neighbour's network is not its own"
    );
    // A cluster's network of version 6.
    let cluster = ["2606:2800:220:1::15/128".parse().unwrap()];
    slot.apply(&Policy::default(), &cluster).unwrap();
    assert!(guest.reaches(PUBLIC6, 443) && !guest.reaches(OTHER6, 443));
}

#[test]
fn without_a_way_out_of_version_6_there_is_version_4_alone() {
    let world = World::without_v6();
    world.listen(&world.world, PUBLIC, 80);
    let pool = world.pool(1, 2, &[]);
    let slot = pool.lease(SOON * 10).unwrap();
    assert!(!slot.ways().v6);
    let routes = || std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap();
    let inside = forkd_host::net::netns::Netns::open(slot.netns());
    let addresses = inside.unwrap().unwrap().enter(routes).unwrap();
    assert_eq!(addresses, "");
    assert!(Guest::on(&slot).reaches(PUBLIC, 80));
    let forwards = || std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/forwarding").unwrap();
    assert_eq!(world.host.enter(forwards).unwrap().trim(), "0");
}

#[test]
fn a_policy_ends_connections_that_it_no_longer_allows_and_keeps_the_others() {
    let world = World::new();
    for address in [PUBLIC, OTHER, PUBLIC6, OTHER6] {
        world.listen(&world.world, address, 80);
    }
    let pool = world.pool(1, 2, &[]);
    let slot = pool.lease(SOON * 10).unwrap();
    let guest = Guest::on(&slot);
    let mut kept = [PUBLIC, PUBLIC6].map(|address| guest.connect(address, 80).unwrap());
    let mut ended = [OTHER, OTHER6].map(|address| guest.connect(address, 80).unwrap());
    assert!(kept.iter_mut().chain(&mut ended).all(echoes));
    slot.apply(&policy(&[], &[OTHER, OTHER6]), &[]).unwrap();
    assert!(kept.iter_mut().all(echoes), "an allowed connection is gone");
    assert!(!ended.iter_mut().any(echoes), "a denied connection goes on");
}

#[test]
fn a_guest_that_lies_about_its_address_reaches_nothing() {
    let world = World::new();
    let pool = world.pool(1, 2, &[]);
    let slot = pool.lease(SOON * 10).unwrap();
    let mut tap = std::fs::File::from(slot.tap().unwrap());
    let cases: [(&str, &str, IpAddr, [&str; 4]); 2] = [
        (
            PUBLIC,
            HOST,
            GUEST.into(),
            ["10.42.0.3", "10.43.0.99", "127.0.0.1", "93.184.215.15"],
        ),
        (
            PUBLIC6,
            HOST6,
            GUEST6.into(),
            [
                "fd66:6f72:6b64:42::3",
                "fd66:6f72:6b64:43::99",
                "fe80::2",
                "2606:2800:220:1::15",
            ],
        ),
    ];
    for (to, host, honest, lies) in cases {
        let to: IpAddr = to.parse().unwrap();
        let bind = || UdpSocket::bind((to, 53));
        let listener = world.world.enter(bind).unwrap().unwrap();
        listener.set_read_timeout(Some(SOON)).unwrap();
        // What is written to the tap's file is what a VM would send.
        tap.write_all(&udp(honest, to)).unwrap();
        let mut word = [0; 16];
        let (length, from) = listener.recv_from(&mut word).unwrap();
        assert_eq!(&word[..length], b"lie!");
        assert_eq!(from.ip().to_string(), host, "the world sees the host alone");
        for source in lies {
            tap.write_all(&udp(source.parse().unwrap(), to)).unwrap();
        }
        let came = listener.recv_from(&mut word);
        assert!(came.is_err(), "a lie came through: {came:?}");
    }
}

/// linux/if_addr.h: others may still object to the address.
const IFA_F_TENTATIVE: u32 = 0x40;

#[test]
fn a_guest_is_no_router_and_few_neighbours() {
    let world = World::new();
    let pool = world.pool(1, 2, &[]);
    let slot = pool.lease(SOON * 10).unwrap();
    let mut tap = std::fs::File::from(slot.tap().unwrap());
    let inside = forkd_host::net::netns::Netns::open(slot.netns());
    let inside = inside.unwrap().unwrap();
    // Where to and through whom, without what counts users, and what the devices' own addresses bring about when they
    // come to count.
    let routes = || -> Vec<String> {
        let table = std::fs::read_to_string("/proc/thread-self/net/ipv6_route").unwrap();
        let words = table.lines().map(|line| line.split_whitespace().collect());
        let words = words.filter(|words: &Vec<&str>| !words[0].starts_with("fe80"));
        words
            .map(|words: Vec<&str>| [words[0], words[1], words[4], words[9]].join(" "))
            .collect()
    };
    // The device hears nobody before its addresses count, its own and the gateway's.
    let counts = || {
        let addresses = std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap();
        let words = addresses
            .lines()
            .map(|line| line.split_whitespace().collect());
        let of_device: Vec<Vec<&str>> = words.filter(|words: &Vec<_>| words[5] == TAP).collect();
        let flags = |words: &Vec<&str>| u32::from_str_radix(words[4], 16).unwrap();
        of_device.len() == 2
            && of_device
                .iter()
                .all(|words| flags(words) & IFA_F_TENTATIVE == 0)
    };
    let until = Instant::now() + SOON * 10;
    while !inside.enter(counts).unwrap() {
        assert!(
            Instant::now() < until,
            "the device has no address of its own"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    let before = inside.enter(routes).unwrap();
    let from = |last: u16| Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, last);
    for last in 1..=100 {
        tap.write_all(&solicitation(from(last))).unwrap();
        tap.write_all(&advertisement_of_router(from(last))).unwrap();
    }
    let neighbours = || {
        let listed = Command::new("ip")
            .args(["-6", "neigh", "show", "dev", TAP])
            .output();
        let listed = String::from_utf8(listed.unwrap().stdout).unwrap();
        listed
            .lines()
            .filter(|line| line.starts_with("fe80"))
            .count()
    };
    // The kernel takes them in one after the other, before the write returns or soon after.
    std::thread::sleep(SOON / 5);
    let known = inside.enter(neighbours).unwrap();
    assert!((1..=8).contains(&known), "{known} of 100 are known");
    assert_eq!(inside.enter(routes).unwrap(), before, "a guest gave advice");
}

/// A virtio header, then an Ethernet frame to the gateway.
fn frame(mac: [u8; 6], protocol: [u8; 2], packet: &[u8]) -> Vec<u8> {
    let source = [2, 0, 0, 0, 0, 9];
    [&[0; 10][..], &mac, &source, &protocol, packet].concat()
}

/// A UDP packet from port 7 to port 53 that says `lie!`.
fn udp(source: IpAddr, to: IpAddr) -> Vec<u8> {
    let mut datagram = vec![0, 7, 0, 53, 0, 12, 0, 0, b'l', b'i', b'e', b'!'];
    match (source, to) {
        (IpAddr::V4(source), IpAddr::V4(to)) => {
            // No checksum of its own: RFC 768.
            let mut packet = vec![0x45, 0, 0, 32, 0, 1, 0, 0, 64, 17, 0, 0];
            packet.extend(source.octets());
            packet.extend(to.octets());
            let sum = checksum(&packet);
            packet[10..12].copy_from_slice(&sum);
            packet.extend(datagram);
            frame(GATEWAY_MAC, [8, 0], &packet)
        }
        (IpAddr::V6(source), IpAddr::V6(to)) => {
            let sum = checksum6(source, to, 17, &datagram);
            datagram[6..8].copy_from_slice(&sum);
            frame(
                GATEWAY_MAC,
                [0x86, 0xdd],
                &packet6(source, to, 17, 64, &datagram),
            )
        }
        _ => unreachable!("one family at a time"),
    }
}

/// Asks who the gateway is: RFC 4861 §4.3.
fn solicitation(source: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
    message.extend(GATEWAY6.octets());
    message.extend([1, 1, 2, 0, 0, 0, 0, source.octets()[15]]);
    let to = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 1);
    icmp6([0x33, 0x33, 0xff, 0, 0, 1], source, to, message)
}

/// Offers to be everybody's router for half an hour: RFC 4861 §4.2.
fn advertisement_of_router(source: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    message.extend([1, 1, 2, 0, 0, 0, 0, 9]);
    let to = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    icmp6([0x33, 0x33, 0, 0, 0, 1], source, to, message)
}

fn icmp6(mac: [u8; 6], source: Ipv6Addr, to: Ipv6Addr, mut message: Vec<u8>) -> Vec<u8> {
    let sum = checksum6(source, to, 58, &message);
    message[2..4].copy_from_slice(&sum);
    frame(mac, [0x86, 0xdd], &packet6(source, to, 58, 255, &message))
}

fn packet6(source: Ipv6Addr, to: Ipv6Addr, next: u8, hops: u8, payload: &[u8]) -> Vec<u8> {
    let length = payload.len() as u16;
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([next, hops]);
    packet.extend(source.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    packet
}

fn checksum6(source: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> [u8; 2] {
    let length = (payload.len() as u32).to_be_bytes();
    let around = [
        &source.octets()[..],
        &to.octets(),
        &length,
        &[0, 0, 0, next],
    ];
    checksum(&[&around.concat(), payload].concat())
}

/// The sum of RFC 1071 over an even number of bytes.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let pairs = bytes.chunks(2);
    let mut sum: u32 = pairs.map(|p| u32::from(p[0]) << 8 | u32::from(p[1])).sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    (!(sum as u16)).to_be_bytes()
}

#[test]
fn names_are_answered_in_the_slot_and_nowhere_else() {
    let world = World::new();
    let pool = world.pool(1, 2, &[]);
    let mut slot = pool.lease(SOON * 10).unwrap();
    let names = slot.take_names().unwrap();
    assert!(slot.take_names().is_none());
    names.udp.set_nonblocking(false).unwrap();
    names.udp.set_read_timeout(Some(SOON)).unwrap();
    let guest = Guest::on(&slot);
    guest.udp().send_to(b"who?", "10.42.0.1:53").unwrap();
    let mut word = [0; 16];
    let (length, from) = names.udp.recv_from(&mut word).unwrap();
    assert_eq!(
        (&word[..length], from.ip().to_string().as_str()),
        (&b"who?"[..], "10.42.0.2")
    );
}
