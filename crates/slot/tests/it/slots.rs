//! Slots come, go, run out, and are found again.

use std::io::Write;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::{Duration, Instant};

use forkd_host::net::route::Route;
use forkd_host::net::{netns, nft, tap};
use forkd_slot::policy::{Mode, Policy};
use forkd_slot::pool::{Counts, Error};
use forkd_slot::sweep;
use forkd_slot::{address, provision, rules, slot};

use crate::world::{Guest, OTHER, PUBLIC, PUBLIC6, World};

const PATIENCE: Duration = Duration::from_secs(30);

fn wait(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "did not happen: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_pool_fills_leases_refills_and_leaves_nothing() {
    let world = World::new();
    let pool = world.pool(3, 5, &[]);
    wait("the pool is full", || pool.counts().ready == 3);
    let leased: Vec<_> = (0..5).map(|_| pool.lease(PATIENCE).unwrap()).collect();
    let mut indices: Vec<u32> = leased.iter().map(slot::Slot::index).collect();
    indices.sort_unstable();
    indices.dedup();
    assert_eq!(indices.len(), 5);
    assert_eq!(
        pool.lease(PATIENCE).unwrap_err(),
        Error::Exhausted { max: 5 }
    );
    let held: Vec<Space> = leased.iter().map(|slot| Space::of(slot.index())).collect();
    for slot in leased {
        assert_eq!(slot.netns(), address::netns(slot.index()));
        pool.release(slot.index());
    }
    let full = Counts {
        ready: 3,
        ..Counts::default()
    };
    wait("the pool is full again", || pool.counts() == full);
    assert_eq!(world.registry().ours().unwrap().len(), 3);
    pool.close();
    assert!(world.registry().ours().unwrap().is_empty());
    assert!(!held.iter().any(Space::is_there));
}

/// The namespace that a slot had, told from one of the same name that another node of this machine made since.
struct Space {
    index: u32,
    /// Held, so that its number is no other's.
    namespace: netns::Netns,
}

impl Space {
    fn of(index: u32) -> Space {
        let namespace = netns::Netns::open(&address::netns(index)).unwrap();
        let namespace = namespace.expect("a slot has a namespace");
        Space { index, namespace }
    }

    fn number(namespace: &netns::Netns) -> u64 {
        let file = std::fs::File::from(namespace.as_fd().try_clone_to_owned().unwrap());
        file.metadata().unwrap().ino()
    }

    fn is_there(&self) -> bool {
        let now = netns::Netns::open(&address::netns(self.index)).unwrap();
        now.is_some_and(|now| Space::number(&now) == Space::number(&self.namespace))
    }
}

#[test]
fn what_a_crash_left_is_swept_and_what_is_in_use_is_kept() {
    let world = World::new();
    let pool = world.pool(0, 4, &[]);
    let mut used = pool.lease(PATIENCE).unwrap();
    let _stray = pool.lease(PATIENCE).unwrap();
    world.listen(&world.world, PUBLIC, 80);
    let guest = Guest::on(&used);
    assert!(guest.reaches(PUBLIC, 80));
    // A crash: nothing is given back, nothing is closed.
    std::mem::forget(pool);
    let next = world.pool(0, 4, &[used.index()]);
    assert_eq!(world.registry().ours().unwrap(), [used.index()]);
    assert_eq!(next.counts().leased, 1);
    drop(used.take_names());
    let mut used = slot::Slot::adopt(used.index()).unwrap().unwrap();
    used.bind_names().unwrap();
    world.listen(&world.world, OTHER, 80);
    let denied = Policy::new(Mode::Nat, vec![], vec![OTHER.parse().unwrap()]).unwrap();
    used.apply(&denied, &[]).unwrap();
    assert!(
        !guest.reaches(OTHER, 80),
        "a policy after a restart is not in force"
    );
    assert!(
        guest.reaches(PUBLIC, 80),
        "a sandbox lost its network to a restart"
    );
    next.release(used.index());
    wait("the slot is removed", || {
        world.registry().ours().unwrap().is_empty()
    });
}

