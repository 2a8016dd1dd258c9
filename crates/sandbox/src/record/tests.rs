//! Records survive a reopening; damaged and newer files are told apart.

use super::*;
use crate::place::PlaceLimits;

fn record(id: &str) -> SandboxRecord {
    SandboxRecord {
        id: SandboxId::new(id).unwrap(),
        tag: Tag::new("t").unwrap(),
        snapshot_id: "snap".into(),
        index: 3,
        state: State::Starting,
        process: None,
        engine: "fake".into(),
        created_at_unix: 1,
        deadline_unix: Some(u64::from(u32::MAX)),
        metadata: BTreeMap::from([("a".into(), "b".into())]),
        memory_limit_mib: None,
        branches: 0,
        place: PlaceRecord {
            vcpus: 2,
            limits: PlaceLimits {
                cpu_milli: Some(250),
                ..PlaceLimits::default()
            },
            not_enforced: vec!["cpu_limit_milli".into()],
            slot: Some(12),
            cgroup: Some("/sys/fs/cgroup/forkd/a".into()),
            nat: true,
            allow: vec!["*.example.com:443".into()],
            deny: vec!["all".into()],
        },
        request: None,
    }
}

#[tokio::test]
async fn a_file_of_the_second_version_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    drop(Records::open(&path).unwrap());
    let old = Connection::open(&path).unwrap();
    old.execute_batch(
        "ALTER TABLE sandboxes DROP COLUMN request; DROP TABLE requests; PRAGMA user_version = 2;",
    )
    .unwrap();
    drop(old);
    let records = Records::open(&path).unwrap();
    records.insert(vec![record("a")]).await.unwrap();
    assert_eq!(read(&records).await, [record("a")]);
    assert_eq!(records.to_start_over().await.unwrap(), []);
}

#[tokio::test]
async fn a_file_of_the_first_version_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let old = Connection::open(&path).unwrap();
    old.execute_batch(
        "CREATE TABLE sandboxes (
             id TEXT PRIMARY KEY, tag TEXT NOT NULL, snapshot_id TEXT NOT NULL, child_index INTEGER NOT NULL,
             state TEXT NOT NULL, why TEXT, pid INTEGER, start_ticks INTEGER, engine TEXT NOT NULL,
             created_at_unix INTEGER NOT NULL, deadline_unix INTEGER, metadata TEXT NOT NULL,
             memory_limit_mib INTEGER, branches INTEGER NOT NULL
         ) STRICT;
         INSERT INTO sandboxes VALUES ('a', 't', 'snap', 3, 'starting', NULL, NULL, NULL, 'fake', 1, 4294967295,
                                       '{\"a\":\"b\"}', NULL, 0);
         PRAGMA user_version = 1;",
    )
    .unwrap();
    drop(old);
    let expected = SandboxRecord {
        place: PlaceRecord::default(),
        ..record("a")
    };
    for _ in 0..2 {
        let records = Records::open(&path).unwrap();
        assert_eq!(read(&records).await, std::slice::from_ref(&expected));
        records.insert(vec![record("b")]).await.unwrap();
        records.remove(&record("b").id).await.unwrap();
    }
}

async fn read(records: &Records) -> Vec<SandboxRecord> {
    records
        .all()
        .await
        .unwrap()
        .into_iter()
        .map(Result::unwrap)
        .collect()
}

#[tokio::test]
async fn what_was_written_is_read_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let process = Some(ProcessIdentity {
        pid: 7,
        start_ticks: 8,
    });
    {
        let records = Records::open(&path).unwrap();
        records
            .insert(vec![record("a"), record("b"), record("c")])
            .await
            .unwrap();
        let changed = SandboxRecord {
            state: State::Running,
            process,
            branches: 2,
            deadline_unix: Some(77),
            ..record("a")
        };
        records.update(&changed).await.unwrap();
        records.remove(&record("b").id).await.unwrap();
    }
    let records = Records::open(&path).unwrap();
    let expected = SandboxRecord {
        state: State::Running,
        process,
        branches: 2,
        deadline_unix: Some(77),
        ..record("a")
    };
    assert_eq!(read(&records).await, [expected, record("c")]);
}

#[tokio::test]
async fn every_state_makes_the_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(&dir.path().join("s")).unwrap();
    let why = || "because".to_owned();
    let states = [
        State::Starting,
        State::Greeting,
        State::Running,
        State::Paused,
        State::Branching { paused: true },
        State::Branching { paused: false },
        State::Stopping { why: why() },
        State::Ended { why: why() },
    ];
    for (i, state) in states.iter().enumerate() {
        let one = SandboxRecord {
            state: state.clone(),
            ..record(&format!("s{i}"))
        };
        records.insert(vec![one]).await.unwrap();
    }
    let found: Vec<State> = read(&records).await.into_iter().map(|r| r.state).collect();
    assert_eq!(found, states);
}

#[tokio::test]
async fn a_refused_write_does_not_undo_its_neighbours() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(&dir.path().join("s")).unwrap();
    let writes = ["a", "a", "b"].map(|id| {
        let records = records.clone();
        async move { records.insert(vec![record(id)]).await }
    });
    let outcomes = futures_util::future::join_all(writes).await;
    assert_eq!(outcomes.iter().filter(|o| o.is_err()).count(), 1);
    assert_eq!(read(&records).await.len(), 2);
}

#[tokio::test]
async fn an_insert_is_all_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(&dir.path().join("s")).unwrap();
    records.insert(vec![record("b")]).await.unwrap();
    assert!(
        records
            .insert(vec![record("a"), record("b"), record("c")])
            .await
            .is_err()
    );
    assert_eq!(read(&records).await, [record("b")]);
}

