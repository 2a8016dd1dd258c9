//! A bounded run of every target: random bytes, and well-formed inputs with a few bytes changed. The
//! seed is fixed, so that a failure can be repeated; `FORKD_FUZZ_ROUNDS` asks for more.

use super::*;

/// A small generator of our own: the same numbers everywhere and for ever.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        // The usual xorshift with multiplier.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let len = self.next() as usize % (most + 1);
        (0..len).map(|_| self.next() as u8).collect()
    }
}

fn rounds() -> u64 {
    let wanted = std::env::var("FORKD_FUZZ_ROUNDS").ok();
    wanted.and_then(|rounds| rounds.parse().ok()).unwrap_or(400)
}

/// Well-formed inputs to start from.
fn seeds(name: &str) -> Vec<Vec<u8>> {
    match name {
        "control" => vec![
            Request::Pause.encode(1),
            Request::Branch { stay_paused: true }.encode(2),
            Request::Guest {
                op: 1,
                args: [2, 3, 4],
            }
            .encode(3),
            Reply::Report(7).encode(0),
            Reply::Paused { pause_us: 9 }.encode(4),
        ],
        "state" => {
            use forkd_wire::layer::{Builder, Kind, PAGE_SIZE};
            let mut index = Builder::new(64 * PAGE_SIZE).unwrap();
            index.push(0, 3 * PAGE_SIZE, Kind::Data).unwrap();
            index.push(5 * PAGE_SIZE, PAGE_SIZE, Kind::Zero).unwrap();
            vec![
                crate::state::tests::sample().encode(),
                index.finish().encode(),
            ]
        }
        // A request with header, data and room for an answer, then a notification, and the same for
        // the second queue.
        _ => vec![
            [
                vec![0, 0, 0, 0, 0, 0, 0, 2, 16],
                vec![0; 16],
                vec![129, 1, 5, 0, 8, 0, 4, 1, 2, 3, 4],
            ]
            .concat(),
            [
                vec![255, 255, 255, 255, 1, 0, 1, 0, 44],
                vec![3, 0, 0, 0, 0, 0, 0, 0, 2],
                vec![0; 40],
            ]
            .concat(),
        ],
    }
}

fn run(name: &str) {
    let (_, target) = TARGETS.iter().find(|(found, _)| *found == name).unwrap();
    let mut numbers = Numbers(0x5eed_0000 + name.len() as u64);
    let seeds = seeds(name);
    for round in 0..rounds() {
        let input = if round % 2 == 0 {
            numbers.bytes(1500)
        } else {
            let mut input = seeds[numbers.next() as usize % seeds.len()].clone();
            // What follows the checksum of a file would only make its length wrong.
            if name != "state" {
                input.extend(numbers.bytes(60));
            }
            for _ in 0..numbers.next() % 6 {
                let at = numbers.next() as usize % input.len();
                input[at] = numbers.next() as u8;
            }
            input
        };
        target(&input);
    }
}

#[test]
fn queues_survive_anything() {
    run("queues");
}

#[test]
fn the_disk_survives_anything() {
    run("block");
}

#[test]
fn the_network_card_survives_anything() {
    run("net");
}

#[test]
fn the_socket_device_survives_anything() {
    run("vsock");
}

#[test]
fn ports_survive_anything() {
    run("ports");
}

#[test]
fn the_state_file_survives_anything() {
    run("state");
}

#[test]
fn control_messages_survive_anything() {
    run("control");
}
