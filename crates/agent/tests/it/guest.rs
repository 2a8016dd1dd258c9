//! The agent as PID 1 of a real guest, under QEMU in software emulation.
//!
//! Runs when `FORKD_TEST_GUEST` names a directory that holds `vmlinuz`, `initramfs` (with the agent as
//! `/init`) and `rootfs`. Prints how long things took.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd_engine::qemu::{Accel, Qemu};
use forkd_engine::{
    BootSpec, Engine, Exit, ForkSpec, Lifetime, MachineSpec, SaveMemory, SaveSpec, SlotHandles,
    SnapshotFiles, Template, TemplateSpec, Vm,
};
use forkd_sandbox::guest::{Client, Event, ExecRequest};
use forkd_wire::agent::{EvalRequest, ResumeRequest};

use crate::world::PATIENCE;

pub(crate) struct Guest {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) client: Client,
    machine: MachineSpec,
    engine: Qemu,
    dir: tempfile::TempDir,
}

pub(crate) fn files() -> Option<PathBuf> {
    let found = std::env::var_os("FORKD_TEST_GUEST").map(PathBuf::from);
    if found.is_none() {
        eprintln!("skipped: FORKD_TEST_GUEST does not name a directory with a guest's files");
    }
    found
}

async fn boot(files: &Path, cmdline: &str) -> Guest {
    boot_with(files, cmdline, false, None).await
}

pub(crate) async fn boot_with(
    files: &Path,
    cmdline: &str,
    network: bool,
    slot: Option<SlotHandles>,
) -> Guest {
    let dir = tempfile::tempdir().unwrap();
    let engine = Qemu::new("qemu-system-x86_64", Accel::Tcg);
    let machine = MachineSpec {
        vcpus: 1,
        memory_mib: 512,
        kernel: files.join("vmlinuz"),
        initramfs: files.join("initramfs"),
        rootfs: files.join("rootfs"),
        cmdline: cmdline.to_owned(),
        network,
    };
    let run_dir = dir.path().join("boot");
    std::fs::create_dir(&run_dir).unwrap();
    let spec = BootSpec {
        id: "agent-test".to_owned(),
        run_dir,
        machine: machine.clone(),
        memory_file: dir.path().join("memory"),
        lifetime: Lifetime::DieWithParent,
        slot,
    };
    let vm = engine.boot(spec).await.unwrap();
    Guest {
        client: Client::new(Arc::clone(&vm)),
        vm,
        machine,
        engine,
        dir,
    }
}

