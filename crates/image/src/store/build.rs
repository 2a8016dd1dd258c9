//! Builds an image: each part from the cache if its inputs are known, else made and published.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::blob::{self, Cached, Kind};
use super::record::{self, Record};
use super::sweep::Scratch;
use super::{Image, Store, io_error, sweep};
use crate::digest::Digest;
use crate::kernel::{self, KernelSource};
use crate::modules::{self, Catalog, Wanted};
use crate::rootfs::{self, Plan, Source};
use crate::{Error, Progress, Step, initramfs, name, oci, tool};

/// Part of every cache key; raised when the same inputs would give another result.
const FORMAT: u32 = 1;
const STEPS: [&str; 4] = ["kernel", "root file system", "initramfs", "publish"];
/// What a kernel's maker notes beside it.
const RELEASE: &str = "release";
const ORIGIN: &str = "origin";

/// What an image shall be made of.
#[derive(Debug, Clone)]
pub struct BuildRequest {
    /// What to call it; made up from the source if not given.
    pub name: Option<String>,
    /// What the root file system is made of.
    pub source: Source,
    /// The guest's first program, linked statically.
    pub agent: PathBuf,
    /// Which kernel it boots.
    pub kernel: KernelSource,
    /// Modules besides those that every guest needs.
    pub extra_modules: Vec<String>,
    /// Looks for newer packages and builds anew even if the same was built before.
    pub refresh: bool,
}

impl BuildRequest {
    /// A request with defaults: a made-up name, Debian's kernel, no extra modules, the cache used.
    pub fn new(source: Source, agent: &Path) -> BuildRequest {
        BuildRequest {
            name: None,
            source,
            agent: agent.to_owned(),
            kernel: KernelSource::Debian,
            extra_modules: Vec::new(),
            refresh: false,
        }
    }
}

/// What a build gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    /// The image.
    pub image: Image,
    /// Whether every part of it was there already.
    pub reused: bool,
}

impl Store {
    /// Builds an image, or finds that it is built already. Another build in the same store is
    /// waited for. An image of the same name but other content is displaced, not removed.
    pub fn build(
        &self,
        request: &BuildRequest,
        progress: &mut dyn Progress,
    ) -> Result<Built, Error> {
        if let Some(name) = &request.name {
            name::image(name).map_err(Error::Name)?;
        }
        for module in &request.extra_modules {
            name::module(module).map_err(Error::Name)?;
        }
        let agent = initramfs::agent(&request.agent).map_err(Error::Initramfs)?;
        let plan = rootfs::plan(&request.source, self.dir()).map_err(Error::Rootfs)?;
        let name = request.name.clone().unwrap_or_else(|| plan.default_name());
        let lock = self.lock(progress)?;
        let mut build = Build {
            store: self,
            request,
            progress,
            made: 0,
        };
        let built = build.all(&agent, &plan, &name);
        drop(lock);
        built.map_err(cancelled)
    }
}

/// However deep a request to stop was noticed, it is the same answer.
fn cancelled(error: Error) -> Error {
    let stopped = matches!(
        &error,
        Error::Rootfs(
            rootfs::Error::Pack(tool::Error::Cancelled { .. })
                | rootfs::Error::Debian {
                    source: tool::Error::Cancelled { .. },
                    ..
                }
                | rootfs::Error::Oci {
                    source: oci::Error::Cancelled,
                    ..
                }
        ) | Error::Kernel(kernel::Error::Download {
            source: tool::Error::Cancelled { .. },
            ..
        })
    );
    if stopped { Error::Cancelled } else { error }
}

struct Build<'a> {
    store: &'a Store,
    request: &'a BuildRequest,
    progress: &'a mut dyn Progress,
    /// How many parts were not in the cache.
    made: usize,
}

