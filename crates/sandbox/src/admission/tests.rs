//! The decision over all values, and promises that come and go.

use proptest::prelude::*;

use super::*;

const BOUNDS: Admission = Admission {
    sandboxes_max: 10,
    vcpus_per_cpu: Some(4),
    memory_reserve_mib: 100,
    disk_reserve_mib: 50,
};

fn load(sandboxes: u64, vcpus: u64, memory_mib: u64) -> Load {
    Load {
        sandboxes,
        vcpus,
        memory_mib,
    }
}

fn found() -> Found {
    Found {
        sandboxes: 8,
        vcpus: 8,
        vcpus_max: Some(10),
        memory_mib: Some(200),
        promised_mib: 30,
        short_of_disk: None,
    }
}

#[test]
fn up_to_the_bound_and_no_further() {
    let at = |asked| decide(&BOUNDS, asked, &found()).map_err(|refusal| refusal.resource());
    assert_eq!(at(load(2, 2, 70)), Ok(()));
    assert_eq!(at(load(3, 2, 70)), Err(Resource::Sandboxes));
    assert_eq!(at(load(2, 3, 70)), Err(Resource::Vcpus));
    assert_eq!(at(load(2, 2, 71)), Err(Resource::Memory));
    assert_eq!(at(load(0, 0, 71)), Err(Resource::Memory));
    assert_eq!(at(load(u64::MAX, 0, 0)), Err(Resource::Sandboxes));
    assert_eq!(at(load(0, 0, u64::MAX)), Err(Resource::Memory));
}

#[test]
fn what_is_not_told_bounds_nothing() {
    let silent = Found {
        sandboxes: 0,
        ..Found::default()
    };
    assert_eq!(decide(&BOUNDS, load(10, 1000, 1 << 40), &silent), Ok(()));
}

#[test]
fn a_short_disk_refuses_sandboxes_and_says_where() {
    let short = Found {
        short_of_disk: Some(("/run/forkd".into(), 3, 4)),
        ..found()
    };
    let refusal = decide(&BOUNDS, load(1, 1, 0), &short).unwrap_err();
    assert_eq!(refusal.resource(), Resource::Disk);
    let text = refused("a fork", &refusal).to_string();
    assert_eq!(
        text,
        "no room for a fork: /run/forkd has 3 MiB of disk free, 4 MiB stay free"
    );
    // Virtual CPUs of sandboxes that were let in take no disk.
    assert_eq!(decide(&BOUNDS, load(0, 1, 0), &short), Ok(()));
}

#[test]
fn every_refusal_has_its_code_and_a_remedy() {
    let cases = [
        (load(9, 0, 0), ErrorCode::Busy, "--max-sandboxes"),
        (load(1, 9, 0), ErrorCode::Busy, "--max-vcpus-per-cpu"),
        (
            load(1, 1, 999),
            ErrorCode::InsufficientResources,
            "forkd kill",
        ),
    ];
    for (asked, code, remedy) in cases {
        let refusal = decide(&BOUNDS, asked, &found()).unwrap_err();
        let error = refused("x", &refusal);
        assert_eq!(error.code(), code);
        assert!(error.remedy().unwrap().contains(remedy), "{error}");
    }
}

fn ledger(bounds: Admission) -> (tempfile::TempDir, Arc<Ledger>) {
    let dir = tempfile::tempdir().unwrap();
    let places = Places {
        snapshots: dir.path().to_owned(),
        records: dir.path().to_owned(),
        run: dir.path().to_owned(),
        group: None,
    };
    (dir, Ledger::new(bounds, places))
}

const WIDE: Admission = Admission {
    memory_reserve_mib: 0,
    disk_reserve_mib: 0,
    ..BOUNDS
};

