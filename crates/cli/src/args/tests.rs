//! What is typed, and what it is understood as.

use clap::CommandFactory;

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

fn refused(line: &str) {
    assert!(parse(line).is_err(), "accepted: {line}");
}

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_has_examples_and_a_summary() {
    fn check(path: &str, command: &clap::Command) {
        if command.is_hide_set() || command.get_name() == "help" {
            return;
        }
        let path = format!("{path} {}", command.get_name());
        assert!(command.get_about().is_some(), "{path}: no summary");
        // The daemon's flags are described where the daemon is.
        if command.get_name() != "serve" {
            let after = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(after.contains("Examples:\n  forkd"), "{path}: no examples");
        }
        for sub in command.get_subcommands() {
            check(&path, sub);
        }
    }
    check("", &Cli::command());
}

#[test]
fn a_command_after_two_dashes_is_left_alone() {
    let cli = parse("forkd exec sb-1 --env A=1 -- ls -la --json").unwrap();
    let Command::Exec(exec) = cli.command else {
        panic!("no exec")
    };
    assert_eq!(exec.command, ["ls", "-la", "--json"]);
    assert_eq!(exec.env, [("A".to_owned(), "1".to_owned())]);
    assert!(!exec.json);
}

#[test]
fn common_options_stand_anywhere() {
    for line in [
        "forkd --daemon-url http://x ls",
        "forkd ls --daemon-url http://x",
    ] {
        assert_eq!(
            parse(line).unwrap().common.daemon_url.as_deref(),
            Some("http://x"),
            "{line}"
        );
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    refused("forkd");
    refused("forkd fork");
    refused("forkd fork --tag ../x");
    refused("forkd fork --tag t -n 0");
    refused("forkd fork --tag t -n 1001");
    refused("forkd fork --tag t --env NOEQUALS");
    refused("forkd fork --tag t --timeout soon");
    refused("forkd kill");
    refused("forkd kill --all sb-1");
    refused("forkd kill --all --tag t");
    refused("forkd exec sb-1");
    refused("forkd exec sb-1 -- ");
    refused("forkd snapshot --tag t");
    refused("forkd snapshot --image i");
    refused("forkd snapshot --tag t --image i --from-sandbox s");
    refused("forkd snapshot --tag t --image i --warm a --warm-cmd b");
    refused("forkd snapshot --tag t --image i --memory 1");
    refused("forkd image build");
    refused("forkd image build --debian a --oci b");
    refused("forkd quickstart -n 0");
    refused("forkd quickstart --engine bochs");
}

#[test]
fn packages_may_be_many() {
    let cli = parse("forkd image build --debian python3 git,ripgrep --name x").unwrap();
    let Command::Image(Image {
        command: ImageCommand::Build(build),
    }) = cli.command
    else {
        panic!("no build")
    };
    assert_eq!(build.debian, ["python3", "git", "ripgrep"]);
}
