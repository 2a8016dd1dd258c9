//! Accepting connections, bounding them, and letting them finish at the end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::ServiceExt;

use super::reload::Signals;
use crate::state::App;
use crate::tls::Tls;

/// Longest time a client may take for the head of a request, and stay silent between two.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time a client may take for the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Rest after an accept that failed: out of file descriptors, most likely.
const ACCEPT_REST: Duration = Duration::from_millis(50);
/// Streams at once on one HTTP/2 connection.
const HTTP2_STREAMS: u32 = 1024;

/// What is served, and how much of it.
pub(super) struct Serving {
    pub(super) app: App,
    pub(super) router: Router,
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) max: usize,
}

/// Files this process may open: as many as the system lets it.
pub(super) fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(error = %error, "file limit not raised");
    }
}

/// Serves until a signal comes, then lets running requests finish for as long as `drain`.
pub(super) async fn serve(
    listener: TcpListener,
    serving: Serving,
    mut signals: Signals,
    drain: Duration,
) {
    let places = Arc::new(Semaphore::new(serving.max));
    let graceful = GracefulShutdown::new();
    let serving = Arc::new(serving);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            name = signals.next() => {
                tracing::info!(signal = name, "draining");
                break;
            }
        };
        match accepted {
            Ok((stream, remote)) => {
                take(&serving, &places, &graceful, stream, remote);
            }
            Err(error) => {
                tracing::warn!(error = %error, "connection not accepted");
                tokio::time::sleep(ACCEPT_REST).await;
            }
        }
    }
    drop(listener);
    serving.app.drain();
    tokio::select! {
        () = graceful.shutdown() => {}
        () = tokio::time::sleep(drain) => tracing::warn!("requests cut off at the deadline"),
        name = signals.next() => tracing::warn!(signal = name, "requests cut off"),
    }
}

fn take(
    serving: &Arc<Serving>,
    places: &Arc<Semaphore>,
    graceful: &GracefulShutdown,
    stream: TcpStream,
    remote: SocketAddr,
) {
    let Ok(place) = Arc::clone(places).try_acquire_owned() else {
        serving.app.metrics().connections_refused.inc();
        if serving.tls.is_none() {
            tokio::spawn(refuse(stream));
        }
        return;
    };
    let serving = Arc::clone(serving);
    let watcher = graceful.watcher();
    tokio::spawn(async move {
        let _open = Open::new(serving.app.clone(), place);
        let _ = stream.set_nodelay(true);
        match serving.tls.as_ref().map(|tls| tls.acceptor()) {
            None => speak(&serving, watcher, stream, remote).await,
            Some(acceptor) => {
                let handshake = acceptor.accept(stream);
                match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
                    Ok(Ok(stream)) => speak(&serving, watcher, stream, remote).await,
                    Ok(Err(error)) => tracing::debug!(%remote, error = %error, "handshake failed"),
                    Err(_) => tracing::debug!(%remote, "handshake took too long"),
                }
            }
        }
    });
}

async fn speak<S>(
    serving: &Serving,
    watcher: hyper_util::server::graceful::Watcher,
    stream: S,
    remote: SocketAddr,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let router = serving.router.clone();
    let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
        let router = router.clone();
        async move {
            let mut request = request.map(axum::body::Body::new);
            request.extensions_mut().insert(ConnectInfo(remote));
            router.oneshot(request).await
        }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(HEAD_TIMEOUT)
        .max_concurrent_streams(HTTP2_STREAMS);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    if let Err(error) = watcher.watch(connection.into_owned()).await {
        tracing::debug!(%remote, error = %error, "connection ended");
    }
}

/// Tells a client that there is no place left, without waiting for its request.
async fn refuse(mut stream: TcpStream) {
    const BODY: &str = r#"{"error":"too many connections","code":"busy","remedy":"close idle connections, or raise --max-connections"}"#;
    let head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n\
                retry-after: 1\r\nconnection: close\r\n";
    let answer = format!("{head}content-length: {}\r\n\r\n{BODY}", BODY.len());
    let told = stream.write_all(answer.as_bytes());
    let _ = tokio::time::timeout(Duration::from_secs(1), told).await;
}

/// Counts an open connection.
struct Open {
    app: App,
    _place: OwnedSemaphorePermit,
}

impl Open {
    fn new(app: App, place: OwnedSemaphorePermit) -> Self {
        app.metrics().connections.inc();
        Self { app, _place: place }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.app.metrics().connections.dec();
    }
}
