//! Files, in and out.

use std::io;

use bytes::Bytes;
use forkd_sandbox::guest::{Error, ExecRequest};
use forkd_wire::agent::connect::Code;
use forkd_wire::agent::filesystem::FileType;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::world::{PATIENCE, World};

fn once(bytes: &[u8]) -> impl futures_util::Stream<Item = io::Result<Bytes>> + Send + 'static {
    futures_util::stream::iter([Ok(Bytes::copy_from_slice(bytes))])
}

#[tokio::test]
async fn files_go_there_and_back() {
    let world = World::new().await;
    let path = world.path("new/dir/file with ü&?");
    let written = world
        .client
        .write_file(&path, once(b"hello\0\xff"), Some(0o750))
        .await
        .unwrap();
    assert_eq!(written.path, path);
    let file = world.client.read_file(&path).await.unwrap();
    assert_eq!(file.size(), Some(7));
    assert_eq!(file.collect(100).await.unwrap(), b"hello\0\xff");
    let entry = world.client.stat(&path).await.unwrap();
    assert_eq!(
        (entry.kind, entry.size, entry.mode),
        (FileType::File, 7, 0o750)
    );
    assert_eq!(
        (entry.permissions.as_str(), entry.owner.as_str()),
        ("-rwxr-x---", "root")
    );
    // Shorter content leaves nothing of the longer.
    world
        .client
        .write_file(&path, once(b"hi"), None)
        .await
        .unwrap();
    assert_eq!(
        world
            .client
            .read_file(&path)
            .await
            .unwrap()
            .collect(9)
            .await
            .unwrap(),
        b"hi"
    );
    assert!(
        world
            .client
            .read_file(&path)
            .await
            .unwrap()
            .collect(1)
            .await
            .is_err()
    );
    // Files of /proc have no size and still have content.
    let status = world.client.read_file("/proc/self/status").await.unwrap();
    assert!(!status.collect(1 << 16).await.unwrap().is_empty());
}

#[tokio::test]
async fn large_files_pass_through_little_memory() {
    const CHUNK: usize = 1 << 20;
    const COUNT: usize = 100;
    let world = World::new().await;
    let path = world.path("large");
    let chunks = (0..COUNT).map(|n| Ok(Bytes::from(vec![u8::try_from(n).unwrap(); CHUNK])));
    world
        .client
        .write_file(&path, futures_util::stream::iter(chunks), None)
        .await
        .unwrap();
    let mut file = world.client.read_file(&path).await.unwrap();
    let mut at = 0;
    while let Some(bytes) = file.next().await.unwrap() {
        for byte in &bytes {
            assert_eq!(usize::from(*byte), at / CHUNK);
            at += 1;
        }
    }
    assert_eq!(at, CHUNK * COUNT);
    let peak = world.agent_peak();
    assert!(peak < 64 << 20, "peak of {peak} bytes");
}

#[tokio::test]
async fn directories_are_made_listed_moved_and_removed() {
    let world = World::new().await;
    let client = &world.client;
    client.make_dir(&world.path("a/b/c")).await.unwrap();
    client
        .write_file(&world.path("a/x"), once(b"1"), None)
        .await
        .unwrap();
    let names = async |path: &str, depth| {
        let entries = client.list_dir(&world.path(path), depth).await.unwrap();
        entries
            .into_iter()
            .map(|entry| entry.name)
            .collect::<Vec<_>>()
    };
    assert_eq!(names("a", 0).await, ["b", "x"]);
    assert_eq!(names("a", 5).await, ["b", "c", "x"]);
    client
        .rename(&world.path("a/x"), &world.path("z/y"))
        .await
        .unwrap();
    assert_eq!(names("z", 1).await, ["y"]);
    client.remove(&world.path("a")).await.unwrap();
    for result in [
        client.stat(&world.path("a")).await.map(drop),
        client.list_dir(&world.path("a"), 1).await.map(drop),
        client.remove(&world.path("a")).await,
        client.read_file(&world.path("a")).await.map(drop),
    ] {
        assert!(
            matches!(
                result,
                Err(Error::Refused {
                    code: Code::NotFound,
                    ..
                })
            ),
            "{result:?}"
        );
    }
    let error = client.read_file(&world.path("z")).await.unwrap_err();
    assert!(error.to_string().contains("is a directory"), "{error}");
    let exists = client.make_dir(&world.path("z")).await;
    assert!(matches!(
        exists,
        Err(Error::Refused {
            code: Code::AlreadyExists,
            ..
        })
    ));
}

#[tokio::test]
async fn an_upload_that_fails_at_its_source_fails() {
    let world = World::new().await;
    let chunks = [
        Ok(Bytes::from_static(b"half")),
        Err(io::Error::other("source broke")),
    ];
    let path = world.path("half");
    let result = world
        .client
        .write_file(&path, futures_util::stream::iter(chunks), None)
        .await;
    assert!(result.is_err(), "{result:?}");
}

#[tokio::test]
async fn tunnels_carry_both_directions() {
    let world = World::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut all = Vec::new();
        stream.write_all(b"greeting ").await.unwrap();
        stream.read_to_end(&mut all).await.unwrap();
        stream.write_all(&all).await.unwrap();
    });
    let mut tunnel = world.client.tunnel(port).await.unwrap();
    let mut greeting = [0; 9];
    tunnel.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"greeting ");
    let sent = vec![9; 300_000];
    tunnel.write_all(&sent).await.unwrap();
    tunnel.shutdown().await.unwrap();
    let mut got = Vec::new();
    tunnel.read_to_end(&mut got).await.unwrap();
    assert!(got == sent);
    server.await.unwrap();
    let error = world.client.tunnel(port).await.unwrap_err();
    assert!(error.to_string().contains(&port.to_string()), "{error}");
}

#[tokio::test]
async fn metrics_and_shutdown() {
    let mut world = World::new().await;
    let metrics = world.client.metrics(PATIENCE).await.unwrap();
    assert!(
        metrics.mem_total > metrics.mem_used && metrics.cpu_count > 0,
        "{metrics:?}"
    );
    let mut background = ExecRequest::new(["sleep", "100"]);
    background.background = true;
    let pid = world.client.start(background).await.unwrap().pid();
    world.client.shutdown(PATIENCE).await.unwrap();
    let status = tokio::task::spawn_blocking(move || {
        let status = world.agent.wait().unwrap();
        (status, world)
    });
    assert!(status.await.unwrap().0.success());
    crate::world::until("the end of its processes", || !crate::world::alive(pid)).await;
}
