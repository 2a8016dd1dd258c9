//! Work that is done to its end whoever waits: what blocks (files, processes, memory), and what must not be left half
//! done.

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::Error;

/// How much blocking work runs at once. More would only fight for the disk.
const PERMITS: usize = 16;

static GATE: std::sync::LazyLock<Arc<Semaphore>> =
    std::sync::LazyLock::new(|| Arc::new(Semaphore::new(PERMITS)));

/// Runs `work` on a thread that may block. It runs to its end even if nobody waits any more.
pub(crate) async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let permit = Arc::clone(&GATE).acquire_owned().await;
    let joined = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        work()
    });
    match joined.await {
        Ok(value) => value,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // Blocking work is only cancelled when the runtime shuts down, and then nothing polls this.
        Err(_) => std::future::pending().await,
    }
}

/// Does `work` in a task of its own: a caller who goes away must not leave it half done. `step` names it.
pub(crate) async fn to_its_end<T: Send + 'static>(
    step: &'static str,
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    tokio::spawn(work).await.unwrap_or_else(|error| {
        Err(Error::Control {
            step,
            detail: error.to_string(),
        })
    })
}
