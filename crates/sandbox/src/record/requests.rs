//! Requests that may be repeated: that they were begun, and what was answered.
//!
//! A request is recorded before anything is done for it, and its answer before the caller gets it. So a daemon that
//! finds one without an answer knows that nobody was told how it went.

use rusqlite::{Connection, Error, OptionalExtension, params};

/// Answers remembered; the oldest make room, some dozens at a time.
const KEPT_MAX: i64 = 4096;
/// Requests after which the older ones are counted.
const ROOM_EVERY: i64 = 64;
/// Bytes of answers remembered.
const KEPT_BYTES_MAX: i64 = 64 << 20;
/// How long an answer is remembered, seconds.
const ANSWER_KEPT_SECS: u64 = 3600;
/// How long it is remembered that a request was begun, seconds: longer than any may take.
const BEGUN_KEPT_SECS: u64 = 24 * 3600;

/// Names a request and its repetitions.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RequestId(pub String);

/// A request that may be repeated.
#[derive(Debug, Clone)]
pub struct Repeatable {
    /// Its name.
    pub id: RequestId,
    /// A digest of what is asked: a repetition asks the same.
    pub content: String,
    /// Whether its sandboxes are undone, and it may start over, when the daemon ends before it is answered.
    /// Otherwise nobody knows how far it came.
    pub starts_over: bool,
}

/// What is known of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begun {
    /// It is new, and recorded now.
    New,
    /// It was answered so.
    Answered(Vec<u8>),
    /// It was begun and never answered.
    CutOff,
    /// Something else was asked under this name.
    Different,
}

pub(super) const TABLE: &str = "
    CREATE TABLE requests (
        id              TEXT PRIMARY KEY,
        content         TEXT NOT NULL,
        starts_over     INTEGER NOT NULL,
        kept_until_unix INTEGER NOT NULL,
        answer          BLOB
    ) STRICT;";

pub(super) fn begin(
    connection: &Connection,
    request: &Repeatable,
    now_unix: u64,
) -> Result<Begun, Error> {
    let known: Option<(String, Option<Vec<u8>>)> = connection
        .prepare_cached(
            "SELECT content, answer FROM requests WHERE id = ?1 AND kept_until_unix > ?2",
        )?
        .query_row(params![request.id.0, now_unix], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .optional()?;
    Ok(match known {
        Some((content, _)) if content != request.content => Begun::Different,
        Some((_, Some(answer))) => Begun::Answered(answer),
        Some((_, None)) => Begun::CutOff,
        None => {
            connection
                .prepare_cached("INSERT OR REPLACE INTO requests VALUES (?1, ?2, ?3, ?4, NULL)")?
                .execute(params![
                    request.id.0,
                    request.content,
                    request.starts_over,
                    now_unix.saturating_add(BEGUN_KEPT_SECS),
                ])?;
            if connection.last_insert_rowid() % ROOM_EVERY == 0 {
                make_room(connection, now_unix)?;
            }
            Begun::New
        }
    })
}

pub(super) fn answer(
    connection: &Connection,
    id: &RequestId,
    answer: &[u8],
    now_unix: u64,
) -> Result<(), Error> {
    connection
        .prepare_cached("UPDATE requests SET answer = ?2, kept_until_unix = ?3 WHERE id = ?1")?
        .execute(params![
            id.0,
            answer,
            now_unix.saturating_add(ANSWER_KEPT_SECS)
        ])?;
    Ok(())
}

pub(super) fn forget(connection: &Connection, ids: &[RequestId]) -> Result<(), Error> {
    let mut delete = connection.prepare_cached("DELETE FROM requests WHERE id = ?1")?;
    ids.iter()
        .try_for_each(|id| delete.execute([&id.0]).map(drop))
}

/// Requests that nobody was answered, and that may start over.
pub(super) fn to_start_over(connection: &Connection) -> Result<Vec<RequestId>, Error> {
    connection
        .prepare("SELECT id FROM requests WHERE answer IS NULL AND starts_over")?
        .query_map([], |row| row.get(0).map(RequestId))?
        .collect()
}

/// A request under way has no answer yet, and stays.
pub(super) fn make_room(connection: &Connection, now_unix: u64) -> Result<(), Error> {
    connection
        .prepare_cached("DELETE FROM requests WHERE kept_until_unix <= ?1")?
        .execute([now_unix])?;
    connection
        .prepare_cached(
            "DELETE FROM requests WHERE rowid IN (
                 SELECT rowid FROM (
                     SELECT rowid, row_number() OVER newest AS place, sum(length(answer)) OVER newest AS bytes
                     FROM requests WHERE answer IS NOT NULL WINDOW newest AS (ORDER BY rowid DESC)
                 ) WHERE place > ?1 OR bytes > ?2
             )",
        )?
        .execute([KEPT_MAX, KEPT_BYTES_MAX])?;
    Ok(())
}