impl Guest {
    pub(crate) async fn sh(&self, line: &str) -> String {
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

    /// Freezes the guest and makes it ready to be forked.
    pub(crate) async fn template(&self) -> Arc<dyn Template> {
        let memory = self.dir.path().join("snapshot");
        let state = self.dir.path().join("state");
        let spec = SaveSpec {
            memory: SaveMemory::Full(memory.clone()),
            state: state.clone(),
        };
        self.vm.save(spec).await.unwrap();
        let run_dir = self.dir.path().join("template");
        std::fs::create_dir(&run_dir).unwrap();
        let spec = TemplateSpec {
            id: "agent-test-template".to_owned(),
            run_dir,
            machine: self.machine.clone(),
            files: SnapshotFiles {
                memory,
                layers: Vec::new(),
                state,
            },
            lifetime: Lifetime::DieWithParent,
        };
        self.engine.template(spec).await.unwrap()
    }

    pub(crate) fn fork_spec(&self, index: u32) -> ForkSpec {
        let run_dir = self.dir.path().join(format!("fork{index}"));
        std::fs::create_dir(&run_dir).unwrap();
        let id = format!("agent-test-{index}");
        ForkSpec {
            id,
            run_dir,
            lifetime: Lifetime::DieWithParent,
            slot: None,
        }
    }

    fn console(&self) -> String {
        std::fs::read_to_string(self.vm.console()).unwrap_or_default()
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
    let guest = boot(&files, "").await;
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

    let request = resume(3);
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
    guest
        .sh("i=0; while [ $i -lt 50 ]; do i=$((i+1)); /bin/true; done")
        .await;
    let each = started.elapsed().as_secs_f64() * 20.0;
    println!("a shell's own fork and exec of true: {each:.1} ms");
    measure("exec of a missing program", 20, async || {
        let missing = ExecRequest::new(["/no/such/program"]);
        guest.client.run(missing, PATIENCE).await.unwrap_err();
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
    assert_eq!(guest.vm.exited().await, Exit::Code(0));
    println!("power-off: {:.2} s", started.elapsed().as_secs_f64());
    let console = guest.console();
    assert!(!console.contains("forkd-agent"), "{console}");
}

pub(crate) fn resume(index: u32) -> ResumeRequest {
    ResumeRequest {
        sandbox_id: "sb".to_owned(),
        index,
        entropy: "q".repeat(44),
        wall_clock_ns: 2_000_000_000_000_000_000,
        hostname: format!("fork-{index}"),
        machine_id: "00112233445566778899aabbccddeeff".to_owned(),
        env: [("FORKD_INDEX".to_owned(), index.to_string())].into(),
        network: None,
    }
}

#[tokio::test]
async fn forks_go_on_with_what_the_parent_was_doing() {
    let Some(files) = files() else { return };
    let guest = boot(&files, "").await;
    guest.client.health(2 * PATIENCE).await.unwrap();
    // A process and an evaluation are under way, with output on its way to the host.
    let line = "echo begun; sleep 1; echo $$ > /tmp/survived; while :; do echo talk; done";
    let mut exec = guest.client.start(ExecRequest::shell(line)).await.unwrap();
    assert_eq!(
        exec.next().await.unwrap(),
        Some(Event::Stdout("begun\n".into()))
    );
    let python = guest
        .client
        .health(PATIENCE)
        .await
        .unwrap()
        .python
        .is_some();
    if python {
        guest
            .eval("import random; random.seed(1); first = random.random(); random.seed(1)")
            .await;
    }
    let template = guest.template().await;
    let specs = (0..3).map(|index| guest.fork_spec(index));
    let started = Instant::now();
    let forks = template.fork(specs.collect()).await;
    let mut draws = Vec::new();
    for (index, vm) in forks.into_iter().enumerate() {
        let client = Client::new(vm.unwrap());
        let answer = client
            .resume(&resume(index.try_into().unwrap()), PATIENCE)
            .await
            .unwrap();
        println!(
            "fork {index}: {:.0} ms, {answer:?}",
            started.elapsed().as_secs_f64() * 1000.0
        );
        let until = "until [ -s /tmp/survived ]; do sleep 0.1; done; kill -0 $(cat /tmp/survived)";
        let output = client
            .run(ExecRequest::shell(until), PATIENCE)
            .await
            .unwrap();
        assert_eq!(output.exit_code, 0, "{output:?}");
        let output = client
            .run(ExecRequest::shell("echo $FORKD_INDEX"), PATIENCE)
            .await
            .unwrap();
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            format!("{index}\n")
        );
        assert_eq!(client.processes().await.unwrap().len(), 1);
        if python {
            let code = "assert random.random() != first; random.random()".to_owned();
            let request = EvalRequest {
                language: "python".to_owned(),
                code,
                timeout_ms: 0,
            };
            let answer = client.eval(request, PATIENCE).await.unwrap();
            assert_eq!(answer.error, None);
            draws.push(answer.result);
        }
    }
    draws.sort_unstable();
    draws.dedup();
    assert!(draws.len() == if python { 3 } else { 0 }, "{draws:?}");
    // The parent's own stream has not been cut.
    for _ in 0..100 {
        assert!(matches!(exec.next().await.unwrap(), Some(Event::Stdout(_))));
    }
    template.close().await.unwrap();
}

#[tokio::test]
async fn forks_of_an_idle_guest_answer_soon() {
    let Some(files) = files() else { return };
    let guest = boot(&files, "").await;
    guest.client.health(2 * PATIENCE).await.unwrap();
    guest.client.resume(&resume(99), PATIENCE).await.unwrap();
    guest.sh("true").await;
    if guest
        .client
        .health(PATIENCE)
        .await
        .unwrap()
        .python
        .is_some()
    {
        guest.eval("import random").await;
    }
    guest.client.disconnect().await;
    let template = guest.template().await;
    guest.vm.kill().await.unwrap();
    for index in 0..4 {
        let started = Instant::now();
        let since = || started.elapsed().as_secs_f64() * 1000.0;
        let vm = template
            .fork(vec![guest.fork_spec(index)])
            .await
            .remove(0)
            .unwrap();
        let forked = since();
        let client = Client::new(Arc::clone(&vm));
        let answer = client.resume(&resume(index), PATIENCE).await.unwrap();
        let ready = since();
        client
            .run(ExecRequest::new(["true"]), PATIENCE)
            .await
            .unwrap();
        let executed = since();
        println!(
            "forked {forked:.0} ms, ready {ready:.0} ms, first exec done {executed:.0} ms, {answer:?}"
        );
        vm.kill().await.unwrap();
    }
    template.close().await.unwrap();
}

#[tokio::test]
async fn a_guest_that_cannot_boot_says_why_and_ends() {
    let Some(files) = files() else { return };
    let guest = boot(&files, "forkd.root=/dev/vdz").await;
    assert_eq!(guest.vm.exited().await, Exit::Code(0));
    let console = guest.console();
    assert!(
        console.contains("forkd-agent: fatal: there is no root disk: /dev/vdz"),
        "{console}"
    );
}
