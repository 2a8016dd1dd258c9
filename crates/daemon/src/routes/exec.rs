//! Running things in a sandbox: once, streamed, in the background; and the interpreter.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use forkd_sandbox::guest::{Client, Event, Exec as Running, ExecRequest};
use forkd_wire::agent::EvalRequest;
use forkd_wire::agent::process::{ProcessSelector, Signal};
use forkd_wire::api::exec::{
    Eval, EvalResult, Exec, ExecOutput, ExecResult, ExecStarted, ProcessInfo, SignalProcess,
    StartProcess,
};
use forkd_wire::api::sandbox::Pong;
use forkd_wire::id::SandboxId;
use futures_util::Stream;
use http::StatusCode;

use super::failures::Failures;
use crate::http::extract::{Json, Path};
use crate::state::App;
use crate::{ApiError, convert, guest};

/// How long a guest that runs may take to answer.
const PING_LIMIT: Duration = Duration::from_secs(3);
/// How long the interpreter may take to tell a version.
const NUMPY_LIMIT: Duration = Duration::from_secs(1);
/// What is told where there is none.
const NO_NUMPY: &str = "not-installed";
/// How much longer than the code's own limit its result is waited for.
const EVAL_GRACE: Duration = Duration::from_secs(5);
/// Wait for code for which no limit was asked.
const EVAL_UNLIMITED: Duration = Duration::from_secs(366 * 24 * 3600);

/// Asks the guest's agent whether it is there.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/ping", tag = "guest", params(("id" = SandboxId, Path)),
    responses((status = 200, body = Pong), Failures))]
pub(crate) async fn ping(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
) -> Result<Json<Pong>, ApiError> {
    let client = app.guest(&id)?;
    let begun = Instant::now();
    let health = client.health(PING_LIMIT).await?;
    let round_trip_ms = convert::millis(begun.elapsed());
    let python = health.python.is_some();
    let numpy_version = match python {
        true => numpy_version(&client).await,
        false => Some(NO_NUMPY.to_owned()),
    };
    Ok(Json(Pong {
        pong: true,
        numpy_version,
        pid: 1,
        agent_lang: if python { "python" } else { "none" }.to_owned(),
        warmup_ready: python,
        agent_version: health.agent_version,
        kernel: health.kernel,
        round_trip_ms,
    }))
}

/// What the interpreter says, unless it has something else to do.
async fn numpy_version(client: &Client) -> Option<String> {
    let request = EvalRequest {
        language: "python".to_owned(),
        code: "__import__('importlib.metadata').metadata.version('numpy')".to_owned(),
        timeout_ms: u64::try_from(NUMPY_LIMIT.as_millis()).unwrap_or(u64::MAX),
    };
    let answer = client.eval(request, NUMPY_LIMIT).await.ok()?;
    match (answer.result, answer.error) {
        (Some(version), None) => Some(version.trim_matches('\'').to_owned()),
        (_, Some(error)) if error.contains("PackageNotFound") => Some(NO_NUMPY.to_owned()),
        _ => None,
    }
}

/// Runs a command to its end and answers with its output.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/exec", tag = "guest", params(("id" = SandboxId, Path)),
    request_body = Exec, responses((status = 200, body = ExecResult), Failures))]
pub(crate) async fn exec(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
    Json(body): Json<Exec>,
) -> Result<Json<ExecResult>, ApiError> {
    let client = app.guest(&id)?;
    Ok(Json(guest::run(&client, body).await?))
}

/// Runs a command and streams what it does as server-sent events.
///
/// `started`, then `stdout` and `stderr`, then `exit`; or `error`. The command is killed when the reader leaves.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/exec/stream", tag = "guest",
    params(("id" = SandboxId, Path)), request_body = Exec,
    responses((status = 200, content_type = "text/event-stream", body = String), Failures))]
pub(crate) async fn stream(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
    Json(body): Json<Exec>,
) -> Result<Sse<impl Stream<Item = Result<SseEvent, Infallible>>>, ApiError> {
    let client = app.guest(&id)?;
    let request = guest::request(&body)?;
    let opening = match client.start(request).await {
        Ok(running) => {
            if let Some(input) = body.stdin {
                let handle = running.handle();
                // Ends with the command: its input is refused then.
                tokio::spawn(async move {
                    if handle.write(input.as_bytes()).await.is_ok() {
                        let _ = handle.close_stdin().await;
                    }
                });
            }
            Streamed::Begins(running)
        }
        Err(error) => match guest::not_started(&error) {
            Some(exit) => Streamed::Ends(super::event("exit", &exit)),
            None => return Err(error.into()),
        },
    };
    Ok(sse(opening))
}

enum Streamed {
    Begins(Running),
    Goes(Running),
    Ends(SseEvent),
    Over,
}

fn sse(opening: Streamed) -> Sse<impl Stream<Item = Result<SseEvent, Infallible>>> {
    let events = futures_util::stream::unfold(opening, |state| async move {
        match state {
            Streamed::Begins(running) => {
                let started = ExecStarted { pid: running.pid() };
                Some((
                    Ok(super::event("started", &started)),
                    Streamed::Goes(running),
                ))
            }
            Streamed::Goes(mut running) => {
                let event = match running.next().await {
                    Ok(Some(event)) => output_event(event),
                    Ok(None) => return None,
                    Err(error) => {
                        let event = super::event("error", &ApiError::from(error).into_body());
                        return Some((Ok(event), Streamed::Over));
                    }
                };
                Some((Ok(event), Streamed::Goes(running)))
            }
            Streamed::Ends(event) => Some((Ok(event), Streamed::Over)),
            Streamed::Over => None,
        }
    });
    Sse::new(events).keep_alive(KeepAlive::default())
}

