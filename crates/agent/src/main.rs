//! forkd-agent: PID 1 of the guest, and the HTTP server inside it.
//!
//! As PID 1 it makes the guest out of the kernel's bare start (`init`), then serves the host over
//! virtio-serial or vsock. `forkd-agent serve` does only the serving, on sockets of a normal
//! machine, for tests and for trying out.

use std::io::Write;
use std::process::ExitCode;

mod agent;
mod eval;
mod fd;
mod files;
mod init;
mod metrics;
mod process;
mod resume;
mod rpc;
mod run;
mod serve;
mod sys;
mod transport;
mod tunnel;
mod users;

const USAGE: &str = "\
usage: forkd-agent serve [--unix PATH] [--tcp ADDRESS:PORT] [--link PATH] [--vsock]

Serves the guest agent's protocol on this machine, as the user who runs it.
  --unix PATH   HTTP/1.1 and HTTP/2 on a Unix socket
  --tcp ADDR    the same on TCP; use a loopback address
  --link PATH   a Unix socket whose connections are framed like a virtio-serial port
  --vsock       vsock port 49983

As PID 1 it boots a guest instead.
";

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        console(&format!("fatal: {panic}"));
        if init::is_init() {
            init::power_off();
        }
    }));
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match &words[..] {
        _ if init::is_init() => match init::run() {
            Ok(never) => match never {},
            Err(error) => {
                console(&format!("fatal: {}", chain(&error)));
                init::power_off();
                ExitCode::FAILURE
            }
        },
        ["serve", rest @ ..] => match run::serve(rest) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                console(&chain(&error));
                ExitCode::FAILURE
            }
        },
        ["--version"] => print(concat!("forkd-agent ", env!("CARGO_PKG_VERSION"), "\n"), 0),
        ["--help" | "-h"] => print(USAGE, 0),
        _ => print(USAGE, 2),
    }
}

fn print(text: &str, status: u8) -> ExitCode {
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::from(status)
}

/// Writes one line to the console.
pub(crate) fn console(line: &str) {
    let _ = writeln!(std::io::stderr(), "forkd-agent: {line}");
}

/// An error with all its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
