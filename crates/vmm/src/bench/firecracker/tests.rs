//! The conversation with Firecracker against a small server of our own, and the kernel image against
//! the loader that Firecracker uses. With the program on PATH, the program itself.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixListener;

use linux_loader::loader::{Elf, KernelLoader as _};
use serde_json::{Value, json};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;

/// Answers one request with `answer`; returns what was asked.
fn served(answer: &'static str) -> (Result<(), api::Error>, String, Value) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || {
        let mut stream = BufReader::new(listener.accept().unwrap().0);
        let (mut first, mut length) = (String::new(), 0);
        stream.read_line(&mut first).unwrap();
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).unwrap();
            if line == "\r\n" {
                break;
            }
            if let Some(value) = line.strip_prefix("Content-Length: ") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).unwrap();
        stream.get_mut().write_all(answer.as_bytes()).unwrap();
        (first, serde_json::from_slice(&body).unwrap())
    });
    let mut api = Connection::open(&socket, PATIENCE).unwrap();
    api.send("PUT", "/vm", &json!({"state": "Paused"})).unwrap();
    let answer = api.answer();
    let (first, body) = server.join().unwrap();
    (answer, first, body)
}

#[test]
fn a_request_is_asked_and_answered() {
    let (answer, first, body) = served("HTTP/1.1 204 \r\nServer: x\r\n\r\n");
    answer.unwrap();
    assert_eq!(first, "PUT /vm HTTP/1.1\r\n");
    assert_eq!(body, json!({"state": "Paused"}));
}

#[test]
fn a_refusal_is_told_in_its_own_words() {
    let text = "HTTP/1.1 400 \r\ncontent-length: 25\r\n\r\n{\"fault_message\":\"wrong!\"}";
    match served(text).0 {
        Err(api::Error::Status { status, message }) => {
            // One byte of the body was held back: it is told as it came.
            assert_eq!(
                (status, message.as_str()),
                (400, "{\"fault_message\":\"wrong!\"")
            );
        }
        other => panic!("{other:?}"),
    }
    let text = "HTTP/1.1 400 \r\nContent-Length: 26\r\n\r\n{\"fault_message\":\"wrong!\"}";
    match served(text).0 {
        Err(api::Error::Status { message, .. }) => assert_eq!(message, "wrong!"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_no_answer_is_an_error() {
    for text in [
        "",
        "hello\r\n\r\n",
        "HTTP/1.1 fine\r\n\r\n",
        "HTTP/1.1 200 \r\nContent",
    ] {
        assert!(served(text).0.is_err(), "{text:?}");
    }
    let short = "HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\nabc";
    assert!(matches!(served(short).0, Err(api::Error::Socket(_))));
}

#[test]
fn the_kernel_can_be_loaded() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap();
    let mut file = std::io::Cursor::new(kernel::image());
    let loaded = Elf::load(&memory, None, &mut file, Some(GuestAddress(1 << 20))).unwrap();
    assert_eq!(loaded.kernel_load, GuestAddress(16 << 20));
}

#[test]
#[allow(clippy::print_stdout, reason = "a test says when it is skipped")]
fn the_program_itself_restores_its_guest() {
    if program().is_none() || crate::kvm::open().is_err() {
        println!("skipped: no firecracker on PATH, or no /dev/kvm");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut firecracker = Firecracker::set_up(directory.path(), 128).unwrap();
    assert!(firecracker.version().contains("irecracker"));
    let (took, kib) = firecracker.restore(2).unwrap();
    assert!(took > 0.0 && kib.iter().all(|kib| *kib > 0.0));
}

#[test]
fn a_guests_word_is_heard_among_others_and_its_absence_told() {
    let saying = |script: &str| Machine {
        child: Command::new("sh")
            .args(["-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
        socket: PathBuf::from("/no/such/socket"),
    };
    saying("echo started; printf '\\006'; exec sleep 60")
        .hear()
        .unwrap();
    let mute = saying("echo started").hear();
    assert!(matches!(mute, Err(Error::Mute)), "{mute:?}");
}
