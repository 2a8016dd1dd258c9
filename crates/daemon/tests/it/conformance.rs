//! schemathesis sends what the checked-in description of the interface allows and what it forbids, and sees whether
//! the answers are described. It comes from PyPI, into a virtual environment below the target directory.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;
use tempfile::TempDir;

use crate::daemon::Daemon;

const VERSION: &str = "4.32.5";
const TOKEN: &str = "a-token-that-is-long-enough";
/// What is checked of every answer: no 5xx, nothing that is not described, nothing without a token.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,\
    response_headers_conformance,response_schema_conformance,ignored_auth";
/// Longest time for the part that invents requests, seconds.
const FUZZING_SECS: &str = "45";

/// The program, installed if it was not; or why it cannot be.
fn schemathesis() -> Result<PathBuf, String> {
    // target/debug/deps/it-0123 is this program.
    let own = std::env::current_exe().unwrap();
    let home = own.ancestors().nth(3).unwrap();
    let home = home.join(format!("schemathesis-{VERSION}"));
    let program = home.join("bin/schemathesis");
    if program.exists() {
        return Ok(program);
    }
    let run = |command: &mut Command| -> Result<(), String> {
        let output = command.stdin(Stdio::null()).output();
        let output = output.map_err(|error| error.to_string())?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        output.status.success().then_some(()).ok_or(said)
    };
    run(Command::new("python3").args(["-m", "venv"]).arg(&home))
        .map_err(|why| format!("there is no python3 with venv: {why}"))?;
    let package = format!("schemathesis=={VERSION}");
    run(Command::new(home.join("bin/pip")).args(["install", "--quiet", &package]))
        .map_err(|why| format!("the package cannot be had: {why}"))?;
    Ok(program)
}

#[test]
fn every_answer_is_described_and_none_is_a_failure() {
    let program = match schemathesis() {
        Ok(program) => program,
        Err(why) => {
            println!("skipped: schemathesis: {why}");
            return;
        }
    };
    let dir = TempDir::new().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, TOKEN).unwrap();
    let daemon = Daemon::start(dir.path(), &|| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forkd-controller"));
        command.args(["serve", "--engine", "fake"]);
        command.arg("--token-file").arg(&token);
        command
    });
    let sandbox = seed(&daemon, dir.path());
    // Without it hardly any request would get beyond "there is no such sandbox".
    let settings = format!(
        "[[operations]]\ninclude-path-regex = '^/v1/sandboxes/\\{{id\\}}'\nexclude-method = 'DELETE'\n\
         [operations.parameters]\n'path.id' = '{sandbox}'\n'query.follow' = false\n"
    );
    std::fs::write(dir.path().join("schemathesis.toml"), settings).unwrap();
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../openapi/v1.json");
    let mut failed = vec![];
    for (phases, more) in [
        ("examples,coverage", &["--max-examples", "3"][..]),
        (
            "fuzzing,stateful",
            &["--max-examples", "6", "--max-time", FUZZING_SECS],
        ),
    ] {
        let output = Command::new(&program)
            .args(["run", "--url", &format!("http://{}", daemon.addr)])
            .args(["--header", &format!("Authorization: Bearer {TOKEN}")])
            .args(["--checks", CHECKS, "--phases", phases, "--seed", "1"])
            .args([
                "--request-timeout",
                "30",
                "--warnings",
                "off",
                // Python 3.11 loses count of its recursion when two threads parse at once.
                "--workers",
                "1",
            ])
            .args(["--continue-on-failure", "--no-color"])
            .args(more)
            .arg(&document)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        println!("{said}");
        assert!(said.contains("Operations:       42"), "{said}");
        if !output.status.success() {
            failed.push(phases);
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
    daemon.ask("GET", "/healthz", &json!(null)).unwrap();
}

/// Something to ask about; answers the sandbox.
fn seed(daemon: &Daemon, dir: &Path) -> String {
    let mut client = crate::client::Client::connect(daemon.addr).unwrap();
    client.bearer(TOKEN);
    let file = dir.join("file");
    std::fs::write(&file, "file").unwrap();
    let snapshot = json!({"tag": "base", "kernel": file, "initramfs": file, "rootfs": file,
        "memory_mib": 64});
    let made = client.ask("POST", "/v1/snapshots", &snapshot.to_string());
    assert_eq!(made.unwrap().status, 201);
    let fork = json!({"snapshot_tag": "base"}).to_string();
    let made = client.ask("POST", "/v1/sandboxes", &fork).unwrap();
    let made: serde_json::Value = serde_json::from_slice(&made.body).unwrap();
    made[0]["id"].as_str().unwrap().to_owned()
}