fn output_event(event: Event) -> SseEvent {
    let output = |bytes: bytes::Bytes| ExecOutput {
        data: STANDARD.encode(bytes),
    };
    match event {
        Event::Stdout(bytes) => super::event("stdout", &output(bytes)),
        Event::Stderr(bytes) => super::event("stderr", &output(bytes)),
        Event::Exit(exit) => super::event("exit", &guest::exit(exit)),
    }
}

/// Runs code in the interpreter that was warm when the snapshot was made. It keeps its state.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/eval", tag = "guest", params(("id" = SandboxId, Path)),
    request_body = Eval, responses((status = 200, body = EvalResult), Failures))]
pub(crate) async fn eval(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
    Json(body): Json<Eval>,
) -> Result<Json<EvalResult>, ApiError> {
    let limit = guest::limit(body.timeout_secs)?;
    let client = app.guest(&id)?;
    let request = EvalRequest {
        language: "python".to_owned(),
        code: body.code,
        timeout_ms: body.timeout_secs.saturating_mul(1000),
    };
    let deadline = limit.map_or(EVAL_UNLIMITED, |limit| limit + EVAL_GRACE);
    let answer = client.eval(request, deadline).await?;
    Ok(Json(EvalResult {
        result: answer.result,
        exit_code: i64::from(answer.error.is_some()),
        error: answer.error,
        stdout: answer.stdout,
        stderr: answer.stderr,
        traceback: answer.traceback,
        truncated: answer.truncated,
    }))
}

/// Processes that were started in the sandbox and still run.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/processes", tag = "guest", params(("id" = SandboxId, Path)),
    responses((status = 200, body = Vec<ProcessInfo>), Failures))]
pub(crate) async fn processes(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
) -> Result<Json<Vec<ProcessInfo>>, ApiError> {
    let processes = app.guest(&id)?.processes().await?;
    let info = |process: forkd_wire::agent::process::ProcessInfo| ProcessInfo {
        pid: process.pid,
        args: std::iter::once(process.config.cmd)
            .chain(process.config.args)
            .collect(),
    };
    Ok(Json(processes.into_iter().map(info).collect()))
}

/// Starts a process in the background.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/processes", tag = "guest", params(("id" = SandboxId, Path)),
    request_body = StartProcess, responses((status = 201, body = ProcessInfo), Failures))]
pub(crate) async fn start(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
    Json(body): Json<StartProcess>,
) -> Result<(StatusCode, Json<ProcessInfo>), ApiError> {
    let client = app.guest(&id)?;
    if body.args.first().is_none_or(String::is_empty) {
        return Err(ApiError::invalid("args names no program"));
    }
    let request = ExecRequest {
        args: body.args.clone(),
        env: body.env,
        cwd: body.cwd,
        user: body.user,
        timeout: guest::limit(body.timeout_secs)?,
        background: true,
        ..ExecRequest::default()
    };
    let pid = client.start(request).await?.pid();
    Ok((
        StatusCode::CREATED,
        Json(ProcessInfo {
            pid,
            args: body.args,
        }),
    ))
}

/// Follows a process, from now on, as `exec/stream` does.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/processes/{pid}/stream", tag = "guest",
    params(("id" = SandboxId, Path), ("pid" = u32, Path)),
    responses((status = 200, content_type = "text/event-stream", body = String), Failures))]
pub(crate) async fn follow(
    State(app): State<App>,
    Path((id, pid)): Path<(SandboxId, u32)>,
) -> Result<Sse<impl Stream<Item = Result<SseEvent, Infallible>>>, ApiError> {
    let client = app.guest(&id)?;
    let running = client.attach(ProcessSelector::Pid(pid)).await?;
    Ok(sse(Streamed::Begins(running)))
}

/// Sends a signal to a process and all its children.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/processes/{pid}/signal", tag = "guest",
    params(("id" = SandboxId, Path), ("pid" = u32, Path)), request_body = SignalProcess,
    responses((status = 204), Failures))]
pub(crate) async fn signal(
    State(app): State<App>,
    Path((id, pid)): Path<(SandboxId, u32)>,
    Json(body): Json<SignalProcess>,
) -> Result<StatusCode, ApiError> {
    let number = signal_number(&body.signal)?;
    let client = app.guest(&id)?;
    let running = client.attach(ProcessSelector::Pid(pid)).await?;
    running.handle().signal(number).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A signal by name or number.
pub(crate) fn signal_number(text: &str) -> Result<i32, ApiError> {
    let number = text
        .parse::<i32>()
        .ok()
        .filter(|number| (1..=64).contains(number));
    let number = number.or_else(|| Signal::from_name(text).map(|signal| signal.0));
    number.ok_or_else(|| ApiError::invalid(format!("{text:?} is no signal, such as SIGTERM or 15")))
}
