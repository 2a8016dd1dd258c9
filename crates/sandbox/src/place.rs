//! Where sandboxes live on their host: a slot of the network, a user and a control group each.
//!
//! What a host cannot give is not a failure: a sandbox without network is safe, and one without a control group is
//! bounded by its memory's size. But it is said, in [`Places::missing`], and a node may be told to refuse instead.

use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use forkd_engine::SlotHandles;
use forkd_host::cgroup::{self, Leaf};
use forkd_slot::address;
use forkd_slot::dns::{self, Names};
use forkd_slot::policy::{Mode, Policy};
use forkd_slot::slot::Slot;
use forkd_wire::agent::{GuestNetwork, GuestNetwork6};
use forkd_wire::error::ErrorCode;
use ipnet::IpNet;
use tokio::task::{AbortHandle, JoinHandle};
use tracing::warn;

use crate::Error;
use crate::node::blocking;
use forkd_host::chain;

mod limits;
mod networks;

use limits::Disks;
pub use limits::PlaceLimits;
use networks::{Networks, no_network, slot_error};

const TOLD_TO_HAVE_NONE: &str = "this node was told to have none (--net none)";

/// How sandboxes are kept apart.
#[derive(Debug, Clone)]
pub struct Isolation {
    /// Whether sandboxes have a network at all.
    pub network: bool,
    /// Whether sandboxes have control groups.
    pub limits: bool,
    /// Slots that wait for forks.
    pub slots_ready: u32,
    /// Slots there may be.
    pub slots_max: u32,
    /// Networks refused by default besides private ones: a cluster's.
    pub refused: Vec<IpNet>,
    /// The control group that sandboxes' groups are made in; by default `forkd` at the root of version 2.
    pub cgroup_root: Option<PathBuf>,
    /// Refuse to run sandboxes where something is missing.
    pub required: bool,
}

impl Isolation {
    /// Nothing but what the engine does by itself. For tests and hosts that have nothing to give.
    pub const OFF: Isolation = Isolation {
        network: false,
        limits: false,
        slots_ready: 0,
        slots_max: 0,
        refused: vec![],
        cgroup_root: None,
        required: false,
    };
}

impl Default for Isolation {
    /// Everything, with nothing prepared before it is asked for.
    fn default() -> Self {
        Self {
            network: true,
            limits: true,
            slots_max: address::MAX_SLOTS,
            ..Self::OFF
        }
    }
}

/// Something that this host does not do for sandboxes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// What: `network`, `limits`, or a controller such as `memory`.
    pub what: String,
    /// Why, and what would help.
    pub why: String,
}

/// What a sandbox wants of its place.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wish {
    /// Whether its guest has a network device.
    pub(crate) device: bool,
    /// Its virtual CPUs.
    pub(crate) vcpus: u32,
    /// What it wants to reach, if somebody said so.
    pub(crate) policy: Option<Policy>,
    /// The most memory its VM may use, MiB.
    pub(crate) memory_mib: Option<u64>,
    /// What else its VM may use.
    pub(crate) limits: PlaceLimits,
    /// Files and directories that its VM reads and writes.
    pub(crate) files: Vec<PathBuf>,
}

/// What all sandboxes of a node share.
#[derive(Debug)]
pub(crate) struct Places {
    networks: Option<Networks>,
    groups: Option<cgroup::Root>,
    missing: Vec<Missing>,
    /// Whether a limit that nobody enforces is refused.
    required: bool,
}

/// The place of one sandbox.
#[derive(Debug)]
pub(crate) struct Place {
    slot: Option<Arc<Slot>>,
    policy: Mutex<Policy>,
    names: Option<(Names, AbortHandle)>,
    leaf: Option<Leaf>,
    vcpus: u32,
    limits: PlaceLimits,
    not_enforced: Vec<String>,
}

