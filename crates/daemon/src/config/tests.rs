//! What is refused before anything is touched.

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    serve: ServeArgs,
}

fn config(args: &[&str]) -> Result<Config, Error> {
    let args = std::iter::once(&"serve").chain(args);
    Config::from_args(Cli::try_parse_from(args).unwrap().serve)
}

#[test]
fn the_defaults_listen_on_loopback_only() {
    let config = config(&[]).unwrap();
    assert_eq!(config.bind.to_string(), "127.0.0.1:8889");
    assert_eq!(config.branch_concurrency, 4);
    assert_eq!(config.drain, Duration::from_secs(30));
}

#[test]
fn an_open_address_needs_a_token() {
    for bind in ["0.0.0.0:8889", "[::]:8889", "10.0.0.1:1"] {
        let refused = config(&["--bind", bind]).unwrap_err();
        assert!(refused.to_string().contains("--token-file"), "{refused}");
        assert!(config(&["--bind", bind, "--token-file", "/t"]).is_ok());
    }
    assert!(config(&["--bind", "[::1]:8889"]).is_ok());
}

#[test]
fn half_a_pair_and_empty_limits_are_refused() {
    assert_eq!(config(&["--tls-cert", "/c"]).unwrap_err(), Error::HalfTls);
    assert_eq!(config(&["--tls-key", "/k"]).unwrap_err(), Error::HalfTls);
    let none = config(&["--branch-concurrency", "0"]).unwrap_err();
    assert_eq!(none, Error::Zero("branch-concurrency"));
}

#[test]
fn the_audit_log_can_be_moved_or_left_out() {
    assert_eq!(config(&["--audit-log", "none"]).unwrap().audit_log, None);
    let moved = config(&["--audit-log", "/a/b"]).unwrap().audit_log;
    assert_eq!(moved, Some(PathBuf::from("/a/b")));
}
