//! The qemu engine: pure parts always, the contract with real guests where an image is at hand.

mod jail;

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::contract::{World, check};
use crate::{MachineSpec, test_image};

/// Guests in software emulation, with other tests beside them.
const PATIENCE: Duration = Duration::from_secs(60);

/// The machine of the test image; `None`, and why on the output, where there is none.
fn machine() -> Option<MachineSpec> {
    test_image::machine(512, false)
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_contract() {
    let Some(machine) = machine() else { return };
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(Qemu::new(PROGRAM, Accel::Tcg));
    check(&World::new(engine, machine, dir.path(), PATIENCE)).await;
}

/// Boots a machine that cannot work, and answers what became of it.
async fn boot(engine: &Qemu, machine: MachineSpec, dir: &Path) -> Result<Arc<dyn Vm>, Error> {
    let spec = BootSpec {
        id: "trouble".to_owned(),
        run_dir: dir.to_owned(),
        machine,
        memory_file: dir.join("ram"),
        lifetime: crate::Lifetime::DieWithParent,
        slot: None,
    };
    engine.boot(spec).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_cannot_start_says_why_at_once() {
    let Some(machine) = machine() else { return };
    let engine = Qemu::new(PROGRAM, Accel::Tcg);
    let garbage = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(garbage.path(), [0x5a; 100_000]).unwrap();
    let mut broken = vec![machine.clone(), machine.clone(), machine.clone(), machine];
    broken[0].kernel = "/no/such/kernel".into();
    broken[1].kernel = garbage.path().to_owned();
    broken[2].rootfs = "/no/such/rootfs".into();
    broken[3].initramfs = "/no/such/initramfs".into();
    let names = [
        "/no/such/kernel",
        "linux kernel too old",
        "/no/such/rootfs",
        "/no/such/initramfs",
    ];
    for (machine, word) in broken.into_iter().zip(names) {
        let dir = tempfile::tempdir().unwrap();
        let error = boot(&engine, machine, dir.path()).await.expect_err(word);
        let exited = !word.starts_with('/');
        assert_eq!(matches!(error, Error::Exited { .. }), exited, "{error:?}");
        assert!(error.to_string().contains(word), "{error}");
        assert!(!dir.path().join("ram").exists(), "memory is left over");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panicking_guest_is_told_from_a_polite_one() {
    let Some(mut machine) = machine() else { return };
    machine.cmdline = "rdinit=/no/such/program".to_owned();
    let dir = tempfile::tempdir().unwrap();
    let engine = Qemu::new(PROGRAM, Accel::Tcg);
    let vm = boot(&engine, machine, dir.path()).await.unwrap();
    let exit = tokio::time::timeout(PATIENCE, vm.exited()).await.unwrap();
    assert_eq!(exit, crate::Exit::Reset);
    let console = std::fs::read_to_string(vm.console()).unwrap();
    assert!(console.contains("Kernel panic"), "{console}");
}

#[tokio::test]
async fn an_absent_or_strange_program_is_named_with_the_remedy() {
    let absent = Qemu::new("qemu-that-is-not-there", Accel::Tcg);
    let error = absent.compatibility().await.unwrap_err().to_string();
    assert!(error.contains("apt-get install qemu-system-x86"), "{error}");
    let strange = Qemu::new("true", Accel::Tcg);
    let error = strange.compatibility().await.unwrap_err().to_string();
    assert!(error.contains("no version"), "{error}");
}

#[test]
fn versions_are_read_and_compared() {
    let text = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright";
    let version = facts::parse(text).unwrap();
    assert_eq!(version.to_string(), "7.2.22");
    assert!(version > facts::parse("version 6.2.0").unwrap());
    assert_eq!(
        facts::parse("version 9.0-rc1").unwrap().to_string(),
        "9.0.0"
    );
    for bad in ["", "version", "version x", "7.2.22"] {
        assert_eq!(facts::parse(bad), None, "{bad:?}");
    }
}

#[test]
fn differences_are_named() {
    let version = facts::parse("version 7.2.22").unwrap();
    let here = facts::collect(version, Accel::Tcg, Some(2_596_150));
    let check = |key: &str, value: &str, expected: Option<&str>| {
        let mut recorded = here.clone();
        recorded.insert(key.to_owned(), value.to_owned());
        assert_eq!(facts::difference(&recorded, &here).as_deref(), expected);
    };
    check("qemu_version", "7.2.1", None);
    check("tsc_khz", "2596000", None);
    check("something_else", "x", None);
    check(
        "qemu_version",
        "8.0.2",
        Some("qemu version was 8.0.2 when it was made, here it is 7.2.22"),
    );
    check(
        "tsc_khz",
        "3000000",
        Some("tsc khz was 3000000 when it was made, here it is 2596150"),
    );
    check(
        "accelerator",
        "kvm",
        Some("accelerator was kvm when it was made, here it is tcg"),
    );
    let nothing = BTreeMap::new();
    assert!(
        facts::difference(&nothing, &here)
            .unwrap()
            .contains("unknown")
    );
}

#[test]
fn messages_are_understood() {
    use request::{Event, Message, Shutdown, Status, parse, parse_status};
    let event = |text: &str| parse(text.as_bytes());
    assert_eq!(
        event(r#"{"QMP": {"version": {}}}"#),
        Some(Message::Greeting)
    );
    assert_eq!(
        event(r#"{"event": "RESUME"}"#),
        Some(Message::Event(Event::Resumed))
    );
    for (text, reason) in [
        (
            r#"{"guest": true, "reason": "guest-shutdown"}"#,
            Shutdown::PowerOff,
        ),
        (
            r#"{"guest": true, "reason": "guest-reset"}"#,
            Shutdown::Reset,
        ),
        (
            r#"{"guest": true, "reason": "guest-panic"}"#,
            Shutdown::Reset,
        ),
        (
            r#"{"guest": false, "reason": "host-signal"}"#,
            Shutdown::Host,
        ),
    ] {
        let line = format!(r#"{{"event": "SHUTDOWN", "data": {text}}}"#);
        assert_eq!(event(&line), Some(Message::Event(Event::Shutdown(reason))));
    }
    let refused = event(r#"{"id": 3, "error": {"class": "GenericError", "desc": "no"}}"#);
    let expected = Message::Reply {
        id: 3,
        result: Err("no".to_owned()),
    };
    assert_eq!(refused, Some(expected));
    for bad in ["", "{}", "[1]", "null", "{\"id\": 1}", "garbage"] {
        assert_eq!(event(bad), None, "{bad}");
    }
    let status = |text: &str| parse_status(&serde_json::json!({"status": text}));
    assert_eq!(status("inmigrate"), Some(Status::Loading));
    assert_eq!(status("guest-panicked"), Some(Status::Dead));
    assert_eq!(parse_status(&serde_json::json!({})), None);
}

#[test]
fn a_fork_has_the_devices_of_its_parent() {
    use arguments::{Launch, Sockets, Start, arguments};
    let machine = MachineSpec {
        vcpus: 2,
        memory_mib: 256,
        kernel: "/k,ernel".into(),
        initramfs: "/initramfs".into(),
        rootfs: "/root,fs".into(),
        cmdline: "extra=1".to_owned(),
        network: true,
    };
    let make = |start, tap| -> Vec<String> {
        let sockets = Sockets {
            control: 5,
            agent: 6,
            console: 7,
        };
        let launch = Launch {
            id: "a",
            machine: &machine,
            accel: Accel::Tcg,
            ram: 20,
            disk: 21,
            start,
            sockets,
            tap,
            sandbox: true,
        };
        let args = arguments(&launch).into_iter();
        args.map(|arg| arg.into_string().unwrap()).collect()
    };
    let start = Start::Boot {
        tsc_khz: Some(7),
        kernel: 22,
        initramfs: 23,
    };
    let boot = make(start, Some(11));
    let fork = make(Start::Load { state: 9 }, None);
    let devices = |args: &[String]| -> Vec<String> {
        let pairs = args.windows(2).filter(|pair| pair[0] == "-device");
        pairs.map(|pair| pair[1].clone()).collect()
    };
    assert_eq!(devices(&boot), devices(&fork));
    assert_eq!(devices(&boot).len(), 5);
    let line = &boot[boot.iter().position(|a| a == "-append").unwrap() + 1];
    assert!(
        line.contains(" tsc_early_khz=7 ") && line.ends_with(" extra=1"),
        "{line}"
    );
    assert!(fork.contains(&"fd:9".to_owned()) && !fork.contains(&"-kernel".to_owned()));
    let shares = |args: &[String], text: &str| args.iter().any(|arg| arg.contains(text));
    assert!(shares(&boot, "\"share\":true") && shares(&fork, "\"share\":false"));
    assert!(shares(&boot, "/proc/self/fd/22") && shares(&fork, "/proc/self/fd/20"));
    assert!(shares(&boot, "tap,id=net,fd=11,") && shares(&fork, "hubport,id=net"));
}

#[test]
fn files_that_qemu_complains_of_get_their_names() {
    let complaint = |output: &str| Error::Exited {
        exit: "status 1".to_owned(),
        output: output.to_owned(),
    };
    let names = [(7, "/k1".into()), (77, "/k2".into())];
    let named = launch::name_files(complaint("could not load '/proc/self/fd/77': no"), &names);
    let expected = complaint("could not load '/k2': no");
    assert_eq!(named.to_string(), expected.to_string());
}

#[test]
fn guest_memory_is_found_among_mappings() {
    let maps = "\
        1000-3000 rw-p 00002000 fe:00 42 /m\n\
        7000-9000 rw-p 00000000 fe:00 42 /m\n\
        9000-a000 r--p 00000000 fe:00 42 /m\n\
        a000-b000 rw-s 00000000 fe:00 42 /m\n\
        b000-c000 rw-p 00000000 fe:00 43 /other\n\
        nonsense\n";
    let parts = memory::parse_maps(maps, 42);
    let found: Vec<_> = parts
        .iter()
        .map(|part| (part.guest.clone(), part.address))
        .collect();
    assert_eq!(found, [(0..0x2000, 0x7000), (0x2000..0x4000, 0x1000)]);
}

#[test]
fn a_console_keeps_its_end_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.log");
    let mut log = console::Log::open(&path).unwrap();
    let line = [b'x'; 1000];
    for _ in 0..3000 {
        log.write(&line).unwrap();
        assert!(std::fs::metadata(&path).unwrap().len() <= 1 << 20);
    }
    log.write(b"the end").unwrap();
    drop(log);
    console::Log::open(&path)
        .unwrap()
        .write(b", and on")
        .unwrap();
    let text = std::fs::read(&path).unwrap();
    assert!(text.ends_with(b"the end, and on") && text.len() > 1 << 18);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}