/// What is kept of a place.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct PlaceRecord {
    /// The slot's number.
    pub slot: Option<u32>,
    /// Virtual CPUs of the machine that lives there; 0 in records that do not know.
    pub vcpus: u32,
    /// Limits that were asked for.
    pub limits: PlaceLimits,
    /// Those of them, and of its memory, that are not enforced.
    pub not_enforced: Vec<String>,
    /// The control group's path.
    pub cgroup: Option<PathBuf>,
    /// Whether there is a network.
    pub nat: bool,
    /// Rules, as they were given.
    pub allow: Vec<String>,
    /// Rules, as they were given.
    pub deny: Vec<String>,
}

impl Places {
    /// Sweeps what earlier runs of the node left, but for what these records name. Blocks.
    pub(crate) fn open(config: &Isolation, owner: &Path, in_use: &[PlaceRecord]) -> Self {
        let mut missing = vec![];
        let mut lacks = |what: &str, why: String| {
            missing.push(Missing {
                what: what.to_owned(),
                why,
            });
        };
        let networks = match Networks::open(config, owner, in_use) {
            Ok(networks) => networks,
            Err(why) => {
                lacks("network", why);
                None
            }
        };
        let groups = match open_groups(config, owner, in_use) {
            Ok(None) => None,
            Ok(Some(root)) => {
                let without = |c: &&str| !root.controllers().iter().any(|known| known == c);
                for controller in cgroup::CONTROLLERS.iter().filter(|c| without(c)) {
                    let why = format!("{} has no {controller} controller", root.path().display());
                    lacks(controller, why);
                }
                Some(root)
            }
            Err(why) => {
                lacks("limits", why);
                None
            }
        };
        Self {
            networks,
            groups,
            missing,
            required: config.required,
        }
    }

    /// What this host does not do, as far as it was tried.
    pub(crate) fn missing(&self) -> Vec<Missing> {
        let problem = self.networks.as_ref().and_then(Networks::known_problem);
        let network = problem.map(|why| Missing {
            what: "network".to_owned(),
            why: why.to_owned(),
        });
        self.missing.iter().cloned().chain(network).collect()
    }

    /// The group that sandboxes' groups are in.
    pub(crate) fn group(&self) -> Option<&Path> {
        self.groups.as_ref().map(cgroup::Root::path)
    }

    /// Tries everything that is tried only when it is first wanted. Blocks.
    pub(crate) fn try_all(&self) {
        if let Some(networks) = &self.networks {
            networks.problem();
        }
    }

    /// A place for a sandbox of this name. A wish without a policy gets the default, or no network where there can be
    /// none.
    pub(crate) async fn take(self: &Arc<Self>, name: &str, wish: Wish) -> Result<Place, Error> {
        let (places, name) = (Arc::clone(self), name.to_owned());
        let place = blocking(move || places.take_now(&name, wish)).await??;
        Ok(self.answer_names(place))
    }

    /// As many places as names, or none.
    pub(crate) async fn take_all(
        self: &Arc<Self>,
        names: &[String],
        wish: &Wish,
    ) -> Result<Vec<Arc<Place>>, Error> {
        let taken = names.iter().map(|name| self.take(name, wish.clone()));
        let taken = futures_util::future::join_all(taken).await;
        let (places, failed): (Vec<_>, Vec<_>) = taken.into_iter().partition(Result::is_ok);
        let places: Vec<Arc<Place>> = places.into_iter().flatten().map(Arc::new).collect();
        let Some(Err(e)) = failed.into_iter().next() else {
            return Ok(places);
        };
        for place in places {
            self.give_back(&place).await;
        }
        Err(e)
    }

    /// The place of a sandbox that an earlier daemon gave it.
    pub(crate) async fn adopt(self: &Arc<Self>, record: &PlaceRecord) -> Place {
        let (places, record) = (Arc::clone(self), record.clone());
        let adopted = blocking(move || places.adopt_now(&record)).await;
        match adopted {
            Ok(place) => self.answer_names(place),
            Err(e) => {
                warn!(error = e.chain(), "the place of a sandbox is lost");
                Place::new(None, None, Policy::NONE)
            }
        }
    }

