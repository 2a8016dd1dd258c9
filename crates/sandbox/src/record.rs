//! The durable record of sandboxes: one SQLite file in WAL mode.
//!
//! One thread owns the connection. Requests that arrive together share one transaction, so a fan-out of a
//! hundred sandboxes costs a few commits, not hundreds. A request is answered only after its
//! commit: the caller may perform the effect then, and not before.
//!
//! Commits survive a crash of the daemon, not of the host (`synchronous=NORMAL`): when the host goes
//! down, the VMs that the records describe are gone as well.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use forkd_engine::ProcessIdentity;
use forkd_wire::id::{SandboxId, Tag};
use rusqlite::{Connection, OptionalExtension};
use tokio::sync::oneshot;

use crate::machine::State;
use crate::place::PlaceRecord;

mod requests;
mod row;

pub use requests::{Begun, Repeatable, RequestId};

/// The version of the tables. A newer file is refused, an older one is migrated.
pub const SCHEMA_VERSION: i64 = 3;

/// Requests that share one transaction, at most.
const BATCH_MAX: usize = 512;

/// Rest after which the log is written back into the file. That waits for the disk, and a fan-out must not wait for it.
const IDLE: Duration = Duration::from_millis(500);

/// Pages in the log at which it is written back even so: 64 MiB.
const LOG_PAGES_MAX: u32 = 16_384;

/// How long SQLite waits for another process' lock before it gives up.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The records cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be opened or its tables not be made.
    #[error("cannot open the state file {}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// The file is damaged.
    #[error("the state file {} is damaged: {problem}", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the check found.
        problem: String,
    },
    /// The file was written by a newer version.
    #[error(
        "the state file {} has version {found}, this program reads up to {SCHEMA_VERSION}",
        .path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
    },
    /// A read or write failed.
    #[error("cannot {step} the record of {subject}")]
    Access {
        /// What was tried.
        step: &'static str,
        /// Whose record.
        subject: String,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// The thread that owns the file has ended.
    #[error("the records are closed")]
    Closed,
}

impl Error {
    /// Whether there was no room to write.
    pub fn is_disk_full(&self) -> bool {
        let (Self::Open { source, .. } | Self::Access { source, .. }) = self else {
            return false;
        };
        // An exhausted disk shows as such, or as a write that falls short.
        source.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull)
    }
}

/// What is kept of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxRecord {
    /// Its id.
    pub id: SandboxId,
    /// The snapshot it was forked from.
    pub tag: Tag,
    /// That snapshot's unique id; a tag may be made anew.
    pub snapshot_id: String,
    /// Its index within its request.
    pub index: u32,
    /// Where it is in its life.
    pub state: State,
    /// The VM's process, once there is one.
    pub process: Option<ProcessIdentity>,
    /// The engine that runs it.
    pub engine: String,
    /// Seconds since the Unix epoch.
    pub created_at_unix: u64,
    /// When it is to be killed, seconds since the Unix epoch.
    pub deadline_unix: Option<u64>,
    /// The caller's own words.
    pub metadata: BTreeMap<String, String>,
    /// Memory limit of the VM's process.
    pub memory_limit_mib: Option<u64>,
    /// Snapshots branched from it so far.
    pub branches: u32,
    /// Where it lives on the host.
    pub place: PlaceRecord,
    /// The request that made it, if that may be repeated.
    pub request: Option<RequestId>,
}

/// Does the work; says whether it succeeded, and how to answer.
type Job = Box<dyn FnOnce(&Connection) -> (bool, Done) + Send>;
/// Sends the answer; run after the commit.
type Done = Box<dyn FnOnce(Result<(), rusqlite::Error>) + Send>;

/// A handle on the records.
#[derive(Debug, Clone)]
pub struct Records {
    jobs: mpsc::Sender<Job>,
}

