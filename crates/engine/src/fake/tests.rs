//! The fake engine keeps the contract, is cheap, and fails where it is told to.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd_wire::agent::EvalRequest;
use forkd_wire::agent::process::{ProcessConfig, START_PATH, StartRequest};
use http::Method;

use super::*;
use crate::contract::{Agent, World, check};
use crate::{Exit, Lifetime, SlotHandles};

fn machine() -> MachineSpec {
    MachineSpec {
        vcpus: 1,
        memory_mib: 64,
        kernel: "kernel".into(),
        initramfs: "initramfs".into(),
        rootfs: "rootfs".into(),
        cmdline: String::new(),
        network: false,
    }
}

struct Place {
    dir: tempfile::TempDir,
    engine: Fake,
}

impl Place {
    fn new(config: FakeConfig) -> Place {
        Place {
            dir: tempfile::tempdir().unwrap(),
            engine: Fake::new(config),
        }
    }

    async fn boot(&self) -> Result<Arc<dyn Vm>, Error> {
        let spec = BootSpec {
            id: "boot".to_owned(),
            run_dir: self.dir.path().to_owned(),
            machine: machine(),
            memory_file: self.dir.path().join("ram"),
            lifetime: Lifetime::DieWithParent,
            slot: None,
        };
        self.engine.boot(spec).await
    }

    async fn template(&self) -> Arc<dyn Template> {
        let vm = self.boot().await.unwrap();
        let files = crate::SnapshotFiles {
            memory: self.dir.path().join("memory.bin"),
            layers: vec![],
            state: self.dir.path().join("state.bin"),
        };
        let spec = crate::SaveSpec {
            memory: crate::SaveMemory::Full(files.memory.clone()),
            state: files.state.clone(),
        };
        vm.save(spec).await.unwrap();
        let spec = TemplateSpec {
            id: "template".to_owned(),
            run_dir: self.dir.path().to_owned(),
            machine: machine(),
            files,
            lifetime: Lifetime::DieWithParent,
        };
        self.engine.template(spec).await.unwrap()
    }

    fn forks(&self, n: usize) -> Vec<ForkSpec> {
        let spec = |n| ForkSpec {
            id: format!("fork{n}"),
            run_dir: self.dir.path().to_owned(),
            lifetime: Lifetime::DieWithParent,
            slot: Some(SlotHandles::NONE),
        };
        (0..n).map(spec).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_contract() {
    for write_behind in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(Fake::new(FakeConfig {
            write_behind,
            ..FakeConfig::default()
        }));
        let world = World::new(engine, machine(), dir.path(), Duration::from_secs(20));
        check(&world).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_are_cheap() {
    let place = Place::new(FakeConfig::default());
    let template = place.template().await;
    let began = Instant::now();
    let forks = template.fork(place.forks(1000)).await;
    for vm in &forks {
        let agent = Agent::connect(vm.as_ref().unwrap()).await.unwrap();
        assert!(agent.answers().await);
    }
    eprintln!("1000 forks, each asked once: {:?}", began.elapsed());
    let mut pids: Vec<u32> = forks.iter().flatten().map(|vm| vm.identity().pid).collect();
    pids.dedup();
    assert_eq!(pids.len(), 1000);
    assert!(pids.iter().all(|pid| *pid >= FIRST_PID));
}

#[tokio::test]
async fn fails_where_it_is_told_to() {
    let place = Place::new(FakeConfig {
        fail_fork_every: Some(3),
        exit_after: Some(Duration::from_millis(50)),
        ..FakeConfig::default()
    });
    let template = place.template().await;
    let forks = template.fork(place.forks(6)).await;
    let made: Vec<bool> = forks.iter().map(Result::is_ok).collect();
    assert_eq!(made, [true, true, false, true, true, false]);
    assert_eq!(forks[0].as_ref().unwrap().exited().await, Exit::Signal(9));
    let failing = Place::new(FakeConfig {
        fail_boot: true,
        ..FakeConfig::default()
    });
    failing.boot().await.expect_err("told to fail");
}

#[tokio::test]
async fn a_mute_guest_never_answers() {
    let place = Place::new(FakeConfig {
        mute: true,
        ..FakeConfig::default()
    });
    let vm = place.boot().await.unwrap();
    let agent = Agent::connect(&vm).await.unwrap();
    let limit = Duration::from_millis(100);
    assert!(tokio::time::timeout(limit, agent.answers()).await.is_err());
}

#[tokio::test]
async fn runs_commands_and_names_those_it_lacks() {
    let place = Place::new(FakeConfig::default());
    let vm = place.boot().await.unwrap();
    let agent = Agent::connect(&vm).await.unwrap();
    for (cmd, arg, expected) in [
        ("echo", "hello", "aGVsbG8K"),
        ("exit", "7", "\"exitCode\":7"),
        ("no-such", "", "not_found"),
    ] {
        let request = StartRequest {
            process: ProcessConfig {
                cmd: cmd.to_owned(),
                args: vec![arg.to_owned()],
                ..ProcessConfig::default()
            },
            ..StartRequest::default()
        };
        let json = serde_json::to_vec(&request).unwrap();
        let mut body = forkd_wire::agent::connect::envelope(json.len(), false).to_vec();
        body.extend_from_slice(&json);
        let (status, body) = agent.call(Method::POST, START_PATH, &body).await.unwrap();
        let text = String::from_utf8_lossy(&body);
        assert!(
            status.is_success() && text.contains(expected),
            "{cmd}: {text}"
        );
    }
}

#[test]
fn evaluates() {
    let mut state = State::default();
    let mut check = |code: &str, result: Option<&str>, error: Option<&str>| {
        let request = EvalRequest {
            language: "python".to_owned(),
            code: code.to_owned(),
            timeout_ms: 0,
        };
        let response = eval::run(&mut state, &request);
        assert_eq!(response.result.as_deref(), result, "{code}: {response:?}");
        let kind = response
            .error
            .as_deref()
            .and_then(|text| text.split(':').next());
        assert_eq!(kind, error, "{code}: {response:?}");
    };
    check("1 + 2 * 3", Some("7"), None);
    check("(1 + 2) * -3", Some("-9"), None);
    check("2 ** 10 % 1000", Some("24"), None);
    check("import numpy; x = 20; x", Some("20"), None);
    check("x = x + 1\nx * 2", Some("42"), None);
    check("'a' + \"b\"", Some("'ab'"), None);
    check("print(x)", None, None);
    check("1 // 0", None, Some("ZeroDivisionError"));
    check("y", None, Some("NameError"));
    check("1 +", None, Some("SyntaxError"));
    check("9 ** 99", None, Some("OverflowError"));
    check(&"(".repeat(100_000), None, Some("RecursionError"));
    check("raise ValueError: no", None, Some("ValueError"));
}
