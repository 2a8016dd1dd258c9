//! Which node a command talks to, and what is done with it when the command is over.
//!
//! An explicit address is always used. Without one, a daemon on the default port is; without that, a
//! command that leaves nothing running opens the node within this process ("embedded"), and every
//! other says how to start a daemon.

use clap::ValueEnum;
use forkd_daemon::{EngineArgs, EngineName};

use crate::args::Common;
use crate::client::Client;
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::{embedded, output};

/// Where a daemon listens unless told otherwise.
pub(crate) const DEFAULT_URL: &str = "http://127.0.0.1:8889";

/// In place of an address: use no daemon, even where one answers.
pub(crate) const NO_DAEMON: &str = "none";

/// A node to talk to.
#[derive(Debug)]
pub(crate) struct Session {
    /// Carries the calls.
    pub client: Client,
    node: Option<embedded::Opened>,
}

impl Session {
    /// The daemon that was named, or the one on the default port.
    pub(crate) async fn daemon(common: &Common) -> Result<Self, Failure> {
        match find(common).await? {
            Some(client) => Ok(Self { client, node: None }),
            None => Err(Failure::new(format!("no daemon answers at {DEFAULT_URL}")).with_help(
                "sandboxes live in a daemon: start one with `forkd serve &` (or `systemctl start \
                 forkd-controller`), or name one with --daemon-url",
            )),
        }
    }

    /// A daemon, or else the node within this process.
    pub(crate) async fn any(common: &Common, args: &EngineArgs) -> Result<Self, Failure> {
        if let Some(client) = find(common).await? {
            if args.engine != EngineName::Auto {
                check_engine(&client, args.engine).await?;
            }
            return Ok(Self { client, node: None });
        }
        let opened = embedded::open(&common.paths(), args).await?;
        for note in opened.notes() {
            output::say(&format!("note: {note}"));
        }
        Ok(Self {
            client: Client::embedded(opened.router()),
            node: Some(opened),
        })
    }

    /// Whether the node is this process.
    pub(crate) fn is_embedded(&self) -> bool {
        self.node.is_some()
    }

    /// Ends the session. An embedded node leaves nothing running.
    pub(crate) async fn close(self) {
        if let Some(opened) = self.node {
            opened.close().await;
        }
    }
}

/// Runs a command's work on a session, ends it early when a signal comes, and always closes.
pub(crate) async fn run<T, W>(
    session: Session,
    interrupt: &Interrupt,
    work: impl FnOnce(Client) -> W,
) -> Result<T, Failure>
where
    W: Future<Output = Result<T, Failure>>,
{
    let outcome = interrupt.guard(work(session.client.clone())).await;
    session.close().await;
    outcome
}

/// What the user says about a daemon.
enum Named {
    /// This one.
    At(Box<Client>),
    /// None, even where one answers.
    None,
    /// Nothing.
    Unsaid,
}

fn named(common: &Common) -> Result<Named, Failure> {
    match common.daemon_url.as_deref().map(str::trim) {
        None | Some("") => Ok(Named::Unsaid),
        Some(NO_DAEMON) => Ok(Named::None),
        Some(url) => {
            let client = Client::web(url, common.daemon_token.as_deref())?;
            Ok(Named::At(Box::new(client)))
        }
    }
}

/// The daemon to talk to, if there is one.
async fn find(common: &Common) -> Result<Option<Client>, Failure> {
    match named(common)? {
        Named::At(client) => Ok(Some(*client)),
        Named::None => Ok(None),
        Named::Unsaid => default(common).await,
    }
}

/// An engine that was asked for must be the daemon's: it has one for all its sandboxes.
async fn check_engine(client: &Client, asked: EngineName) -> Result<(), Failure> {
    let asked = asked
        .to_possible_value()
        .map(|value| value.get_name().to_owned());
    let has = client.version().await?.engine;
    if asked.as_deref() == Some(has.as_str()) {
        return Ok(());
    }
    let asked = asked.unwrap_or_default();
    Err(
        Failure::new(format!("the daemon runs the engine {has}, not {asked}")).with_help(format!(
            "leave --engine out, or start the daemon with `forkd serve --engine {asked}`"
        )),
    )
}

async fn default(common: &Common) -> Result<Option<Client>, Failure> {
    let client = Client::web(DEFAULT_URL, common.daemon_token.as_deref())?;
    Ok(client.answers().await.then_some(client))
}
