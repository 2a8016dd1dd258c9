//! Connections that follow each other over one channel.

use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use super::*;

#[tokio::test]
async fn a_new_connection_ends_the_one_before_it() {
    let (mut host, guest) = duplex(1 << 16);
    let link = Link::new(guest);
    let mut bytes = b"what an older peer left".to_vec();
    let first = Encoder::new(1);
    first.open(&mut bytes);
    first.data(b"one", &mut bytes);
    // The first peer is cut off in the middle of a frame.
    let mut partial = Vec::new();
    first.data(b"never whole", &mut partial);
    bytes.extend_from_slice(&partial[..9]);
    let second = Encoder::new(2);
    second.open(&mut bytes);
    first.data(b"too late", &mut bytes);
    second.data(b"two", &mut bytes);
    second.close(&mut bytes);
    host.write_all(&bytes).await.unwrap();

    let mut read = String::new();
    let mut one = link.accept().await.unwrap().unwrap();
    one.read_to_string(&mut read).await.unwrap();
    assert_eq!(read, "one");
    link.superseded().await;
    let mut two = link.accept().await.unwrap().unwrap();
    assert!(one.write_all(b"x").await.is_err());
    read.clear();
    two.read_to_string(&mut read).await.unwrap();
    assert_eq!(read, "two");
    drop(host);
    assert!(link.accept().await.unwrap().is_none());
}

#[tokio::test]
async fn what_was_begun_is_finished_before_the_next_connection() {
    let (mut host, guest) = duplex(16);
    let link = Link::new(guest);
    let mut bytes = Vec::new();
    Encoder::new(1).open(&mut bytes);
    let mut decoder = Decoder::new();
    host.write_all(&bytes[..]).await.unwrap();
    let mut one = link.accept().await.unwrap().unwrap();
    one.write_all(&[5; 100]).await.unwrap();
    // Sixteen bytes fit the channel, so this frame is stuck half way.
    assert!(
        tokio::time::timeout(std::time::Duration::from_millis(20), one.flush())
            .await
            .is_err()
    );
    let task = tokio::spawn(async move {
        let mut two = link.accept().await.unwrap().unwrap();
        two.write_all(b"fresh").await.unwrap();
        two.flush().await.unwrap();
    });
    bytes.clear();
    Encoder::new(2).open(&mut bytes);
    host.write_all(&bytes).await.unwrap();
    let mut buf = [0; 64];
    let mut heard = Vec::new();
    while heard != b"fresh" {
        let read = host.read(&mut buf).await.unwrap();
        assert_ne!(read, 0, "the channel ended early");
        let mut rest = &buf[..read];
        // One read may end one frame and bring the next.
        while let Some(frame) = decoder.next(&mut rest) {
            if frame.id == 2 {
                heard.extend_from_slice(frame.payload);
            }
        }
    }
    task.await.unwrap();
    assert_eq!(decoder.damaged(), 0);
}