    /// Changes what a sandbox may reach, while it runs.
    pub(crate) async fn set_policy(&self, place: &Place, policy: Policy) -> Result<(), Error> {
        let (Some(networks), Some(slot), Mode::Nat) =
            (&self.networks, &place.slot, place.policy().mode())
        else {
            return Err(no_network("it was started without one"));
        };
        if let Some((names, _)) = &place.names {
            names.set_policy(policy.clone());
        }
        let (slot, refused, new) = (Arc::clone(slot), networks.refused.clone(), policy.clone());
        blocking(move || slot.apply(&new, &refused))
            .await?
            .map_err(slot_error)?;
        *place.policy.lock().unwrap_or_else(PoisonError::into_inner) = policy;
        Ok(())
    }

    /// Takes a place back. The VM must be gone.
    pub(crate) async fn give_back(&self, place: &Place) {
        if let Some((_, task)) = &place.names {
            task.abort();
        }
        if let (Some(networks), Some(slot)) = (&self.networks, &place.slot) {
            networks.pool.release(slot.index());
        }
        let Some(leaf) = place.leaf.clone() else {
            return;
        };
        if let Ok(Err(e)) = blocking(move || leaf.remove()).await {
            warn!(error = chain(&e), "a control group may have leaked");
        }
    }

    /// Ends what works ahead, and removes what nobody uses. Slots in use stay, for the next daemon. Blocks.
    pub(crate) fn close(&self) {
        if let Some(networks) = &self.networks {
            networks.pool.close();
        }
        // Only an empty group goes.
        if let Some(groups) = &self.groups {
            groups.remove_if_empty();
        }
    }

    fn take_now(&self, name: &str, wish: Wish) -> Result<Place, Error> {
        let problem = self.networks.as_ref().and_then(Networks::problem);
        let networks = self.networks.as_ref().filter(|_| problem.is_none());
        let policy = match (wish.policy.clone(), networks) {
            (Some(policy), None) if policy.mode() == Mode::Nat => {
                let known = self.missing.iter().find(|m| m.what == "network");
                let known = problem.or_else(|| known.map(|missing| missing.why.as_str()));
                return Err(no_network(known.unwrap_or(TOLD_TO_HAVE_NONE)));
            }
            (Some(policy), _) => policy,
            (None, Some(_)) if wish.device => Policy::default(),
            (None, _) => Policy::NONE,
        };
        let disks = Disks::of(&wish);
        let not_enforced = limits::not_enforced(&wish, &disks, |controller| self.has(controller));
        if self.required && !not_enforced.is_empty() {
            return Err(unlimited(&not_enforced));
        }
        let slot = networks
            .map(|networks| networks.take(&policy))
            .transpose()?;
        match self.leaf(name, &wish, &disks) {
            Ok(leaf) => Ok(Place {
                vcpus: wish.vcpus,
                limits: wish.limits,
                not_enforced: not_enforced.into_iter().map(str::to_owned).collect(),
                ..Place::new(slot, leaf, policy)
            }),
            Err(e) => {
                if let (Some(networks), Some(slot)) = (&self.networks, slot) {
                    networks.pool.release(slot.index());
                }
                Err(e)
            }
        }
    }

    fn leaf(&self, name: &str, wish: &Wish, disks: &Disks) -> Result<Option<Leaf>, Error> {
        let Some(root) = &self.groups else {
            return Ok(None);
        };
        // What nobody enforces is told in `not_enforced`; to fail for it would be of no use to anybody.
        let limits = limits::enforced(wish, disks, |controller| self.has(controller));
        let made = root.leaf(name, &limits).map_err(|e| {
            Error::new(
                ErrorCode::Internal,
                format!("sandbox {name} cannot be limited"),
            )
            .with_source(e)
        })?;
        Ok(Some(made))
    }

    fn has(&self, controller: &str) -> bool {
        let of = |root: &cgroup::Root| root.controllers().iter().any(|known| known == controller);
        self.groups.as_ref().is_some_and(of)
    }

