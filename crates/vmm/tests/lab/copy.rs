//! A copy of a running guest goes on where the original stood, and is another machine.

use std::io::{Read as _, Write as _};

use crate::guest::{Guest, Spec};
use crate::node::lab;

const PORT: u32 = 49983;

fn count(guest: &mut Guest) -> u32 {
    let text = guest.printed();
    let last = text
        .lines()
        .rev()
        .find_map(|line| line.trim_end().strip_prefix("lab: count "));
    last.and_then(|count| count.parse().ok()).unwrap_or(0)
}

fn wait_for_count(guest: &mut Guest, least: u32) -> u32 {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let found = count(guest);
        if found >= least {
            return found;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "stuck at {found}, wanted {least}"
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

fn round_trip(stream: &mut std::os::unix::net::UnixStream, text: &[u8]) {
    stream.write_all(text).unwrap();
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(back, text);
}

#[test]
fn copies_go_on_and_have_streams_of_their_own() {
    let Some(_) = lab() else { return };
    let spec = Spec {
        cpus: 2,
        ..Spec::new("root,vsock,count")
    };
    let mut parent = Guest::boot(&spec, None);
    parent.wait("vsock listening");
    wait_for_count(&mut parent, 3);
    let mut old = parent.dial(PORT).unwrap();
    round_trip(&mut old, b"before");

    parent.threads.park();
    let at = count(&mut parent);
    let mut copies: Vec<Guest> = (0..2).map(|_| parent.copy(&spec, None)).collect();
    parent.threads.unpark();

    for copy in &mut copies {
        let first = wait_for_count(copy, at + 1);
        println!("figure copy_to_first_line_ms {}", copy.elapsed_ms());
        wait_for_count(copy, first + 3);
        let mut stream = copy.dial(PORT).unwrap();
        round_trip(&mut stream, b"after");
    }
    // The original's stream was not touched, and the original goes on.
    round_trip(&mut old, b"still here");
    wait_for_count(&mut parent, at + 2);

    let ids: Vec<[u8; 16]> = std::iter::once(&parent)
        .chain(&copies)
        .map(|guest| guest.machine.devices().set().unwrap().generation())
        .collect();
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2]);
}
