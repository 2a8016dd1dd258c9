//! Running things in a guest, in the interface's terms.

use std::time::Duration;

use forkd_sandbox::guest::{Client, Error, ExecRequest, Exit, Output};
use forkd_wire::agent::connect::Code;
use forkd_wire::api::exec::{
    EXIT_NOT_ALLOWED, EXIT_NOT_FOUND, EXIT_TIMED_OUT, Exec, ExecExit, ExecResult,
};

use crate::ApiError;

/// Time limit of a command for which none was asked.
const NO_LIMIT: Duration = Duration::from_secs(366 * 24 * 3600);
/// Longest time limit that may be asked for, seconds.
const TIMEOUT_SECS_MAX: u64 = 365 * 24 * 3600;

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let missing = error.is_missing_interpreter();
        let answer = Self::from(forkd_sandbox::Error::from(error));
        match missing {
            true => answer.remedy("build the image with Python, or use exec"),
            false => answer,
        }
    }
}

/// The time limit of a request; 0 is none.
pub(crate) fn limit(secs: u64) -> Result<Option<Duration>, ApiError> {
    match secs {
        0 => Ok(None),
        1..=TIMEOUT_SECS_MAX => Ok(Some(Duration::from_secs(secs))),
        _ => Err(ApiError::invalid(format!(
            "timeout_secs is {secs}, at most {TIMEOUT_SECS_MAX} are allowed"
        ))),
    }
}

/// What to run, checked.
pub(crate) fn request(exec: &Exec) -> Result<ExecRequest, ApiError> {
    if exec.args.first().is_none_or(String::is_empty) {
        return Err(ApiError::invalid("args names no program"));
    }
    let mut request = ExecRequest::new(exec.args.iter().cloned());
    request.env = exec.env.clone();
    request.cwd = exec.cwd.clone();
    request.user = exec.user.clone();
    request.stdin = exec.stdin.is_some();
    request.timeout = limit(exec.timeout_secs)?;
    Ok(request)
}

/// Runs a command to its end.
pub(crate) async fn run(client: &Client, exec: Exec) -> Result<ExecResult, ApiError> {
    let request = request(&exec)?;
    let limit = request.timeout.unwrap_or(NO_LIMIT);
    let output = match exec.stdin {
        None => client.run(request, limit).await,
        Some(input) => with_input(client, request, input.into_bytes()).await,
    };
    match output {
        Ok(output) => Ok(result(output)),
        Err(error) => match not_started(&error) {
            Some(exit) => Ok(ExecResult {
                exit_code: exit.exit_code,
                stderr: exit.error.clone().unwrap_or_default(),
                error: exit.error,
                ..ExecResult::default()
            }),
            None => Err(error.into()),
        },
    }
}

async fn with_input(
    client: &Client,
    request: ExecRequest,
    input: Vec<u8>,
) -> Result<Output, Error> {
    let mut running = client.start(request).await?;
    let handle = running.handle();
    // A command may end without reading; then nobody waits for its input to be taken.
    let feed = async move {
        if handle.write(&input).await.is_ok() {
            let _ = handle.close_stdin().await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        output = running.collect() => output,
        () = feed => Ok(Output::default()),
    }
}

fn result(output: Output) -> ExecResult {
    let exit = exit(Exit {
        code: output.exit_code,
        signal: output.signal,
        timed_out: output.timed_out,
    });
    ExecResult {
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        exit_code: exit.exit_code,
        error: exit.error,
        timed_out: exit.timed_out,
        truncated: output.truncated,
    }
}

/// How a command ended.
pub(crate) fn exit(exit: Exit) -> ExecExit {
    if exit.timed_out {
        return ExecExit {
            exit_code: EXIT_TIMED_OUT,
            error: Some("the command's time was up and it was killed".to_owned()),
            timed_out: true,
        };
    }
    ExecExit {
        exit_code: i64::from(exit.code),
        error: None,
        timed_out: false,
    }
}

/// A command that the guest could not start is a result, as it is in a shell, not a failure of ours.
pub(crate) fn not_started(error: &Error) -> Option<ExecExit> {
    let Error::Refused { code, message } = error else {
        return None;
    };
    let exit_code = match code {
        Code::NotFound => EXIT_NOT_FOUND,
        Code::PermissionDenied => EXIT_NOT_ALLOWED,
        _ => return None,
    };
    Some(ExecExit {
        exit_code,
        error: Some(message.clone()),
        timed_out: false,
    })
}
