//! forkd-vmm: the built-in KVM machine monitor and template process.

mod args;

use std::process::ExitCode;

use clap::Parser;
use forkd_vmm::{bench, control, host, role, start};

use args::{Args, Command};

fn main() -> ExitCode {
    let role = match Args::parse().command {
        Command::Template(args) => start::template(&args.process(), &args.snapshot()),
        Command::Floor(args) => match bench::floor::serve(&args.process(), &args.snapshot()) {
            Ok(never) => match never {},
            Err(error) => return report(&error),
        },
        Command::Boot(args) => args
            .guest()
            .and_then(|guest| start::boot(&args.process(), args.size(), guest)),
        Command::Bench(args) => return bench::main(&args.options()),
        Command::Check => return check(),
    };
    match role {
        Ok(role) => role::live(role),
        Err(error) => report(&error),
    }
}

#[expect(clippy::print_stdout, reason = "the command's output")]
fn check() -> ExitCode {
    match host::Host::open() {
        Ok(host) => {
            println!(
                "{}",
                serde_json::json!({
                    "kvm": true,
                    "vendor": host.facts.vendor,
                    "kernel": host.facts.kernel,
                    "hardware_virtualization": host::hardware_virtualization(),
                })
            );
            ExitCode::SUCCESS
        }
        Err(error) => report(&error),
    }
}

#[expect(
    clippy::print_stderr,
    reason = "the program's only way to tell a person"
)]
fn report(error: &(dyn std::error::Error + 'static)) -> ExitCode {
    eprintln!("forkd-vmm: {}", control::failure(error).message);
    ExitCode::FAILURE
}
