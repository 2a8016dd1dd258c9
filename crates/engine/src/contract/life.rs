//! A VM's life: standing still, being reached, ending, being found again.

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use tokio::time::timeout;

use super::agent::Agent;
use super::{Frozen, MARK, MARK_CONTENT, World};
use crate::{Exit, Vm};

/// How soon the end of a process is told.
const PROMPT: Duration = Duration::from_secs(5);

/// A paused guest does nothing; resumed, it goes on where it was.
pub(super) async fn pauses_and_resumes(world: &World, frozen: &Frozen) {
    let template = world
        .template(frozen.files.clone())
        .await
        .expect("template");
    let vm = world.fork_one(&template).await;
    let agent = world.agent(&vm).await;
    vm.pause().await.expect("pause");
    vm.pause().await.expect("pause again");
    let silence = Duration::from_millis(300);
    let call = agent.call(Method::GET, "/health", b"");
    assert!(
        timeout(silence, call).await.is_err(),
        "a paused guest answered"
    );
    vm.resume().await.expect("resume");
    vm.resume().await.expect("resume again");
    assert!(agent.answers().await);
    vm.kill().await.expect("kill");
    template.close().await.expect("close");
}

/// The newest connection works, whatever became of those before.
pub(super) async fn a_new_connection_ends_the_one_before(world: &World, frozen: &Frozen) {
    let template = world
        .template(frozen.files.clone())
        .await
        .expect("template");
    let vm = world.fork_one(&template).await;
    let first = world.agent(&vm).await;
    let second = world.agent(&vm).await;
    assert!(second.answers().await);
    // Dropped in the middle of a call.
    {
        let third = Agent::connect(&vm).await.expect("connect");
        let body = vec![7; 256 * 1024];
        let call = third.call(Method::POST, "/files?path=/tmp/part&username=root", &body);
        let _ = timeout(Duration::from_millis(2), call).await;
    }
    let fourth = world.agent(&vm).await;
    assert_eq!(fourth.read(MARK).await.as_deref(), Some(MARK_CONTENT));
    drop((first, second));
    assert!(
        fourth.answers().await,
        "the end of an old connection ended the new one"
    );
    vm.kill().await.expect("kill");
    template.close().await.expect("close");
}

/// Whoever waits for the end of a VM is told at once, and how it ended.
pub(super) async fn a_killed_process_is_noticed(world: &World, frozen: &Frozen) {
    let template = world
        .template(frozen.files.clone())
        .await
        .expect("template");
    let vm = world.fork_one(&template).await;
    let waiter = tokio::spawn({
        let vm = vm.clone();
        async move { vm.exited().await }
    });
    assert!(
        timeout(Duration::from_millis(100), vm.exited())
            .await
            .is_err()
    );
    vm.kill().await.expect("kill");
    let exit = timeout(PROMPT, waiter).await.expect("promptly").unwrap();
    assert_eq!(exit, Exit::Signal(9));
    assert_eq!(vm.exited().await, exit, "asked again, it says the same");
    template.close().await.expect("close");
}

/// A guest that powers off ends its VM, which is no failure.
pub(super) async fn a_polite_shutdown_is_told(world: &World, frozen: &Frozen) {
    let template = world
        .template(frozen.files.clone())
        .await
        .expect("template");
    let vm = world.fork_one(&template).await;
    world.agent(&vm).await.shut_down().await;
    let exit = timeout(world.patience, vm.exited()).await;
    assert_eq!(exit.expect("the guest powers off"), Exit::Code(0));
    vm.kill().await.expect("killing what is gone is fine");
    template.close().await.expect("close");
}

/// What an engine adopts, it can use; what is gone, it says so.
pub(super) async fn adopts_what_still_runs(world: &World, frozen: &Frozen) {
    let template = world
        .template(frozen.files.clone())
        .await
        .expect("template");
    let mut spec = world.fork_spec();
    spec.lifetime = crate::Lifetime::Survive;
    let (id, run_dir) = (spec.id.clone(), spec.run_dir.clone());
    let vm = template.fork(vec![spec]).await.remove(0).expect("fork");
    let identity = vm.identity();
    world
        .agent(&vm)
        .await
        .write("/tmp/before", b"the daemon ended")
        .await;
    drop(vm);
    let mut reused = identity;
    reused.start_ticks += 1;
    let none = world
        .engine
        .adopt(reused, &id, &run_dir)
        .await
        .expect("adopt");
    assert!(none.is_none(), "adopted a process of another age");
    let other = world
        .engine
        .adopt(identity, "somebody-else", &run_dir)
        .await;
    assert!(other.expect("adopt").is_none(), "adopted another VM");
    let adopted = world.engine.adopt(identity, &id, &run_dir).await;
    let adopted = adopted.expect("adopt");
    // The guests of the fake die with the process they live in.
    assert!(adopted.is_some() || world.engine.name() == "fake");
    if let Some(vm) = adopted {
        let agent = world.agent(&vm).await;
        let before = agent.read("/tmp/before").await;
        assert_eq!(before.as_deref(), Some(&b"the daemon ended"[..]));
        let (spec, _) = world.full();
        vm.save(spec).await.expect("save an adopted VM");
        vm.kill().await.expect("kill");
        timeout(PROMPT, vm.exited()).await.expect("promptly");
    }
    let gone = world
        .engine
        .adopt(identity, &id, &run_dir)
        .await
        .expect("adopt");
    assert!(gone.is_none());
    template.close().await.expect("close");
}

async fn asked_anew(vm: &Arc<dyn Vm>) -> bool {
    match Agent::connect(vm).await {
        Some(agent) => agent.answers().await,
        None => false,
    }
}

/// A running VM runs on after a save, a paused one stays paused.
pub(super) async fn a_saved_machine_goes_on(world: &World, frozen: &Frozen) {
    let template = world
        .template(frozen.files.clone())
        .await
        .expect("template");
    let vm = world.fork_one(&template).await;
    let agent = world.agent(&vm).await;
    let (spec, _) = world.full();
    let report = vm.save(spec).await.expect("save");
    world.note("saved a fork in full", &report);
    assert!(report.pause > Duration::ZERO);
    let agent = world.agent_after_save(&vm, agent).await;
    vm.pause().await.expect("pause");
    let (spec, _) = world.full();
    vm.save(spec).await.expect("save");
    let silence = Duration::from_millis(300);
    let answered = match world.engine.capabilities().keeps_connections {
        true => timeout(silence, agent.answers()).await,
        false => timeout(silence, asked_anew(&vm)).await,
    };
    assert!(!answered.unwrap_or(false), "it was paused");
    vm.resume().await.expect("resume");
    world.agent_after_save(&vm, agent).await;
    vm.kill().await.expect("kill");
    template.close().await.expect("close");
}
