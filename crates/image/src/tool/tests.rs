//! Tools found, failing, cancelled and killed.

use super::output::TAIL_LINES;
use super::*;
use crate::Silent;

const SH: Tool = Tool::new("sh", "dash");

struct CancelAfter(Instant);

impl Progress for CancelAfter {
    fn step(&mut self, _: &crate::Step) {}
    fn message(&mut self, _: &str) {}
    fn cancelled(&self) -> bool {
        Instant::now() > self.0
    }
}

#[test]
fn a_missing_tool_names_its_package() {
    let tool = Tool::new("no-such-program-here", "the-package");
    let text = tool.find().unwrap_err().to_string();
    assert!(text.contains("no-such-program-here") && text.contains("apt-get install the-package"));
}

#[test]
fn output_of_both_streams_arrives_line_by_line() {
    let mut seen = Vec::new();
    SH.run(
        Path::new("/"),
        ["-c", "echo out; echo err >&2; printf 'no newline'"],
        &mut Silent,
        &mut |line, _| {
            seen.push(line.to_owned());
        },
    )
    .unwrap();
    seen.sort();
    assert_eq!(seen, ["err", "no newline", "out"]);
}

#[test]
fn a_failure_carries_the_last_lines_without_control_characters() {
    let script = "for i in $(seq 100); do echo line $i; done; printf '\\033[31mbad\\n' >&2; exit 3";
    let error = SH
        .run(Path::new("/"), ["-c", script], &mut Silent, &mut |_, _| {})
        .unwrap_err();
    let Error::Failed { status, tail, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(status.code(), Some(3));
    assert_eq!(tail.len(), TAIL_LINES);
    assert_eq!(tail.last().unwrap(), "[31mbad");
    assert!(error.to_string().contains("line 100"));
}

#[test]
fn cancelling_kills_the_whole_tree() {
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("alive");
    // A grandchild in the background goes on writing; it must stop with its parent.
    let script = format!(
        "(while :; do date +%N > {0}; sleep 0.02; done) & sleep 60",
        mark.display()
    );
    let started = Instant::now();
    let mut progress = CancelAfter(started + Duration::from_millis(500));
    let error = SH
        .run(
            Path::new("/"),
            ["-c", &script],
            &mut progress,
            &mut |_, _| {},
        )
        .unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(10));
    assert!(mark.exists(), "the script never ran");
    let stopped = (0..50).any(|_| {
        let before = std::fs::read(&mark).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        before == std::fs::read(&mark).unwrap()
    });
    assert!(stopped, "the grandchild still runs");
}

#[test]
fn captured_output_and_its_failure() {
    assert_eq!(SH.output(["-c", "echo hi"]).unwrap(), "hi\n");
    let error = SH
        .output(["-c", "echo why >&2; exit 1"])
        .unwrap_err()
        .to_string();
    assert!(error.contains("why"), "{error}");
}