    fn adopt_now(&self, record: &PlaceRecord) -> Place {
        let policy = record.policy();
        let slot = match (&self.networks, record.slot) {
            (Some(networks), Some(index)) => networks.adopt(index, &policy),
            _ => None,
        };
        let leaf = record.cgroup.clone().and_then(Leaf::at);
        Place {
            vcpus: record.vcpus,
            limits: record.limits,
            not_enforced: record.not_enforced.clone(),
            ..Place::new(slot, leaf, policy)
        }
    }

    /// Begins to answer the guest's questions for names.
    fn answer_names(&self, mut place: Place) -> Place {
        let networked = place.policy().mode() == Mode::Nat;
        let (Some(networks), Some(slot), true) = (&self.networks, &mut place.slot, networked)
        else {
            return place;
        };
        let Some(sockets) = Arc::get_mut(slot).and_then(Slot::take_names) else {
            return place;
        };
        let ruled = Arc::clone(slot);
        let enforce: dns::Enforce = Arc::new(move |rules| ruled.rule(rules).map_err(|e| chain(&e)));
        let policy = place
            .policy
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let names = Names::new(
            slot.ways(),
            policy,
            &networks.refused,
            &networks.upstream,
            enforce,
        );
        let task: JoinHandle<()> = tokio::spawn({
            let (names, index) = (names.clone(), slot.index());
            async move {
                if let Err(e) = names.serve(sockets).await {
                    warn!(slot = index, error = %e, "names are no longer answered");
                }
            }
        });
        place.names = Some((names, task.abort_handle()));
        place
    }
}

impl Place {
    fn new(slot: Option<Slot>, leaf: Option<Leaf>, policy: Policy) -> Self {
        Self {
            slot: slot.map(Arc::new),
            policy: Mutex::new(policy),
            names: None,
            leaf,
            vcpus: 0,
            limits: PlaceLimits::default(),
            not_enforced: vec![],
        }
    }

    /// What the VM may use of it, under an engine that [opens taps](forkd_engine::Engine::opens_taps) or does not.
    pub(crate) fn handles(&self, opens_taps: bool) -> Result<SlotHandles, Error> {
        let failed = |what: &str, e: std::io::Error| {
            Error::new(ErrorCode::Internal, format!("cannot hand {what} to a VM")).with_source(e)
        };
        let network = |e| failed("a network device", e);
        let (open, named) = match opens_taps {
            true => (None, self.network()),
            false => (self.network(), None),
        };
        let tap = open.map(Slot::tap).transpose().map_err(network)?;
        let tap_name = named.map(Slot::let_go_of_tap).transpose();
        let netns = named.map(Slot::namespace).transpose();
        let cgroup = self.leaf.as_ref().map(Leaf::open).transpose();
        let cgroup = cgroup.map_err(|e| {
            Error::new(ErrorCode::Internal, "cannot hand a control group to a VM").with_source(e)
        })?;
        Ok(SlotHandles {
            cgroup,
            tap,
            tap_name: tap_name.map_err(network)?.map(str::to_owned),
            netns: netns.map_err(network)?,
            uid: self.slot.as_ref().map(|slot| address::user(slot.index())),
        })
    }

    /// What the guest is told of its network.
    pub(crate) fn guest_network(&self) -> Option<GuestNetwork> {
        self.network().map(|slot| GuestNetwork {
            address: format!("{}/{}", address::GUEST, address::GUEST_PREFIX),
            gateway: address::GATEWAY.to_string(),
            dns: vec![address::GATEWAY.to_string()],
            mac: None,
            gateway_mac: Some(address::gateway_mac()),
            v6: slot.ways().v6.then(|| GuestNetwork6 {
                address: format!("{}/{}", address::GUEST6, address::GUEST_PREFIX6),
                gateway: address::GATEWAY6.to_string(),
            }),
        })
    }

    /// The name of its network namespace.
    pub(crate) fn netns(&self) -> Option<String> {
        self.network().map(|slot| slot.netns().to_owned())
    }

