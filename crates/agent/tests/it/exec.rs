//! Processes: output, input, signals, limits, ends.

use std::time::{Duration, Instant};

use forkd_sandbox::guest::{Error, Event, ExecRequest, Exit, Output};
use forkd_wire::agent::connect::Code;
use forkd_wire::agent::process::{ProcessSelector, PtySize};

use crate::world::{PATIENCE, World, alive, until};

async fn sh(world: &World, line: &str) -> Output {
    world
        .client
        .run(ExecRequest::shell(line), PATIENCE)
        .await
        .unwrap()
}

fn refusal<T: std::fmt::Debug>(result: Result<T, Error>) -> (Code, String) {
    match result {
        Err(Error::Refused { code, message }) => (code, message),
        other => panic!("not a refusal: {other:?}"),
    }
}

#[tokio::test]
async fn output_and_status_come_back() {
    let world = World::new().await;
    let output = sh(&world, "printf 'out\\377'; printf err >&2; exit 3").await;
    assert_eq!(output.stdout, b"out\xff");
    assert_eq!(output.stderr, b"err");
    assert_eq!(
        (output.exit_code, output.signal, output.timed_out),
        (3, None, false)
    );
    let output = sh(&world, "kill -SEGV $$").await;
    assert_eq!((output.exit_code, output.signal), (139, Some(11)));
}

#[tokio::test]
async fn env_and_directory_are_as_asked() {
    let world = World::new().await;
    let mut request = ExecRequest::shell("echo $A-$HOME; pwd");
    request.env.insert("A".to_owned(), "b c".to_owned());
    request.cwd = Some("/usr".to_owned());
    let output = world.client.run(request, PATIENCE).await.unwrap();
    let home = world.dir.path().display();
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        format!("b c-{home}\n/usr\n")
    );
}

#[tokio::test]
async fn another_user_is_another_user() {
    let world = World::new().await;
    let mut request = ExecRequest::new(["id", "-un"]);
    request.user = Some("nobody".to_owned());
    request.cwd = Some("/".to_owned());
    let output = world.client.run(request, PATIENCE).await.unwrap();
    assert_eq!(output.stdout, b"nobody\n");
    let mut request = ExecRequest::new(["id"]);
    request.user = Some("nosuchuser".to_owned());
    let (code, message) = refusal(world.client.run(request, PATIENCE).await);
    assert_eq!(code, Code::Unauthenticated);
    assert!(message.contains("nosuchuser"), "{message}");
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let world = World::new().await;
    let start = async |args: &[&str]| {
        refusal(
            world
                .client
                .run(ExecRequest::new(args.iter().copied()), PATIENCE)
                .await,
        )
    };
    let (code, message) = start(&["no-such-command"]).await;
    assert_eq!(code, Code::NotFound);
    assert!(
        message.contains("no-such-command: command not found"),
        "{message}"
    );
    let (code, message) = start(&["/no/such/file"]).await;
    assert_eq!(code, Code::NotFound);
    assert!(message.contains("/no/such/file"), "{message}");
    let script = world.path("script");
    std::fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let (code, message) = start(&[&script]).await;
    assert_eq!(code, Code::NotFound);
    assert!(message.contains("interpreter"), "{message}");
    std::fs::write(&script, "neither program nor script").unwrap();
    assert_eq!(start(&[&script]).await.0, Code::FailedPrecondition);
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    assert_eq!(start(&[&script]).await.0, Code::PermissionDenied);
    let mut request = ExecRequest::new(["true"]);
    request.cwd = Some("/no/such/dir".to_owned());
    let (code, message) = refusal(world.client.run(request, PATIENCE).await);
    assert_eq!(code, Code::NotFound);
    assert!(message.contains("/no/such/dir"), "{message}");
}