impl Build<'_> {
    fn all(&mut self, agent: &[u8], plan: &Plan, name: &str) -> Result<Built, Error> {
        // The root is looked at before the kernel is fetched: what cannot work should fail at once.
        let root_key = plan.key(FORMAT);
        let root = self.cached(Kind::Rootfs, &root_key);
        if root.is_none() {
            plan.preflight(&self.store.dir).map_err(Error::Rootfs)?;
        }
        self.step(0)?;
        let kernel = self.kernel()?;
        self.step(1)?;
        let root = match root {
            Some(root) => root,
            None => self.rootfs(plan, &root_key)?,
        };
        self.step(2)?;
        let initramfs = self.initramfs(agent, &kernel)?;
        self.step(3)?;
        let image = self.publish(name, plan, kernel, initramfs, root)?;
        Ok(Built {
            image,
            reused: self.made == 0,
        })
    }

    fn step(&mut self, index: usize) -> Result<(), Error> {
        if self.progress.cancelled() {
            return Err(Error::Cancelled);
        }
        self.progress.step(&Step {
            name: STEPS[index],
            index: index + 1,
            of: STEPS.len(),
        });
        Ok(())
    }

    /// A part that need not be made. A refresh makes what may have changed at its origin.
    fn cached(&mut self, kind: Kind, inputs: &Digest) -> Option<Cached> {
        let fresh = self.request.refresh && kind != Kind::Initramfs;
        blob::cached(&self.store.dir, kind, inputs).filter(|_| !fresh)
    }

    fn scratch(&self) -> Result<Scratch, Error> {
        Scratch::new(&self.store.dir.join("tmp"))
    }

    fn kernel(&mut self) -> Result<Cached, Error> {
        let choice = kernel::choose(&self.request.kernel).map_err(Error::Kernel)?;
        let wanted: Vec<&str> = modules::GUEST.iter().map(|w: &Wanted| w.name).collect();
        let key = Digest::of_json(
            "kernel",
            &(FORMAT, &choice, wanted, &self.request.extra_modules),
        );
        if let Some(cached) = self.cached(Kind::Kernel, &key) {
            return Ok(cached);
        }
        self.made += 1;
        let scratch = self.scratch()?;
        let cache = self.store.dir.join("cache");
        let material = kernel::obtain(&choice, &cache, scratch.path(), self.progress)
            .map_err(Error::Kernel)?;
        let image = fs::read(&material.kernel).map_err(io_error("read", &material.kernel))?;
        let release = kernel::release(&image).map_err(|reason| {
            let path = material.kernel.clone();
            Error::Kernel(kernel::Error::NotAKernel { path, reason })
        })?;
        let modules = Catalog::open(&material.modules)
            .and_then(|c| c.resolve(modules::GUEST, &self.request.extra_modules, &release))
            .map_err(|source| Error::Kernel(kernel::Error::Modules(source)))?;

        let made = scratch.path().join("blob");
        let modules_dir = made.join(initramfs::MODULES);
        fs::create_dir_all(&modules_dir).map_err(io_error("create", &modules_dir))?;
        write(&made.join(blob::VMLINUZ), &image)?;
        if let Some(vmlinux) = kernel::vmlinux(&image) {
            write(&made.join(blob::VMLINUX), &vmlinux)?;
        }
        for module in &modules {
            write(&modules_dir.join(&module.file_name), &module.content)?;
        }
        let list = initramfs::load_list(&modules);
        write(&modules_dir.join(initramfs::LOAD_LIST), list.as_bytes())?;
        let notes = [(RELEASE, release), (ORIGIN, material.origin)];
        let notes = notes.map(|(key, value)| (key.to_owned(), value)).into();
        blob::publish(&self.store.dir, Kind::Kernel, &key, &made, notes)
    }

    fn rootfs(&mut self, plan: &Plan, key: &Digest) -> Result<Cached, Error> {
        self.made += 1;
        let scratch = self.scratch()?;
        let made = scratch.path().join("blob");
        fs::create_dir(&made).map_err(io_error("create", &made))?;
        plan.build(scratch.path(), &made.join(blob::ROOTFS), key, self.progress)
            .map_err(Error::Rootfs)?;
        blob::publish(&self.store.dir, Kind::Rootfs, key, &made, BTreeMap::new())
    }

    fn initramfs(&mut self, agent: &[u8], kernel: &Cached) -> Result<Cached, Error> {
        let key = Digest::of_json(
            "initramfs",
            &(FORMAT, Digest::of_bytes(agent), &kernel.blob),
        );
        if let Some(cached) = self.cached(Kind::Initramfs, &key) {
            return Ok(cached);
        }
        self.made += 1;
        let scratch = self.scratch()?;
        let made = scratch.path().join("blob");
        fs::create_dir(&made).map_err(io_error("create", &made))?;
        let kernel = blob::path(&self.store.dir, &blob::name(Kind::Kernel, &kernel.blob));
        let modules = kernel.join(initramfs::MODULES);
        initramfs::write(&made.join(blob::INITRAMFS), agent, &modules).map_err(Error::Initramfs)?;
        blob::publish(
            &self.store.dir,
            Kind::Initramfs,
            &key,
            &made,
            BTreeMap::new(),
        )
    }

    fn publish(
        &self,
        name: &str,
        plan: &Plan,
        kernel: Cached,
        initramfs: Cached,
        root: Cached,
    ) -> Result<Image, Error> {
        let store = &self.store.dir;
        let note = |key: &str| kernel.notes.get(key).cloned().unwrap_or_default();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let digest = Digest::of_json("image", &(&kernel.blob, &initramfs.blob, &root.blob));
        let record = Record {
            schema_version: record::SCHEMA_VERSION,
            name: name.to_owned(),
            digest,
            kernel_version: note(RELEASE),
            kernel_origin: note(ORIGIN),
            kernel: kernel.blob,
            initramfs: initramfs.blob,
            rootfs: root.blob,
            source: plan.describe(),
            created_at: now.map_or(0, |age| age.as_secs()),
        };
        let place = store.join("images").join(name);
        match Record::read(store, name) {
            Ok(old) if old.same_image(&record) => return old.image(store),
            // A damaged record names nothing that could be kept.
            Err(Error::Damaged { .. } | Error::Version { .. }) => self.store.drop_record(name)?,
            Err(_) if place.exists() => self.store.drop_record(name)?,
            Err(_) => {}
            Ok(old) if old.digest == record.digest => self.store.drop_record(name)?,
            Ok(old) => self.displace(name, &old.digest)?,
        }
        let scratch = self.scratch()?;
        let new = scratch.path().join("image");
        record.write(&new)?;
        fs::rename(&new, &place).map_err(io_error("publish", &place))?;
        sweep::sync_dir(&store.join("images"))?;
        record.image(store)
    }

    /// Gives the present image of a name the name of its digest.
    fn displace(&self, name: &str, digest: &Digest) -> Result<(), Error> {
        let images = self.store.dir.join("images");
        let (from, to) = (
            images.join(name),
            images.join(format!("{name}@{}", digest.short())),
        );
        if to.exists() {
            return self.store.drop_record(name);
        }
        fs::rename(&from, &to).map_err(io_error("rename", &from))
    }
}

fn write(path: &Path, content: &[u8]) -> Result<(), Error> {
    fs::write(path, content).map_err(io_error("write", path))
}
