//! Sources that are refused, and a directory packed by the real tool.

use super::*;
use crate::Silent;

#[test]
fn directories_that_must_not_be_packed() {
    let store = tempfile::tempdir().unwrap();
    let refused = |path: &Path, why: &str| {
        let error = plan(&Source::Directory(path.to_owned()), store.path()).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    };
    refused(Path::new("/"), "the root of this machine");
    refused(Path::new("/etc/hostname"), "a file");
    refused(Path::new("/no/such"), "cannot be opened");
    refused(store.path(), "the image store itself");
    refused(store.path().parent().unwrap(), "the image store itself");
}

#[test]
fn names_are_made_up_from_the_source() {
    let name = |debian| Plan::Debian(debian).default_name();
    assert_eq!(
        name(Debian::new(["python3-numpy", "g++"])),
        "python3-numpy-g"
    );
    assert_eq!(name(Debian::new(Vec::<String>::new())), "debian-bookworm");
}

#[test]
fn the_same_directory_packs_to_the_same_bytes() {
    if let Err(error) = MKFS_EROFS.find() {
        println!("skipped: {error}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (root, store) = (dir.path().join("root"), dir.path().join("store"));
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::create_dir(&store).unwrap();
    std::fs::write(root.join("bin/sh"), vec![b'x'; 100_000]).unwrap();
    let file = std::fs::File::options()
        .write(true)
        .open(root.join("bin/sh"))
        .unwrap();
    let modified = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    file.set_modified(modified).unwrap();
    let plan = plan(&Source::Directory(root), &store).unwrap();
    let key = plan.key(1);
    let pack = |name: &str| {
        let out = dir.path().join(name);
        plan.build(dir.path(), &out, &key, &mut Silent).unwrap();
        std::fs::read(out).unwrap()
    };
    let first = pack("a");
    // The magic number of the format, at its place.
    assert_eq!(first[1024..1028], 0xE0F5_E1E2_u32.to_le_bytes());
    assert!(first.len().is_multiple_of(4096) && first.len() < 100_000);
    // The image's own date has seconds.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert!(first == pack("b"), "two packings differ");

    let dump = tool::Tool::new("dump.erofs", "erofs-utils");
    let shown = dump
        .output(["--path=/bin/sh".as_ref(), dir.path().join("a").as_os_str()])
        .unwrap();
    assert!(
        shown.contains("2001-09-0"),
        "the file's time is lost: {shown}"
    );
}
