//! `forkd exec`: a command in a sandbox, with its streams and its exit code.

use std::io::{IsTerminal, Read, Write};

use forkd_wire::api::exec::{Exec as Request, ExecExit};
use serde::Serialize;

use super::Context;
use crate::args::Exec;
use crate::failure::{Failure, exit};
use crate::output;
use crate::process::{CHUNK, InputWriter, Process, Stream};
use crate::session::Session;

/// With `--json` output is collected; the most bytes of each stream that are.
const COLLECT_MAX: usize = 16 << 20;

/// `--json` of `forkd exec`.
#[derive(Debug, Serialize)]
struct Report {
    exit_code: i64,
    timed_out: bool,
    error: Option<String>,
    stdout: String,
    stderr: String,
    truncated: bool,
}

/// Output kept for `--json`.
#[derive(Debug, Default)]
struct Collected {
    out: Vec<u8>,
    err: Vec<u8>,
    truncated: bool,
}

/// `forkd exec`
pub(super) async fn run(context: &Context, args: &Exec) -> Result<u8, Failure> {
    match stream(context, args).await {
        Ok(code) => Ok(code),
        Err(failure) if failure.lines().is_empty() || failure.is_interrupt() => Err(failure),
        // Codes below are the guest's own: whatever else failed is forkd's.
        Err(failure) => Err(failure.with_exit(exit::EXEC_FAILED)),
    }
}

async fn stream(context: &Context, args: &Exec) -> Result<u8, Failure> {
    let client = Session::daemon(&context.common).await?.client;
    let request = Request {
        timeout_secs: args
            .timeout
            .map_or(0, |timeout| timeout.as_secs_f64().ceil() as u64),
        cwd: args.cwd.clone(),
        env: args.env.iter().cloned().collect(),
        ..Request::new(args.command.iter().cloned())
    };
    let start = Process::start(&client, &args.id, request);
    let mut process = context.interrupt.guard(start).await?;
    if !args.no_stdin && (args.interactive || !std::io::stdin().is_terminal()) {
        pass_input(process.input().writer());
    } else {
        process.input().close().await;
    }
    let mut kept = args.json.then(Collected::default);
    let ended = tokio::select! {
        ended = process.finish(|stream, data| take(&mut kept, stream, data)) => Some(ended?),
        () = context.interrupt.raised() => None,
    };
    match ended {
        Some(ended) => report(kept, ended),
        None => {
            process.stop().await;
            Err(Failure::silent(exit::INTERRUPTED))
        }
    }
}

fn take(kept: &mut Option<Collected>, stream: Stream, data: &[u8]) -> Result<(), Failure> {
    let Some(kept) = kept else {
        // Writing may wait for a slow reader; the other tasks go on meanwhile.
        return tokio::task::block_in_place(|| match stream {
            Stream::Out => output::bytes(data),
            Stream::Err => output::error_bytes(data),
        });
    };
    let all = match stream {
        Stream::Out => &mut kept.out,
        Stream::Err => &mut kept.err,
    };
    let fits = data.len().min(COLLECT_MAX - all.len());
    all.extend_from_slice(&data[..fits]);
    kept.truncated |= fits < data.len();
    Ok(())
}

/// Reads standard input on a thread of its own: nothing can end a blocking read but the process's end.
fn pass_input(mut writer: InputWriter) {
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        let mut chunk = vec![0; CHUNK];
        loop {
            let len = match input.read(&mut chunk) {
                Ok(0) => break,
                Ok(len) => len,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    output::say(&format!("warning: cannot read standard input: {error}"));
                    break;
                }
            };
            if writer.write_all(&chunk[..len]).is_err() {
                return;
            }
        }
        writer.finish();
    });
}

fn report(kept: Option<Collected>, ended: ExecExit) -> Result<u8, Failure> {
    let code = exit_code(&ended);
    if let Some(kept) = kept {
        output::json(&Report {
            exit_code: ended.exit_code,
            timed_out: ended.timed_out,
            error: ended.error,
            stdout: String::from_utf8_lossy(&kept.out).into_owned(),
            stderr: String::from_utf8_lossy(&kept.err).into_owned(),
            truncated: kept.truncated,
        })?;
    } else if ended.timed_out {
        output::say("error: the command was killed: its time was up");
        output::say("help: give it more with --timeout, or none by leaving the option out");
    } else if let Some(error) = ended.error {
        output::say(&format!("error: {error}"));
    }
    Ok(code)
}

fn exit_code(ended: &ExecExit) -> u8 {
    if ended.timed_out {
        exit::TIMEOUT
    } else {
        u8::try_from(ended.exit_code).unwrap_or(exit::EXEC_FAILED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_code_is_ours() {
        let code = |exit_code, timed_out| exit_code_of(exit_code, timed_out);
        assert_eq!(code(0, false), 0);
        assert_eq!(code(42, false), 42);
        assert_eq!(code(137, false), 137);
        assert_eq!(code(137, true), exit::TIMEOUT);
        assert_eq!(code(-1, false), exit::EXEC_FAILED);
    }

    fn exit_code_of(exit_code: i64, timed_out: bool) -> u8 {
        super::exit_code(&ExecExit {
            exit_code,
            timed_out,
            error: None,
        })
    }

    #[test]
    fn collected_output_is_bounded() {
        let mut kept = Some(Collected::default());
        let data = vec![0; COLLECT_MAX];
        take(&mut kept, Stream::Out, &data).unwrap();
        assert!(!kept.as_ref().unwrap().truncated);
        take(&mut kept, Stream::Out, b"x").unwrap();
        let kept = kept.unwrap();
        assert!(kept.truncated && kept.out.len() == COLLECT_MAX);
    }
}
