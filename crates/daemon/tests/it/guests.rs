//! Inside a sandbox: commands, code, files, console.

use std::collections::BTreeMap;

use axum::body::Body;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{Method, Request};
use serde_json::{Value, json};

use crate::world::{World, until};

async fn running() -> (World, String) {
    let world = World::new().await;
    let path = format!("/v1/sandboxes/{}", world.sandbox().await);
    (world, path)
}

#[tokio::test]
async fn commands_answer_with_output_and_exit_code() {
    let (world, path) = running().await;
    let exec = async |body: Value| world.post(&format!("{path}/exec"), body).await.expect(200);
    let script = "echo out; echo err >&2; exit 3";
    let done = exec(json!({"args": ["sh", "-c", script]})).await;
    assert_eq!(
        done,
        json!({"stdout": "out\n", "stderr": "err\n", "exit_code": 3})
    );
    let done = exec(json!({"args": ["no-such-program"]})).await;
    assert_eq!(done["exit_code"], 127);
    assert!(
        done["error"].as_str().unwrap().contains("no-such-program"),
        "{done}"
    );
    let done = exec(json!({"args": ["sleep", "30"], "timeout_secs": 1})).await;
    assert_eq!(
        (&done["exit_code"], &done["timed_out"]),
        (&json!(124), &json!(true))
    );
    let done = exec(json!({"args": ["sh", "-c", "kill -9 $$"]})).await;
    assert_eq!(done["exit_code"], 137);
    let done = exec(json!({"args": ["cat"], "stdin": "fed\n"})).await;
    assert_eq!(done["stdout"], "fed\n");
    // More input than a pipe holds, for a command that does not read it.
    let done = exec(json!({"args": ["true"], "stdin": "x".repeat(1 << 20)})).await;
    assert_eq!(done["exit_code"], 0);
    let done =
        exec(json!({"args": ["sh", "-c", "pwd; echo $A"], "cwd": "/tmp", "env": {"A": "b"}}));
    assert_eq!(done.await["stdout"], "/tmp\nb\n");
    for body in [
        json!({"args": []}),
        json!({"args": [""]}),
        json!({}),
        json!({"args": "true"}),
    ] {
        let answer = world.post(&format!("{path}/exec"), body.clone()).await;
        assert_eq!(answer.refusal(400), "invalid_argument", "{body}");
    }
    world.close().await;
}

#[tokio::test]
async fn the_environment_of_a_fork_reaches_its_commands() {
    let world = World::new().await;
    world.snapshot("base").await;
    let body = json!({"snapshot_tag": "base", "env": {"COLOUR": "green"}});
    let made = world.post("/v1/sandboxes", body).await.expect(201);
    let path = format!("/v1/sandboxes/{}/exec", made[0]["id"].as_str().unwrap());
    let done = world
        .post(&path, json!({"args": ["sh", "-c", "echo $COLOUR"]}))
        .await
        .expect(200);
    assert_eq!(done["stdout"], "green\n");
    world.close().await;
}

/// The events of a stream, in order.
fn events(text: &str) -> Vec<(String, Value)> {
    let blocks = text.split("\n\n").filter(|block| block.contains("event:"));
    let event = |block: &str| {
        let line = |name: &str| block.lines().find_map(|line| line.strip_prefix(name));
        let data = serde_json::from_str(line("data: ").unwrap()).unwrap();
        (line("event: ").unwrap().to_owned(), data)
    };
    blocks.map(event).collect()
}

#[tokio::test]
async fn commands_are_streamed() {
    let (world, path) = running().await;
    let body = json!({"args": ["sh", "-c", "cat; echo err >&2; exit 4"], "stdin": "in"});
    let text = world
        .post(&format!("{path}/exec/stream"), body)
        .await
        .text();
    let events = events(&text);
    assert_eq!(events[0].0, "started");
    let mut output: BTreeMap<&str, Vec<u8>> = BTreeMap::new();
    for (name, data) in &events {
        if let Some(data) = data["data"].as_str() {
            output
                .entry(name)
                .or_default()
                .extend(STANDARD.decode(data).unwrap());
        }
    }
    assert_eq!(output["stdout"], b"in");
    assert_eq!(output["stderr"], b"err\n");
    let (name, exit) = events.last().unwrap();
    assert_eq!((name.as_str(), &exit["exit_code"]), ("exit", &json!(4)));
    let missing = world
        .post(&format!("{path}/exec/stream"), json!({"args": ["no-such"]}))
        .await;
    assert!(missing.text().contains("\"exit_code\":127"));
    world.close().await;
}

