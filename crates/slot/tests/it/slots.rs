//! Slots come, go, run out, and are found again.

use std::time::{Duration, Instant};

use forkd_host::net::{netns, nft};
use forkd_slot::policy::{Mode, Policy};
use forkd_slot::pool::{Counts, Error};
use forkd_slot::{address, slot};

use crate::world::{Guest, OTHER, PUBLIC, World};

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
    for index in indices {
        assert!(
            netns::Netns::open(&address::netns(index))
                .unwrap()
                .is_none()
        );
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

#[test]
fn a_slot_is_new_every_time() {
    let world = World::new();
    world.listen(&world.world, PUBLIC, 80);
    let pool = world.pool(0, 1, &[]);
    let slot = pool.lease(PATIENCE).unwrap();
    let guest = Guest::on(&slot);
    assert!(guest.reaches(PUBLIC, 80));
    let inside = netns::Netns::open(slot.netns()).unwrap().unwrap();
    let learnt = |netns: &netns::Netns| {
        let read = |path: &str| std::fs::read_to_string(path).unwrap();
        netns
            .enter(|| read("/proc/thread-self/net/arp").lines().count() - 1)
            .unwrap()
    };
    assert!(
        learnt(&inside) > 0,
        "the test shows nothing: no neighbour was learnt"
    );
    drop(guest);
    let index = slot.index();
    pool.release(index);
    drop((slot, inside));
    let again = pool.lease(PATIENCE).unwrap();
    let inside = netns::Netns::open(again.netns()).unwrap().unwrap();
    assert_ne!(
        again.index(),
        index,
        "a number rests before it is used again"
    );
    assert_eq!(learnt(&inside), 0);
    let rules = inside
        .enter(|| nft::table("ip", "forkd"))
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(rules.contains("goto permit"), "{rules}");
}

#[test]
fn two_nodes_of_one_host_do_not_touch_each_other() {
    let (one, two) = (World::new(), World::new());
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
fn a_hundred_slots_are_made_quickly() {
    let world = World::new();
    let started = Instant::now();
    let pool = world.pool(100, 100, &[]);
    wait("a hundred are ready", || pool.counts().ready == 100);
    println!("100 slots in {:?}", started.elapsed());
    pool.close();
    assert!(world.registry().ours().unwrap().is_empty());
}
