//! How a build tells its caller where it is, and how the caller tells it to stop.

/// One of the few long stages of a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// What is being done, for people: `kernel`, `root file system`, ...
    pub name: &'static str,
    /// Counts from 1.
    pub index: usize,
    /// How many steps the build has.
    pub of: usize,
}

/// Receives what a build has to say. Called from the thread that builds, a few times per second
/// at most.
pub trait Progress {
    /// A step begins.
    fn step(&mut self, step: &Step);

    /// One line about what happens within the current step.
    fn message(&mut self, text: &str);

    /// Asked several times per second; `true` ends the build with [`crate::Error::Cancelled`] and
    /// leaves nothing half-made behind.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Says nothing and never cancels.
#[derive(Debug, Default, Clone, Copy)]
pub struct Silent;

impl Progress for Silent {
    fn step(&mut self, _step: &Step) {}

    fn message(&mut self, _text: &str) {}
}