#[test]
fn promises_count_until_they_are_listed_or_dropped() {
    let (_dir, ledger) = ledger(WIDE);
    let ask = |n, there| ledger.sandboxes("a fork".into(), n, 0, || (there, there));
    let mut first = ask(6, 0).unwrap();
    assert_eq!(ask(5, 0).unwrap_err().code(), ErrorCode::Busy);
    let second = ask(4, 0).unwrap();
    drop(second);
    first.listed();
    // Now the list tells of them.
    assert_eq!(ask(5, 6).unwrap_err().code(), ErrorCode::Busy);
    drop(ask(4, 6).unwrap());
    drop(first);
    assert_eq!(*lock(&ledger.promised), Load::default());
    let room = ledger.room((6, 6));
    assert_eq!(room.refused, [2, 0, 0, 0]);
    assert_eq!(room.full, None);
    assert!(ledger.room((10, 6)).full.unwrap().contains("10 sandboxes"));
}

#[test]
fn memory_stays_promised_until_the_end() {
    let (_dir, ledger) = ledger(WIDE);
    let mut promise = ledger.sandboxes("x".into(), 2, 3, || (0, 0)).unwrap();
    promise.vcpus(2, || (0, 0)).unwrap();
    assert_eq!(*lock(&ledger.promised), load(2, 4, 6));
    promise.listed();
    assert_eq!(*lock(&ledger.promised), load(0, 0, 6));
    drop(promise);
    assert_eq!(*lock(&ledger.promised), Load::default());
}

#[test]
fn a_refused_step_leaves_what_was_promised_before() {
    let (_dir, ledger) = ledger(WIDE);
    let mut promise = ledger.sandboxes("x".into(), 1, 0, || (0, 0)).unwrap();
    assert!(promise.vcpus(u32::MAX, || (0, 0)).is_err());
    assert_eq!(*lock(&ledger.promised), load(1, 0, 0));
}

#[test]
fn the_host_is_looked_at() {
    let (_dir, ledger) = ledger(Admission {
        memory_reserve_mib: u64::MAX,
        disk_reserve_mib: u64::MAX,
        ..BOUNDS
    });
    let room = ledger.room((0, 0));
    assert!(room.memory_available_mib.unwrap() > 0);
    assert!(room.disk_available_mib.unwrap() > 0);
    let refused = ledger.memory("a parent".into(), 1).unwrap_err();
    assert_eq!(refused.code(), ErrorCode::InsufficientResources);
    assert_eq!(ledger.room((0, 0)).refused[Resource::ALL.len() - 1], 1);
}

proptest! {
    /// Whatever comes in what order, what was let in never exceeds the bounds.
    #[test]
    fn bounds_hold_over_any_sequence(steps in prop::collection::vec((1u32..6, 1u32..3, any::<bool>()), 1..40)) {
        let (_dir, ledger) = ledger(WIDE);
        let most = ledger.look((0, 0), Load::default()).vcpus_max.unwrap();
        let (mut held, mut listed) = (Vec::new(), (0u64, 0u64));
        for (n, vcpus, keep) in steps {
            let asked = ledger.sandboxes("x".into(), n, 0, || listed);
            if let Ok(mut promise) = asked && promise.vcpus(vcpus, || listed).is_ok() {
                if keep {
                    listed.0 += u64::from(n);
                    listed.1 += u64::from(n * vcpus);
                    promise.listed();
                }
                held.push(promise);
            } else {
                held.pop();
            }
            let promised = *lock(&ledger.promised);
            prop_assert!(listed.0 + promised.sandboxes <= 10);
            prop_assert!(listed.1 + promised.vcpus <= most);
        }
        drop(held);
        prop_assert_eq!(*lock(&ledger.promised), Load::default());
    }

    /// More room never refuses what less room let in.
    #[test]
    fn more_room_never_refuses(asked in (0u64..20, 0u64..20, 0u64..300), there in (0u64..12, 0u64..12, 0u64..300), more in 0u64..50) {
        let asked = load(asked.0, asked.1, asked.2);
        let less = Found { sandboxes: there.0, vcpus: there.1, memory_mib: Some(there.2), ..found() };
        let roomier = Found { memory_mib: Some(there.2 + more), ..less.clone() };
        if decide(&BOUNDS, asked, &less).is_ok() {
            prop_assert_eq!(decide(&BOUNDS, asked, &roomier), Ok(()));
        }
    }
}
