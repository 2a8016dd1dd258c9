//! A connection to the agent over a channel that carries only one byte stream.
//!
//! The host's half of [`forkd_wire::link`]: [`connect`] begins a connection with a fresh id, so that
//! the agent drops the one before, and ignores whatever older connections left in the channel.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use forkd_wire::link::{Decoder, Encoder, Kind};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

#[cfg(test)]
mod tests;

/// Encoded bytes kept before the channel must take some.
const OUT_LIMIT: usize = 32 * 1024;
/// Bytes read from the channel at once; what a virtio-serial port hands over at most.
const IN_SIZE: usize = 32 * 1024;

/// Begins a connection over `channel`. Nothing is sent before the first write or flush.
pub fn connect<C: AsyncRead + AsyncWrite + Unpin>(channel: C) -> LinkStream<C> {
    // Ids only have to differ from those of the connections before, on this channel.
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    let id = hasher.finish();
    let encoder = Encoder::new(id);
    let mut out = Vec::with_capacity(OUT_LIMIT);
    encoder.open(&mut out);
    LinkStream {
        channel,
        id,
        encoder,
        decoder: Decoder::new(),
        out,
        out_at: 0,
        input: vec![0; IN_SIZE].into_boxed_slice(),
        input_at: 0,
        input_end: 0,
        spare: Vec::new(),
        spare_at: 0,
        ended: false,
        closing: false,
    }
}

/// A connection to the agent, framed over a channel.
pub struct LinkStream<C> {
    channel: C,
    id: u64,
    encoder: Encoder,
    decoder: Decoder,
    /// Encoded, not yet taken by the channel from `out_at` on.
    out: Vec<u8>,
    out_at: usize,
    /// Read from the channel, not yet decoded from `input_at` to `input_end`.
    input: Box<[u8]>,
    input_at: usize,
    input_end: usize,
    /// Decoded, not yet read from `spare_at` on.
    spare: Vec<u8>,
    spare_at: usize,
    /// The agent closed the connection, or the channel ended.
    ended: bool,
    /// We closed the connection.
    closing: bool,
}

impl<C> fmt::Debug for LinkStream<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkStream")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> LinkStream<C> {
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

    /// Decodes what was read until `buf` is full or nothing is left.
    fn take_frames(&mut self, buf: &mut ReadBuf<'_>) {
        let mut rest = &self.input[self.input_at..self.input_end];
        while buf.remaining() > 0 && self.spare.is_empty() && !self.ended {
            let Some(frame) = self.decoder.next(&mut rest) else {
                break;
            };
            if frame.id != self.id {
                continue;
            }
            match frame.kind {
                Kind::Open => {}
                Kind::Close => self.ended = true,
                Kind::Data => {
                    let taken = frame.payload.len().min(buf.remaining());
                    buf.put_slice(&frame.payload[..taken]);
                    self.spare.extend_from_slice(&frame.payload[taken..]);
                }
            }
        }
        self.input_at = self.input_end - rest.len();
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut buf = ReadBuf::new(&mut self.input);
        ready!(Pin::new(&mut self.channel).poll_read(cx, &mut buf))?;
        self.input_at = 0;
        self.input_end = buf.filled().len();
        self.ended |= self.input_end == 0;
        Poll::Ready(Ok(()))
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
        Poll::Ready(Ok(()))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> AsyncRead for LinkStream<C> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        loop {
            this.take_spare(buf);
            this.take_frames(buf);
            if buf.filled().len() > before || buf.remaining() == 0 || this.ended {
                return Poll::Ready(Ok(()));
            }
            ready!(this.poll_fill(cx))?;
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
        if this.closing {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if this.out.len() >= OUT_LIMIT {
            ready!(this.poll_drain(cx))?;
        }
        // One frame at a time; the channel sees them together, at the flush.
        Poll::Ready(Ok(this.encoder.data(bytes, &mut this.out)))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.channel).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.closing {
            this.closing = true;
            this.encoder.close(&mut this.out);
        }
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.channel).poll_flush(cx)
    }
}
