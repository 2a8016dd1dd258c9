//! The order of modules, and what happens when they do not fit.

use super::*;

fn check(
    kernel: &[(&str, &[&str], &[&str])],
    builtin: &[&str],
    wanted: &[(&str, bool)],
) -> Result<Vec<String>, Error> {
    closure(wanted, &mut |name| {
        let module = kernel.iter().find(|(n, ..)| *n == name);
        Ok(match module {
            Some((_, depends, soft)) => Found::Module(Info {
                release: "6.1".into(),
                depends: depends.iter().map(|s| (*s).to_owned()).collect(),
                soft: soft.iter().map(|s| (*s).to_owned()).collect(),
            }),
            None if builtin.contains(&name) => Found::Builtin,
            None => Found::Absent,
        })
    })
}

#[test]
fn dependencies_come_first_and_once() {
    let kernel: &[(&str, &[&str], &[&str])] = &[
        ("virtio", &[], &[]),
        ("virtio_ring", &["virtio"], &[]),
        ("virtio_blk", &["virtio", "virtio_ring"], &[]),
        ("virtio_net", &["virtio_ring", "net_failover"], &[]),
        ("net_failover", &["failover"], &[]),
        ("failover", &[], &[]),
        ("unwanted", &[], &[]),
    ];
    let order = check(kernel, &[], &[("virtio-blk", true), ("virtio_net", true)]).unwrap();
    assert_eq!(
        order,
        [
            "virtio",
            "virtio_ring",
            "virtio_blk",
            "failover",
            "net_failover",
            "virtio_net"
        ]
    );
}

#[test]
fn built_in_and_optional_modules_are_left_out() {
    let kernel: &[(&str, &[&str], &[&str])] = &[("erofs", &["libcrc32c"], &["crc32c", "lz4"])];
    let order = check(
        kernel,
        &["libcrc32c"],
        &[("erofs", true), ("vmgenid", false)],
    )
    .unwrap();
    assert_eq!(order, ["erofs"]);
}

#[test]
fn what_is_missing_is_named_with_who_needs_it() {
    let kernel: &[(&str, &[&str], &[&str])] = &[("erofs", &["libcrc32c"], &[])];
    let text = check(kernel, &[], &[("erofs", true)])
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("`libcrc32c`") && text.contains("`erofs`"),
        "{text}"
    );
    let text = check(kernel, &[], &[("overlay", true)])
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("`overlay`") && text.contains("every guest"),
        "{text}"
    );
}

#[test]
fn a_circle_is_refused() {
    let kernel: &[(&str, &[&str], &[&str])] = &[("a", &["b"], &[]), ("b", &["a"], &[])];
    assert!(matches!(
        check(kernel, &[], &[("a", true)]),
        Err(Error::Circle { .. })
    ));
}

#[test]
fn file_names_become_module_names() {
    let name = |path: &str| module_name(Path::new(path));
    assert_eq!(
        name("kernel/x/virtio-rng.ko").as_deref(),
        Some("virtio_rng")
    );
    assert_eq!(name("a.ko.xz").as_deref(), Some("a"));
    assert_eq!(name("a.ko.zst").as_deref(), Some("a"));
    assert_eq!(name("modules.dep"), None);
    assert_eq!(name(".ko"), None);
}

#[test]
fn an_empty_directory_is_no_module_directory() {
    let dir = tempfile::tempdir().unwrap();
    let error = Catalog::open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::NoModules { .. }), "{error}");
}

#[test]
fn garbage_with_a_module_name_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("kernel")).unwrap();
    fs::write(dir.path().join("kernel/overlay.ko"), "garbage").unwrap();
    let catalog = Catalog::open(dir.path()).unwrap();
    let error = catalog
        .resolve(&[], &["overlay".into()], "6.1")
        .unwrap_err();
    assert!(matches!(error, Error::NotAModule { .. }), "{error}");
}
