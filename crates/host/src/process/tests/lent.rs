//! Hostile code in the place of a monitor that opens its files by name and makes its own sockets: it has those that it
//! was lent, and no way into the network it runs in.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use super::super::root::{Contents, Lent, Root, with_libraries};
use super::super::{Confinement, Exit, User};
use super::PATIENCE;
use super::jail::{fact, is_root, namespace, start_in, told};
use crate::net::netns;

/// A user that nobody else on a test machine has.
const MONITOR: u32 = 4_000_004;

fn shared() -> Root {
    let this = std::env::current_exe().unwrap();
    let contents = Contents {
        files: with_libraries(&this).unwrap(),
        renamed: vec![(this, "monitor")],
        file_names: vec!["read", "written"],
        dir_names: vec!["own"],
        ..Contents::default()
    };
    Root::make(&contents).unwrap()
}

#[test]
fn a_monitor_has_what_it_is_lent_and_nothing_of_its_network() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("read"), "to be read").unwrap();
    fs::create_dir(path("own")).unwrap();
    chown(path("own"), Some(MONITOR), Some(MONITOR)).unwrap();
    let (read, own) = (path("read"), path("own"));
    let lent = [
        Lent {
            source: &read,
            name: "read",
            writable: false,
        },
        Lent {
            source: &own,
            name: "own",
            writable: true,
        },
    ];
    let shared = shared();
    let root = shared.with(&lent).unwrap();
    let network = netns::nameless().unwrap();
    let named = netns::enter(network.as_fd(), || {
        fs::read_link("/proc/thread-self/ns/net")
    });
    let named = named.unwrap().unwrap();
    let confine = Confinement {
        root: Some(root.clone()),
        user: Some(User {
            id: MONITOR,
            groups: vec![],
        }),
        given_network: true,
        own_sockets: true,
        file_bytes: 1 << 20,
        open_files: 64,
        threads: 16,
    };
    let facts = [fact("net", named.display()), fact("user", MONITOR)];
    let (process, mut said) = start_in(
        confine,
        Some(network),
        "lent::uses_what_it_has",
        &facts,
        vec![],
    );
    // Where it listens, so that it is known to be there.
    let began = Instant::now();
    let mut stream = loop {
        match UnixStream::connect(path("own").join("socket")) {
            Ok(stream) => break stream,
            Err(_) if began.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => panic!("{error}: {}", io::read_to_string(&mut said).unwrap()),
        }
    };
    // Lent while it runs, and taken back.
    fs::write(path("written"), "").unwrap();
    fs::set_permissions(path("written"), fs::Permissions::from_mode(0o666)).unwrap();
    let written = path("written");
    let lent = Lent {
        source: &written,
        name: "written",
        writable: true,
    };
    Root::of(process.identity().pid)
        .unwrap()
        .lend(&lent)
        .unwrap();
    stream.write_all(b"w").unwrap();
    stream.read_exact(&mut [0; 1]).unwrap();
    assert_eq!(fs::read(path("written")).unwrap(), b"by the monitor");
    root.take_back("written").unwrap();
    root.take_back("written").unwrap_err();
    stream.write_all(b"x").unwrap();
    let mut text = String::new();
    said.read_to_string(&mut text).unwrap();
    let exit = process.wait_for(PATIENCE).unwrap().expect("ended");
    assert_eq!(exit, Exit::Code(0), "{text}");
    assert!(text.contains("all was tried"), "{text}");
    assert_eq!(fs::read(path("read")).unwrap(), b"to be read");
    // Nobody else's root was touched.
    let other = shared.with(&[]).unwrap();
    other.take_back("read").unwrap_err();
}

#[test]
#[ignore = "is run by the other, in a jail"]
fn uses_what_it_has() {
    let Some(told) = told() else { return };
    assert_eq!(namespace("net").display().to_string(), told["net"]);
    assert_eq!(fs::read("/read").unwrap(), b"to be read");
    File::options().write(true).open("/read").unwrap_err();
    assert_eq!(fs::metadata("/written").unwrap().len(), 0);
    makes_no_way_out();
    let listener = UnixListener::bind("/own/socket").unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    stream.read_exact(&mut [0; 1]).unwrap();
    fs::write("/written", "by the monitor").unwrap();
    stream.write_all(b"w").unwrap();
    stream.read_exact(&mut [0; 1]).unwrap();
    let gone = fs::write("/written", "too late");
    gone.expect_err("what was taken back is written to");
    println!("all was tried");
}

/// Of sockets only local ones; and no name that leads the daemon elsewhere when it looks into the directory.
fn makes_no_way_out() {
    let unknown = |error: io::Error| {
        assert_eq!(error.raw_os_error(), Some(libc::ENOSYS), "{error}");
    };
    unknown(UdpSocket::bind("127.0.0.1:0").unwrap_err());
    unknown(TcpListener::bind("[::1]:0").unwrap_err());
    for family in [
        rustix::net::AddressFamily::NETLINK,
        rustix::net::AddressFamily::PACKET,
        rustix::net::AddressFamily::VSOCK,
    ] {
        let made = rustix::net::socket(family, rustix::net::SocketType::RAW, None);
        unknown(made.unwrap_err().into());
    }
    unknown(symlink("/proc/self", "/own/link").unwrap_err());
    unknown(fs::hard_link("/read", "/own/link").unwrap_err());
    unknown(fs::rename("/own", "/own/other").unwrap_err());
    assert!(Path::new("/monitor").is_file());
}