/// A VM that opens its device itself, in the slot's namespace, has it alone; and it goes with the slot.
#[test]
fn a_device_is_let_go_of_and_stays_until_its_slot_goes() {
    let world = World::new();
    let pool = world.pool(0, 4, &[]);
    let used = pool.lease(PATIENCE).unwrap();
    let inside = netns::Netns::open(used.netns()).unwrap().unwrap();
    let open = || inside.enter(|| tap::open(address::TAP)).unwrap();
    assert!(open().unwrap_err().is_in_use());
    assert_eq!(used.let_go_of_tap().unwrap(), address::TAP);
    assert_eq!(used.let_go_of_tap().unwrap(), address::TAP);
    used.tap().expect_err("nobody here has it any more");
    let own = used.namespace().unwrap();
    let own = std::fs::File::from(own).metadata().unwrap().ino();
    let named = format!("{}/{}", netns::DIRECTORY, used.netns());
    assert_eq!(own, std::fs::metadata(named).unwrap().ino());
    let user = || slot::user_of(used.index(), &Default::default()).unwrap();
    assert_eq!(user(), None);
    let held = open().unwrap();
    assert_eq!(user(), Some(slot::User::Device));
    drop(held);
    let again = open();
    assert!(again.is_ok(), "it went with whoever had it: {again:?}");
    drop(again);
    pool.release(used.index());
    wait("the slot is removed", || {
        world.registry().ours().unwrap().is_empty()
    });
    drop(used);
}

/// What a guest could leave in its slot, but for the slot's own number.
#[derive(Debug, PartialEq)]
struct Traces {
    connections: String,
    neighbours: Vec<String>,
    routes: Vec<String>,
    routes6: Vec<String>,
    rules: String,
    frames: u64,
}

impl Traces {
    fn of(slot: &slot::Slot) -> Traces {
        let inside = netns::Netns::open(slot.netns()).unwrap().unwrap();
        inside.enter(|| Traces::here(slot.index())).unwrap()
    }

    fn here(index: u32) -> Traces {
        let read = |path: &str| std::fs::read_to_string(path).unwrap();
        let own = [
            address::outer(index).to_string(),
            address::outer6(index).to_string(),
        ];
        let said = |args: &[&str]| -> Vec<String> {
            let said = Command::new("ip").args(args).output().unwrap();
            let text = String::from_utf8(said.stdout).unwrap();
            let text = own.iter().fold(text, |text, own| text.replace(own, "OWN"));
            text.lines().map(str::to_owned).collect()
        };
        let learnt = |args: &[&str]| -> Vec<String> {
            let of_guest = said(args).into_iter();
            of_guest.filter(|line| line.contains("lladdr")).collect()
        };
        let rules = nft::table("inet", "forkd").unwrap().unwrap();
        let devices = read("/proc/thread-self/net/dev");
        let tap = devices.lines().find(|line| line.contains(address::TAP));
        let frames = tap.unwrap().split_whitespace().nth(2).unwrap();
        Traces {
            connections: read("/proc/sys/net/netfilter/nf_conntrack_count"),
            neighbours: learnt(&["neigh", "show", "dev", address::TAP]),
            routes: said(&["-4", "route", "show", "table", "all"]),
            routes6: said(&["-6", "route", "show", "table", "all", "proto", "boot"]),
            rules: own.iter().fold(rules, |text, own| text.replace(own, "OWN")),
            frames: frames.parse().unwrap(),
        }
    }
}

#[test]
fn a_slot_of_a_number_that_was_used_is_as_new_as_one_that_never_was() {
    let world = World::new();
    for address in [PUBLIC, PUBLIC6] {
        world.listen(&world.world, address, 80);
    }
    let bind = || UdpSocket::bind((PUBLIC, 53)).unwrap();
    let peer = world.world.enter(bind).unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    // Leaves everything that a guest and its owner can leave.
    let use_up = |slot: &slot::Slot| {
        let guest = Guest::on(slot);
        assert!(guest.reaches(PUBLIC, 80) && guest.reaches(PUBLIC6, 80));
        let resolved = ["192.0.2.1".parse().unwrap(), "2606::1".parse().unwrap()];
        let denied = Policy::new(Mode::Nat, vec![], vec![OTHER.parse().unwrap()]).unwrap();
        slot.apply(&denied, &[]).unwrap();
        let learnt = rules::resolved(rules::Verdict::Allow, &resolved, None, 300);
        slot.rule(&learnt).unwrap();
        let socket = guest.udp();
        socket.send_to(b"hello", (PUBLIC, 53)).unwrap();
        let (_, back) = peer.recv_from(&mut [0; 8]).unwrap();
        peer.send_to(b"back", back).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.recv_from(&mut [0; 8]).unwrap();
        (back, socket.local_addr().unwrap().port())
    };
    // A number rests as long as possible, but a new daemon begins where the one before did; others take numbers, too.
    for _ in 0..20 {
        let before = world.pool(0, 1, &[]);
        let old = before.lease(PATIENCE).unwrap();
        let fresh = Traces::of(&old);
        let (back, port) = use_up(&old);
        let (used, index) = (Traces::of(&old), old.index());
        assert_ne!(used.connections, fresh.connections);
        assert!(used.neighbours.len() >= 2, "{used:?}");
        assert!(used.frames > fresh.frames && used.rules != fresh.rules);
        before.release(index);
        drop(old);
        wait("the slot is removed", || {
            world.registry().ours().unwrap().is_empty()
        });
        before.close();
        let after = world.pool(0, 1, &[]);
        let new = after.lease(PATIENCE).unwrap();
        if new.index() == index {
            assert_eq!(Traces::of(&new), fresh);
            // The host may still know the old guest's peer: what it says does not reach the new guest.
            let guest = Guest::on(&new);
            let to = (IpAddr::V4(address::GUEST), port);
            let bound = guest
                .netns()
                .enter(|| UdpSocket::bind(to))
                .unwrap()
                .unwrap();
            bound
                .set_read_timeout(Some(Duration::from_millis(300)))
                .unwrap();
            peer.send_to(b"late", back).unwrap();
            let heard = bound.recv_from(&mut [0; 8]);
            assert!(heard.is_err(), "{heard:?}");
            return;
        }
        after.close();
    }
    panic!("the number was never used again");
}