impl Records {
    /// Opens or makes the file. Blocks.
    pub fn open(path: &Path) -> Result<Records, Error> {
        let connection = open_checked(path)?;
        let (jobs, inbox) = mpsc::channel();
        std::thread::Builder::new()
            .name("forkd-records".into())
            .spawn(move || serve(connection, &inbox))
            .map_err(|source| Error::Open {
                path: path.to_owned(),
                source: rusqlite::Error::ToSqlConversionFailure(Box::new(source)),
            })?;
        Ok(Records { jobs })
    }

    /// Writes the records of new sandboxes, all or none.
    pub async fn insert(&self, records: Vec<SandboxRecord>) -> Result<(), Error> {
        let subject = records
            .first()
            .map_or_else(String::new, |r| r.id.to_string());
        self.run("insert", subject, move |connection| {
            records
                .iter()
                .try_for_each(|record| row::insert(connection, record))
        })
        .await
    }

    /// Writes what may change of a sandbox: its state, its process, its deadline, its branches, its place.
    pub async fn update(&self, record: &SandboxRecord) -> Result<(), Error> {
        let record = record.clone();
        self.run("update", record.id.to_string(), move |connection| {
            row::update(connection, &record)
        })
        .await
    }

    /// Forgets a sandbox.
    pub async fn remove(&self, id: &SandboxId) -> Result<(), Error> {
        let key = id.clone();
        self.run("remove", id.to_string(), move |connection| {
            row::remove(connection, &key)
        })
        .await
    }

    /// Every recorded sandbox. A row that cannot be understood is an error of its own, not of the rest.
    pub async fn all(&self) -> Result<Vec<Result<SandboxRecord, String>>, Error> {
        self.run("read", "every sandbox".into(), row::all).await
    }

    /// Records that a request is begun, unless it is known.
    pub async fn begin(&self, request: Repeatable, now_unix: u64) -> Result<Begun, Error> {
        self.run("begin", "a request".into(), move |connection| {
            requests::begin(connection, &request, now_unix)
        })
        .await
    }

    /// Records what a request is answered.
    pub async fn answer(&self, id: RequestId, answer: Vec<u8>, now_unix: u64) -> Result<(), Error> {
        self.run("answer", "a request".into(), move |connection| {
            requests::answer(connection, &id, &answer, now_unix)
        })
        .await
    }

    /// Forgets requests: whoever repeats them asks anew.
    pub async fn forget(&self, ids: Vec<RequestId>) -> Result<(), Error> {
        self.run("forget", "a request".into(), move |connection| {
            requests::forget(connection, &ids)
        })
        .await
    }

    /// Requests whose answer nobody got, and that are to start over.
    pub async fn to_start_over(&self) -> Result<Vec<RequestId>, Error> {
        self.run("read", "every request".into(), requests::to_start_over)
            .await
    }

    async fn run<T: Send + 'static>(
        &self,
        step: &'static str,
        subject: String,
        work: impl FnOnce(&Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let outcome = work(connection);
            let succeeded = outcome.is_ok();
            let done: Done = Box::new(move |committed| {
                // Nobody waits any more when the caller has given up; the write stands all the same.
                let _ = answer.send(outcome.and_then(|value| committed.map(|()| value)));
            });
            (succeeded, done)
        });
        self.jobs.send(job).map_err(|_| Error::Closed)?;
        let outcome = answered.await.map_err(|_| Error::Closed)?;
        outcome.map_err(|source| Error::Access {
            step,
            subject,
            source,
        })
    }
}

fn open_checked(path: &Path) -> Result<Connection, Error> {
    let open = |source| Error::Open {
        path: path.to_owned(),
        source,
    };
    let connection = Connection::open(path).map_err(open)?;
    connection.busy_timeout(BUSY_TIMEOUT).map_err(open)?;
    check(&connection, path)?;
    connection
        .pragma_update(None, "journal_mode", "WAL")
        .map_err(open)?;
    connection
        .pragma_update(None, "synchronous", "NORMAL")
        .map_err(open)?;
    connection
        .pragma_update(None, "wal_autocheckpoint", LOG_PAGES_MAX)
        .map_err(open)?;
    let found: i64 = connection
        .pragma_query_value(None, "user_version", |row| row.get(0))
        .map_err(open)?;
    match found {
        0 => row::create_tables(&connection).map_err(open)?,
        1 => row::add_places(&connection).map_err(open)?,
        2 => row::add_requests(&connection).map_err(open)?,
        SCHEMA_VERSION => {}
        _ => {
            return Err(Error::Newer {
                path: path.to_owned(),
                found,
            });
        }
    }
    write_back(&connection);
    Ok(connection)
}

