//! The agent behind a channel that never closes.

use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use forkd_engine::{Error as EngineError, GuestStream};
use forkd_sandbox::guest::{Client, Dial, Error, ExecRequest};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::world::{PATIENCE, World, alive};

#[tokio::test]
async fn everything_works_over_a_link() {
    let world = World::framed().await;
    let output = world
        .client
        .run(ExecRequest::shell("echo $((6*7))"), PATIENCE)
        .await
        .unwrap();
    assert_eq!(output.stdout, b"42\n");
    let line = "head -c 30000000 /dev/zero";
    let output = world
        .client
        .run(ExecRequest::shell(line), PATIENCE)
        .await
        .unwrap();
    assert!(output.truncated && output.exit_code == 0);
}

/// One channel that outlives the peers that use it, as a virtio-serial port does.
#[derive(Debug)]
struct SameChannel(
    Arc<tokio::sync::Mutex<UnixStream>>,
    Mutex<Option<tokio::task::JoinHandle<()>>>,
);

#[async_trait]
impl Dial for SameChannel {
    async fn dial(&self) -> Result<Box<dyn GuestStream>, EngineError> {
        let (ours, theirs) = tokio::io::duplex(1 << 14);
        // The peer before is gone, in the middle of whatever it was doing.
        if let Some(before) = self.1.lock().unwrap().take() {
            before.abort();
        }
        let channel = Arc::clone(&self.0);
        let task = tokio::spawn(async move {
            let mut channel = channel.lock().await;
            let (mut from_guest, mut to_guest) = tokio::io::split(&mut *channel);
            let (mut from_host, mut to_host) = tokio::io::split(theirs);
            // A port cannot be shut for writing: a peer that leaves must not end the channel for the next one.
            let _ = tokio::join!(
                tokio::io::copy(&mut from_guest, &mut to_host),
                tokio::io::copy(&mut from_host, &mut to_guest),
            );
        });
        *self.1.lock().unwrap() = Some(task);
        Ok(Box::new(forkd_engine::link::connect(ours)))
    }
}

#[tokio::test]
async fn a_new_peer_takes_over_in_the_middle_of_anything() {
    let world = World::framed().await;
    world.client.disconnect().await;
    let mut channel = UnixStream::connect(&world.dial.path).await.unwrap();
    channel.write_all(b"noise before anything").await.unwrap();
    let channel = Arc::new(tokio::sync::Mutex::new(channel));
    let dial = Arc::new(SameChannel(channel, Mutex::default()));
    let client = Client::with_dial(Arc::clone(&dial) as Arc<dyn Dial>);
    for round in 0..20 {
        // Leaves output on its way in both directions and a frame cut somewhere.
        let mut flood = ExecRequest::shell("exec head -c 100000000 /dev/zero");
        flood.background = true;
        let mut exec = client.start(flood).await.unwrap();
        for _ in 0..round {
            exec.next().await.unwrap();
        }
        let upload = futures_util::stream::repeat_with(|| Ok(bytes::Bytes::from(vec![0; 5000])));
        let (writer, path) = (client.clone(), world.path("upload"));
        let upload = tokio::spawn(async move { writer.write_file(&path, upload, None).await });
        tokio::time::sleep(Duration::from_millis(5 + round)).await;
        client.disconnect().await;
        assert!(matches!(upload.await.unwrap(), Err(Error::Lost { .. })));
        drop(exec);
        if round % 2 == 1 {
            // Long enough for the channel to learn that its peer has left before the next one comes.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let echo = ExecRequest::new(["echo".to_owned(), round.to_string()]);
        let output = client.run(echo, PATIENCE).await.unwrap();
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            format!("{round}\n")
        );
    }
}

#[tokio::test]
async fn a_process_goes_on_when_the_peer_changes() {
    let world = World::framed().await;
    let exec = world
        .client
        .start(ExecRequest::new(["sleep", "100"]))
        .await
        .unwrap();
    world.client.disconnect().await;
    world.client.health(PATIENCE).await.unwrap();
    assert!(alive(exec.pid()));
    exec.handle().kill().await.unwrap();
}

#[tokio::test]
async fn a_guest_that_talks_nonsense_is_an_error_not_a_hang() {
    #[derive(Debug)]
    struct Liar(Vec<u8>);
    #[async_trait]
    impl Dial for Liar {
        async fn dial(&self) -> Result<Box<dyn GuestStream>, EngineError> {
            let (ours, mut theirs) = tokio::io::duplex(1 << 16);
            let bytes = self.0.clone();
            tokio::spawn(async move {
                let _ = theirs.write_all(&bytes).await;
                let mut sink = vec![0; 4096];
                while theirs.read(&mut sink).await.is_ok_and(|read| read > 0) {}
            });
            Ok(Box::new(ours))
        }
    }
    let cases = [
        b"HTTP/1.1 200 OK\r\n\r\n".to_vec(),
        vec![0xff; 60_000],
        vec![0; 60_000],
    ];
    for lie in cases {
        let client = Client::with_dial(Arc::new(Liar(lie)));
        let error = client
            .run(ExecRequest::new(["true"]), Duration::from_secs(2))
            .await;
        assert!(matches!(error, Err(Error::Lost { .. })), "{error:?}");
    }
    let silent = Client::with_dial(Arc::new(Liar(Vec::new())));
    let error = silent.health(Duration::from_millis(200)).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Timeout {
                what: "health",
                millis: 200
            }
        ),
        "{error:?}"
    );
}
