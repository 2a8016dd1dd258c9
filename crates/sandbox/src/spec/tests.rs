//! Ranges are inclusive at both ends.

use super::*;

fn tag() -> Tag {
    Tag::new("t").unwrap()
}

fn image() -> ImageFiles {
    ImageFiles {
        name: "i".into(),
        digest: "d".into(),
        kernel: "/k".into(),
        initramfs: "/i".into(),
        rootfs: "/r".into(),
    }
}

#[test]
fn fork_counts() {
    for (n, ok) in [(0, false), (1, true), (1000, true), (1001, false)] {
        assert_eq!(ForkRequest::new(tag(), n).validate().is_ok(), ok, "{n}");
    }
}

#[test]
fn limits_of_a_fork() {
    let of = |pids, io| ForkRequest {
        pids_limit: pids,
        io_limit: io,
        ..ForkRequest::new(tag(), 1)
    };
    let none = IoLimit::default();
    for (pids, ok) in [(63, false), (64, true), (32_768, true), (32_769, false)] {
        assert_eq!(of(Some(pids), none).validate().is_ok(), ok, "{pids}");
    }
    let slow = IoLimit {
        write_bytes: Some(4095),
        ..none
    };
    let text = of(None, slow).validate().unwrap_err().to_string();
    assert_eq!(
        text,
        "bytes written per second is 4095, must be within 4096..=1099511627776"
    );
    let still = IoLimit {
        reads: Some(0),
        ..none
    };
    assert!(of(None, still).validate().is_err());
    let fair = IoLimit {
        read_bytes: Some(4096),
        writes: Some(1),
        ..none
    };
    assert!(of(None, fair).validate().is_ok() && fair.is_some() && !none.is_some());
}

#[test]
fn machine_sizes() {
    for (memory_mib, vcpus, ok) in [
        (63, 1, false),
        (64, 1, true),
        (262_144, 32, true),
        (262_145, 1, false),
        (64, 0, false),
        (64, 33, false),
    ] {
        let request = SnapshotRequest {
            memory_mib,
            vcpus,
            ..SnapshotRequest::new(tag(), image())
        };
        assert_eq!(request.validate().is_ok(), ok, "{memory_mib} {vcpus}");
    }
}

#[test]
fn environment_names_and_size() {
    for (key, ok) in [("A", true), ("", false), ("A=B", false), ("A\0", false)] {
        let mut request = ForkRequest::new(tag(), 1);
        request.env.insert(key.into(), "v".into());
        assert_eq!(request.validate().is_ok(), ok, "{key:?}");
    }
    let mut request = ForkRequest::new(tag(), 1);
    request
        .metadata
        .insert("k".into(), "v".repeat(limits::ENV_BYTES));
    let text = request.validate().unwrap_err().to_string();
    assert!(text.contains("at most"), "{text}");
}
