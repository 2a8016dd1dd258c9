//! A command on a WebSocket, with standard input and signals. The frames are described in
//! [`forkd_wire::api::exec`].

use std::time::Duration;

use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use forkd_sandbox::guest::{Client, Event, Exec as Running, ProcessHandle};
use forkd_wire::api::exec::{
    ClientMessage, Exec, ExecStarted, STDERR, STDIN, STDOUT, ServerMessage,
};
use forkd_wire::error::ErrorCode;
use forkd_wire::id::SandboxId;
use tokio::sync::mpsc;

use super::exec::signal_number;
use super::failures::Failures;
use crate::http::extract::Path;
use crate::state::App;
use crate::{ApiError, guest};

/// Longest wait for the frame that says what to run.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for the client to close its side when the command has ended.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a silent client is asked whether it is still there.
const PING_EVERY: Duration = Duration::from_secs(30);
/// Largest frame of a client, bytes.
const FRAME_MAX: usize = 1 << 20;
/// Frames of input that may wait for the command to read. Then the socket is read no further, signals
/// included; `processes/{pid}/signal` still reaches the command.
const INPUT_WAITING: usize = 64;

/// Runs a command over a WebSocket, with standard input and signals.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/exec/ws", tag = "guest", params(("id" = SandboxId, Path)),
    responses((status = 101, description = "switches to the WebSocket protocol"), Failures))]
pub(crate) async fn websocket(
    State(app): State<App>,
    Path(id): Path<SandboxId>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let client = app.guest(&id)?;
    let upgrade = upgrade.map_err(|rejection| {
        ApiError::invalid(format!("this route speaks WebSocket: {rejection}"))
            .remedy("use POST exec or exec/stream for plain HTTP")
    })?;
    let upgrade = upgrade
        .max_message_size(FRAME_MAX)
        .max_frame_size(FRAME_MAX);
    Ok(upgrade.on_upgrade(move |socket| converse(client, socket)))
}

async fn converse(client: Client, mut socket: WebSocket) {
    let last = match begin(&client, &mut socket).await {
        Ok(running) => run(running, &mut socket).await,
        Err(Failure::Gone) => return,
        Err(Failure::Told(message)) => Some(*message),
    };
    if let Some(message) = last {
        let _ = send(&mut socket, &message).await;
    }
    if socket.send(Message::Close(None)).await.is_ok() {
        // Input may still be on its way here. To close before it is read would reset the connection, and
        // the client would lose the last frame with it.
        let rest = async { while let Some(Ok(_)) = socket.recv().await {} };
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, rest).await;
    }
}

enum Failure {
    /// The client has left.
    Gone,
    /// The client is told this, and that is the end.
    Told(Box<ServerMessage>),
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self::Told(Box::new(ServerMessage::Error(error.into_body())))
    }
}

/// Waits for the first frame and starts what it names.
async fn begin(client: &Client, socket: &mut WebSocket) -> Result<Running, Failure> {
    let first = tokio::time::timeout(START_TIMEOUT, first_text(socket)).await;
    let text = first.map_err(|_| ApiError::invalid("no start frame came within 30 s"))??;
    let exec: Exec = match serde_json::from_str(&text) {
        Ok(ClientMessage::Start(exec)) => exec,
        Ok(_) => return Err(ApiError::invalid("the first frame is no start frame").into()),
        Err(error) => {
            return Err(ApiError::invalid(format!("the start frame does not fit: {error}")).into());
        }
    };
    let mut request = guest::request(&exec)?;
    request.stdin = true;
    match client.start(request).await {
        Ok(running) => Ok(running),
        Err(error) => match guest::not_started(&error) {
            Some(exit) => Err(Failure::Told(Box::new(ServerMessage::Exit(exit)))),
            None => Err(ApiError::from(error).into()),
        },
    }
}

