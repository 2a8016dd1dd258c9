//! The agent's half of [`forkd_wire::link`]: connections, one after another, over one channel.
//!
//! The channel is read by whichever connection is current. It stops at an `Open` of another id, and
//! [`Link::accept`] hands out the connection that begins there. Only HTTP/2 is served over a link:
//! its flow control makes sure that the channel is always read on.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use forkd_wire::link::{Decoder, Encoder, Kind};
use futures_util::FutureExt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

#[cfg(test)]
mod tests;

/// Encoded bytes kept before the channel must take some.
const OUT_LIMIT: usize = 32 * 1024;
/// Bytes read from the channel at once; what a virtio-serial port hands over at most.
const IN_SIZE: usize = 32 * 1024;

/// A channel that carries connections.
#[derive(Debug)]
pub(crate) struct Link<C> {
    inner: Arc<Mutex<Inner<C>>>,
    superseded: Arc<Notify>,
}

#[derive(Debug)]
struct Inner<C> {
    channel: C,
    decoder: Decoder,
    input: Box<[u8]>,
    input_at: usize,
    input_end: usize,
    out: Vec<u8>,
    out_at: usize,
    /// The connection that may read and write.
    current: Option<u64>,
    /// The connection that begins where reading has stopped.
    next: Option<u64>,
    /// Bytes of the current connection that its reader had no room for.
    spare: Vec<u8>,
    spare_at: usize,
}

fn lock<C>(inner: &Mutex<Inner<C>>) -> MutexGuard<'_, Inner<C>> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<C: AsyncRead + AsyncWrite + Unpin> Link<C> {
    pub(crate) fn new(channel: C) -> Self {
        let inner = Inner {
            channel,
            decoder: Decoder::new(),
            input: vec![0; IN_SIZE].into_boxed_slice(),
            input_at: 0,
            input_end: 0,
            out: Vec::with_capacity(OUT_LIMIT),
            out_at: 0,
            current: None,
            next: None,
            spare: Vec::new(),
            spare_at: 0,
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
            superseded: Arc::default(),
        }
    }

    /// Waits for a connection; `None` when the channel has ended, for now. The connection before is
    /// over: its stream gives nothing any more.
    pub(crate) async fn accept(&self) -> io::Result<Option<LinkStream<C>>> {
        let id = std::future::poll_fn(|cx| lock(&self.inner).poll_next(cx)).await?;
        // The connection before may have left its word unheard; it is not about this one.
        let _ = self.superseded.notified().now_or_never();
        Ok(id.map(|id| LinkStream {
            inner: Arc::clone(&self.inner),
            superseded: Arc::clone(&self.superseded),
            id,
            encoder: Encoder::new(id),
            closing: false,
        }))
    }

    /// Resolves when the host has begun another connection, or left.
    pub(crate) async fn superseded(&self) {
        self.superseded.notified().await;
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> Inner<C> {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<u64>>> {
        self.current = None;
        self.spare.clear();
        self.spare_at = 0;
        loop {
            // What the connection before has left, its end above all. It is sent while we wait.
            if let Poll::Ready(sent) = self.poll_drain(cx) {
                sent?;
            }
            if let Some(id) = self.next.take() {
                self.current = Some(id);
                return Poll::Ready(Ok(Some(id)));
            }
            let mut rest = &self.input[self.input_at..self.input_end];
            while let Some(frame) = self.decoder.next(&mut rest) {
                if frame.kind == Kind::Open {
                    self.next = Some(frame.id);
                    break;
                }
            }
            self.input_at = self.input_end - rest.len();
            if self.next.is_none() && ready!(self.poll_fill(cx))? == 0 {
                return Poll::Ready(Ok(None));
            }
        }
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut buf = ReadBuf::new(&mut self.input);
        ready!(Pin::new(&mut self.channel).poll_read(cx, &mut buf))?;
        self.input_at = 0;
        self.input_end = buf.filled().len();
        Poll::Ready(Ok(self.input_end))
    }

    fn take_spare(&mut self, buf: &mut ReadBuf<'_>) {
        let rest = &self.spare[self.spare_at..];
        let taken = rest.len().min(buf.remaining());
        buf.put_slice(&rest[..taken]);
        self.spare_at += taken;
        if self.spare_at == self.spare.len() {
            self.spare.clear();
            self.spare_at = 0;
        }
    }

    fn take_frames(&mut self, id: u64, buf: &mut ReadBuf<'_>) {
        let mut rest = &self.input[self.input_at..self.input_end];
        while buf.remaining() > 0 && self.spare.is_empty() && self.current == Some(id) {
            let Some(frame) = self.decoder.next(&mut rest) else {
                break;
            };
            match frame.kind {
                Kind::Open if frame.id != id => {
                    self.next = Some(frame.id);
                    self.current = None;
                }
                Kind::Close if frame.id == id => self.current = None,
                Kind::Data if frame.id == id => {
                    let taken = frame.payload.len().min(buf.remaining());
                    buf.put_slice(&frame.payload[..taken]);
                    self.spare.extend_from_slice(&frame.payload[taken..]);
                }
                Kind::Open | Kind::Close | Kind::Data => {}
            }
        }
        self.input_at = self.input_end - rest.len();
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.out_at < self.out.len() {
            let rest = &self.out[self.out_at..];
            let written = ready!(Pin::new(&mut self.channel).poll_write(cx, rest))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.out_at += written;
        }
        self.out.clear();
        self.out_at = 0;
        Pin::new(&mut self.channel).poll_flush(cx)
    }
}

/// One connection of a link.
#[derive(Debug)]
pub(crate) struct LinkStream<C> {
    inner: Arc<Mutex<Inner<C>>>,
    superseded: Arc<Notify>,
    id: u64,
    encoder: Encoder,
    closing: bool,
}

impl<C> Drop for LinkStream<C> {
    /// However a connection ends here, the host must learn of it: the channel itself stays.
    fn drop(&mut self) {
        let mut inner = lock(&self.inner);
        if !self.closing && inner.next.is_none() {
            self.encoder.close(&mut inner.out);
        }
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> AsyncRead for LinkStream<C> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let mut inner = lock(&this.inner);
        let before = buf.filled().len();
        loop {
            if inner.current == Some(this.id) {
                inner.take_spare(buf);
                inner.take_frames(this.id, buf);
            }
            if buf.filled().len() > before || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            if inner.current != Some(this.id) {
                this.superseded.notify_one();
                return Poll::Ready(Ok(()));
            }
            if ready!(inner.poll_fill(cx))? == 0 {
                inner.current = None;
            }
        }
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> AsyncWrite for LinkStream<C> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let mut inner = lock(&this.inner);
        if this.closing || inner.current != Some(this.id) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if inner.out.len() >= OUT_LIMIT {
            ready!(inner.poll_drain(cx))?;
        }
        Poll::Ready(Ok(this.encoder.data(bytes, &mut inner.out)))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.inner).poll_drain(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let mut inner = lock(&this.inner);
        if !this.closing && inner.current == Some(this.id) {
            this.closing = true;
            this.encoder.close(&mut inner.out);
        }
        inner.poll_drain(cx)
    }
}
