//! What isolation costs a fork: the filtered system calls in an empty root that every fork of a confined template has,
//! and with them a network, a control group and a user of its own, against nothing at all.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd_host::cgroup::{self, Leaf, Limits};
use forkd_slot::address::MAX_SLOTS;
use forkd_slot::pool::{Config, Pool};
use forkd_slot::registry::Registry;
use forkd_slot::slot::Slot;

use super::super::template::KvmTemplate;
use super::super::vm::KvmVm;
use super::machine::Yard;
use crate::{Lifetime, SlotHandles, Vm, blocking};

const ROUNDS: usize = 5;
const ONE_BY_ONE: usize = 20;
const AT_ONCE: usize = 100;
/// No other user of the host has these.
const FIRST_USER: u32 = 0x7000_0000;
const PIDS: u64 = 512;
/// How long the pool may take to be full.
const FILL_LIMIT: Duration = Duration::from_secs(60);

/// Where isolated sandboxes live.
struct Grounds {
    pool: Pool,
    groups: cgroup::Root,
}

/// What a sandbox holds of its host.
struct Place {
    slot: Slot,
    leaf: Leaf,
}

/// How long forks took, in milliseconds.
#[derive(Default)]
struct Figures {
    one: Vec<f64>,
    at_once: Vec<f64>,
}

/// One way to run forks.
struct Side<'a> {
    name: &'static str,
    template: &'a KvmTemplate,
    grounds: Option<&'a Arc<Grounds>>,
}

impl Grounds {
    fn open(yard: &Yard) -> Grounds {
        forkd_slot::host::prepare().unwrap();
        let owner = yard.dir.path().display().to_string();
        let registry = forkd_slot::registry::DIRECTORY;
        let config = Config {
            registry: Registry::open(registry.as_ref(), &owner).unwrap(),
            ready: u32::try_from(AT_ONCE).unwrap(),
            max: MAX_SLOTS,
            refused: vec![],
        };
        let name = format!("isolation-{}", std::process::id());
        let root = cgroup::mount_point().unwrap().join("forkd").join(name);
        Grounds {
            pool: Pool::open(config, &[]).unwrap(),
            groups: cgroup::Root::open(&root).unwrap(),
        }
    }

    /// Waits until forks need not wait for a slot.
    fn wait_until_full(&self) {
        let since = Instant::now();
        loop {
            let counts = self.pool.counts();
            if counts.ready as usize == AT_ONCE && counts.busy == 0 {
                return;
            }
            assert!(since.elapsed() < FILL_LIMIT, "{counts:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn take(&self, id: &str) -> Place {
        let has_pids = self.groups.controllers().iter().any(|c| c == "pids");
        let limits = Limits {
            pids: has_pids.then_some(PIDS),
            ..Limits::default()
        };
        Place {
            slot: self.pool.lease(FILL_LIMIT).unwrap(),
            leaf: self.groups.leaf(id, &limits).unwrap(),
        }
    }

    fn give_back(&self, place: Place) {
        place.leaf.remove().unwrap();
        self.pool.release(place.slot.index());
    }
}

impl Drop for Grounds {
    fn drop(&mut self) {
        self.pool.close();
        self.groups.remove_if_empty();
    }
}

impl Place {
    fn handles(&self) -> SlotHandles {
        SlotHandles {
            cgroup: Some(self.leaf.open().unwrap()),
            tap: Some(self.slot.tap().unwrap()),
            tap_name: None,
            netns: None,
            uid: Some(FIRST_USER + self.slot.index()),
        }
    }
}

impl Side<'_> {
    /// One fork from the wish for it until its guest runs.
    async fn fork(&self, yard: &Yard, id: String) -> (Arc<KvmVm>, Option<Place>) {
        let mut spec = yard.fork_spec(&id, Lifetime::DieWithParent);
        let place = match self.grounds.cloned() {
            Some(grounds) => blocking::run(move || Some(grounds.take(&id))).await,
            None => None,
        };
        spec.slot = place.as_ref().map(Place::handles);
        (self.template.fork_typed(spec).await.unwrap(), place)
    }

    /// Forks so many at once, and ends them. Milliseconds until the last one ran.
    async fn measure(&self, yard: &Yard, label: &str, count: usize) -> f64 {
        if let Some(grounds) = self.grounds.cloned() {
            blocking::run(move || grounds.wait_until_full()).await;
        }
        let since = Instant::now();
        let forks = (0..count).map(|at| self.fork(yard, format!("{}-{label}-{at}", self.name)));
        let forked = futures_util::future::join_all(forks).await;
        let took = since.elapsed().as_secs_f64() * 1e3;
        for (vm, place) in forked {
            vm.kill().await.unwrap();
            if let (Some(place), Some(grounds)) = (place, self.grounds) {
                grounds.give_back(place);
            }
        }
        took
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: make bench-isolation"]
async fn what_isolation_costs() {
    let Some(yard) = Yard::new() else { return };
    let files = yard.freeze().await;
    let load = |id: &'static str, jail| {
        let spec = yard.template_spec(id, files.clone());
        KvmTemplate::load(spec, yard.program.clone(), jail)
    };
    let open = load("open", false).await.unwrap();
    let confined = load("confined", true).await.unwrap();
    let grounds = Arc::new(Grounds::open(&yard));
    let side = |name, template, grounds| Side {
        name,
        template,
        grounds,
    };
    let sides = [
        side("nothing", &open, None),
        side("filter", &confined, None),
        side("all", &confined, Some(&grounds)),
    ];
    let mut figures = sides.each_ref().map(|_| Figures::default());
    for round in 0..ROUNDS {
        for (side, figures) in sides.iter().zip(&mut figures) {
            for at in 0..ONE_BY_ONE {
                let took = side.measure(&yard, &format!("{round}-one-{at}"), 1).await;
                figures.one.push(took);
            }
            let took = side.measure(&yard, &format!("{round}-all"), AT_ONCE).await;
            figures.at_once.push(took);
        }
    }
    let medians = figures.map(|mut f| (median(&mut f.one), median(&mut f.at_once)));
    println!("isolation   one fork, p50       {AT_ONCE} at once");
    for (side, (one, at_once)) in sides.iter().zip(medians) {
        let (added, times) = (one - medians[0].0, at_once / medians[0].1);
        let name = side.name;
        println!("{name:8} {one:8.2} ms {added:+6.2} {at_once:8.1} ms {times:5.2} x");
    }
    for template in [open, confined] {
        crate::Template::close(&template).await.unwrap();
    }
}
