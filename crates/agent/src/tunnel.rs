//! A byte stream to a TCP port of the guest.

use std::net::Ipv4Addr;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use forkd_wire::agent::connect::Code;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use crate::rpc::{self, ChannelBody, Fault, Reply};

/// How long a port of this same machine may take to accept.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Bytes read at once.
const CHUNK: usize = 16 << 10;
/// Chunks read ahead of the caller.
const QUEUE: usize = 4;

/// Connects, and answers with what comes from the port while the request's body goes to it.
pub(crate) async fn open(port: &str, request: Request<Incoming>) -> Reply {
    match connect(port).await {
        Err(fault) => fault.unary(),
        Ok(stream) => {
            let (from, to) = stream.into_split();
            let (sender, receiver) = mpsc::channel(QUEUE);
            let up = AbortOnDropHandle::new(tokio::spawn(upload(request.into_body(), to)));
            tokio::spawn(download(from, sender));
            let body = ChannelBody::boxed(receiver, up);
            rpc::reply(StatusCode::OK, "application/octet-stream", body)
        }
    }
}

async fn connect(port: &str) -> Result<TcpStream, Fault> {
    let number: u16 = port
        .parse()
        .ok()
        .filter(|number| *number != 0)
        .ok_or_else(|| Fault::invalid(format!("{port:?} is no TCP port; use 1 to 65535")))?;
    let connecting = TcpStream::connect((Ipv4Addr::LOCALHOST, number));
    match tokio::time::timeout(CONNECT_LIMIT, connecting).await {
        Ok(Ok(stream)) => {
            let _ = stream.set_nodelay(true);
            Ok(stream)
        }
        Ok(Err(error)) => Err(Fault::new(
            Code::Unavailable,
            format!(
                "nothing answers on port {number} of the guest ({error}); start the server first"
            ),
        )),
        Err(_) => Err(Fault::new(
            Code::DeadlineExceeded,
            format!(
                "port {number} of the guest did not accept within {} s",
                CONNECT_LIMIT.as_secs()
            ),
        )),
    }
}

async fn upload(mut body: Incoming, mut to: OwnedWriteHalf) {
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

async fn download(mut from: OwnedReadHalf, sender: mpsc::Sender<Bytes>) {
    loop {
        let mut buf = BytesMut::with_capacity(CHUNK);
        let read = tokio::select! {
            read = from.read_buf(&mut buf) => read,
            () = sender.closed() => return,
        };
        match read {
            Ok(0) | Err(_) => return,
            Ok(_) if sender.send(buf.freeze()).await.is_err() => return,
            Ok(_) => {}
        }
    }
}
