//! Who reaches whom.

use std::io::Write;

use forkd_slot::policy::{Mode, Policy};

use crate::world::{Guest, HOST, METADATA, OTHER, PRIVATE, PUBLIC, SOON, World, echoes};

fn policy(allow: &[&str], deny: &[&str]) -> Policy {
    let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    Policy::new(Mode::Nat, rules(allow), rules(deny)).unwrap()
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
    let outer =
        |slot: &forkd_slot::slot::Slot| forkd_slot::address::outer(slot.index()).to_string();
    let next_door = outer(&neighbour);

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
    for (column, policy) in policies.iter().enumerate() {
        slot.apply(policy, &[]).unwrap();
        std::thread::scope(|scope| {
            for (address, port, expected) in &matrix {
                let (guest, expected) = (&guest, expected[column]);
                scope.spawn(move || {
                    assert_eq!(
                        guest.reaches(address, *port),
                        expected,
                        "{address}:{port} under {policy:?}"
                    );
                });
            }
        });
        assert!(
            other.reaches(PUBLIC, 443),
            "the neighbour's network is not its own"
        );
    }
}

#[test]
fn a_policy_ends_connections_that_it_no_longer_allows_and_keeps_the_others() {
    let world = World::new();
    for address in [PUBLIC, OTHER] {
        world.listen(&world.world, address, 80);
    }
    let pool = world.pool(1, 2, &[]);
    let slot = pool.lease(SOON * 10).unwrap();
    let guest = Guest::on(&slot);
    let mut kept = guest.connect(PUBLIC, 80).unwrap();
    let mut ended = guest.connect(OTHER, 80).unwrap();
    assert!(echoes(&mut kept) && echoes(&mut ended));
    slot.apply(&policy(&[], &[OTHER]), &[]).unwrap();
    assert!(echoes(&mut kept), "an allowed connection is gone");
    assert!(!echoes(&mut ended), "a denied connection goes on");
}

#[test]
fn a_guest_that_lies_about_its_address_reaches_nothing() {
    let world = World::new();
    let listener = world
        .world
        .enter(|| std::net::UdpSocket::bind((PUBLIC, 53)))
        .unwrap()
        .unwrap();
    listener.set_read_timeout(Some(SOON)).unwrap();
    let pool = world.pool(1, 2, &[]);
    let slot = pool.lease(SOON * 10).unwrap();
    let guest = Guest::on(&slot);
    guest.udp().send_to(b"honest", (PUBLIC, 53)).unwrap();
    let mut word = [0; 16];
    let (length, from) = listener.recv_from(&mut word).unwrap();
    assert_eq!(&word[..length], b"honest");
    assert_eq!(from.ip().to_string(), HOST, "the world sees the host alone");

    let mut tap = std::fs::File::from(slot.tap().unwrap());
    // The frames of a guest come out of the tap's file; what is written there is what a VM would send.
    for source in [
        [10, 42, 0, 3],
        [10, 43, 0, 99],
        [127, 0, 0, 1],
        [93, 184, 215, 15],
    ] {
        tap.write_all(&frame(source, [93, 184, 215, 14])).unwrap();
    }
    assert!(
        listener.recv_from(&mut word).is_err(),
        "a lie came through: {word:?}"
    );
}

/// A virtio header, then a UDP packet in an Ethernet frame for anybody.
fn frame(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0; 10];
    frame.extend([0xff; 6]);
    frame.extend([2, 0, 0, 0, 0, 9, 8, 0]);
    let mut ip = vec![0x45, 0, 0, 32, 0, 1, 0, 0, 64, 17, 0, 0];
    ip.extend(source);
    ip.extend(destination);
    let sum = ip
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum::<u32>();
    let sum = !(((sum >> 16) + (sum & 0xffff)) as u16);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(ip);
    // Ports 7 to 53, twelve bytes, no checksum: RFC 768.
    frame.extend([0, 7, 0, 53, 0, 12, 0, 0, b'l', b'i', b'e', b'!']);
    frame
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