    /// The address its connections come from, on the host.
    pub(crate) fn outer(&self) -> Option<Ipv4Addr> {
        self.network().map(|slot| address::outer(slot.index()))
    }

    /// The slot, if the guest may use its network.
    fn network(&self) -> Option<&Slot> {
        let networked = self.policy().mode() == Mode::Nat;
        self.slot.as_deref().filter(|_| networked)
    }

    /// The virtual CPUs of the machine that lives there.
    pub(crate) fn vcpus(&self) -> u32 {
        self.vcpus.max(1)
    }

    /// The limits that were asked for, besides that of memory.
    pub(crate) fn limits(&self) -> PlaceLimits {
        self.limits
    }

    /// Limits that were asked for and are not enforced.
    pub(crate) fn not_enforced(&self) -> &[String] {
        &self.not_enforced
    }

    /// What its guest may reach.
    pub(crate) fn policy(&self) -> Policy {
        self.policy
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Whether its memory ran out.
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        self.leaf
            .as_ref()
            .is_some_and(|leaf| leaf.usage().oom_kills > 0)
    }

    /// What is to be kept of it.
    pub(crate) fn record(&self) -> PlaceRecord {
        let policy = self.policy();
        let texts =
            |rules: &[forkd_slot::policy::Rule]| rules.iter().map(ToString::to_string).collect();
        PlaceRecord {
            slot: self.slot.as_ref().map(|slot| slot.index()),
            vcpus: self.vcpus,
            limits: self.limits,
            not_enforced: self.not_enforced.clone(),
            cgroup: self.leaf.as_ref().map(|leaf| leaf.path().to_owned()),
            nat: policy.mode() == Mode::Nat,
            allow: texts(policy.allow()),
            deny: texts(policy.deny()),
        }
    }
}

impl PlaceRecord {
    /// The policy. What cannot be read any more is no reason to open everything: then there is no network.
    fn policy(&self) -> Policy {
        let rules = |texts: &[String]| {
            texts
                .iter()
                .map(|text| text.parse())
                .collect::<Result<Vec<_>, _>>()
        };
        if !self.nat {
            return Policy::NONE;
        }
        let read =
            rules(&self.allow).and_then(|allow| Policy::new(Mode::Nat, allow, rules(&self.deny)?));
        read.unwrap_or(Policy::NONE)
    }
}

fn unlimited(what: &[&str]) -> Error {
    let text = format!(
        "this node must enforce every limit, but cannot enforce {}",
        what.join(", ")
    );
    Error::new(ErrorCode::Incompatible, text).with_remedy(
        "leave that limit out; one on input and output needs images, snapshots and the run directory on a disk, \
         not on overlay or a network file system",
    )
}

/// The group of this node's sandboxes, swept of what no record names. Several nodes may share the group above.
fn open_groups(
    config: &Isolation,
    owner: &Path,
    in_use: &[PlaceRecord],
) -> Result<Option<cgroup::Root>, String> {
    if !config.limits {
        return Ok(None);
    }
    let root = match &config.cgroup_root {
        Some(root) => root.clone(),
        None => {
            let mount =
                cgroup::mount_point().ok_or_else(|| cgroup::Error::NotMounted.to_string())?;
            mount.join("forkd")
        }
    };
    let shared = cgroup::Root::open(&root).map_err(|e| chain(&e))?;
    // A node is where its state is: that directory is the same after a restart, and no other node has it.
    let home = owner.parent().and_then(|dir| std::fs::metadata(dir).ok());
    let home = home.ok_or("the directory of the state file cannot be looked at")?;
    let name = format!("node-{:x}-{:x}", home.dev(), home.ino());
    let ours = cgroup::Root::open(&shared.path().join(name)).map_err(|e| chain(&e))?;
    for leaf in ours.leaves("").map_err(|e| chain(&e))? {
        if !in_use
            .iter()
            .any(|record| record.cgroup.as_deref() == Some(leaf.path()))
        {
            leaf.remove().map_err(|e| chain(&e))?;
        }
    }
    Ok(Some(ours))
}
