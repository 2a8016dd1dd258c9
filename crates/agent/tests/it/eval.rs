//! Code in the persistent interpreter.

use std::time::{Duration, Instant};

use forkd_sandbox::guest::Error;
use forkd_wire::agent::connect::Code;
use forkd_wire::agent::{EvalRequest, EvalResponse, ResumeRequest};

use crate::world::{PATIENCE, World};

fn request(code: &str, timeout_ms: u64) -> EvalRequest {
    EvalRequest {
        language: "python".to_owned(),
        code: code.to_owned(),
        timeout_ms,
    }
}

async fn eval(world: &World, code: &str) -> EvalResponse {
    world.client.eval(request(code, 0), PATIENCE).await.unwrap()
}

async fn refused(world: &World, code: &str, timeout_ms: u64) -> (Code, String) {
    match world.client.eval(request(code, timeout_ms), PATIENCE).await {
        Err(Error::Refused { code, message }) => (code, message),
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn values_output_and_state() {
    let world = World::new().await;
    assert_eq!(eval(&world, "").await, EvalResponse::default());
    assert_eq!(eval(&world, "1 + 1").await.result.as_deref(), Some("2"));
    assert_eq!(eval(&world, "None").await.result, None);
    let code = "import sys\nx = [1, 'ä']\nprint('out')\nprint('err', file=sys.stderr)\nx";
    let answer = eval(&world, code).await;
    assert_eq!(answer.result.as_deref(), Some("[1, 'ä']"));
    assert_eq!(
        (answer.stdout.as_str(), answer.stderr.as_str()),
        ("out\n", "err\n")
    );
    assert_eq!(eval(&world, "x[0] = 5").await.result, None);
    assert_eq!(
        eval(&world, "x, __name__").await.result.as_deref(),
        Some("([5, 'ä'], '__main__')")
    );
    // What a child of the interpreter prints is captured too.
    let answer = eval(&world, "import os; os.system('echo from a child')").await;
    assert_eq!(answer.stdout, "from a child\n");
    assert_eq!(answer.result.as_deref(), Some("0"));
}

#[tokio::test]
async fn exceptions_come_with_their_source() {
    let world = World::new().await;
    let answer = eval(&world, "def f():\n    return 1 / 0\nf()").await;
    assert_eq!(
        answer.error.as_deref(),
        Some("ZeroDivisionError: division by zero")
    );
    let traceback = answer.traceback.unwrap();
    assert!(traceback.contains("return 1 / 0"), "{traceback}");
    assert!(!traceback.contains("_forkd_driver"), "{traceback}");
    let answer = eval(&world, "1 +").await;
    assert!(answer.error.unwrap().starts_with("SyntaxError"));
    eval(&world, "kept = 7").await;
    let answer = eval(&world, "import sys; sys.exit(3)").await;
    assert_eq!(answer.error.as_deref(), Some("SystemExit: 3"));
    assert_eq!(eval(&world, "kept").await.result.as_deref(), Some("7"));
    let bad = "class Bad:\n    def __repr__(self): raise ValueError('no')\nBad()";
    assert_eq!(
        eval(&world, bad).await.error.as_deref(),
        Some("ValueError: no")
    );
    assert_eq!(eval(&world, "'\\ud800'").await.error, None);
    // A forked copy of the interpreter does not answer in its place.
    assert_eq!(
        eval(&world, "import os\nos.fork() == 0 and None\n1")
            .await
            .result
            .as_deref(),
        Some("1")
    );
    assert_eq!(eval(&world, "2").await.result.as_deref(), Some("2"));
}

#[tokio::test]
async fn output_is_bounded() {
    let world = World::new().await;
    let answer = eval(
        &world,
        "for _ in range(3000): print('x' * 1000)\n'y' * 3000000",
    )
    .await;
    assert!(answer.truncated);
    assert_eq!(answer.stdout.len(), 1 << 20);
    assert_eq!(answer.result.unwrap().len(), 1 << 20);
    assert!(!eval(&world, "1").await.truncated);
}

#[tokio::test]
async fn time_that_is_up_interrupts_and_keeps_the_state() {
    let world = World::new().await;
    eval(&world, "kept = 1").await;
    let started = Instant::now();
    let (code, message) = refused(&world, "while True: pass", 200).await;
    assert_eq!(code, Code::DeadlineExceeded);
    assert!(
        message.contains("200 ms") && message.contains("keeps its state"),
        "{message}"
    );
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(eval(&world, "kept").await.result.as_deref(), Some("1"));
    // Code that will not be interrupted costs the interpreter.
    let stubborn =
        "import time\nwhile True:\n  try: time.sleep(9)\n  except KeyboardInterrupt: pass";
    let (code, message) = refused(&world, stubborn, 200).await;
    assert_eq!(code, Code::DeadlineExceeded);
    assert!(message.contains("state is lost"), "{message}");
    let answer = eval(&world, "kept").await;
    assert_eq!(
        answer.error.as_deref(),
        Some("NameError: name 'kept' is not defined")
    );
}

#[tokio::test]
async fn an_interpreter_that_dies_is_replaced() {
    let world = World::new().await;
    let (code, message) = refused(&world, "import os; os._exit(9)", 0).await;
    assert_eq!(code, Code::Aborted);
    assert!(
        message.contains("exit status: 9") && message.contains("state is lost"),
        "{message}"
    );
    assert_eq!(eval(&world, "1").await.result.as_deref(), Some("1"));
    let (_, message) = refused(&world, "import os; os.kill(os.getpid(), 11)", 0).await;
    assert!(message.contains("signal: 11"), "{message}");
    assert_eq!(eval(&world, "1").await.result.as_deref(), Some("1"));
}

#[tokio::test]
async fn evaluations_wait_for_each_other() {
    let world = World::new().await;
    eval(&world, "log = []").await;
    let tasks: Vec<_> = (0..20)
        .map(|n| {
            let client = world.client.clone();
            let code = format!("log.append({n}); import time; time.sleep(0.005); len(log)");
            tokio::spawn(async move { client.eval(request(&code, 0), PATIENCE).await.unwrap() })
        })
        .collect();
    let mut lengths = Vec::new();
    for task in tasks {
        lengths.push(
            task.await
                .unwrap()
                .result
                .unwrap()
                .parse::<usize>()
                .unwrap(),
        );
    }
    lengths.sort_unstable();
    assert_eq!(lengths, (1..=20).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_cancelled_evaluation_ends_and_a_lost_one_goes_on() {
    let world = World::new().await;
    eval(&world, "import time; n = 0").await;
    let endless = "while True: time.sleep(0.01)";
    let cancelled = world
        .client
        .eval(request(endless, 0), Duration::from_millis(300))
        .await;
    assert!(matches!(cancelled, Err(Error::Timeout { .. })));
    assert_eq!(eval(&world, "n").await.result.as_deref(), Some("0"));
    let client = world.client.clone();
    let lost = tokio::spawn(async move {
        client
            .eval(request("time.sleep(0.5); n = 1", 0), PATIENCE)
            .await
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    world.client.disconnect().await;
    assert!(matches!(lost.await.unwrap(), Err(Error::Lost { .. })));
    assert_eq!(eval(&world, "n").await.result.as_deref(), Some("1"));
}

#[tokio::test]
async fn without_python_it_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap().to_owned();
    let world = World::with(false, &[("PATH", &path)]).await;
    assert_eq!(world.client.health(PATIENCE).await.unwrap().python, None);
    let error = world
        .client
        .eval(request("1", 0), PATIENCE)
        .await
        .unwrap_err();
    assert!(error.is_missing_interpreter());
    assert!(error.to_string().contains("python3"), "{error}");
    assert!(error.to_string().contains("forkd image build"), "{error}");
}

fn resume(env: &[(&str, &str)]) -> ResumeRequest {
    ResumeRequest {
        sandbox_id: "sb-1".to_owned(),
        index: 0,
        entropy: "A".repeat(44),
        wall_clock_ns: 1_700_000_000_000_000_000,
        hostname: "sb-1".to_owned(),
        machine_id: "0123456789abcdef0123456789abcdef".to_owned(),
        env: env
            .iter()
            .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
            .collect(),
        network: None,
    }
}

#[tokio::test]
async fn resume_reseeds_even_a_busy_interpreter() {
    let world = World::new().await;
    eval(
        &world,
        "import random, ssl, uuid, time; random.seed(1); a = random.random()",
    )
    .await;
    eval(&world, "random.seed(1)").await;
    let answer = world
        .client
        .resume(&resume(&[("FORK", "7")]), PATIENCE)
        .await
        .unwrap();
    assert!(answer.reseeded.contains(&"python".to_owned()), "{answer:?}");
    assert_eq!(
        eval(&world, "random.random() == a").await.result.as_deref(),
        Some("False")
    );
    assert_eq!(
        eval(&world, "import os; os.environ['FORK']")
            .await
            .result
            .as_deref(),
        Some("'7'")
    );
    let client = world.client.clone();
    let busy =
        "random.seed(1)\nt = time.time()\nwhile time.time() < t + 1: pass\nrandom.random() == a";
    let task = tokio::spawn(async move { client.eval(request(busy, 0), PATIENCE).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let started = Instant::now();
    world.client.resume(&resume(&[]), PATIENCE).await.unwrap();
    assert!(
        started.elapsed() < Duration::from_millis(500),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(
        task.await.unwrap().unwrap().result.as_deref(),
        Some("False")
    );
}

#[tokio::test]
async fn resume_refuses_what_it_cannot_apply() {
    let world = World::new().await;
    let cases: [(&str, fn(&mut ResumeRequest)); 4] = [
        ("entropy", |r| r.entropy = "AAAA".to_owned()),
        ("hostname", |r| r.hostname = "a b".to_owned()),
        ("machine id", |r| r.machine_id = "short".to_owned()),
        ("environment", |r| {
            drop(r.env.insert("A=B".to_owned(), String::new()))
        }),
    ];
    for (word, spoil) in cases {
        let mut request = resume(&[]);
        spoil(&mut request);
        match world.client.resume(&request, PATIENCE).await {
            Err(Error::Refused {
                code: Code::InvalidArgument,
                message,
            }) => {
                assert!(message.contains(word), "{message}");
            }
            other => panic!("{word}: {other:?}"),
        }
    }
}
