//! Measures forks and branches with the test guest, beside a floor measured in the same minutes.
//!
//! Everything is timed by the controller, from the control message to the guest's first own word
//! after the fork: it has executed. Floor and figure are measured in turn, so that a machine whose
//! speed changes from minute to minute slows both.

mod figures;
mod firecracker;
pub mod floor;
mod load;
mod report;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use forkd_wire::vmm::{Request, Stages};

use crate::client::{self, Process, SnapshotFiles};
use crate::control::failure;
use crate::guest::FILL;
use figures::Figures;
use firecracker::{Firecracker, Samples};

/// How to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// Print JSON.
    pub json: bool,
    /// Guest memory.
    pub memory_mib: u32,
    /// Rounds.
    pub rounds: u32,
    /// Leave out the thousand.
    pub quick: bool,
    /// Another engine to compare with.
    pub compare: Option<String>,
    /// How long to wait before each round for the machine to become quiet.
    pub patience: Duration,
}

/// Single forks in a round.
const SINGLES: usize = 12;
/// Branches in a round for each amount of dirty memory.
const BRANCHES: usize = 3;
/// Templates loaded in a round, flat and scattered.
const LOADS: usize = 3;
/// Layers of the deep snapshot above its base.
const LAYERS: u32 = 8;
/// Pages each of its layers changes.
const LAYER_PAGES: u32 = 512;
/// Memory over which every second page differs in the scattered snapshot; less in a small guest.
const SCATTERED_MIB: u32 = 128;
/// First page that the guest fills: beyond its program.
const FIRST_PAGE: u32 = 256;
const PAGES_PER_MIB: u32 = 256;

