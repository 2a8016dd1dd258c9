//! A byte stream to a TCP port of a guest.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use forkd_wire::agent::TUNNEL_PATH_PREFIX;
use futures_util::StreamExt;
use http::Method;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, WriteHalf};
use tokio_util::io::ReaderStream;
use tokio_util::task::AbortOnDropHandle;

use super::{Client, Error, rpc, within};

/// How long the port may take to accept.
const OPEN_LIMIT: Duration = Duration::from_secs(15);
/// Bytes on their way in each direction.
const BUFFER: usize = 64 << 10;

/// A connection to a port of a guest. Shut down for writing, the port reads the end; dropped, the
/// connection is closed.
#[derive(Debug)]
pub struct Tunnel {
    ours: DuplexStream,
    /// Keeps the connection.
    _client: Client,
    _download: AbortOnDropHandle<()>,
}

impl Client {
    /// Connects to TCP 127.0.0.1:`port` in the guest.
    pub async fn tunnel(&self, port: u16) -> Result<Tunnel, Error> {
        let what = "tunnel";
        let (ours, theirs) = tokio::io::duplex(BUFFER);
        let (outgoing, incoming) = tokio::io::split(theirs);
        let frames = ReaderStream::new(outgoing).map(|item| item.map(Frame::data));
        let body = BodyExt::boxed_unsync(StreamBody::new(frames));
        let request = rpc::request(
            Method::POST,
            &format!("{TUNNEL_PATH_PREFIX}{port}"),
            body,
            what,
        )?;
        let response = within(what, OPEN_LIMIT, async {
            rpc::check(what, self.send(what, request).await?).await
        })
        .await?;
        let download = tokio::spawn(download(response.into_body(), incoming));
        Ok(Tunnel {
            ours,
            _client: self.clone(),
            _download: AbortOnDropHandle::new(download),
        })
    }
}

async fn download(mut body: Incoming, mut to: WriteHalf<DuplexStream>) {
    while let Some(Ok(frame)) = body.frame().await {
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if to.write_all(&data).await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}

impl AsyncRead for Tunnel {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().ours).poll_read(cx, buf)
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().ours).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().ours).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().ours).poll_shutdown(cx)
    }
}
