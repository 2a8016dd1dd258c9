//! Steps of a long command on standard error: a spinner on a terminal, plain lines elsewhere.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::{human, output};

/// How often the spinner turns.
const TICK: Duration = Duration::from_millis(120);

/// Tells steps as they begin and end.
#[derive(Debug, Clone)]
pub(crate) struct Steps {
    quiet: bool,
}

/// A step under way. Dropped without an end, it leaves no trace on a terminal.
#[derive(Debug)]
pub(crate) struct Running {
    name: String,
    began: Instant,
    quiet: bool,
    bar: Option<ProgressBar>,
}

impl Steps {
    /// Tells steps, unless `quiet`.
    pub(crate) fn new(quiet: bool) -> Self {
        Self { quiet }
    }

    /// Begins a step.
    pub(crate) fn begin(&self, name: impl Into<String>) -> Running {
        let name = name.into();
        let bar = (!self.quiet && output::is_watched()).then(|| spinner(&name));
        if bar.is_none() && !self.quiet {
            output::say(&format!("· {name} …"));
        }
        Running {
            name,
            began: Instant::now(),
            quiet: self.quiet,
            bar,
        }
    }
}

impl Running {
    /// Says what happens within the step. Elsewhere than on a terminal this would be noise.
    pub(crate) fn detail(&self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{} · {}", self.name, one_line(text)));
        }
    }

    /// The step went well; `result` says what came of it.
    pub(crate) fn done(self, result: &str) {
        let took = human::ms(self.began.elapsed().as_secs_f64() * 1000.0);
        let separator = if result.is_empty() { "" } else { ": " };
        let text = format!("✓ {}{separator}{result} ({took})", self.name);
        self.end(&text);
    }

    /// The step did not go well; the failure itself is told elsewhere.
    pub(crate) fn failed(self) {
        let text = format!("✗ {}", self.name);
        self.end(&text);
    }

    fn end(mut self, text: &str) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        if !self.quiet {
            output::say(text);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn spinner(name: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}") {
        bar.set_style(style.tick_strings(&["⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏", " "]));
    }
    bar.set_message(name.to_owned());
    bar.enable_steady_tick(TICK);
    bar
}

fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
