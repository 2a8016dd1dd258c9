//! The kvm engine: pure parts always; real processes with the monitor's own test guest where /dev/kvm
//! opens; the contract with Linux guests where the CPU can run them.

mod isolation;
mod linux;
mod machine;
mod monitor;

use forkd_host::process as host;
use forkd_wire::vmm;

use super::*;
use crate::{Exit, MachineSpec};

#[test]
fn ends_are_told_apart() {
    use host::Exit::{Code, Signal, Unknown};
    for (process, told, expected) in [
        (Some(Code(0)), Some(vmm::Exit::PowerOff), Exit::Code(0)),
        (Some(Code(0)), Some(vmm::Exit::Reset), Exit::Reset),
        (Some(Code(0)), Some(vmm::Exit::Crash), Exit::Reset),
        (Some(Code(0)), Some(vmm::Exit::Stopped), Exit::Code(0)),
        (Some(Code(0)), None, Exit::Code(0)),
        (Some(Code(1)), Some(vmm::Exit::Internal), Exit::Code(1)),
        (Some(Signal(31)), None, Exit::Signal(31)),
        (Some(Signal(9)), Some(vmm::Exit::PowerOff), Exit::Signal(9)),
        // Of an adopted VM only its own word is known.
        (Some(Unknown), Some(vmm::Exit::PowerOff), Exit::Code(0)),
        (Some(Unknown), Some(vmm::Exit::Reset), Exit::Reset),
        (Some(Unknown), Some(vmm::Exit::Internal), Exit::Code(1)),
        (Some(Unknown), None, Exit::Unknown),
        (None, None, Exit::Unknown),
    ] {
        assert_eq!(
            process::judge(process, told),
            expected,
            "{process:?} {told:?}"
        );
    }
}

#[test]
fn the_check_is_understood_and_differences_are_named() {
    let text = br#"{"kvm":true,"vendor":"AMD","kernel":"6.1","hardware_virtualization":true}"#;
    let here = facts::parse(text).unwrap();
    assert_eq!(facts::difference(&here, &here), None);
    for bad in [&b""[..], b"{}", b"[]", b"{\"vendor\": 1}"] {
        assert_eq!(facts::parse(bad), None);
    }
    let mut there = here.clone();
    there.insert("kvm_kind".to_owned(), "paravirtual".to_owned());
    let expected = "kvm kind was paravirtual when it was made, here it is hardware";
    assert_eq!(facts::difference(&there, &here).as_deref(), Some(expected));
    let nothing = BTreeMap::new();
    let difference = facts::difference(&nothing, &here).unwrap();
    assert!(difference.contains("unknown"), "{difference}");
}

fn machine_of(rootfs: &str, network: bool) -> MachineSpec {
    MachineSpec {
        vcpus: 2,
        memory_mib: 256,
        kernel: "/kernel".into(),
        initramfs: "/initramfs".into(),
        rootfs: rootfs.into(),
        cmdline: "extra=1".to_owned(),
        network,
    }
}

#[test]
fn a_machine_becomes_arguments() {
    let fds = arguments::BootFds {
        control: 5,
        vsock: 6,
        console: 7,
        rendezvous: Some(8),
        tap: Some(9),
    };
    let text = |args: Vec<std::ffi::OsString>| -> String {
        let args: Vec<String> = args.into_iter().map(|a| a.into_string().unwrap()).collect();
        args.join(" ")
    };
    let line = text(arguments::boot(&machine_of("/root", true), fds, true));
    assert!(!line.contains("--no-"), "{line}");
    for part in [
        "boot --control-fd 5 --rendezvous-fd 8 --memory 256 --vcpus 2 --kernel /kernel",
        " --disk /root ",
        "panic=-1",
        " extra=1 ",
        "--vsock-fd 6 --console-fd 7 --mac ",
        " --tap-fd 9",
    ] {
        assert!(line.contains(part), "{part:?} is not in {line}");
    }
    let line = text(arguments::boot(&machine_of("/root", false), fds, false));
    assert!(line.contains("boot --no-jail --no-seccomp "), "{line}");
    assert!(!line.contains("--mac") && !line.contains("--tap"), "{line}");
    let layers = [
        (Path::new("/m0"), Path::new("/i0")),
        (Path::new("/m1"), Path::new("/i1")),
    ];
    let machine = machine_of("/root", false);
    let line = text(arguments::template(
        "t",
        &machine,
        Path::new("/s"),
        &layers,
        9,
        true,
    ));
    let expected = "template --control-fd 9 --id t --state /s --layer /m0,/i0 --layer /m1,/i1 \
                    --disk /root";
    assert_eq!(line, expected);
}

#[tokio::test]
async fn a_program_that_is_no_monitor_is_named_with_the_remedy() {
    for (program, words) in [("true", "not understood"), ("false", "exit status")] {
        let engine = Kvm::with_program(program);
        let error = engine.compatibility().await.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert!(error.contains("--engine qemu"), "{error}");
    }
    let absent = Kvm::with_program("/no/such/monitor");
    absent.compatibility().await.unwrap_err();
}