/// Runs the benchmark and prints the result.
#[expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the command's output"
)]
pub fn main(options: &Options) -> ExitCode {
    match measure(options) {
        Ok(figures) if options.json => {
            println!("{}", report::json(options, &figures));
            if let Some(complaint) = figures.load.complaint() {
                eprintln!("forkd-vmm: {complaint}");
            }
        }
        Ok(figures) => print!("{}", report::text(&figures)),
        Err(error) => {
            eprintln!("forkd-vmm: {}", failure(&error).message);
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// The processes that are measured, and their files.
struct Bench {
    floor: Process,
    flat: Process,
    deep: Process,
    scattered: Scattered,
    directory: Directory,
}

/// A snapshot with data in half of its memory, and a layer over it whose pages lie apart from each other.
struct Scattered {
    program: PathBuf,
    layers: [SnapshotFiles; 2],
}

impl Scattered {
    fn set_up(
        program: &Path,
        options: &Options,
        directory: &Path,
    ) -> Result<Scattered, client::Error> {
        let filled = options.memory_mib / 2 * PAGES_PER_MIB;
        let spread = filled.min(SCATTERED_MIB * PAGES_PER_MIB);
        let mut parent = Process::boot_test_guest(program, options.memory_mib, &[])?;
        parent.run(FILL, [FIRST_PAGE, filled, 1])?;
        let base = written(&mut parent, &directory.join("filled"))?;
        let mut template = Process::template(program, "filled", std::slice::from_ref(&base), &[])?;
        let mut sandbox = template.fork_one()?;
        for page in (0..spread).step_by(2) {
            sandbox.run(FILL, [FIRST_PAGE + page, 1, 77 + page])?;
        }
        let layer = written(&mut sandbox, &directory.join("scattered"))?;
        Ok(Scattered {
            program: program.to_owned(),
            layers: [base, layer],
        })
    }

    /// Loads the lowest `count` layers and forks once: how long until the template was there, and from then
    /// until the guest ran, milliseconds.
    fn load(&self, count: usize) -> Result<(f64, f64), client::Error> {
        let start = Instant::now();
        let mut template =
            Process::template(&self.program, "scattered", &self.layers[..count], &[])?;
        let loaded = ms(start);
        template.fork_one()?;
        Ok((loaded, ms(start) - loaded))
    }

    fn measure(&self, figures: &mut Figures) -> Result<(), client::Error> {
        for _ in 0..LOADS {
            figures.load_flat.push(self.load(1)?.0);
            let (loaded, forked) = self.load(2)?;
            figures.load_scattered.push(loaded);
            figures.scattered_one.push(forked);
        }
        Ok(())
    }
}

/// A directory that is removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Result<Directory, client::Error> {
        let path = std::env::temp_dir().join(format!("forkd-vmm-bench-{}", std::process::id()));
        create_directory(&path)?;
        Ok(Directory(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        _ = std::fs::remove_dir_all(&self.0);
    }
}

fn create_directory(path: &Path) -> Result<(), client::Error> {
    let failed = |source| client::Error::System {
        step: "create a directory for snapshots",
        source,
    };
    std::fs::create_dir(path).map_err(failed)
}

fn measure(options: &Options) -> Result<Figures, client::Error> {
    let mut bench = Bench::set_up(options)?;
    let mut figures = Figures::default();
    let mut other = options
        .compare
        .as_ref()
        .map(|_| Firecracker::set_up(&bench.directory.0, options.memory_mib));
    if let Some(Ok(other)) = &other {
        let version = other.version();
        figures.compared = Some(Ok(Samples {
            version,
            ..Samples::default()
        }));
    }
    for _ in 0..options.rounds {
        figures.load.settle(options.patience);
        bench.singles(&mut figures)?;
        if let (Some(Ok(other)), Some(Ok(samples))) = (&mut other, &mut figures.compared)
            && let Err(error) = other.round(samples)
        {
            figures.compared = Some(Err(error));
        }
        figures.floor_100.push(wall(&mut bench.floor, 100)?.0);
        let (wall_ms, kib) = wall(&mut bench.flat, 100)?;
        figures.fork_100.push(wall_ms);
        figures.private_kib.extend(kib);
        if !options.quick {
            figures.floor_1000.push(wall(&mut bench.floor, 1000)?.0);
            figures.fork_1000.push(wall(&mut bench.flat, 1000)?.0);
        }
        bench.branches(options, &mut figures)?;
        bench.scattered.measure(&mut figures)?;
    }
    figures.load.end();
    if let Some(Err(error)) = other {
        figures.compared = Some(Err(error));
    }
    Ok(figures)
}

impl Bench {
    fn set_up(options: &Options) -> Result<Bench, client::Error> {
        let failed = |source| client::Error::System {
            step: "find this program",
            source,
        };
        let program = std::env::current_exe().map_err(failed)?;
        let directory = Directory::new()?;
        let scattered = Scattered::set_up(&program, options, &directory.0)?;
        let mut parent = Process::boot_test_guest(&program, options.memory_mib, &[])?;
        parent.run(FILL, [FIRST_PAGE, 16 * PAGES_PER_MIB, 1])?;
        let base = written(&mut parent, &directory.0.join("base"))?;
        drop(parent);
        let mut layers = vec![base];
        let flat = Process::template(&program, "base", &layers, &[])?;
        for layer in 0..LAYERS {
            let mut template = Process::template(&program, "deep", &layers, &[])?;
            let mut sandbox = template.fork_one()?;
            let first = FIRST_PAGE + (16 + 4 * layer) * PAGES_PER_MIB;
            sandbox.run(FILL, [first, LAYER_PAGES, 1 + layer])?;
            layers.push(written(
                &mut sandbox,
                &directory.0.join(format!("layer-{layer}")),
            )?);
        }
        let deep = Process::template(&program, "deep", &layers, &[])?;
        let mut arguments = vec!["floor".into(), "--id=floor".into()];
        arguments.push(format!("--state={}", layers[0].state.display()));
        arguments.push(format!("--layer={}", layers[0].layer_argument()));
        let mut floor = Process::start(&program, &arguments)?;
        floor.next()?;
        Ok(Bench {
            floor,
            flat,
            deep,
            scattered,
            directory,
        })
    }

    /// Floor, flat and deep, one at a time and in turn.
    fn singles(&mut self, figures: &mut Figures) -> Result<(), client::Error> {
        for _ in 0..SINGLES {
            figures.floor_one.push(single(&mut self.floor)?.0);
            let (took, stages) = single(&mut self.flat)?;
            figures.fork_one.push(took);
            figures.stages.extend(stages);
            figures.deep_one.push(single(&mut self.deep)?.0);
        }
        Ok(())
    }

    fn branches(&mut self, options: &Options, figures: &mut Figures) -> Result<(), client::Error> {
        for _ in 0..BRANCHES {
            let mut sandbox = self.flat.fork_one()?;
            sandbox.run(FILL, [FIRST_PAGE, 2 * PAGES_PER_MIB, 3])?;
            let start = Instant::now();
            let mut branch = sandbox.branch()?;
            let child = branch.template.fork_one()?;
            figures.branch_to_running.push(ms(start));
            drop(child);
            figures.branch(2, &branch);
            self.plain_fork(2, figures)?;
        }
        for dirty_mib in [64, options.memory_mib - 1] {
            for _ in 0..BRANCHES {
                let mut sandbox = self.flat.fork_one()?;
                sandbox.run(FILL, [FIRST_PAGE, dirty_mib * PAGES_PER_MIB, 3])?;
                let branch = sandbox.branch()?;
                figures.branch(dirty_mib, &branch);
                drop((sandbox, branch));
                self.plain_fork(dirty_mib, figures)?;
            }
        }
        Ok(())
    }

    /// What the kernel's fork alone takes.
    fn plain_fork(&mut self, dirty_mib: u32, figures: &mut Figures) -> Result<(), client::Error> {
        let args = [FIRST_PAGE, dirty_mib * PAGES_PER_MIB, 3];
        let ns = self.floor.run(FILL, args)?;
        let samples = figures.floor_branch.entry(dirty_mib).or_default();
        samples.push(ns as f64 / 1e6);
        Ok(())
    }
}

/// Freezes a sandbox and writes it.
fn written(sandbox: &mut Process, directory: &Path) -> Result<SnapshotFiles, client::Error> {
    create_directory(directory)?;
    let mut branch = sandbox.branch()?;
    Ok(branch.template.write(&Request::Write, directory)?.0)
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// One fork until its guest has executed, milliseconds; and where the time went.
fn single(template: &mut Process) -> Result<(f64, Option<Stages>), client::Error> {
    let start = Instant::now();
    let mut child = template.fork(1, false)?.remove(0);
    let stages = child.alive_with_stages()?;
    Ok((ms(start), stages))
}

/// Many forks until all guests have executed, milliseconds; and private memory of each child, KiB.
fn wall(template: &mut Process, count: usize) -> Result<(f64, Vec<f64>), client::Error> {
    let start = Instant::now();
    let mut children = template.fork(count, false)?;
    children.iter_mut().try_for_each(Process::alive)?;
    let took = ms(start);
    let sample = children.iter().step_by(10);
    let kib = sample
        .filter_map(|child| figures::private_kib(child.pid()))
        .collect();
    // All at once: their ends overlap.
    children.iter().for_each(Process::kill);
    Ok((took, kib))
}
