//! `forkd network`: what a running sandbox may reach.

use forkd_wire::api::sandbox::{NetworkMode, NetworkPolicy, SandboxInfo};

use super::Context;
use crate::args::Network;
use crate::failure::Failure;
use crate::output;
use crate::session::Session;

/// `forkd network`
pub(super) async fn run(context: &Context, args: &Network) -> Result<(), Failure> {
    let client = Session::daemon(&context.common).await?.client;
    let changes = args.default || !args.allow.is_empty() || !args.deny.is_empty();
    let sandbox = if changes {
        let policy = NetworkPolicy {
            mode: NetworkMode::Nat,
            allow: args.allow.clone(),
            deny: args.deny.clone(),
        };
        let asked = client.set_network(&args.id, &policy);
        context.interrupt.guard(asked).await?
    } else {
        context.interrupt.guard(client.sandbox(&args.id)).await?
    };
    if args.json {
        return output::json(&sandbox.network);
    }
    lines(&sandbox)
        .iter()
        .try_for_each(|line| output::line(line))
}

/// What is in force, in the order in which it counts.
fn lines(sandbox: &SandboxInfo) -> Vec<String> {
    let network = &sandbox.network;
    if network.mode == NetworkMode::None {
        return vec!["no network".to_owned()];
    }
    let mut lines = Vec::new();
    for (word, rules) in [("allow", &network.allow), ("deny", &network.deny)] {
        lines.extend(rules.iter().map(|rule| format!("{word} {rule}")));
    }
    lines.push("then the public internet".to_owned());
    lines
}
