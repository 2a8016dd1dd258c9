//! Tests with real namespaces, links, taps and rules.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;

use super::netns::Netns;
use super::route::Route;
use super::settings::Settings;
use super::{netns, nft, tap};

/// A namespace of this test's own; deleted at its end.
struct Space(Netns);

impl Space {
    fn new(name: &str) -> Self {
        let name = format!("forkd-test-{name}-{}", std::process::id());
        Self(Netns::create(&name).expect("these tests need root and network namespaces"))
    }

    fn route(&self) -> Route {
        self.0.enter(Route::open).unwrap().unwrap()
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        netns::delete(self.0.name()).unwrap();
    }
}

fn names(route: &mut Route) -> Vec<String> {
    let mut names: Vec<String> = route.links().unwrap().into_iter().map(|l| l.name).collect();
    names.sort();
    names
}

#[test]
fn a_namespace_has_a_name_once_and_goes_with_it() {
    let space = Space::new("name");
    let name = space.0.name().to_owned();
    assert!(netns::list("forkd-test-name-").unwrap().contains(&name));
    assert!(matches!(
        Netns::create(&name),
        Err(netns::Error::Exists { .. })
    ));
    let inode = |path: &str| {
        std::fs::metadata(path)
            .map(|m| std::os::unix::fs::MetadataExt::ino(&m))
            .unwrap()
    };
    let inside = space.0.enter(|| inode("/proc/thread-self/ns/net")).unwrap();
    assert_ne!(inside, inode("/proc/self/ns/net"));
    assert_eq!(inside, inode(&format!("{}/{name}", netns::DIRECTORY)));
    drop(space);
    assert!(Netns::open(&name).unwrap().is_none());
    netns::delete(&name).unwrap();
}

#[test]
fn what_a_crash_left_of_a_namespace_is_deleted() {
    let name = format!("forkd-test-torn-{}", std::process::id());
    std::fs::create_dir_all(netns::DIRECTORY).unwrap();
    std::fs::write(format!("{}/{name}", netns::DIRECTORY), "").unwrap();
    netns::delete(&name).unwrap();
    assert!(Netns::open(&name).unwrap().is_none());
}

#[test]
fn a_pair_carries_both_address_families() {
    let (left, right) = (Space::new("left"), Space::new("right"));
    let (mut here, mut there) = (left.route(), right.route());
    here.add_veth("forkd-v-0h", "veth0", &right.0).unwrap();
    assert!(names(&mut here).contains(&"forkd-v-0h".to_owned()));
    assert!(names(&mut there).contains(&"veth0".to_owned()));
    for (route, name, last) in [(&mut here, "forkd-v-0h", 1), (&mut there, "veth0", 2)] {
        for (address, prefix) in [
            (IpAddr::V4(Ipv4Addr::new(10, 9, 0, last)), 32),
            (
                IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last.into())),
                128,
            ),
        ] {
            route.add_address(name, address, prefix).unwrap();
        }
        route.set_up(name).unwrap();
        assert!(
            route
                .links()
                .unwrap()
                .iter()
                .any(|l| l.name == name && l.up)
        );
    }
    // Nothing but a host's address on either side: only these routes lead anywhere.
    let two: [(IpAddr, u8); 2] = [
        ("10.9.0.2".parse().unwrap(), 32),
        ("fd00::2".parse().unwrap(), 128),
    ];
    for destination in two {
        here.add_route(destination, "forkd-v-0h", None).unwrap();
    }
    for (everywhere, gateway) in [("0.0.0.0", "10.9.0.1"), ("::", "fd00::1")] {
        let gateway: IpAddr = gateway.parse().unwrap();
        let whole = if gateway.is_ipv4() { 32 } else { 128 };
        there.add_route((gateway, whole), "veth0", None).unwrap();
        there
            .add_route((everywhere.parse().unwrap(), 0), "veth0", Some(gateway))
            .unwrap();
    }
    for address in ["10.9.0.1", "fd00::1"] {
        let address: IpAddr = address.parse().unwrap();
        let listener = left
            .0
            .enter(|| TcpListener::bind((address, 0)))
            .unwrap()
            .unwrap();
        let to = listener.local_addr().unwrap();
        let mut from = right.0.enter(|| TcpStream::connect(to)).unwrap().unwrap();
        from.write_all(b"hello").unwrap();
        drop(from);
        let mut said = String::new();
        listener
            .accept()
            .unwrap()
            .0
            .read_to_string(&mut said)
            .unwrap();
        assert_eq!(said, "hello");
    }
    here.delete_link("forkd-v-0h").unwrap();
    here.delete_link("forkd-v-0h").unwrap();
    assert_eq!(names(&mut there), ["lo"]);
}