#[test]
fn a_number_rests_before_it_is_used_again() {
    let world = World::new();
    let pool = world.pool(0, 1, &[]);
    let first = pool.lease(PATIENCE).unwrap().index();
    pool.release(first);
    let again = pool.lease(PATIENCE).unwrap();
    assert_ne!(again.index(), first);
}

#[test]
fn two_nodes_of_one_host_do_not_touch_each_other() {
    let one = World::new();
    let two = World::beside(&one);
    let (first, second) = (one.pool(3, 3, &[]), two.pool(3, 3, &[]));
    // A number that is being claimed may turn out to be taken.
    let claimed = |world: &World| world.registry().ours().unwrap().len();
    wait("both are full", || {
        first.counts().ready == 3 && second.counts().ready == 3
    });
    wait("both have settled", || {
        claimed(&one) == 3 && claimed(&two) == 3
    });
    let (ours, theirs) = (
        one.registry().ours().unwrap(),
        two.registry().ours().unwrap(),
    );
    assert!(
        ours.iter().all(|index| !theirs.contains(index)),
        "{ours:?} {theirs:?}"
    );
    first.close();
    let _first = one.pool(0, 3, &[]);
    assert_eq!(two.registry().ours().unwrap(), theirs);
}

#[test]
fn slots_of_nodes_that_are_gone_are_swept_unless_they_are_used() {
    let one = World::new();
    let (gone, stopped, running) = (
        World::beside(&one),
        World::beside(&one),
        World::beside(&one),
    );
    let start = |world: &World| {
        let pool = world.pool(0, 20, &[]);
        let slots: Vec<_> = (0..2).map(|_| pool.lease(PATIENCE).unwrap()).collect();
        (pool, slots)
    };
    let (ended, mut theirs) = start(&gone);
    let (paused, others) = start(&stopped);
    let (_runs, kept) = start(&running);
    let spaces = |slots: &[slot::Slot]| -> Vec<Space> {
        slots.iter().map(|slot| Space::of(slot.index())).collect()
    };
    let used = theirs.pop().unwrap();
    let used_space = Space::of(used.index());
    // A daemon that was killed: its files are closed, nothing is removed. The VM of one slot goes on.
    let unused = spaces(&theirs);
    let (stays, rests) = (spaces(&others), spaces(&kept));
    drop((ended, theirs, paused, others));
    drop(kept);
    for world in [&gone, &running] {
        std::fs::remove_file(world.state()).unwrap();
    }

    let _next = one.pool(0, 20, &[]);
    let there = Space::is_there;
    assert!(!unused.iter().any(there), "of a node that is gone");
    assert!(used_space.is_there(), "a process uses it");
    assert!(stays.iter().all(there), "its node will come back");
    assert!(rests.iter().all(there), "its node runs");
    assert_eq!(gone.registry().ours().unwrap(), [used.index()]);

    drop(used);
    sweep::gone(&one.registry()).unwrap();
    assert!(!used_space.is_there());
    assert!(stays.iter().chain(&rests).all(there));
}

