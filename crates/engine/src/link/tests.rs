//! The host's half of the link.

use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use super::*;

/// The agent's side, by hand: what arrives, frame by frame.
async fn frames(channel: &mut (impl AsyncRead + Unpin), count: usize) -> Vec<(u64, Kind, Vec<u8>)> {
    let mut decoder = Decoder::new();
    let (mut found, mut buf) = (Vec::new(), [0; 1024]);
    while found.len() < count {
        let read = channel.read(&mut buf).await.unwrap();
        assert_ne!(read, 0);
        let mut rest = &buf[..read];
        while let Some(frame) = decoder.next(&mut rest) {
            found.push((frame.id, frame.kind, frame.payload.to_vec()));
        }
    }
    found
}

#[tokio::test]
async fn opens_sends_and_closes() {
    let (host, mut guest) = duplex(64);
    let mut stream = connect(host);
    let id = stream.id;
    tokio::spawn(async move {
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();
    });
    let found = frames(&mut guest, 3).await;
    assert_eq!(found[0], (id, Kind::Open, vec![]));
    assert_eq!(found[1], (id, Kind::Data, b"hello".to_vec()));
    assert_eq!(found[2], (id, Kind::Close, vec![]));
}

#[tokio::test]
async fn reads_past_what_older_connections_left() {
    let (host, mut guest) = duplex(1 << 20);
    let mut stream = connect(host);
    let mut bytes = Vec::new();
    let old = Encoder::new(!stream.id);
    old.data(b"cut off in the middle", &mut bytes);
    let mut bytes = bytes.split_off(7);
    old.data(b"whole but old", &mut bytes);
    old.close(&mut bytes);
    let ours = Encoder::new(stream.id);
    ours.data(b"new", &mut bytes);
    ours.close(&mut bytes);
    guest.write_all(&bytes).await.unwrap();
    let mut read = Vec::new();
    stream.read_to_end(&mut read).await.unwrap();
    assert_eq!(read, b"new");
}

#[tokio::test]
async fn full_buffers_in_both_directions_do_not_lock() {
    let (host, guest) = duplex(4096);
    let stream = connect(host);
    let id = stream.id;
    let sent = vec![7; 300_000];
    let (mut read, mut write) = tokio::io::split(stream);
    let (mut from_host, mut to_host) = tokio::io::split(guest);
    let upload = sent.clone();
    let writer = tokio::spawn(async move {
        write.write_all(&upload).await.unwrap();
        write.flush().await.unwrap();
    });
    let download = sent.clone();
    let agent_writer = tokio::spawn(async move {
        let (encoder, mut bytes) = (Encoder::new(id), Vec::new());
        let mut rest = &download[..];
        while !rest.is_empty() {
            rest = &rest[encoder.data(rest, &mut bytes)..];
        }
        encoder.close(&mut bytes);
        to_host.write_all(&bytes).await.unwrap();
    });
    let agent_reader = tokio::spawn(async move { frames(&mut from_host, 1 + 37).await });
    let mut got = Vec::new();
    read.read_to_end(&mut got).await.unwrap();
    writer.await.unwrap();
    agent_writer.await.unwrap();
    let frames = agent_reader.await.unwrap();
    assert_eq!(
        frames.iter().map(|frame| frame.2.len()).sum::<usize>(),
        sent.len()
    );
    assert_eq!(got, sent);
}

#[tokio::test]
async fn a_dead_channel_is_the_end() {
    let (host, guest) = duplex(64);
    let mut stream = connect(host);
    drop(guest);
    let mut read = Vec::new();
    stream.read_to_end(&mut read).await.unwrap();
    assert!(read.is_empty());
    assert!(stream.flush().await.is_err());
}