#[tokio::test]
async fn stdin_is_written_and_closed() {
    let world = World::new().await;
    let mut request = ExecRequest::new(["cat"]);
    request.stdin = true;
    let mut exec = world.client.start(request).await.unwrap();
    let handle = exec.handle();
    let sent: Vec<u8> = (0..=255).cycle().take(1_000_000).collect();
    let input = sent.clone();
    let writer = tokio::spawn(async move {
        handle.write(&input).await.unwrap();
        handle.close_stdin().await.unwrap();
    });
    let mut got = Vec::new();
    while let Some(event) = exec.next().await.unwrap() {
        match event {
            Event::Stdout(bytes) => got.extend_from_slice(&bytes),
            Event::Exit(exit) => assert_eq!(exit.code, 0),
            Event::Stderr(bytes) => panic!("{bytes:?}"),
        }
    }
    writer.await.unwrap();
    assert!(got == sent);
    // Without stdin, the process reads the end at once.
    let output = sh(&world, "cat; echo done").await;
    assert_eq!(output.stdout, b"done\n");
}

#[tokio::test]
async fn signals_reach_the_group() {
    let world = World::new().await;
    let mut exec = world
        .client
        .start(ExecRequest::shell("sleep 100 & echo $!; wait"))
        .await
        .unwrap();
    let Some(Event::Stdout(text)) = exec.next().await.unwrap() else {
        panic!("no output")
    };
    let child: u32 = std::str::from_utf8(&text).unwrap().trim().parse().unwrap();
    assert_eq!(world.client.processes().await.unwrap()[0].pid, exec.pid());
    exec.handle().signal(15).await.unwrap();
    let exit = Event::Exit(Exit {
        code: 143,
        signal: Some(15),
        timed_out: false,
    });
    assert_eq!(exec.next().await.unwrap(), Some(exit));
    until("the grandchild's end", || !alive(child)).await;
    assert!(world.client.processes().await.unwrap().is_empty());
    let (code, _) = refusal(exec.handle().kill().await);
    assert_eq!(code, Code::NotFound);
}

#[tokio::test]
async fn time_that_is_up_kills_everything() {
    let world = World::new().await;
    let mut request = ExecRequest::shell("sleep 100 & echo $!; trap '' TERM; sleep 100");
    request.timeout = Some(Duration::from_millis(300));
    let started = Instant::now();
    let output = world.client.run(request, PATIENCE).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(10));
    assert!(output.timed_out);
    assert_eq!((output.exit_code, output.signal), (137, Some(9)));
    let child: u32 = String::from_utf8(output.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    until("the grandchild's end", || !alive(child)).await;
}

