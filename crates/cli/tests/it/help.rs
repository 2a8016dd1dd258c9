//! The help of every command, word for word. `FORKD_REWRITE=1` rewrites the file.

use std::path::Path;

use clap::CommandFactory;
use forkd_cli::args::Cli;

/// Every command's help but that of `serve`, whose flags are the daemon's.
fn all() -> String {
    let mut text = String::new();
    let root = Cli::command().term_width(100);
    add(&mut text, "forkd", root);
    text
}

fn add(text: &mut String, path: &str, mut command: clap::Command) {
    command = command.term_width(100).bin_name(path);
    command.build();
    text.push_str(&format!(
        "$ {path} --help\n{}\n",
        command.render_long_help()
    ));
    let names: Vec<String> = command
        .get_subcommands()
        .map(|sub| sub.get_name().to_owned())
        .filter(|name| name != "help" && name != "serve")
        .collect();
    for name in names {
        if let Some(sub) = command.find_subcommand(&name) {
            add(text, &format!("{path} {name}"), sub.clone());
        }
    }
}

#[test]
fn help_is_pinned() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/help.txt");
    let found = all();
    if std::env::var_os("FORKD_REWRITE").is_some() {
        std::fs::write(&path, &found).unwrap();
        return;
    }
    let pinned = std::fs::read_to_string(&path).unwrap();
    let differs = pinned
        .lines()
        .zip(found.lines())
        .find(|(pinned, found)| pinned != found);
    assert!(
        pinned == found,
        "the help has changed, first at {differs:?}; look, then run with FORKD_REWRITE=1"
    );
}

#[test]
fn the_manual_names_every_command() {
    let manual = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/cli.md");
    let manual = std::fs::read_to_string(manual).unwrap();
    for command in Cli::command()
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
    {
        let name = command.get_name();
        assert!(
            manual.contains(&format!("forkd {name}")),
            "docs/cli.md: no `forkd {name}`"
        );
    }
}
