//! Ctrl-C and SIGTERM: the first asks the command to clean up and leave, the second leaves at once.

use std::future::Future;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::failure::{Failure, exit};
use crate::output;

/// Told to everything that takes long.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interrupt {
    token: CancellationToken,
}

impl Interrupt {
    /// Listens to SIGINT, SIGTERM and SIGHUP from now on.
    pub(crate) fn listen() -> Result<Self, Failure> {
        let interrupt = Self::default();
        let hear = |kind| {
            signal(kind).map_err(|error| Failure::caused("cannot listen to signals", &error))
        };
        let signals = [
            hear(SignalKind::interrupt())?,
            hear(SignalKind::terminate())?,
            hear(SignalKind::hangup())?,
        ];
        let token = interrupt.token.clone();
        tokio::spawn(async move {
            let [mut int, mut term, mut hup] = signals;
            any(&mut int, &mut term, &mut hup).await;
            token.cancel();
            any(&mut int, &mut term, &mut hup).await;
            output::say(
                "interrupted again: leaving at once; run `forkd doctor` to see what is left",
            );
            leave();
        });
        Ok(interrupt)
    }

    /// Whether a signal came.
    pub(crate) fn is_raised(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Waits for a signal.
    pub(crate) async fn raised(&self) {
        self.token.cancelled().await;
    }

    /// Runs work until it is done or a signal comes; work cut short is dropped.
    pub(crate) async fn guard<T>(
        &self,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        tokio::select! {
            biased;
            () = self.raised() => Err(Failure::interrupted()),
            done = work => done,
        }
    }
}

async fn any(int: &mut Signal, term: &mut Signal, hup: &mut Signal) {
    tokio::select! {
        _ = int.recv() => (),
        _ = term.recv() => (),
        _ = hup.recv() => (),
    }
}

#[expect(
    clippy::exit,
    reason = "the user asked twice: nothing may hold the process back"
)]
fn leave() -> ! {
    std::process::exit(i32::from(exit::INTERRUPTED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_ends_when_raised() {
        let interrupt = Interrupt::default();
        assert_eq!(interrupt.guard(async { Ok(7) }).await, Ok(7));
        interrupt.token.cancel();
        let cut = interrupt
            .guard(std::future::pending::<Result<(), Failure>>())
            .await;
        assert_eq!(cut.unwrap_err().exit(), exit::INTERRUPTED);
    }
}
