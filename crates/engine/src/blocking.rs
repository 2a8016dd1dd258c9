//! The one door from async code to work that blocks: files, processes, memory.

use std::sync::Arc;

use tokio::sync::Semaphore;

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
