//! What the interface costs, measured on the daemon as a program. With `fake`, the default, guests cost nothing,
//! so everything measured is ours; with `qemu`, where the time of a fork of ten goes.
//!
//! ```text
//! cargo bench -p forkd-daemon                            # over the fake engine
//! cargo bench -p forkd-daemon -- qemu                    # FORKD_TEST_GUEST names a guest
//! ```
#![allow(clippy::print_stdout, reason = "the results are its output")]

mod client;
mod daemon;
mod figures;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use daemon::Daemon;

/// After this long without work the daemon has given unused memory back.
const CALM: Duration = Duration::from_secs(12);

fn main() -> io::Result<()> {
    // Cargo adds flags of its own, such as --bench.
    let engine = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    match engine.as_deref() {
        None | Some("fake") => over_the_fake(),
        Some(engine) => stages(engine),
    }
}

fn over_the_fake() -> io::Result<()> {
    let daemon = Daemon::start("fake")?;
    let idle = daemon.resident_kib()?;
    daemon.snapshot(None, 64)?;
    println!("| figure | measured | at most | |\n| --- | --- | --- | --- |");
    row(
        "idle daemon, resident",
        mib(idle),
        "30 MiB",
        idle <= 30 * 1024,
    );
    let added = figures::fork_cost(&daemon, 100, 15)?;
    let text = format!(
        "{:.1} ms ({:.1} ms, engine {:.1} ms)",
        added.added(),
        added.api,
        added.engine
    );
    row(
        "100 forks over the engine",
        text,
        "30 ms",
        added.added() <= 30.0,
    );
    let rate = figures::exec_rate(&daemon, 16, 6.0)?;
    let text = format!(
        "{:.0}/s, p50 {:.1} ms, p99 {:.1} ms",
        rate.per_second, rate.p50, rate.p99
    );
    row(
        "exec requests, at least",
        text,
        "2000/s",
        rate.per_second >= 2000.0,
    );
    let health = figures::health_during_forks(&daemon, 1000, 5)?;
    let text = format!(
        "p99 {:.1} ms, worst {:.1} ms, {} probes",
        health.p99, health.worst, health.probes
    );
    row(
        "`/healthz` while 1000 sandboxes are made",
        text,
        "p99 10 ms",
        health.p99 <= 10.0,
    );
    println!(
        "| 1000 forks in one request | {:.0} ms | | |",
        health.fork_ms
    );
    let after = daemon.resident_kib()?;
    println!("| resident after all this | {} | | |", mib(after));
    std::thread::sleep(CALM);
    let calm = daemon.resident_kib()?;
    println!("| and when it has been given back | {} | | |", mib(calm));
    Ok(())
}

/// Where the time of `POST /v1/sandboxes` with n=10 goes.
fn stages(engine: &str) -> io::Result<()> {
    let guest = std::env::var_os("FORKD_TEST_GUEST").map(PathBuf::from);
    let guest = guest.ok_or_else(|| io::Error::other("FORKD_TEST_GUEST names no guest"))?;
    let daemon = Daemon::start(engine)?;
    daemon.snapshot(Some(&guest), 512)?;
    let cold = figures::fork_stages(&daemon, 10, 1)?;
    let warm = figures::fork_stages(&daemon, 10, 7)?;
    println!("| from the request until | first fork | later forks, median |\n| --- | --- | --- |");
    for (name, cold, warm) in [
        ("the template is there", cold.template, warm.template),
        ("the last VM runs", cold.forked, warm.forked),
        ("the last guest has answered", cold.ready, warm.ready),
        ("the client has the answer", cold.total, warm.total),
    ] {
        println!("| {name} | {cold:.0} ms | {warm:.0} ms |");
    }
    Ok(())
}

fn row(figure: &str, measured: String, limit: &str, held: bool) {
    let verdict = if held { "held" } else { "**missed**" };
    println!("| {figure} | {measured} | {limit} | {verdict} |");
}

fn mib(kib: u64) -> String {
    format!("{}.{} MiB", kib / 1024, kib % 1024 * 10 / 1024)
}
