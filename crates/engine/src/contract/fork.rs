//! Forks: each has what was frozen, and nothing of its siblings.

use super::{Frozen, MARK, MARK_CONTENT, World};

/// Three forks begin with the same content, write to the same file, and see only their own.
pub(super) async fn inherits_and_is_isolated(world: &World, frozen: &Frozen) {
    let template = world
        .template(frozen.files.clone())
        .await
        .expect("template");
    let specs = (0..3).map(|_| world.fork_spec()).collect();
    let mut forks = Vec::new();
    for fork in template.fork(specs).await {
        let vm = fork.expect("fork");
        let agent = world.agent(&vm).await;
        forks.push((vm, agent));
    }
    for (index, (_, agent)) in forks.iter().enumerate() {
        assert_eq!(agent.read(MARK).await.as_deref(), Some(MARK_CONTENT));
        agent.write(MARK, format!("I am {index}").as_bytes()).await;
        agent
            .write("/tmp/large", &vec![index as u8; 256 << 10])
            .await;
    }
    for (index, (_, agent)) in forks.iter().enumerate() {
        let mark = agent.read(MARK).await;
        assert_eq!(mark, Some(format!("I am {index}").into_bytes()));
        assert_eq!(
            agent.read("/tmp/large").await,
            Some(vec![index as u8; 256 << 10])
        );
    }
    for (vm, _) in &forks {
        vm.kill().await.expect("kill");
    }
    // What siblings wrote did not reach the template either.
    let vm = world.fork_one(&template).await;
    let agent = world.agent(&vm).await;
    assert_eq!(agent.read(MARK).await.as_deref(), Some(MARK_CONTENT));
    // Forks outlive the template.
    template.close().await.expect("close");
    assert!(agent.answers().await);
    vm.kill().await.expect("kill");
}

/// A fork that cannot be made has its own error; the others are made.
pub(super) async fn one_answer_per_fork(world: &World, frozen: &Frozen) {
    let template = world
        .template(frozen.files.clone())
        .await
        .expect("template");
    assert!(template.fork(vec![]).await.is_empty());
    let mut specs: Vec<_> = (0..3).map(|_| world.fork_spec()).collect();
    specs[1].run_dir = world.dir.join("not").join("there");
    let forks = template.fork(specs).await;
    let made: Vec<bool> = forks.iter().map(Result::is_ok).collect();
    assert_eq!(made, [true, false, true]);
    for vm in forks.into_iter().flatten() {
        assert!(world.agent(&vm).await.answers().await);
        vm.kill().await.expect("kill");
    }
    template.close().await.expect("close");
}

/// A killed fork is gone for good; its siblings do not notice.
pub(super) async fn killing_one_leaves_the_others(world: &World, frozen: &Frozen) {
    let template = world
        .template(frozen.files.clone())
        .await
        .expect("template");
    let victim = world.fork_one(&template).await;
    let other = world.fork_one(&template).await;
    assert_ne!(victim.identity(), other.identity());
    let agent = world.agent(&other).await;
    victim.kill().await.expect("kill");
    victim.kill().await.expect("kill again");
    assert!(victim.dial().await.is_err());
    assert!(victim.pause().await.is_err());
    assert!(agent.answers().await);
    other.kill().await.expect("kill");
    template.close().await.expect("close");
}
