//! Disk, sockets, entropy and network of a real guest.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use crate::guest::{Guest, Spec};
use crate::node::lab;

const PORT: u32 = 49983;

fn md5(path: &str) -> String {
    let out = Command::new("md5sum").arg(path).output().unwrap();
    String::from_utf8_lossy(&out.stdout)[..32].to_owned()
}

/// Sends `len` bytes to the echoing guest and checks what comes back.
fn echo(guest: &Guest, len: usize, seed: u8) {
    let mut stream = guest.dial(PORT).unwrap();
    let sent: Vec<u8> = (0..len)
        .map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed))
        .collect();
    let mut writer = stream.try_clone().unwrap();
    let copy = sent.clone();
    let writing = std::thread::spawn(move || {
        writer.write_all(&copy).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    writing.join().unwrap();
    assert!(
        received == sent,
        "{} of {len} bytes came back",
        received.len()
    );
}

#[test]
fn disk_entropy_and_sockets_work() {
    let Some(_) = lab() else { return };
    let scratch = PathBuf::from("/tmp/scratch.img");
    std::fs::File::create(&scratch)
        .unwrap()
        .set_len(8 << 20)
        .unwrap();
    let words = "root,readonly,write,rng,vsock,dial";
    let spec = Spec {
        scratch: Some(scratch),
        ..Spec::new(words)
    };
    let mut guest = Guest::boot(&spec, None);
    assert!(guest.wait("root").contains("Debian"));
    println!("figure boot_to_root_ms {}", guest.elapsed_ms());
    assert_eq!(guest.wait("readonly"), "yes");
    let written = guest.wait("write");
    let status = Command::new("sh")
        .args(["-c", "head -c 4194304 /tmp/scratch.img > /tmp/scratch.head"])
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(md5("/tmp/scratch.head"), written);
    assert_eq!(guest.wait("rng"), "virtio_rng.0 64");
    guest.wait("vsock listening");
    println!("figure boot_to_python_listening_ms {}", guest.elapsed_ms());

    let start = Instant::now();
    echo(&guest, 5, 0);
    println!("figure echo_first_ms {}", start.elapsed().as_millis());
    let start = Instant::now();
    echo(&guest, 1 << 20, 7);
    println!("figure echo_one_mib_ms {}", start.elapsed().as_millis());
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let guest = &guest;
            scope.spawn(move || echo(guest, 100_000, seed));
        }
    });
    assert!(guest.dial(9).is_err(), "nobody listens there");
    assert_eq!(guest.wait("dial failed"), "ConnectionResetError");
}

#[test]
fn network_reaches_the_host() {
    let Some(_) = lab() else { return };
    let tap = crate::tap::Tap::create("forkdlab0");
    let spec = Spec {
        tap: true,
        ..Spec::new("net")
    };
    let mut guest = Guest::boot(&spec, Some(tap.fd()));
    assert_eq!(guest.wait("mac"), "02:f0:4b:00:00:01");
    assert_eq!(guest.wait("net"), "up");
    drop(guest);
}
