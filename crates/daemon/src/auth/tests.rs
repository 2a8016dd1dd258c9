//! Token files good and bad, reload, scopes, and that no token shows.

use std::fs;

use http::HeaderValue;
use tempfile::TempDir;

use super::*;

const GOOD: &str = "0123456789abcdef";

fn file(text: &str) -> (TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("token");
    fs::write(&path, text).unwrap();
    (dir, path)
}

fn headers(value: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
    headers
}

#[test]
fn a_file_with_one_token_is_trimmed_and_may_do_everything() {
    let (_dir, path) = file(&format!("  {GOOD}\n\n"));
    let access = Access::from_path(&path).unwrap();
    let caller = access
        .identify(&headers(&format!("Bearer  {GOOD} ")))
        .unwrap();
    assert_eq!(
        caller,
        Caller {
            name: "default".into(),
            scope: Scope::Admin
        }
    );
    for wrong in [
        "Bearer 0123456789abcdeX",
        "Bearer 0123456789abcde",
        "Basic x",
        "Bearer ",
    ] {
        let error = access.identify(&headers(wrong)).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Unauthorized, "{wrong}");
    }
    assert!(access.identify(&HeaderMap::new()).is_err());
}

#[test]
fn unusable_files_are_refused_by_name_with_a_recipe() {
    for (text, part) in [
        ("", "holds no token"),
        (" \n# only a comment\n", "holds no token"),
        ("REPLACE_ME_WITH_32_BYTES_BASE64", "placeholder"),
        ("CHANGE_ME_aaaaaaaaaaaaaaaaaaaaaaa", "placeholder"),
        ("short", "5 bytes"),
        ("a:read:short", "5 bytes"),
    ] {
        let (_dir, path) = file(text);
        let message = Access::from_path(&path).unwrap_err().to_string();
        assert!(message.contains(part), "{text:?}: {message}");
        assert!(message.contains(path.to_str().unwrap()), "{message}");
        assert!(message.contains("urandom"), "{message}");
    }
    let (_dir, path) = file("a:read:0123456789abcdef\nnonsense nonsense\n");
    assert!(
        Access::from_path(&path)
            .unwrap_err()
            .to_string()
            .contains("line 2")
    );
    let missing = Access::from_path(Path::new("/nowhere/token")).unwrap_err();
    assert!(missing.to_string().contains("/nowhere/token"));
}

#[test]
fn named_tokens_have_their_scopes() {
    let text =
        "# who\nci:use:aaaaaaaaaaaaaaaa\n\nboard:read:bbbbbbbbbbbbbbbb\nops:admin:cccccccccccccccc";
    let (_dir, path) = file(text);
    let access = Access::from_path(&path).unwrap();
    let of = |token: &str| {
        access
            .identify(&headers(&format!("Bearer {token}")))
            .unwrap()
    };
    assert_eq!(of("aaaaaaaaaaaaaaaa").scope, Scope::Use);
    assert_eq!(
        of("bbbbbbbbbbbbbbbb"),
        Caller {
            name: "board".into(),
            scope: Scope::Read
        }
    );
    assert_eq!(of("cccccccccccccccc").scope, Scope::Admin);
}

#[test]
fn a_directory_holds_one_token_a_file() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("ops"), "aaaaaaaaaaaaaaaa\n").unwrap();
    fs::write(dir.path().join("board.read"), "bbbbbbbbbbbbbbbb\n").unwrap();
    fs::create_dir(dir.path().join("..2026")).unwrap();
    let access = Access::from_path(dir.path()).unwrap();
    let of = |token: &str| {
        access
            .identify(&headers(&format!("Bearer {token}")))
            .unwrap()
    };
    assert_eq!(
        of("aaaaaaaaaaaaaaaa"),
        Caller {
            name: "ops".into(),
            scope: Scope::Admin
        }
    );
    assert_eq!(of("bbbbbbbbbbbbbbbb").scope, Scope::Read);
}

#[test]
fn a_token_twice_is_refused() {
    for text in [
        "a:read:aaaaaaaaaaaaaaaa\na:use:bbbbbbbbbbbbbbbb",
        "a:read:aaaaaaaaaaaaaaaa\nb:use:aaaaaaaaaaaaaaaa",
    ] {
        let (_dir, path) = file(text);
        assert!(
            Access::from_path(&path)
                .unwrap_err()
                .to_string()
                .contains("twice")
        );
    }
}

#[test]
fn a_reload_takes_over_good_tokens_and_keeps_the_old_ones_otherwise() {
    let (_dir, path) = file(GOOD);
    let access = Access::from_path(&path).unwrap();
    assert!(!access.reload().unwrap());
    fs::write(&path, "short").unwrap();
    assert!(access.reload().is_err());
    assert!(access.identify(&headers(&format!("Bearer {GOOD}"))).is_ok());
    fs::write(&path, "another-good-token").unwrap();
    assert!(access.reload().unwrap());
    assert!(
        access
            .identify(&headers(&format!("Bearer {GOOD}")))
            .is_err()
    );
    assert!(
        access
            .identify(&headers("bearer another-good-token"))
            .is_ok()
    );
}

#[test]
fn tokens_never_show_in_debug_output() {
    let (_dir, path) = file("ci:use:sentinel-sentinel-sentinel");
    let access = Access::from_path(&path).unwrap();
    assert!(!format!("{access:?}").contains("sentinel"));
}

#[test]
fn scopes_follow_method_and_route() {
    let table = [
        (Method::GET, "/v1/sandboxes", Scope::Read),
        (Method::GET, "/v1/sandboxes/{id}/files", Scope::Use),
        (Method::GET, "/v1/sandboxes/{id}/exec/ws", Scope::Use),
        (Method::GET, "/v1/sandboxes/{id}/console", Scope::Use),
        (Method::GET, "/metrics", Scope::Read),
        (Method::POST, "/v1/sandboxes", Scope::Use),
        (Method::DELETE, "/v1/sandboxes/{id}", Scope::Use),
        (Method::POST, "/v1/sandboxes/{id}/branch", Scope::Use),
        (Method::POST, "/v1/snapshots", Scope::Admin),
        (Method::DELETE, "/v1/snapshots/{tag}", Scope::Admin),
    ];
    for (method, route, scope) in table {
        assert_eq!(needed(&method, route), scope, "{method} {route}");
    }
}