#[test]
fn a_file_that_is_no_database_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    std::fs::write(&path, vec![7; 8192]).unwrap();
    assert!(matches!(Records::open(&path), Err(Error::Damaged { .. })));
}

#[test]
fn a_truncated_database_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let connection = Connection::open(&path).unwrap();
    row::create_tables(&connection).unwrap();
    for i in 0..200 {
        row::insert(&connection, &record(&format!("s{i}"))).unwrap();
    }
    drop(connection);
    let len = std::fs::metadata(&path).unwrap().len();
    std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(len / 2)
        .unwrap();
    assert!(matches!(Records::open(&path), Err(Error::Damaged { .. })));
}

#[test]
fn a_newer_file_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let connection = Connection::open(&path).unwrap();
    connection.pragma_update(None, "user_version", 99).unwrap();
    drop(connection);
    assert!(matches!(
        Records::open(&path),
        Err(Error::Newer { found: 99, .. })
    ));
}

#[test]
fn a_missing_directory_is_named() {
    let error = Records::open(Path::new("/nonexistent/dir/state.db")).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/dir/state.db"));
}

fn request(id: &str, content: &str) -> Repeatable {
    Repeatable {
        id: RequestId(id.into()),
        content: content.into(),
        starts_over: content.starts_with("fork"),
    }
}

#[tokio::test]
async fn what_a_request_was_answered_is_known_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let id = |id: &str| RequestId(id.into());
    {
        let records = Records::open(&path).unwrap();
        for name in ["done", "gone", "fork"] {
            let begun = records.begin(request(name, name), 1000).await.unwrap();
            assert_eq!(begun, Begun::New);
        }
        records.begin(request("exec", "exec"), 1000).await.unwrap();
        let child = SandboxRecord {
            request: Some(id("fork")),
            ..record("child")
        };
        records.insert(vec![child]).await.unwrap();
        records.answer(id("done"), vec![1, 2], 1000).await.unwrap();
        records.forget(vec![id("gone")]).await.unwrap();
    }
    let records = Records::open(&path).unwrap();
    assert_eq!(read(&records).await[0].request, Some(id("fork")));
    assert_eq!(records.to_start_over().await.unwrap(), [id("fork")]);
    for (asked, now, known) in [
        (request("done", "done"), 4599, Begun::Answered(vec![1, 2])),
        (request("done", "other"), 4599, Begun::Different),
        (request("exec", "exec"), 4599, Begun::CutOff),
        (request("gone", "gone"), 4599, Begun::New),
        (request("done", "other"), 4600, Begun::New),
        (request("exec", "exec"), 87_399, Begun::CutOff),
        (request("exec", "exec"), 87_400, Begun::New),
    ] {
        let text = format!("{asked:?} at {now}");
        assert_eq!(records.begin(asked, now).await.unwrap(), known, "{text}");
    }
}

#[tokio::test]
async fn answers_are_bounded_in_number_and_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let records = Records::open(&path).unwrap();
    let file = Connection::open(&path).unwrap();
    let left = || -> Vec<i64> {
        requests::make_room(&file, 1000).unwrap();
        let mut select = file
            .prepare("SELECT rowid FROM requests ORDER BY rowid")
            .unwrap();
        let rows = select.query_map([], |row| row.get(0)).unwrap();
        rows.map(Result::unwrap).collect()
    };
    let fill = |from: i64, to: i64, answer: &str| {
        file.execute_batch(&format!(
            "WITH RECURSIVE n(i) AS (VALUES({from}) UNION ALL SELECT i + 1 FROM n WHERE i < {to})
             INSERT INTO requests (rowid, id, content, starts_over, kept_until_unix, answer)
             SELECT i, i, 'c', 0, 2000, {answer} FROM n;"
        ))
        .unwrap();
    };
    fill(1, 3, "NULL");
    fill(10, 4109, "x'07'");
    assert_eq!(left(), (1..=3).chain(14..=4109).collect::<Vec<_>>());
    // The newer of two that are too large together, and what is under way.
    fill(5000, 5001, "zeroblob(40 << 20)");
    assert_eq!(left(), [1, 2, 3, 5001]);
    file.execute_batch("UPDATE requests SET kept_until_unix = 1000 WHERE rowid < 3")
        .unwrap();
    assert_eq!(left(), [3, 5001]);
    // Whoever begins many makes room by the way.
    fill(6000, 12_000, "x'07'");
    for i in 0..64 {
        let begun = records.begin(request(&format!("r{i}"), "c"), 1000).await;
        assert_eq!(begun.unwrap(), Begun::New);
    }
    let count = file.query_row("SELECT count(*) FROM requests", [], |row| row.get(0));
    let count: i64 = count.unwrap();
    assert!((4096..=4096 + 64 + 2).contains(&count), "{count}");
}

/// A header and one frame of one page: the next commit appends, and does not wait for the disk.
#[tokio::test]
async fn a_log_is_begun_before_anybody_waits_for_it() {
    const BEGUN: u64 = 32 + 24 + 4096;
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("state.db-wal");
    let len = || std::fs::metadata(&log).unwrap().len();
    let records = Records::open(&dir.path().join("state.db")).unwrap();
    assert_eq!(len(), BEGUN);
    records.insert(vec![record("a")]).await.unwrap();
    assert!(len() > BEGUN);
    for _ in 0..500 {
        if len() == BEGUN {
            assert_eq!(read(&records).await, [record("a")]);
            return;
        }
        tokio::time::sleep(IDLE / 50).await;
    }
    panic!("{} bytes are left in the log", len());
}