/// A file that is no database, or a damaged one, is told apart from one that cannot be opened: the remedy
/// differs.
fn check(connection: &Connection, path: &Path) -> Result<(), Error> {
    let damaged = |problem: String| Error::Damaged {
        path: path.to_owned(),
        problem,
    };
    match connection
        .query_row("PRAGMA quick_check(1)", [], |row| row.get::<_, String>(0))
        .optional()
    {
        Ok(Some(answer)) if answer == "ok" => Ok(()),
        Ok(answer) => Err(damaged(answer.unwrap_or_else(|| "no answer".into()))),
        Err(rusqlite::Error::SqliteFailure(error, text))
            if matches!(
                error.code,
                rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt
            ) =>
        {
            Err(damaged(text.unwrap_or_else(|| error.to_string())))
        }
        Err(source) => Err(Error::Open {
            path: path.to_owned(),
            source,
        }),
    }
}

fn serve(connection: Connection, inbox: &mpsc::Receiver<Job>) {
    let mut tidy = true;
    loop {
        let first = match inbox.recv_timeout(IDLE) {
            Ok(first) => first,
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
            Err(mpsc::RecvTimeoutError::Timeout) if tidy => match inbox.recv() {
                Ok(first) => first,
                Err(_) => return,
            },
            Err(mpsc::RecvTimeoutError::Timeout) => {
                write_back(&connection);
                tidy = true;
                continue;
            }
        };
        tidy = false;
        let jobs = std::iter::once(first)
            .chain(inbox.try_iter())
            .take(BATCH_MAX);
        let begun = connection.execute_batch("BEGIN IMMEDIATE");
        let done: Vec<Done> = jobs.map(|job| run_in_savepoint(&connection, job)).collect();
        let committed = begun.and_then(|()| connection.execute_batch("COMMIT"));
        if committed.is_err() {
            // Fails where no transaction is open, which is what it is to make sure of.
            let _ = connection.execute_batch("ROLLBACK");
        }
        for answer in done {
            answer(committed.as_ref().copied().map_err(copy_error));
        }
    }
}

/// Writes the log back into the file, and begins the next one with a write that changes nothing: a log's first commit
/// is the only one that waits for the disk, and must not be that of a fan-out.
fn write_back(connection: &Connection) {
    // What fails now is done at the next opportunity: the log holds it all.
    let _ = connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)");
    let _ = connection.pragma_update(None, "user_version", SCHEMA_VERSION);
}

/// One request's failure undoes that request, not its neighbours in the same transaction.
fn run_in_savepoint(connection: &Connection, job: Job) -> Done {
    let opened = connection.execute_batch("SAVEPOINT job");
    let (succeeded, done) = job(connection);
    if opened.is_ok() {
        let end = if succeeded {
            "RELEASE job"
        } else {
            "ROLLBACK TO job; RELEASE job"
        };
        // Where this fails the commit fails too, and tells.
        let _ = connection.execute_batch(end);
    }
    done
}

/// `rusqlite::Error` is not `Clone`; a failed commit answers several callers.
fn copy_error(error: &rusqlite::Error) -> rusqlite::Error {
    match error {
        rusqlite::Error::SqliteFailure(code, text) => {
            rusqlite::Error::SqliteFailure(*code, text.clone())
        }
        other => rusqlite::Error::SqliteFailure(
            rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_ERROR),
            Some(other.to_string()),
        ),
    }
}

#[cfg(test)]
mod tests;