#[test]
fn slots_made_ahead_are_taken_once_and_by_nobody_who_finds_them_used() {
    let world = World::new();
    world.listen(&world.world, PUBLIC, 80);
    let setup = |count| {
        let told = |_| true;
        let work = || provision::setup(world.slots(), count, told);
        world.host.enter(work).unwrap().unwrap().unwrap()
    };
    let first = setup(3);
    assert_eq!((first.ready.len(), first.made.len()), (3, 3));
    let again = setup(3);
    assert_eq!((&again.ready, again.made.len()), (&first.ready, 0));

    // Somebody used one by hand.
    let inside = netns::Netns::open(&address::netns(first.ready[0]))
        .unwrap()
        .unwrap();
    let tap = inside.enter(|| tap::open(address::TAP)).unwrap().unwrap();
    std::fs::File::from(tap).write_all(&[0; 80]).unwrap();
    drop(inside);
    let inode = |index: &u32| {
        let path = format!("{}/{}", netns::DIRECTORY, address::netns(*index));
        std::fs::metadata(path).unwrap().ino()
    };
    let used = inode(&first.ready[0]);
    let unused: Vec<u64> = first.ready[1..].iter().map(inode).collect();

    let pool = world.pool(0, 8, &[]);
    let leased: Vec<_> = (0..3).map(|_| pool.lease(PATIENCE).unwrap()).collect();
    let numbers: Vec<u32> = leased.iter().map(slot::Slot::index).collect();
    let spaces: Vec<u64> = numbers.iter().map(inode).collect();
    assert!(!spaces.contains(&used), "it was used: {numbers:?}");
    assert!(unused.iter().all(|i| spaces.contains(i)), "{numbers:?}");
    assert!(world.registry().offered().unwrap().is_empty());
    let was_ahead = |slot: &slot::Slot| first.ready[1..].contains(&slot.index());
    let mut taken = leased.into_iter().filter(was_ahead);
    assert!(Guest::on(&taken.next().unwrap()).reaches(PUBLIC, 80));
    let index = taken.next().unwrap().index();
    drop(taken);
    let links = || {
        let inside = netns::Netns::open(&address::netns(index)).unwrap().unwrap();
        let mut route = inside.enter(Route::open).unwrap().unwrap();
        route.links().unwrap()
    };
    wait("the device goes with its last user", || {
        !links().iter().any(|link| link.name == address::TAP)
    });
    pool.release(index);
    wait("the slot is removed", || {
        !world.registry().ours().unwrap().contains(&index)
    });
}

fn veths(world: &World) -> Vec<u32> {
    let mut route = world.host.enter(Route::open).unwrap().unwrap();
    let links = route.links().unwrap();
    let mut found: Vec<u32> = links
        .iter()
        .filter_map(|link| address::index_of_veth(&link.name))
        .collect();
    found.sort_unstable();
    found
}

#[test]
fn many_slots_are_made_at_once_and_each_is_whole() {
    let world = World::new();
    world.listen(&world.world, PUBLIC, 80);
    // Somebody else's number in between.
    assert!(world.registry().claim(7).unwrap());
    let mut heard = vec![];
    let mut told = |ready| {
        heard.push(ready);
        true
    };
    let work = || provision::setup(world.slots(), 48, &mut told);
    let done = world.host.enter(work).unwrap().unwrap().unwrap();
    // Names of namespaces are shared with other tests, one of which may have this number's.
    world.registry().release(7).unwrap();
    assert_eq!(heard, (0..=48).collect::<Vec<_>>());
    assert_eq!(done.ready, done.made);
    assert!(done.made.is_sorted() && !done.made.contains(&7));
    assert_eq!(veths(&world), done.made);
    assert_eq!(world.registry().offered().unwrap(), done.made);
    let ways = forkd_slot::host::Ways { v6: true };
    for index in [done.made[0], done.made[47]] {
        let take = || slot::Slot::take_ready(index, &[], ways);
        let slot = world.host.enter(take).unwrap().unwrap().unwrap();
        assert!(slot.ways().v6 && Guest::on(&slot).reaches(PUBLIC, 80));
    }
}

#[test]
fn a_setup_that_is_cut_short_leaves_nothing() {
    let world = World::new();
    for last in [0, 2, 30] {
        let told = |ready| ready < last;
        let work = || provision::setup(world.slots(), 200, told);
        assert_eq!(world.host.enter(work).unwrap().unwrap(), None);
        assert!(world.registry().claims().unwrap().is_empty());
        assert!(world.registry().offered().unwrap().is_empty());
        assert!(veths(&world).is_empty(), "{:?}", veths(&world));
    }
}

#[test]
fn a_hundred_slots_are_made_quickly() {
    let world = World::new();
    let started = Instant::now();
    let pool = world.pool(100, 100, &[]);
    wait("a hundred are ready", || pool.counts().ready == 100);
    println!("100 slots in {:?}", started.elapsed());
    pool.close();
    assert!(world.registry().ours().unwrap().is_empty());
}
