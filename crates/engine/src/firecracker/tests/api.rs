//! Requests against a server on a UNIX socket that says what is written here.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};

use super::super::client::{self, Error};
use super::super::request::{Extent, Request, parse_fault, parse_running};
use crate::MachineSpec;

/// What came: method, path, body.
type Seen = Arc<Mutex<Vec<(String, String, Value)>>>;

/// Answers every request with this.
fn serve(path: &Path, status: u16, answer: &'static str) -> Seen {
    let listener = UnixListener::bind(path).unwrap();
    let seen = Seen::default();
    let note = Arc::clone(&seen);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let note = Arc::clone(&note);
            let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
                let note = Arc::clone(&note);
                async move {
                    let (method, path) = (request.method().to_string(), request.uri().to_string());
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
                    note.lock().unwrap().push((method, path, body));
                    let answer = Full::new(Bytes::from_static(answer.as_bytes()));
                    hyper::Response::builder().status(status).body(answer)
                }
            });
            let http = hyper::server::conn::http1::Builder::new();
            tokio::spawn(http.serve_connection(TokioIo::new(stream), service));
        }
    });
    seen
}

async fn ask(path: &Path, request: Request<'_>) -> Result<Bytes, Error> {
    client::ask(UnixStream::connect(path).await.unwrap(), &request).await
}

fn machine() -> MachineSpec {
    MachineSpec {
        vcpus: 2,
        memory_mib: 256,
        kernel: "/k".into(),
        initramfs: "/i".into(),
        rootfs: "/r".into(),
        cmdline: "extra=1".to_owned(),
        network: true,
    }
}

#[tokio::test]
async fn requests_are_what_the_api_wants() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let seen = serve(&path, 204, "");
    let machine = machine();
    let line = super::super::arguments::kernel_command_line(&machine);
    assert!(
        line.ends_with(" extra=1") && line.contains(" forkd.off=restart "),
        "{line}"
    );
    for request in [
        Request::Machine(&machine),
        Request::BootSource("quiet"),
        Request::Disk,
        Request::Vsock,
        Request::Network("forkd-tap0"),
        Request::Start,
        Request::Pause,
        Request::Resume,
        Request::Save(Path::new("dump"), Extent::Written),
    ] {
        assert_eq!(ask(&path, request).await.unwrap(), Bytes::new());
    }
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    let put = |path: &str, body: Value| ("PUT".to_owned(), path.to_owned(), body);
    let patch = |state: &str| {
        (
            "PATCH".to_owned(),
            "/vm".to_owned(),
            json!({"state": state}),
        )
    };
    let expected = [
        put(
            "/machine-config",
            json!({"vcpu_count": 2, "mem_size_mib": 256, "smt": false}),
        ),
        put(
            "/boot-source",
            json!({"kernel_image_path": "kernel", "initrd_path": "initramfs", "boot_args": "quiet"}),
        ),
        put(
            "/drives/root",
            json!({"drive_id": "root", "path_on_host": "rootfs", "is_root_device": false, "is_read_only": true}),
        ),
        put(
            "/vsock",
            json!({"guest_cid": 3, "uds_path": "vm/vsock.sock"}),
        ),
        put(
            "/network-interfaces/net",
            json!({"iface_id": "net", "host_dev_name": "forkd-tap0", "guest_mac": "02:f0:4b:00:00:01"}),
        ),
        put("/actions", json!({"action_type": "InstanceStart"})),
        patch("Paused"),
        patch("Resumed"),
        put(
            "/snapshot/create",
            json!({"snapshot_type": "Diff", "snapshot_path": "vm/devices.tmp", "mem_file_path": "dump"}),
        ),
    ];
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn refusals_come_in_the_words_of_the_api() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    serve(
        &path,
        400,
        r#"{"fault_message": "Load error:\n no such\u0007 file"}"#,
    );
    match ask(&path, Request::Pause).await {
        Err(Error::Refused(words)) => assert_eq!(words, "Load error: no such file"),
        other => panic!("{other:?}"),
    }
    assert_eq!(parse_fault(b"not JSON"), "not JSON");
}

#[tokio::test]
async fn an_answer_is_read_and_a_closed_connection_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    serve(
        &path,
        200,
        r#"{"id": "x", "state": "Running", "vmm_version": "1.10.0"}"#,
    );
    let answer = ask(&path, Request::Status).await.unwrap();
    assert_eq!(parse_running(&answer), Some(true));
    assert_eq!(parse_running(br#"{"state": "Paused"}"#), Some(false));
    assert_eq!(parse_running(br#"{"state": "Dancing"}"#), None);
    assert_eq!(parse_running(b""), None);
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    let closed = client::ask(ours, &Request::Status);
    let closed = tokio::time::timeout(Duration::from_secs(5), closed)
        .await
        .unwrap();
    assert!(matches!(closed, Err(Error::Closed)), "{closed:?}");
}

#[tokio::test]
async fn an_answer_without_end_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let endless: &'static str = "x".repeat(2 << 20).leak();
    serve(&path, 200, endless);
    let answer = ask(&path, Request::Status).await;
    assert!(matches!(answer, Err(Error::Closed)));
}
