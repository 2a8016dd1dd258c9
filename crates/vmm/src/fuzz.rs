//! What the fuzzer calls, one function for each kind of input a guest, a file or a controller can
//! send. Each takes any bytes and must neither panic nor run for ever. `fuzz/` hands them to
//! libFuzzer; the tests here hand them seeded random and mutated inputs.
//!
//! For devices the bytes are a script: what a hostile driver does to rings and registers.

mod script;

use std::io::Write as _;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::Arc;

use forkd_wire::layer::Index;
use forkd_wire::vmm::{Reply, Request};

use crate::bus::{BusDevice as _, CountingIrq};
use crate::devices::block::{Block, Disk};
use crate::devices::net::{Net, Tap};
use crate::devices::power::{Keyboard, Power, PowerEvent, PowerSink};
use crate::devices::rng::Rng;
use crate::devices::serial::{Console, Sink};
use crate::devices::vsock::{Listener, Vsock};
use crate::fixture::memory;
use crate::state::MachineState;
use crate::virtio::{Device, Transport};

/// Takes any bytes.
pub type Target = fn(&[u8]);

/// Every target by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("queues", queues),
    ("block", block),
    ("net", net),
    ("vsock", vsock),
    ("ports", ports),
    ("state", state),
    ("control", control),
];

fn transport<D: Device>(device: D) -> Transport<D> {
    Transport::new(device, memory(), Arc::new(CountingIrq::default()))
}

/// Rings and registers of the simplest device.
pub fn queues(data: &[u8]) {
    script::run(transport(Rng), data, &mut |_| {});
}

/// A writable disk.
pub fn block(data: &[u8]) {
    let Ok(fd) = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC) else {
        return;
    };
    let file = std::fs::File::from(fd);
    if file.set_len(64 << 10).is_err() {
        return;
    }
    let Ok(disk) = Disk::new(file, data.len().is_multiple_of(2)) else {
        return;
    };
    script::run(transport(Block::new(disk, "fuzz")), data, &mut |_| {});
}

/// A network card on a datagram socket; the host sends frames between the driver's steps.
pub fn net(data: &[u8]) {
    let Ok((ours, theirs)) = UnixDatagram::pair() else {
        return;
    };
    theirs.set_nonblocking(true).ok();
    let Ok(tap) = Tap::datagrams(ours.into()) else {
        return;
    };
    let device = Net::new(Some(tap), [2, 0, 0, 0, 0, 1]);
    script::run(transport(device), data, &mut |bytes| {
        theirs.send(bytes).ok();
        theirs.recv(&mut [0; 2048]).ok();
    });
}

/// The socket device with clients that connect and write.
pub fn vsock(data: &[u8]) {
    // An abstract name: nothing is left in the file system.
    use std::os::linux::net::SocketAddrExt as _;
    let name = format!(
        "forkd-fuzz-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    );
    let Ok(address) = std::os::unix::net::SocketAddr::from_abstract_name(name) else {
        return;
    };
    let Ok(listener) = UnixListener::bind_addr(&address) else {
        return;
    };
    let Ok(listener) = Listener::new(listener.into()) else {
        return;
    };
    let mut clients: Vec<UnixStream> = Vec::new();
    script::run(
        transport(Vsock::new(3, Some(listener))),
        data,
        &mut |bytes| {
            if clients.len() < 4
                && let Ok(mut client) = UnixStream::connect_addr(&address)
            {
                client.set_nonblocking(true).ok();
                client.write_all(b"CONNECT 49983\n").ok();
                clients.push(client);
            }
            let chosen = bytes.first().map_or(0, |byte| usize::from(*byte)) % 4;
            match clients.get_mut(chosen) {
                Some(client) if bytes.len() > 3 => _ = client.write(bytes),
                Some(_) if bytes.len() == 1 => drop(clients.remove(chosen)),
                _ => {}
            }
        },
    );
}

#[derive(Debug)]
struct Ignored;

impl PowerSink for Ignored {
    fn ended(&self, _event: PowerEvent) {}
}

/// The devices behind I/O ports.
pub fn ports(data: &[u8]) {
    let mut console = Console::new(Sink::default(), Arc::new(CountingIrq::default()));
    let mut power = Power::new(Arc::new(Ignored));
    let mut keyboard = Keyboard::new(Arc::new(Ignored));
    for step in data.chunks_exact(3) {
        let (offset, value) = (u64::from(step[1]), &step[2..]);
        let mut read = [0; 4];
        match step[0] % 6 {
            0 => console.write(offset, value),
            1 => console.read(offset, &mut read[..1]),
            2 => power.write(offset, value),
            3 => power.read(offset, &mut read),
            4 => keyboard.write(offset, value),
            _ => keyboard.read(offset, &mut read),
        }
    }
}

/// The state file, and the index of a memory layer: as they come, and with a checksum that is right, as
/// somebody who means harm would write it.
pub fn state(data: &[u8]) {
    files(data);
    if let Some(end) = data.len().checked_sub(blake3::OUT_LEN) {
        let mut sealed = data.to_vec();
        let hash = blake3::hash(&sealed[..end]);
        sealed[end..].copy_from_slice(hash.as_bytes());
        files(&sealed);
    }
}

fn files(data: &[u8]) {
    if let Ok(state) = MachineState::decode(data) {
        let again = MachineState::decode(&state.encode());
        assert!(again.is_ok(), "what was read cannot be written and read");
    }
    if let Ok(index) = Index::decode(data) {
        assert!(Index::decode(&index.encode()).is_ok());
    }
}

/// Packets on the control socket, in both directions.
pub fn control(data: &[u8]) {
    if let Ok((seq, request)) = Request::decode(data) {
        assert_eq!(Request::decode(&request.encode(seq)), Ok((seq, request)));
    }
    if let Ok((seq, reply)) = Reply::decode(data) {
        assert_eq!(Reply::decode(&reply.encode(seq)), Ok((seq, reply)));
    }
}

#[cfg(test)]
mod tests;
