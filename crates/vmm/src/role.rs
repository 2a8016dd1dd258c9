//! What this process is. A template forks and one of the two becomes a sandbox; a sandbox branches
//! and one of the two becomes a template; a stack of calls never grows with the depth of a lineage.
//!
//! ```text
//!             Fork (child)                    PowerOff, Stop, controller gone
//!   Template ─────────────► Sandbox ─────────────────────────────────────────► end
//!            ◄─────────────
//!             Branch (child)
//! ```

use crate::sandbox::Sandbox;
use crate::sys;
use crate::template::Template;

/// A process of the monitor.
#[derive(Debug)]
pub enum Role {
    /// A frozen machine, ready to be forked.
    Template(Box<Template>),
    /// A running machine.
    Sandbox(Box<Sandbox>),
    /// Done; the exit code.
    End(i32),
}

/// Serves until the process is done. Does not return: what is left is the kernel's to release.
pub fn live(mut role: Role) -> ! {
    loop {
        role = match role {
            Role::Template(template) => template.serve(),
            Role::Sandbox(sandbox) => sandbox.serve(),
            Role::End(code) => sys::exit_now(code),
        }
    }
}
