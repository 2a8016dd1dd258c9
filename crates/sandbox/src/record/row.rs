//! The tables, and the way between a row and a [`SandboxRecord`].

use std::collections::BTreeMap;

use forkd_engine::ProcessIdentity;
use forkd_wire::id::{SandboxId, Tag};
use rusqlite::{Connection, Error, Row, params};

use super::{RequestId, SCHEMA_VERSION, SandboxRecord, requests};
use crate::machine::State;

pub(super) fn create_tables(connection: &Connection) -> Result<(), Error> {
    connection.execute_batch(&format!(
        "BEGIN;
         CREATE TABLE sandboxes (
             id               TEXT PRIMARY KEY,
             tag              TEXT NOT NULL,
             snapshot_id      TEXT NOT NULL,
             child_index      INTEGER NOT NULL,
             state            TEXT NOT NULL,
             why              TEXT,
             pid              INTEGER,
             start_ticks      INTEGER,
             engine           TEXT NOT NULL,
             created_at_unix  INTEGER NOT NULL,
             deadline_unix    INTEGER,
             metadata         TEXT NOT NULL,
             memory_limit_mib INTEGER,
             branches         INTEGER NOT NULL,
             place            TEXT NOT NULL DEFAULT '{{}}',
             request          TEXT
         ) STRICT;
         {}
         PRAGMA user_version = {SCHEMA_VERSION};
         COMMIT;",
        requests::TABLE
    ))
}

/// From version 1, whose sandboxes had no place of their own.
pub(super) fn add_places(connection: &Connection) -> Result<(), Error> {
    connection.execute_batch(&format!(
        "BEGIN;
         ALTER TABLE sandboxes ADD COLUMN place TEXT NOT NULL DEFAULT '{{}}';
         ALTER TABLE sandboxes ADD COLUMN request TEXT;
         {}
         PRAGMA user_version = {SCHEMA_VERSION};
         COMMIT;",
        requests::TABLE
    ))
}

/// From version 2, which remembered no requests.
pub(super) fn add_requests(connection: &Connection) -> Result<(), Error> {
    connection.execute_batch(&format!(
        "BEGIN;
         ALTER TABLE sandboxes ADD COLUMN request TEXT;
         {}
         PRAGMA user_version = {SCHEMA_VERSION};
         COMMIT;",
        requests::TABLE
    ))
}

fn json<T: serde::Serialize>(value: &T) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|e| Error::ToSqlConversionFailure(Box::new(e)))
}

pub(super) fn insert(connection: &Connection, record: &SandboxRecord) -> Result<(), Error> {
    let (state, why) = state_columns(&record.state);
    connection
        .prepare_cached(
            "INSERT INTO sandboxes VALUES
             (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)",
        )?
        .execute(params![
            record.id.as_str(),
            record.tag.as_str(),
            record.snapshot_id,
            record.index,
            state,
            why,
            record.process.map(|p| p.pid),
            record.process.map(|p| p.start_ticks),
            record.engine,
            record.created_at_unix,
            record.deadline_unix,
            json(&record.metadata)?,
            record.memory_limit_mib,
            record.branches,
            json(&record.place)?,
            record.request.as_ref().map(|request| &request.0),
        ])?;
    Ok(())
}

pub(super) fn update(connection: &Connection, record: &SandboxRecord) -> Result<(), Error> {
    let (state, why) = state_columns(&record.state);
    connection
        .prepare_cached(
            "UPDATE sandboxes SET state = ?2, why = ?3, pid = ?4, start_ticks = ?5, branches = ?6,
             deadline_unix = ?7, place = ?8 WHERE id = ?1",
        )?
        .execute(params![
            record.id.as_str(),
            state,
            why,
            record.process.map(|p| p.pid),
            record.process.map(|p| p.start_ticks),
            record.branches,
            record.deadline_unix,
            json(&record.place)?,
        ])?;
    Ok(())
}

pub(super) fn remove(connection: &Connection, id: &SandboxId) -> Result<(), Error> {
    connection
        .prepare_cached("DELETE FROM sandboxes WHERE id = ?1")?
        .execute([id.as_str()])?;
    Ok(())
}

pub(super) fn all(connection: &Connection) -> Result<Vec<Result<SandboxRecord, String>>, Error> {
    connection
        .prepare("SELECT * FROM sandboxes ORDER BY created_at_unix, id")?
        .query_map([], |row| Ok(read(row)))?
        .collect()
}

fn read(row: &Row<'_>) -> Result<SandboxRecord, String> {
    let id: String = column(row, "id")?;
    read_fields(row, &id).map_err(|problem| format!("record of sandbox {id:?}: {problem}"))
}

fn read_fields(row: &Row<'_>, id: &str) -> Result<SandboxRecord, String> {
    let pid: Option<u32> = column(row, "pid")?;
    let start_ticks: Option<u64> = column(row, "start_ticks")?;
    let state: String = column(row, "state")?;
    let metadata: String = column(row, "metadata")?;
    Ok(SandboxRecord {
        id: SandboxId::new(id).map_err(|e| e.to_string())?,
        tag: Tag::new(column::<String>(row, "tag")?).map_err(|e| e.to_string())?,
        snapshot_id: column(row, "snapshot_id")?,
        index: column(row, "child_index")?,
        state: state_from(&state, column(row, "why")?)?,
        process: pid
            .zip(start_ticks)
            .map(|(pid, start_ticks)| ProcessIdentity { pid, start_ticks }),
        engine: column(row, "engine")?,
        created_at_unix: column(row, "created_at_unix")?,
        deadline_unix: column(row, "deadline_unix")?,
        metadata: serde_json::from_str::<BTreeMap<_, _>>(&metadata).map_err(|e| e.to_string())?,
        memory_limit_mib: column(row, "memory_limit_mib")?,
        branches: column(row, "branches")?,
        place: serde_json::from_str(&column::<String>(row, "place")?).map_err(|e| e.to_string())?,
        request: column::<Option<String>>(row, "request")?.map(RequestId),
    })
}

fn column<T: rusqlite::types::FromSql>(row: &Row<'_>, name: &str) -> Result<T, String> {
    row.get(name).map_err(|e| e.to_string())
}

fn state_columns(state: &State) -> (&'static str, Option<&str>) {
    match state {
        State::Starting => ("starting", None),
        State::Greeting => ("greeting", None),
        State::Running => ("running", None),
        State::Paused => ("paused", None),
        State::Branching { paused: false } => ("branching", None),
        State::Branching { paused: true } => ("branching_paused", None),
        State::Stopping { why } => ("stopping", Some(why)),
        State::Ended { why } => ("ended", Some(why)),
    }
}

fn state_from(text: &str, why: Option<String>) -> Result<State, String> {
    let why = why.unwrap_or_default();
    Ok(match text {
        "starting" => State::Starting,
        "greeting" => State::Greeting,
        "running" => State::Running,
        "paused" => State::Paused,
        "branching" => State::Branching { paused: false },
        "branching_paused" => State::Branching { paused: true },
        "stopping" => State::Stopping { why },
        "ended" => State::Ended { why },
        other => return Err(format!("unknown state {other:?}")),
    })
}
