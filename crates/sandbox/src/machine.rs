//! The life of one sandbox, as a pure function: state and input in, state and effects out. No clock, no I/O,
//! no locks. Recovery after a crash is an input like any other.
//!
//! ```text
//!              Forked         Greeted
//!   Starting ─────────► Greeting ────► Running ◄───► Paused
//!       │                  │            │   ▲          │
//!       │                  │     Freeze │   │ Frozen   │
//!       │                  │            ▼   │          │
//!       │                  │         Branching         │
//!       └───────┬──────────┴────────────┬──────────────┘
//!               │  Stop, Exited, a failure
//!               ▼
//!            Stopping ───Cleared───► Ended
//! ```

/// Where a sandbox is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Recorded; its VM is being forked.
    Starting,
    /// The VM runs; the agent is being told who it is.
    Greeting,
    /// The agent has answered.
    Running,
    /// The vCPUs are stopped on request.
    Paused,
    /// The VM is being frozen into a snapshot.
    Branching {
        /// Where to return to.
        paused: bool,
    },
    /// The VM is being killed and its resources released.
    Stopping {
        /// Why, in words.
        why: String,
    },
    /// Nothing of it is left.
    Ended {
        /// Why, in words.
        why: String,
    },
}

/// What can happen to a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The engine has forked the VM, or failed.
    Forked(Result<(), String>),
    /// The agent has answered `resume`, or failed.
    Greeted(Result<(), String>),
    /// Somebody asks to stop the vCPUs.
    Pause,
    /// Somebody asks to let the vCPUs go on.
    Resume,
    /// The vCPUs were stopped or let go on as asked, or the engine failed.
    Switched(Result<(), String>),
    /// Somebody asks for a branch.
    Freeze,
    /// The branch is made, or failed; the VM goes on either way.
    Frozen,
    /// Somebody, or a deadline, asks for the end.
    Stop(String),
    /// The VM's process is gone.
    Exited(String),
    /// Process and files are gone.
    Cleared,
    /// After a restart of the daemon: the VM's process was found running, or not.
    Observed {
        /// Whether the process runs.
        alive: bool,
    },
}

/// What must be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Tell the agent who it is.
    Greet,
    /// Stop the vCPUs.
    Pause,
    /// Let the vCPUs go on.
    Resume,
    /// Freeze the VM into the files of a draft.
    Save,
    /// Kill the process and remove the files; then the record.
    Clear,
}

/// Why an input is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The sandbox has not become ready yet.
    Starting,
    /// The sandbox is being branched.
    Branching,
    /// The sandbox is being killed, or is gone.
    Ended,
    /// Nothing waits for this outcome any more.
    Stale,
}

/// One sandbox's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    state: State,
}

impl Machine {
    /// A sandbox whose record was just written.
    pub fn new() -> Self {
        Self {
            state: State::Starting,
        }
    }

    /// A sandbox read from its record; the next input must be [`Input::Observed`].
    pub fn recorded(state: State) -> Self {
        Self { state }
    }

    /// Where it is.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Takes an input. Returns what must be done, in order, or why the input is refused; a refused input
    /// changes nothing.
    pub fn apply(&mut self, input: Input) -> Result<Vec<Effect>, Refused> {
        let (next, effects) = step(&self.state, input)?;
        self.state = next;
        Ok(effects)
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

type Step = Result<(State, Vec<Effect>), Refused>;

fn step(state: &State, input: Input) -> Step {
    match input {
        Input::Stop(why) | Input::Exited(why) => end(state, why),
        Input::Observed { alive } => observed(state, alive),
        Input::Cleared => match state {
            State::Stopping { why } => Ok((State::Ended { why: why.clone() }, vec![])),
            _ => Err(Refused::Stale),
        },
        Input::Forked(outcome) => match (state, outcome) {
            (State::Starting, Ok(())) => Ok((State::Greeting, vec![Effect::Greet])),
            (State::Starting, Err(why)) => end(state, why),
            _ => Err(Refused::Stale),
        },
        Input::Greeted(outcome) => match (state, outcome) {
            (State::Greeting, Ok(())) => Ok((State::Running, vec![])),
            (State::Greeting, Err(why)) => end(state, why),
            _ => Err(Refused::Stale),
        },
        Input::Switched(outcome) => match (state, outcome) {
            (State::Running | State::Paused, Ok(())) => Ok((state.clone(), vec![])),
            // A VM whose vCPUs obey no longer is of no use, and nobody can tell what it does.
            (State::Running | State::Paused, Err(why)) => end(state, why),
            _ => Err(Refused::Stale),
        },
        Input::Frozen => match state {
            State::Branching { paused: true } => Ok((State::Paused, vec![])),
            State::Branching { paused: false } => Ok((State::Running, vec![])),
            _ => Err(Refused::Stale),
        },
        Input::Pause => match ready(state)? {
            Ready::Running => Ok((State::Paused, vec![Effect::Pause])),
            Ready::Paused => Ok((State::Paused, vec![])),
        },
        Input::Resume => match ready(state)? {
            Ready::Running => Ok((State::Running, vec![])),
            Ready::Paused => Ok((State::Running, vec![Effect::Resume])),
        },
        Input::Freeze => {
            let paused = matches!(ready(state)?, Ready::Paused);
            Ok((State::Branching { paused }, vec![Effect::Save]))
        }
    }
}

enum Ready {
    Running,
    Paused,
}

fn ready(state: &State) -> Result<Ready, Refused> {
    match state {
        State::Running => Ok(Ready::Running),
        State::Paused => Ok(Ready::Paused),
        State::Starting | State::Greeting => Err(Refused::Starting),
        State::Branching { .. } => Err(Refused::Branching),
        State::Stopping { .. } | State::Ended { .. } => Err(Refused::Ended),
    }
}

fn end(state: &State, why: String) -> Step {
    match state {
        // The first reason is the true one: a VM that is being killed also exits.
        State::Stopping { .. } | State::Ended { .. } => Err(Refused::Ended),
        _ => Ok((State::Stopping { why }, vec![Effect::Clear])),
    }
}

fn observed(state: &State, alive: bool) -> Step {
    const DIED: &str = "the VM's process ended while no daemon was running";
    const UNANSWERED: &str = "the daemon ended before the sandbox became ready";
    match state {
        // The record comes before the effect, and a save stops the vCPUs for a while: only the record tells
        // whether they are to run. Doing it again does no harm.
        State::Running | State::Branching { paused: false } if alive => {
            Ok((State::Running, vec![Effect::Resume]))
        }
        State::Paused | State::Branching { paused: true } if alive => {
            Ok((State::Paused, vec![Effect::Pause]))
        }
        // Whoever asked for it got no answer and does not know its id.
        State::Starting | State::Greeting => end(state, UNANSWERED.to_owned()),
        State::Running | State::Paused | State::Branching { .. } => end(state, DIED.to_owned()),
        State::Stopping { .. } => Ok((state.clone(), vec![Effect::Clear])),
        State::Ended { .. } => Err(Refused::Ended),
    }
}

#[cfg(test)]
mod tests;
