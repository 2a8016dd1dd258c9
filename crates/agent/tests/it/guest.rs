//! The agent as PID 1 of a real guest, under QEMU in software emulation.
//!
//! Runs when `FORKD_TEST_GUEST` names a directory that holds `vmlinuz`, `initramfs` (with the agent as
//! `/init`) and `rootfs`. Prints how long things took.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd_sandbox::guest::{Client, Dial, Event, ExecRequest};
use forkd_wire::agent::{EvalRequest, ResumeRequest};

use crate::world::{PATIENCE, SocketDial};

struct Guest {
    qemu: Child,
    client: Client,
    dir: tempfile::TempDir,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn files() -> Option<PathBuf> {
    let found = std::env::var_os("FORKD_TEST_GUEST").map(PathBuf::from);
    if found.is_none() {
        eprintln!("skipped: FORKD_TEST_GUEST does not name a directory with a guest's files");
    }
    found
}

fn boot(files: &Path, extra_cmdline: &str, disk: bool) -> Guest {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args("-nodefaults -no-user-config -no-reboot -display none -vga none".split(' '));
    qemu.args(["-machine", "microvm,x-option-roms=off,pit=on,pic=on,rtc=on,isa-serial=on,acpi=on,pcie=off,usb=off,auto-kernel-cmdline=off"]);
    qemu.args("-accel tcg,thread=multi,tb-size=32 -cpu max -smp 1 -m 512M".split(' '));
    qemu.args(["-global", "virtio-mmio.force-legacy=off"]);
    qemu.args([
        "-serial",
        &format!("file:{}", dir.path().join("console").display()),
    ]);
    qemu.args([
        "-chardev",
        &format!("socket,id=a,path={},server=on,wait=off", socket.display()),
    ]);
    qemu.args(
        "-device virtio-serial-device -device virtserialport,chardev=a,name=forkd.agent".split(' '),
    );
    if disk {
        let root = files.join("rootfs");
        qemu.args([
            "-drive",
            &format!(
                "if=none,id=r,format=raw,readonly=on,file={}",
                root.display()
            ),
        ]);
        qemu.args(["-device", "virtio-blk-device,drive=r"]);
    }
    qemu.args(
        "-object rng-random,id=e,filename=/dev/urandom -device virtio-rng-device,rng=e".split(' '),
    );
    qemu.arg("-kernel")
        .arg(files.join("vmlinuz"))
        .arg("-initrd")
        .arg(files.join("initramfs"));
    let cmdline = format!(
        "console=ttyS0 quiet panic=-1 reboot=t random.trust_cpu=on 8250.nr_uarts=1 \
         rcupdate.rcu_expedited=1 mitigations=off no_timer_check {extra_cmdline}"
    );
    qemu.args(["-append", &cmdline]).stdin(Stdio::null());
    let qemu = qemu.spawn().unwrap();
    let dial = SocketDial {
        path: socket,
        framed: true,
        dialled: 0.into(),
    };
    Guest {
        qemu,
        client: Client::with_dial(Arc::new(dial) as Arc<dyn Dial>),
        dir,
    }
}

impl Guest {
    async fn sh(&self, line: &str) -> String {
        let output = self
            .client
            .run(ExecRequest::shell(line), PATIENCE)
            .await
            .unwrap();
        assert_eq!(
            output.exit_code,
            0,
            "{line}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout)
            .unwrap()
            .trim_end()
            .to_owned()
    }

    async fn eval(&self, code: &str) -> Option<String> {
        let request = EvalRequest {
            language: "python".to_owned(),
            code: code.to_owned(),
            timeout_ms: 0,
        };
        let answer = self.client.eval(request, 4 * PATIENCE).await.unwrap();
        assert_eq!(answer.error, None, "{code}");
        answer.result
    }

    fn console(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("console")).unwrap_or_default()
    }
}

/// The median and the worst of some repetitions, in milliseconds.
async fn measure(what: &str, count: usize, mut once: impl AsyncFnMut()) -> f64 {
    let mut took = Vec::new();
    for _ in 0..count {
        let started = Instant::now();
        once().await;
        took.push(started.elapsed().as_secs_f64() * 1000.0);
    }
    took.sort_by(f64::total_cmp);
    let median = took[count / 2];
    println!(
        "{what}: p50 {median:.1} ms, min {:.1} ms, max {:.1} ms",
        took[0],
        took[count - 1]
    );
    median
}

#[tokio::test]
async fn a_guest_boots_serves_and_switches_itself_off() {
    let Some(files) = files() else { return };
    let started = Instant::now();
    let mut guest = boot(&files, "", true);
    let health = guest.client.health(Duration::from_secs(60)).await;
    let health = health.unwrap_or_else(|error| panic!("{error}: {}", guest.console()));
    println!("boot to serving: {:.2} s", started.elapsed().as_secs_f64());
    println!("{health:?}");

    assert_eq!(
        guest
            .sh("echo $$ > /tmp/pid; cat /proc/1/comm; id -u")
            .await,
        "init\n0"
    );
    let mounts = guest.sh("cat /proc/mounts").await;
    for mount in [
        "overlay / ",
        "proc /proc ",
        "sysfs /sys ",
        "/dev/pts ",
        "/dev/shm ",
        "/tmp ",
        "cgroup2 ",
    ] {
        assert!(mounts.contains(mount), "{mount}: {mounts}");
    }
    guest
        .sh("echo kept > /etc/new && rm /etc/new && ls /dev/null /proc/self/exe")
        .await;
    println!(
        "memory: {}",
        guest
            .sh("grep -E 'MemTotal|MemAvailable' /proc/meminfo")
            .await
    );
    println!(
        "agent: {}",
        guest
            .sh("grep -E 'VmRSS|VmHWM|RssAnon' /proc/1/status")
            .await
    );
    // Orphans are reaped.
    guest
        .sh("(sleep 0.1 & ) ; sleep 0.5; ! grep -l 'State:.Z' /proc/[0-9]*/status")
        .await;

    let request = ResumeRequest {
        sandbox_id: "sb".to_owned(),
        index: 3,
        entropy: "q".repeat(44),
        wall_clock_ns: 2_000_000_000_000_000_000,
        hostname: "fork-3".to_owned(),
        machine_id: "00112233445566778899aabbccddeeff".to_owned(),
        env: [("FORKD_INDEX".to_owned(), "3".to_owned())].into(),
        network: None,
    };
    let answer = guest.client.resume(&request, PATIENCE).await.unwrap();
    println!("resume without python: {} us", answer.applied_us);
    let seen = guest.sh("hostname || cat /proc/sys/kernel/hostname; cat /etc/machine-id; date +%Y; echo $FORKD_INDEX").await;
    assert_eq!(seen, "fork-3\n00112233445566778899aabbccddeeff\n2033\n3");

    measure("health", 50, async || {
        guest.client.health(PATIENCE).await.unwrap();
    })
    .await;
    measure("exec true", 50, async || {
        let output = guest
            .client
            .run(ExecRequest::new(["true"]), PATIENCE)
            .await
            .unwrap();
        assert_eq!(output.exit_code, 0);
    })
    .await;
    let started = Instant::now();
    let mut exec = guest
        .client
        .start(ExecRequest::shell("head -c 10000000 /dev/zero"))
        .await
        .unwrap();
    let mut total = 0;
    while let Some(event) = exec.next().await.unwrap() {
        if let Event::Stdout(bytes) = event {
            total += bytes.len();
        }
    }
    assert_eq!(total, 10_000_000);
    println!("10 MB of output: {:.2} s", started.elapsed().as_secs_f64());
    if health.python.is_some() {
        let started = Instant::now();
        guest.eval("import sys").await;
        println!("first eval: {:.2} s", started.elapsed().as_secs_f64());
        assert_eq!(guest.eval("6 * 7").await.as_deref(), Some("42"));
        measure("eval 1+1", 50, async || drop(guest.eval("1 + 1").await)).await;
        measure("resume with python", 10, async || {
            let answer = guest.client.resume(&request, PATIENCE).await.unwrap();
            assert_eq!(answer.reseeded, ["python"]);
        })
        .await;
    }
    // Another peer takes over.
    for _ in 0..5 {
        guest.client.disconnect().await;
        guest.sh("true").await;
    }
    println!(
        "agent: {}",
        guest
            .sh("grep -E 'VmRSS|VmHWM|RssAnon' /proc/1/status")
            .await
    );

    guest.client.shutdown(PATIENCE).await.unwrap();
    let started = Instant::now();
    let status = guest.qemu.wait();
    println!(
        "power-off: {:.2} s, {status:?}",
        started.elapsed().as_secs_f64()
    );
    assert!(status.unwrap().success());
    let console = guest.console();
    assert!(!console.contains("forkd-agent"), "{console}");
}

#[tokio::test]
async fn a_guest_that_cannot_boot_says_why_and_ends() {
    let Some(files) = files() else { return };
    let mut guest = boot(&files, "forkd.root=/dev/vdz", true);
    assert!(guest.qemu.wait().unwrap().success());
    let console = guest.console();
    assert!(
        console.contains("forkd-agent: fatal: there is no root disk: /dev/vdz"),
        "{console}"
    );
    let mut guest = boot(&files, "", false);
    assert!(guest.qemu.wait().unwrap().success());
    assert!(
        guest
            .console()
            .contains("fatal: there is no root disk: /dev/vda"),
        "{}",
        guest.console()
    );
}
