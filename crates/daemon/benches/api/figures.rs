//! One function per figure.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use forkd_engine::fake::Fake;
use forkd_engine::{Engine, ForkSpec, Lifetime, MachineSpec, SnapshotFiles, TemplateSpec};
use serde_json::json;

use super::daemon::Daemon;

/// How long the same forks take through the interface and of the engine alone, ms; medians.
#[derive(Debug)]
pub(crate) struct Cost {
    /// From the request to the answer.
    pub(crate) api: f64,
    /// `Template::fork` of as many.
    pub(crate) engine: f64,
}

impl Cost {
    /// What the interface adds.
    pub(crate) fn added(&self) -> f64 {
        self.api - self.engine
    }
}

/// Forks `n` at once, `rounds` times, with and without the daemon.
pub(crate) fn fork_cost(daemon: &Daemon, n: u32, rounds: usize) -> io::Result<Cost> {
    let (ids, _) = daemon.fork(1)?;
    daemon.kill(&ids)?;
    let mut api = vec![];
    for _ in 0..rounds {
        let begun = Instant::now();
        let (ids, _) = daemon.fork(n)?;
        api.push(ms(begun.elapsed()));
        daemon.kill(&ids)?;
    }
    let runtime = tokio::runtime::Runtime::new()?;
    let engine = runtime.block_on(engine_alone(daemon, n, rounds))?;
    Ok(Cost {
        api: median(api),
        engine: median(engine),
    })
}

async fn engine_alone(daemon: &Daemon, n: u32, rounds: usize) -> io::Result<Vec<f64>> {
    let snapshot = daemon.dir.path().join("data/snapshots/base");
    let file = |name: &str| daemon.dir.path().join(name);
    let run = daemon.run.path().join("engine-alone");
    let spec = TemplateSpec {
        id: "bench".to_owned(),
        run_dir: run.clone(),
        machine: MachineSpec {
            vcpus: 1,
            memory_mib: 64,
            kernel: file("kernel"),
            initramfs: file("initramfs"),
            rootfs: file("rootfs"),
            cmdline: String::new(),
            network: false,
        },
        files: SnapshotFiles {
            memory: snapshot.join("memory.bin"),
            layers: vec![],
            state: snapshot.join("state.bin"),
        },
        lifetime: Lifetime::Survive,
    };
    let template = Fake::default().template(spec).await;
    let template = template.map_err(io::Error::other)?;
    let mut took = vec![];
    for round in 0..rounds {
        let dirs = (0..n).map(|i| run.join(format!("{round}-{i}")));
        let specs: Vec<ForkSpec> = dirs
            .map(|run_dir| {
                std::fs::create_dir_all(&run_dir)?;
                let id = run_dir.display().to_string();
                Ok(ForkSpec {
                    id,
                    run_dir,
                    lifetime: Lifetime::Survive,
                    slot: None,
                })
            })
            .collect::<io::Result<_>>()?;
        let begun = Instant::now();
        let forked = template.fork(specs).await;
        took.push(ms(begun.elapsed()));
        for vm in forked {
            vm.map_err(io::Error::other)?
                .kill()
                .await
                .map_err(io::Error::other)?;
        }
    }
    Ok(took)
}