#[tokio::test]
async fn a_grandchild_that_keeps_the_pipe_does_not_hold_the_end() {
    let world = World::new().await;
    let started = Instant::now();
    let output = sh(&world, "sleep 60 & echo $!; exit 5").await;
    assert_eq!(output.exit_code, 5);
    assert!(started.elapsed() < Duration::from_secs(5));
    // It was put into the background on purpose, so it goes on.
    let child: u32 = String::from_utf8(output.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!(alive(child));
    sh(&world, &format!("kill {child}")).await;
}

#[tokio::test]
async fn dropping_the_stream_kills_and_losing_the_connection_does_not() {
    let world = World::new().await;
    let exec = world
        .client
        .start(ExecRequest::new(["sleep", "100"]))
        .await
        .unwrap();
    let pid = exec.pid();
    drop(exec);
    until("the end of the cancelled process", || !alive(pid)).await;

    let mut request = ExecRequest::new(["sleep", "100"]);
    request.background = true;
    let exec = world.client.start(request).await.unwrap();
    let background = exec.pid();
    drop(exec);
    let mut exec = world
        .client
        .start(ExecRequest::new(["sleep", "100"]))
        .await
        .unwrap();
    world.client.disconnect().await;
    assert!(matches!(exec.next().await, Err(Error::Lost { .. })));
    tokio::time::sleep(Duration::from_millis(200)).await;
    let pids: Vec<_> = world
        .client
        .processes()
        .await
        .unwrap()
        .iter()
        .map(|info| info.pid)
        .collect();
    assert_eq!(pids.len(), 2, "{pids:?}");
    assert!(pids.contains(&exec.pid()) && pids.contains(&background));
    // And both can be picked up again.
    let mut again = world
        .client
        .attach(ProcessSelector::Pid(background))
        .await
        .unwrap();
    again.handle().kill().await.unwrap();
    assert!(matches!(again.next().await.unwrap(), Some(Event::Exit(_))));
    exec.handle().kill().await.unwrap();
}

#[tokio::test]
async fn a_process_without_listeners_is_not_held_up() {
    let world = World::new().await;
    let mut request = ExecRequest::shell(&format!(
        "head -c 1000000 /dev/zero; touch {}",
        world.path("done")
    ));
    request.background = true;
    drop(world.client.start(request).await.unwrap());
    let done = world.dir.path().join("done");
    until("the background process's work", || done.exists()).await;
}

#[tokio::test]
async fn a_hundred_megabytes_pass_through_little_memory() {
    const SIZE: usize = 100_000_000;
    let world = World::new().await;
    let line = format!("head -c {SIZE} /dev/zero | tr '\\0' x");
    let mut exec = world.client.start(ExecRequest::shell(&line)).await.unwrap();
    let before = world.agent_memory();
    // Nobody reads: the process must wait, not the agent grow.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let grown = world.agent_memory().saturating_sub(before);
    assert!(grown < 8 << 20, "grew by {grown} bytes");
    let mut total = 0;
    while let Some(event) = exec.next().await.unwrap() {
        match event {
            Event::Stdout(bytes) => {
                assert!(bytes.iter().all(|byte| *byte == b'x'));
                total += bytes.len();
            }
            Event::Exit(exit) => assert_eq!(exit.code, 0),
            Event::Stderr(bytes) => panic!("{bytes:?}"),
        }
    }
    assert_eq!(total, SIZE);
    let peak = world.agent_peak();
    assert!(peak < 64 << 20, "peak of {peak} bytes");
}

#[tokio::test]
async fn a_terminal_is_a_terminal() {
    let world = World::new().await;
    let mut request = ExecRequest::shell("stty size; read line; echo got $line; stty size");
    request.pty = Some(PtySize { cols: 91, rows: 17 });
    let mut exec = world.client.start(request).await.unwrap();
    let handle = exec.handle();
    let mut text = String::new();
    let mut sent = false;
    while let Some(event) = exec.next().await.unwrap() {
        if let Event::Stdout(bytes) = event {
            text.push_str(std::str::from_utf8(&bytes).unwrap());
        }
        if !sent && text.contains("17 91") {
            sent = true;
            handle
                .resize(PtySize {
                    cols: 100,
                    rows: 50,
                })
                .await
                .unwrap();
            handle.write_terminal(b"hello\n").await.unwrap();
        }
    }
    assert!(text.contains("got hello"), "{text:?}");
    assert!(text.contains("50 100"), "{text:?}");
}

#[tokio::test]
async fn many_at_once_are_kept_apart() {
    let world = World::new().await;
    let one = |n: usize| {
        let client = world.client.clone();
        async move {
            let line = format!("echo {n}; exit {}", n % 7);
            let output = client
                .run(ExecRequest::shell(&line), PATIENCE)
                .await
                .unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{n}\n"));
            assert_eq!(output.exit_code, i32::try_from(n % 7).unwrap());
        }
    };
    let tasks: Vec<_> = (0..100).map(|n| tokio::spawn(one(n))).collect();
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn an_agent_that_dies_is_noticed_at_once() {
    let mut world = World::new().await;
    let mut exec = world
        .client
        .start(ExecRequest::new(["sleep", "5"]))
        .await
        .unwrap();
    world.agent.kill().unwrap();
    let started = Instant::now();
    assert!(matches!(exec.next().await, Err(Error::Lost { .. })));
    let error = world
        .client
        .run(ExecRequest::new(["true"]), PATIENCE)
        .await
        .unwrap_err();
    // Whether its socket was closed before or after the attempt to connect.
    assert!(
        matches!(error, Error::Dial(_) | Error::Lost { .. }),
        "{error:?}"
    );
    assert!(started.elapsed() < Duration::from_secs(2));
    let error = world
        .client
        .health(Duration::from_millis(300))
        .await
        .unwrap_err();
    assert!(
        matches!(error, Error::Dial(_) | Error::Timeout { .. }),
        "{error:?}"
    );
}
