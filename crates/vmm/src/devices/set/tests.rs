//! The devices together: where the tables say they are, saved and made again.

use std::io::Write as _;
use std::os::unix::net::UnixListener;

use super::*;
use crate::bus::CountingIrq;
use crate::devices::power::{PowerEvent, PowerSink};

#[derive(Debug, Default)]
struct Heard(Mutex<Vec<PowerEvent>>);

impl PowerSink for Heard {
    fn ended(&self, event: PowerEvent) {
        lock(&self.0).push(event);
    }
}

fn memory() -> Arc<GuestMemoryMmap> {
    Arc::new(GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 4 << 20)]).unwrap())
}

fn line(_gsi: u32) -> Arc<dyn IrqLine> {
    Arc::new(CountingIrq::default())
}

fn wiring(heard: &Arc<Heard>) -> Wiring<'static, fn(u32) -> Arc<dyn IrqLine>> {
    static LINE: fn(u32) -> Arc<dyn IrqLine> = line;
    Wiring {
        memory: memory(),
        irq: &LINE,
        power: heard.clone(),
    }
}

fn plan() -> Plan {
    Plan {
        disks: vec![true, false],
        mac: Some([2, 0, 0, 0, 0, 1]),
        cid: Some(3),
    }
}

fn handles(directory: &std::path::Path) -> Handles {
    let disk = || {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 4096]).unwrap();
        file
    };
    let socket = directory.join("s");
    std::fs::remove_file(&socket).ok();
    let vsock = UnixListener::bind(socket).unwrap();
    Handles {
        disks: vec![disk(), disk()],
        tap: None,
        vsock: Some(vsock.into()),
        console: None,
    }
}

#[test]
fn every_device_is_where_the_tables_say() {
    let directory = tempfile::tempdir().unwrap();
    let heard = Arc::new(Heard::default());
    let set = Set::new(plan(), handles(directory.path()), &wiring(&heard)).unwrap();
    let (mut pio, mut mmio) = (Bus::default(), Bus::default());
    set.place(&mut pio, &mut mmio).unwrap();
    assert_eq!(set.plan().machine(1).virtio, 5);
    let kinds: Vec<u8> = (0..5)
        .map(|slot| {
            let mut kind = [0; 4];
            assert!(mmio.read(layout::virtio(slot).base + 8, &mut kind));
            kind[0]
        })
        .collect();
    assert_eq!(kinds, [2, 2, 1, 19, 4]);
    assert!(pio.write(0x602, &[1]));
    assert!(pio.write(0x64, &[0xfe]));
    assert!(pio.write(0x600, &[0x34]));
    assert_eq!(
        *lock(&heard.0),
        [PowerEvent::Reset, PowerEvent::Reset, PowerEvent::Off]
    );
}

#[test]
fn saved_devices_come_back_and_differ_only_in_their_identifier() {
    let directory = tempfile::tempdir().unwrap();
    let heard = Arc::new(Heard::default());
    let set = Set::new(plan(), handles(directory.path()), &wiring(&heard)).unwrap();
    let saved = set.save().unwrap();
    let copy = Set::restore(&saved, handles(directory.path()), &wiring(&heard)).unwrap();
    assert_eq!(copy.save().unwrap(), saved);
    copy.resume().unwrap();
    assert_ne!(copy.generation(), set.generation());

    let restore = |saved: &Saved, handles| Set::restore(saved, handles, &wiring(&heard));
    let mut fewer = handles(directory.path());
    fewer.disks.pop();
    assert!(matches!(
        restore(&saved, fewer),
        Err(Error::DiskCount {
            given: 1,
            planned: 2
        })
    ));
    for name in saved.keys() {
        let mut without = saved.clone();
        without.remove(name);
        let error = restore(&without, handles(directory.path())).unwrap_err();
        assert!(matches!(error, Error::Missing(_)), "{name}: {error}");
        let mut other = saved.clone();
        other.insert(name.clone(), serde_json::json!({ "version": 9 }));
        let error = restore(&other, handles(directory.path())).unwrap_err();
        assert!(matches!(error, Error::Format { .. }), "{name}: {error}");
    }
}

#[test]
fn too_many_disks_are_refused() {
    let plan = Plan {
        disks: vec![true; DISKS_MAX + 1],
        mac: None,
        cid: None,
    };
    let error = Set::new(plan, Handles::default(), &wiring(&Arc::default())).unwrap_err();
    assert!(matches!(error, Error::TooManyDisks(_)));
}