/// Requests per second, and how long each took, ms.
#[derive(Debug)]
pub(crate) struct Rate {
    pub(crate) per_second: f64,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

/// `exec` of `echo` on `clients` connections and as many sandboxes.
pub(crate) fn exec_rate(daemon: &Daemon, clients: u32, seconds: f64) -> io::Result<Rate> {
    let (ids, _) = daemon.fork(clients)?;
    let body = json!({"args": ["echo", "hello"]}).to_string();
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    let begun = Instant::now();
    let work = |id: &String| {
        let (path, body) = (format!("/v1/sandboxes/{id}/exec"), body.clone());
        let client = daemon.client();
        thread::spawn(move || -> io::Result<Vec<f64>> {
            let (mut client, mut took) = (client?, vec![]);
            while Instant::now() < until {
                let asked = Instant::now();
                let answer = client.ask("POST", &path, &body)?;
                took.push(ms(asked.elapsed()));
                let right = answer.status == 200 && answer.body.windows(5).any(|w| w == b"hello");
                if !right {
                    let text = String::from_utf8_lossy(&answer.body).into_owned();
                    return Err(io::Error::other(text));
                }
            }
            Ok(took)
        })
    };
    let threads: Vec<_> = ids.iter().map(work).collect();
    let mut all = vec![];
    for thread in threads {
        all.extend(joined(thread)?);
    }
    let elapsed = begun.elapsed().as_secs_f64();
    daemon.kill(&ids)?;
    all.sort_by(f64::total_cmp);
    Ok(Rate {
        per_second: all.len() as f64 / elapsed,
        p50: percentile(&all, 50),
        p99: percentile(&all, 99),
    })
}

/// Probes while sandboxes are made, ms.
#[derive(Debug)]
pub(crate) struct Health {
    pub(crate) p99: f64,
    pub(crate) worst: f64,
    pub(crate) probes: usize,
    /// Median time of the forks.
    pub(crate) fork_ms: f64,
}

/// Asks for `/healthz` every millisecond for as long as `n` sandboxes are made, `rounds` times.
pub(crate) fn health_during_forks(daemon: &Daemon, n: u32, rounds: usize) -> io::Result<Health> {
    let (mut all, mut forks) = (vec![], vec![]);
    for _ in 0..rounds {
        let mut client = daemon.client()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let probes = thread::spawn(move || -> io::Result<Vec<f64>> {
            let mut took = vec![];
            while !stopped.load(Ordering::Relaxed) {
                let asked = Instant::now();
                client.ask("GET", "/healthz", "")?;
                took.push(ms(asked.elapsed()));
                thread::sleep(Duration::from_millis(1));
            }
            Ok(took)
        });
        let begun = Instant::now();
        let made = daemon.fork(n);
        forks.push(ms(begun.elapsed()));
        stop.store(true, Ordering::Relaxed);
        all.extend(joined(probes)?);
        daemon.kill(&made?.0)?;
    }
    all.sort_by(f64::total_cmp);
    Ok(Health {
        p99: percentile(&all, 99),
        worst: percentile(&all, 100),
        probes: all.len(),
        fork_ms: median(forks),
    })
}

/// Until when each stage of a fork request took, ms; medians.
#[derive(Debug)]
pub(crate) struct Stages {
    pub(crate) template: f64,
    pub(crate) forked: f64,
    pub(crate) ready: f64,
    pub(crate) total: f64,
}

/// Forks `n`, `rounds` times.
pub(crate) fn fork_stages(daemon: &Daemon, n: u32, rounds: usize) -> io::Result<Stages> {
    let mut stages: [Vec<f64>; 4] = Default::default();
    for _ in 0..rounds {
        let begun = Instant::now();
        let (ids, answer) = daemon.fork(n)?;
        let total = ms(begun.elapsed());
        daemon.kill(&ids)?;
        let header = |name: &str| answer.number(name).unwrap_or(f64::NAN);
        let found = [
            header("forkd-template-ms"),
            header("forkd-forked-ms"),
            header("forkd-ready-ms"),
            total,
        ];
        for (stage, found) in stages.iter_mut().zip(found) {
            stage.push(found);
        }
    }
    let [template, forked, ready, total] = stages.map(median);
    Ok(Stages {
        template,
        forked,
        ready,
        total,
    })
}

fn joined<T>(thread: thread::JoinHandle<io::Result<T>>) -> io::Result<T> {
    thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    percentile(&values, 50)
}

fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted
        .get(last * percent / 100)
        .copied()
        .unwrap_or(f64::NAN)
}
