//! `forkd image build|ls|rm`: the image store, worked on by this process itself.

use std::path::Path;
use std::time::SystemTime;

use forkd_daemon::EngineArgs;
use forkd_image::{BuildRequest, Built, Debian, Image, KernelSource, Source, Step, Store};
use serde::Serialize;

use super::Context;
use crate::args::{ImageBuild, ImageCommand, ImageRemove};
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::progress::{Running, Steps};
use crate::session::{self, Session};
use crate::table::Table;
use crate::{agent, human, output};

/// An image in JSON.
#[derive(Debug, Serialize)]
struct Record<'a> {
    name: &'a str,
    digest: &'a str,
    source: &'a str,
    kernel_version: &'a str,
    kernel: &'a Path,
    initramfs: &'a Path,
    rootfs: &'a Path,
    size_bytes: u64,
    created_at_unix: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    reused: Option<bool>,
}

/// `forkd image`
pub(super) async fn run(context: &Context, command: ImageCommand) -> Result<(), Failure> {
    match command {
        ImageCommand::Build(args) => build_command(context, args).await,
        ImageCommand::Ls(args) => list(context, args.json).await,
        ImageCommand::Rm(args) => remove(context, &args).await,
    }
}

async fn build_command(context: &Context, args: ImageBuild) -> Result<(), Failure> {
    let json = args.json;
    let request = request(args)?;
    let steps = Steps::new(false);
    let built = build(context, request, &steps).await?;
    if json {
        return output::json(&record(&built.image, Some(built.reused)));
    }
    output::line(&built.image.name)
}

fn request(args: ImageBuild) -> Result<BuildRequest, Failure> {
    let source = match (args.oci, args.dir) {
        (Some(path), _) => Source::Oci(path),
        (None, Some(dir)) => Source::Directory(dir),
        (None, None) => {
            let mut debian = Debian::new(args.debian);
            if let Some(suite) = args.suite {
                debian.suite = suite;
            }
            debian.mirror = args.mirror;
            Source::Debian(debian)
        }
    };
    let mut request = BuildRequest::new(source, &agent::find()?);
    request.name = args.name;
    request.extra_modules = args.extra_modules;
    request.refresh = args.refresh;
    if let (Some(kernel), Some(modules)) = (args.kernel, args.modules) {
        request.kernel = KernelSource::Files { kernel, modules };
    }
    Ok(request)
}

/// Builds an image on a thread that may block; a signal stops it.
pub(super) async fn build(
    context: &Context,
    request: BuildRequest,
    steps: &Steps,
) -> Result<Built, Failure> {
    let root = context.common.paths().images;
    let mut progress = Shown {
        steps: steps.clone(),
        running: None,
        interrupt: context.interrupt.clone(),
    };
    let work = tokio::task::spawn_blocking(move || {
        let built = Store::open(&root).and_then(|store| store.build(&request, &mut progress));
        match (progress.running.take(), &built) {
            (Some(last), Ok(_)) => last.done(""),
            (Some(last), Err(_)) => last.failed(),
            (None, _) => (),
        }
        built
    });
    match work.await {
        Ok(Ok(built)) => Ok(built),
        Ok(Err(forkd_image::Error::Cancelled)) => Err(Failure::interrupted()),
        Ok(Err(error)) => Err(Failure::caused("cannot build the image", &error)),
        Err(error) => Err(Failure::caused("building the image broke off", &error)),
    }
}

/// Shows a build's progress and passes a signal on to it.
#[derive(Debug)]
struct Shown {
    steps: Steps,
    running: Option<Running>,
    interrupt: Interrupt,
}

impl forkd_image::Progress for Shown {
    fn step(&mut self, step: &Step) {
        if let Some(last) = self.running.take() {
            last.done("");
        }
        self.running = Some(self.steps.begin(format!("image: {}", step.name)));
    }

    fn message(&mut self, text: &str) {
        if let Some(running) = &self.running {
            running.detail(text);
        }
    }

    fn cancelled(&self) -> bool {
        self.interrupt.is_raised()
    }
}

async fn list(context: &Context, json: bool) -> Result<(), Failure> {
    let images = with_store(context, |store| store.list()).await?;
    if json {
        let records: Vec<Record<'_>> = images.iter().map(|image| record(image, None)).collect();
        return output::json(&records);
    }
    let mut table = Table::new(&["NAME", "DIGEST", ">AGE", ">SIZE", "KERNEL", "SOURCE"]);
    for image in &images {
        table.row([
            image.name.clone(),
            image.digest.short().to_owned(),
            human::age(human::seconds_since(unix(image.created_at))),
            human::bytes(image.size_bytes),
            image.kernel_version.clone(),
            image.source.clone(),
        ]);
    }
    output::data(&table.render())
}

async fn remove(context: &Context, args: &ImageRemove) -> Result<(), Failure> {
    if !args.force {
        let session = Session::any(&context.common, &EngineArgs::default()).await?;
        let work = |client: crate::client::Client| async move { client.snapshots().await };
        let snapshots = session::run(session, &context.interrupt, work).await?;
        for name in &args.names {
            let users: Vec<&str> = snapshots
                .iter()
                .filter(|snapshot| snapshot.image == *name)
                .map(|snapshot| snapshot.tag.as_str())
                .collect();
            if !users.is_empty() {
                let users = users.join(" ");
                return Err(
                    Failure::new(format!("the image `{name}` is used by: {users}")).with_help(
                        format!("remove them first (forkd rmi {users}), or use --force"),
                    ),
                );
            }
        }
    }
    for name in args.names.clone() {
        let shown = name.clone();
        with_store(context, move |store| store.remove(&name)).await?;
        output::line(&shown)?;
    }
    Ok(())
}

/// Works on the store on a thread that may block.
async fn with_store<T: Send + 'static>(
    context: &Context,
    work: impl FnOnce(&Store) -> Result<T, forkd_image::Error> + Send + 'static,
) -> Result<T, Failure> {
    let root = context.common.paths().images;
    let done = tokio::task::spawn_blocking(move || Store::open(&root).and_then(|s| work(&s))).await;
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Failure::new(crate::failure::chain(&error))),
        Err(error) => Err(Failure::caused("the image store broke off", &error)),
    }
}

fn record(image: &Image, reused: Option<bool>) -> Record<'_> {
    Record {
        name: &image.name,
        digest: image.digest.as_str(),
        source: &image.source,
        kernel_version: &image.kernel_version,
        kernel: &image.kernel,
        initramfs: &image.initramfs,
        rootfs: &image.rootfs,
        size_bytes: image.size_bytes,
        created_at_unix: unix(image.created_at),
        reused,
    }
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |age| age.as_secs())
}
