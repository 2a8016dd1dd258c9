//! Serves HTTP on every transport there is.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, UnixListener, UnixStream};

use crate::agent::Agent;
use crate::rpc::Connection;
use crate::transport::link::Link;
use crate::transport::port::Port;

/// Calls at once on one connection.
const MAX_STREAMS: u32 = 256;
/// What a peer may send ahead on one call, and on all of a connection, bytes.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// What one call may have written and not yet sent, bytes.
const SEND_BUFFER: usize = 64 << 10;
/// How long to wait after a listener failed, for example for want of descriptors.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(50);

/// Marks its connection as lost when the transport ends, before anything above learns of it.
struct Watched<S> {
    stream: S,
    connection: Arc<Connection>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let result = ready!(Pin::new(&mut this.stream).poll_read(cx, buf));
        if result.is_err() || buf.filled().len() == before {
            this.connection.set_lost();
        }
        Poll::Ready(result)
    }
}

impl<S: AsyncWrite + Unpin> Watched<S> {
    fn note<T>(&self, result: io::Result<T>) -> Poll<io::Result<T>> {
        if result.is_err() {
            self.connection.set_lost();
        }
        Poll::Ready(result)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = ready!(Pin::new(&mut this.stream).poll_write(cx, bytes));
        this.note(result)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = ready!(Pin::new(&mut this.stream).poll_flush(cx));
        this.note(result)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// Serves one connection to its end. `only_h2` is for links, which need HTTP/2's flow control.
async fn connection<S>(agent: Arc<Agent>, stream: S, only_h2: bool)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connection = Arc::new(Connection::default());
    // However the connection ends, its calls were not cancelled one by one.
    let _lost = LostAtEnd(Arc::clone(&connection));
    let io = TokioIo::new(Watched {
        stream,
        connection: Arc::clone(&connection),
    });
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(Arc::clone(&connection));
        let agent = Arc::clone(&agent);
        async move { Ok::<_, Infallible>(agent.answer(request).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    if only_h2 {
        builder = builder.http2_only();
    }
    builder
        .http2()
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BUFFER);
    // A peer that breaks the protocol or leaves has ended its own connection; nobody else is hurt.
    let _ = builder.serve_connection(io, service).await;
}

struct LostAtEnd(Arc<Connection>);

impl Drop for LostAtEnd {
    fn drop(&mut self) {
        self.0.set_lost();
    }
}

/// Serves the virtio-serial port for ever.
pub(crate) async fn port(agent: Arc<Agent>, port: Port) -> io::Result<()> {
    let link = Link::new(port);
    loop {
        link_until_end(&agent, &link).await?;
    }
}

/// Serves the connections of a link until its channel ends.
pub(crate) async fn link_until_end<C>(agent: &Arc<Agent>, link: &Link<C>) -> io::Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    while let Some(stream) = link.accept().await? {
        tokio::select! {
            () = connection(Arc::clone(agent), stream, true) => {}
            () = link.superseded() => {}
        }
    }
    Ok(())
}

/// Serves every connection of a Unix socket; with `framed`, each is a channel that carries a link.
pub(crate) async fn unix(agent: Arc<Agent>, listener: UnixListener, framed: bool) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) if framed => {
                let agent = Arc::clone(&agent);
                let link = Link::new(stream);
                tokio::spawn(async move {
                    let _ = link_until_end(&agent, &link).await;
                });
            }
            Ok((stream, _)) => {
                tokio::spawn(connection(Arc::clone(&agent), stream, false));
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Serves every connection of a TCP socket.
pub(crate) async fn tcp(agent: Arc<Agent>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let _ = stream.set_nodelay(true);
                tokio::spawn(connection(Arc::clone(&agent), stream, false));
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Serves every connection of a listening vsock socket.
pub(crate) async fn vsock(agent: Arc<Agent>, listener: std::os::fd::OwnedFd) -> io::Result<()> {
    use rustix::net::SocketFlags;
    let listener = crate::sys::async_fd(listener, tokio::io::Interest::READABLE)?;
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let accepted = listener
            .async_io(tokio::io::Interest::READABLE, |fd| {
                Ok(rustix::net::accept_with(fd, flags)?)
            })
            .await;
        // A connected vsock socket is read and written like any stream socket.
        let stream = accepted.and_then(|fd| UnixStream::from_std(fd.into()));
        match stream {
            Ok(stream) => {
                tokio::spawn(connection(Arc::clone(&agent), stream, false));
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}