#[tokio::test]
async fn processes_run_in_the_background() {
    let (world, path) = running().await;
    let all = format!("{path}/processes");
    let made = world
        .post(&all, json!({"args": ["sleep", "60"]}))
        .await
        .expect(201);
    let listed = world.get(&all).await.expect(200);
    assert_eq!(listed, json!([made]));
    let signal = format!("{all}/{}/signal", made["pid"]);
    let odd = world.post(&signal, json!({"signal": "SIGODD"})).await;
    assert_eq!(odd.refusal(400), "invalid_argument");
    world
        .post(&signal, json!({"signal": "SIGTERM"}))
        .await
        .expect(204);
    until("the process ends", async || {
        world.get(&all).await.expect(200) == json!([])
    })
    .await;
    assert_eq!(
        world
            .post(&signal, json!({"signal": "9"}))
            .await
            .refusal(404),
        "not_found"
    );
    world.close().await;
}

#[tokio::test]
async fn code_runs_in_an_interpreter_that_remembers() {
    let (world, path) = running().await;
    let eval = async |code: &str| {
        let body = json!({"code": code});
        world.post(&format!("{path}/eval"), body).await.expect(200)
    };
    eval("x = 20").await;
    let done = eval("print('hi'); x + 1").await;
    assert_eq!(
        (&done["result"], &done["stdout"]),
        (&json!("21"), &json!("hi\n"))
    );
    assert_eq!(
        (&done["error"], &done["exit_code"]),
        (&Value::Null, &json!(0))
    );
    let done = eval("1/0").await;
    assert_eq!(
        (&done["result"], &done["exit_code"]),
        (&Value::Null, &json!(1))
    );
    assert!(
        done["error"]
            .as_str()
            .unwrap()
            .starts_with("ZeroDivisionError"),
        "{done}"
    );
    let pong = world
        .post(&format!("{path}/ping"), Value::Null)
        .await
        .expect(200);
    assert_eq!(
        (&pong["pong"], &pong["agent_lang"]),
        (&json!(true), &json!("python"))
    );
    world.close().await;
}

#[tokio::test]
async fn files_go_in_and_come_out() {
    let (world, path) = running().await;
    let inside = world.dir.path().join("guest files").display().to_string();
    let query = |name: &str| format!("path={}", format!("{inside}/{name}").replace(' ', "%20"));
    let content: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
    let put = Request::put(format!("{path}/files?{}&mode=640", query("deep/a.bin")));
    world
        .send(put.body(Body::from(content.clone())).unwrap())
        .await
        .expect(204);

    let got = world
        .get(&format!("{path}/files?{}", query("deep/a.bin")))
        .await;
    assert_eq!(got.headers["content-type"], "application/octet-stream");
    assert!(got.bytes == content, "{} bytes came back", got.bytes.len());
    let stat = world
        .get(&format!("{path}/files/stat?{}", query("deep/a.bin")))
        .await
        .expect(200);
    assert_eq!(
        (&stat["kind"], &stat["size"]),
        (&json!("file"), &json!(3_000_000))
    );
    assert_eq!(stat["mode"].as_u64().unwrap() & 0o777, 0o640);

    let body = json!({"path": format!("{inside}/new/dir")});
    let made = world
        .post(&format!("{path}/files/mkdir"), body)
        .await
        .expect(200);
    assert_eq!(made["kind"], "directory");
    let (from, to) = (
        format!("{inside}/deep/a.bin"),
        format!("{inside}/new/b.bin"),
    );
    world
        .post(
            &format!("{path}/files/move"),
            json!({"from": from, "to": to}),
        )
        .await
        .expect(200);
    let list = world
        .get(&format!("{path}/files/list?{}&depth=2", query("new")))
        .await
        .expect(200);
    let names: Vec<&str> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|f| f["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["b.bin", "dir"]);
    let removed = format!("{path}/files?{}", query("new"));
    world.delete(&removed).await.expect(204);
    assert_eq!(world.delete(&removed).await.refusal(404), "not_found");
    assert_eq!(world.get(&removed).await.refusal(404), "not_found");
    let mode = Request::put(format!("{path}/files?path=/tmp/x&mode=999"));
    let mode = world.send(mode.body(Body::empty()).unwrap()).await;
    assert_eq!(mode.refusal(400), "invalid_argument");
    assert_eq!(
        world.get(&format!("{path}/files")).await.refusal(400),
        "invalid_argument"
    );
    world.close().await;
}

#[tokio::test]
async fn the_console_is_there_and_can_be_followed_to_the_end() {
    let (world, path) = running().await;
    let text = world.get(&format!("{path}/console")).await.text();
    assert!(text.contains("the guest boots"), "{text}");
    let tail = world.get(&format!("{path}/console?tail=6")).await.text();
    assert_eq!(tail, "boots\n");
    let uri = format!("{path}/console?follow=true");
    let followed = world.call(Method::GET, &uri, Value::Null);
    let killed = async {
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        world.delete(&path).await.expect(204)
    };
    let (followed, _) = tokio::join!(followed, killed);
    assert!(followed.text().contains("the guest boots"));
    world.close().await;
}