async fn first_text(socket: &mut WebSocket) -> Result<String, Failure> {
    loop {
        match socket.recv().await {
            Some(Ok(Message::Text(text))) => return Ok(text.to_string()),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Binary(_))) => {
                return Err(ApiError::invalid("the first frame is no start frame").into());
            }
            Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Failure::Gone),
        }
    }
}

/// Input on its way to the command; `None` ends it.
type Input = Option<Bytes>;

/// Carries frames both ways until the command ends or the client leaves, which kills the command.
async fn run(mut running: Running, socket: &mut WebSocket) -> Option<ServerMessage> {
    let started = ServerMessage::Started(ExecStarted { pid: running.pid() });
    send(socket, &started).await.ok()?;
    let handle = running.handle();
    let (input, waiting) = mpsc::channel::<Input>(INPUT_WAITING);
    let feeder = tokio::spawn(feed(handle.clone(), waiting));
    let last = loop {
        tokio::select! {
            event = running.next() => match event {
                Ok(Some(Event::Stdout(bytes))) => data(socket, STDOUT, &bytes).await.ok()?,
                Ok(Some(Event::Stderr(bytes))) => data(socket, STDERR, &bytes).await.ok()?,
                Ok(Some(Event::Exit(exit))) => break ServerMessage::Exit(guest::exit(exit)),
                Ok(None) => break lost(),
                Err(error) => break ServerMessage::Error(ApiError::from(error).into_body()),
            },
            frame = socket.recv(), if input.capacity() > 0 => match frame {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
                Some(Ok(frame)) => {
                    if let Err(error) = obey(frame, &handle, &input).await {
                        break ServerMessage::Error(error.into_body());
                    }
                }
            },
            () = tokio::time::sleep(PING_EVERY) => socket.send(Message::Ping(Bytes::new())).await.ok()?,
        }
    };
    feeder.abort();
    Some(last)
}

fn lost() -> ServerMessage {
    let error = ApiError::new(
        ErrorCode::GuestUnreachable,
        "the command's end was not told",
    );
    ServerMessage::Error(error.into_body())
}

async fn feed(handle: ProcessHandle, mut waiting: mpsc::Receiver<Input>) {
    while let Some(Some(bytes)) = waiting.recv().await {
        if handle.write(&bytes).await.is_err() {
            return;
        }
    }
    let _ = handle.close_stdin().await;
}

async fn obey(
    frame: Message,
    handle: &ProcessHandle,
    input: &mpsc::Sender<Input>,
) -> Result<(), ApiError> {
    match frame {
        Message::Binary(bytes) => match bytes.first() {
            // A command that has ended its input takes no more; that is no failure.
            Some(&STDIN) => drop(input.try_send(Some(bytes.slice(1..)))),
            _ => {
                return Err(ApiError::invalid(
                    "a binary frame must begin with 0, standard input",
                ));
            }
        },
        Message::Text(text) => match serde_json::from_str(&text) {
            Ok(ClientMessage::Signal { signal }) => handle.signal(signal_number(&signal)?).await?,
            Ok(ClientMessage::CloseStdin) => drop(input.try_send(None)),
            Ok(ClientMessage::Start(_)) => {
                return Err(ApiError::invalid("a command runs already on this socket"));
            }
            Err(error) => return Err(ApiError::invalid(format!("a frame does not fit: {error}"))),
        },
        _ => {}
    }
    Ok(())
}

async fn data(socket: &mut WebSocket, stream: u8, bytes: &[u8]) -> Result<(), axum::Error> {
    let mut frame = BytesMut::with_capacity(bytes.len() + 1);
    frame.extend_from_slice(&[stream]);
    frame.extend_from_slice(bytes);
    socket.send(Message::Binary(frame.freeze())).await
}

async fn send(socket: &mut WebSocket, message: &ServerMessage) -> Result<(), axum::Error> {
    // Our own types have string keys and no failing fields, so this cannot fail.
    let text = serde_json::to_string(message).unwrap_or_default();
    socket.send(Message::Text(text.into())).await
}
