//! What a command says when it cannot do what was asked: a sentence, a remedy and an exit code.

use std::fmt;

use forkd_wire::error::ErrorCode;

/// The exit codes of every command.
pub mod exit {
    /// Done.
    pub const OK: u8 = 0;
    /// It failed; standard error says why.
    pub const FAILURE: u8 = 1;
    /// The command line makes no sense.
    pub const USAGE: u8 = 2;
    /// `exec`: the guest's command ran into its time limit.
    pub const TIMEOUT: u8 = 124;
    /// `exec`: forkd itself failed, the guest's command did not run to its end.
    pub const EXEC_FAILED: u8 = 125;
    /// `exec`: the guest has the command but cannot run it.
    pub const NOT_EXECUTABLE: u8 = 126;
    /// `exec`: the guest has no such command.
    pub const NOT_FOUND: u8 = 127;
    /// Ended by Ctrl-C or SIGTERM, after cleaning up.
    pub const INTERRUPTED: u8 = 130;
}

/// A failure of a command, for the person who typed it.
///
/// The edge of the program needs a sentence, a remedy and an exit code whatever went wrong below, so
/// there is one type for all commands; what a caller could act on stays in [`Failure::code`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    message: String,
    help: Option<String>,
    code: Option<ErrorCode>,
    exit: u8,
    quiet: bool,
}

impl Failure {
    /// A failure with a sentence.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            help: None,
            code: None,
            exit: exit::FAILURE,
            quiet: false,
        }
    }

    /// A sentence followed by an error and all its causes.
    pub fn caused(message: impl fmt::Display, error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(format!("{message}: {}", chain(error)))
    }

    /// The command has said all there is to say; only the exit code is left.
    pub fn silent(exit: u8) -> Self {
        Self {
            quiet: true,
            exit,
            ..Self::new("")
        }
    }

    /// Ended by a signal.
    pub fn interrupted() -> Self {
        Self::new("interrupted; everything this command started is gone")
            .with_exit(exit::INTERRUPTED)
    }

    /// What the user can do about it.
    #[must_use]
    pub fn with_help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// What kind of failure it is, in the words of the API.
    #[must_use]
    pub fn with_code(mut self, code: ErrorCode) -> Self {
        self.code = Some(code);
        self
    }

    /// Another exit code than 1.
    #[must_use]
    pub fn with_exit(mut self, exit: u8) -> Self {
        self.exit = exit;
        self
    }

    /// What was being done, put before the message.
    #[must_use]
    pub fn during(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// The message with its causes.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What the user can do about it.
    pub fn help(&self) -> Option<&str> {
        self.help.as_deref()
    }

    /// What kind of failure it is.
    pub fn code(&self) -> Option<ErrorCode> {
        self.code
    }

    /// The process's exit code.
    pub fn exit(&self) -> u8 {
        self.exit
    }

    /// Whether a signal ended the command.
    pub fn is_interrupt(&self) -> bool {
        self.exit == exit::INTERRUPTED && !self.quiet
    }

    /// The lines for standard error; none for a silent failure.
    pub fn lines(&self) -> Vec<String> {
        if self.quiet {
            return Vec::new();
        }
        let mut lines = vec![format!("error: {}", self.message)];
        lines.extend(self.help.iter().map(|help| format!("help: {help}")));
        lines
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<forkd_sandbox::Error> for Failure {
    fn from(error: forkd_sandbox::Error) -> Self {
        let failure = Self::new(error.chain()).with_code(error.code());
        match error.remedy() {
            Some(remedy) => failure.with_help(remedy),
            None => failure,
        }
    }
}

/// An error's text followed by those of its causes, joined with `: `.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some libraries repeat their cause in their own text.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_an_error_line_and_a_help_line() {
        let failure = Failure::new("tag `x` is taken").with_help("choose another");
        assert_eq!(
            failure.lines(),
            ["error: tag `x` is taken", "help: choose another"]
        );
        assert_eq!(failure.exit(), exit::FAILURE);
        assert!(Failure::silent(3).lines().is_empty());
    }

    #[test]
    fn causes_are_told_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open x")]
        struct Open(#[source] std::io::Error);
        let error = Open(std::io::Error::other("no luck"));
        assert_eq!(
            Failure::caused("doing it", &error).message(),
            "doing it: cannot open x: no luck"
        );
    }

    #[test]
    fn a_heart_error_keeps_code_and_remedy() {
        let heart =
            forkd_sandbox::Error::new(ErrorCode::NotFound, "no tag").with_remedy("make one");
        let failure = Failure::from(heart);
        assert_eq!(failure.code(), Some(ErrorCode::NotFound));
        assert_eq!(failure.help(), Some("make one"));
    }
}