#[test]
fn a_group_goes_at_once_and_nobody_else_with_it() {
    let (left, right) = (Space::new("group"), Space::new("group-peers"));
    let (mut here, mut there) = (left.route(), right.route());
    let mac = [2, 0xfc, 0, 0, 0, 7];
    for n in 0..4 {
        let (name, peer) = (format!("a{n}"), format!("b{n}"));
        here.add_pair((&name, Some(mac)), (&peer, None), &right.0)
            .unwrap();
    }
    for name in ["a0", "a2", "nosuch0"] {
        here.set_group(name, 0x8000_0001).unwrap();
    }
    here.delete_group(0x8000_0001).unwrap();
    assert_eq!(names(&mut here), ["a1", "a3", "lo"]);
    assert_eq!(names(&mut there), ["b1", "b3", "lo"]);
    here.delete_group(0x8000_0001).unwrap();
    here.set_up("a1").unwrap();
    let known = "10.9.9.9".parse().unwrap();
    here.add_neighbour(known, mac, "a1").unwrap();
    let table = left
        .0
        .enter(|| std::fs::read_to_string("/proc/thread-self/net/arp"));
    let table = table.unwrap().unwrap();
    let line = table.lines().find(|line| line.starts_with("10.9.9.9"));
    assert!(line.unwrap().contains("02:fc:00:00:00:07"), "{table}");
}

#[test]
fn settings_are_those_of_the_thread_s_namespace() {
    let space = Space::new("settings");
    let read = || std::fs::read_to_string("/proc/sys/net/ipv6/conf/default/accept_ra").unwrap();
    let before = read();
    let change = |value: &str| {
        let settings = Settings::open("ipv6/conf").unwrap();
        settings.write("default/accept_ra", value).unwrap();
        assert!(settings.write("default/nosuch", "1").is_err());
        read()
    };
    for value in ["0", "2"] {
        assert_eq!(space.0.enter(|| change(value)).unwrap().trim(), value);
    }
    assert_eq!(read(), before, "it was set for everybody");
}

#[test]
fn a_link_that_is_not_there_is_named() {
    let space = Space::new("missing");
    let said = space.route().set_up("nosuch0").unwrap_err();
    assert_eq!(said.to_string(), "cannot find the link nosuch0");
    let said = space.route().add_veth("lo", "veth0", &space.0).unwrap_err();
    assert_eq!(said.to_string(), "cannot make the device pair of lo");
}

#[test]
fn a_tap_lives_as_long_as_its_file() {
    let space = Space::new("tap");
    let file = space.0.enter(|| tap::open("forkd-tap0")).unwrap().unwrap();
    let copy = file.as_fd().try_clone_to_owned().unwrap();
    drop(file);
    assert_eq!(names(&mut space.route()), ["forkd-tap0", "lo"]);
    drop(copy);
    assert_eq!(names(&mut space.route()), ["lo"]);
    let long = space
        .0
        .enter(|| tap::open("a-name-that-is-too-long"))
        .unwrap();
    assert!(matches!(long, Err(tap::Error::Make { .. })), "{long:?}");
}

#[test]
fn rules_apply_in_their_namespace_only_and_all_or_nothing() {
    let space = Space::new("nft");
    let good = "table inet forkd {\n set refused {\n type ipv4_addr\n flags interval\n elements = { 10.0.0.0/8 }\n }\n }\n";
    space.0.enter(|| nft::apply(good)).unwrap().unwrap();
    let table = space
        .0
        .enter(|| nft::table("inet", "forkd"))
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(table.contains("10.0.0.0/8"), "{table}");
    let bad = "delete table inet forkd\nadd rule inet nowhere chain drop\n";
    let said = space.0.enter(|| nft::apply(bad)).unwrap().unwrap_err();
    assert!(matches!(said, nft::Error::Refused(_)), "{said:?}");
    assert!(
        space
            .0
            .enter(|| nft::table("inet", "forkd"))
            .unwrap()
            .unwrap()
            .is_some()
    );
    let other = Space::new("nft-other");
    assert_eq!(
        other
            .0
            .enter(|| nft::table("inet", "forkd"))
            .unwrap()
            .unwrap(),
        None
    );
}
