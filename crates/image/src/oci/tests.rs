//! Layouts made here, honest and malicious, unpacked for real.

use std::io::Write;
use std::os::unix::fs::MetadataExt;

use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use super::*;
use crate::Silent;

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const BIG: u64 = 1 << 30;

/// A layer's archive, entry by entry; names go in as they are, allowed or not.
struct Layer(Builder<Vec<u8>>);

impl Layer {
    fn new() -> Layer {
        Layer(Builder::new(Vec::new()))
    }

    fn entry(mut self, kind: EntryType, name: &str, link: &str, content: &[u8]) -> Layer {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(if kind == EntryType::Directory {
            0o755
        } else {
            0o640
        });
        header.set_mtime(77);
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    fn file(self, name: &str, content: &str) -> Layer {
        self.entry(EntryType::Regular, name, "", content.as_bytes())
    }

    fn dir(self, name: &str) -> Layer {
        self.entry(EntryType::Directory, name, "", b"")
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// A layout being made in a directory.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new(layers: &[(&str, Vec<u8>)]) -> World {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("layout/blobs/sha256")).unwrap();
        let world = World { dir };
        let layers: Vec<_> = layers
            .iter()
            .map(|(kind, data)| world.blob(kind, data))
            .collect();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux",
            "config": {"Env": ["A=b"], "WorkingDir": "/srv", "User": "app", "Cmd": ["run"]},
        });
        let config = world.blob("application/vnd.oci.image.config.v1+json", &json(&config));
        let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": layers});
        let manifest = world.blob(MANIFEST, &json(&manifest));
        world.index(&[manifest]);
        world
    }

    fn blob(&self, kind: &str, data: &[u8]) -> serde_json::Value {
        let hex: String = Sha256::digest(data)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        fs::write(self.layout().join("blobs/sha256").join(&hex), data).unwrap();
        serde_json::json!(
            {"mediaType": kind, "digest": format!("sha256:{hex}"), "size": data.len()}
        )
    }

    fn index(&self, manifests: &[serde_json::Value]) {
        let index = serde_json::json!({"schemaVersion": 2, "manifests": manifests});
        fs::write(self.layout().join("index.json"), json(&index)).unwrap();
    }

    fn layout(&self) -> PathBuf {
        self.dir.path().join("layout")
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn unpack(&self) -> Result<Defaults, Error> {
        Image::open(&self.layout())?.unpack(&self.root(), BIG, &mut Silent)
    }

    fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.root().join(path)).ok()
    }
}

fn json(value: &serde_json::Value) -> Vec<u8> {
    serde_json::to_vec(value).unwrap()
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn two_layers() -> World {
    let lower = Layer::new()
        .dir("etc/")
        .file("etc/kept", "kept")
        .file("etc/gone", "gone")
        .file("etc/changed", "old")
        .dir("full/")
        .file("full/old", "old")
        .entry(EntryType::Symlink, "lib", "usr/lib", b"");
    let upper = Layer::new()
        .file("./etc/.wh.gone", "")
        .file("etc/changed", "new")
        // The new file comes before the marker: it stays all the same.
        .file("full/new", "new")
        .file("full/.wh..wh..opq", "")
        .entry(EntryType::Link, "etc/linked", "etc/kept", b"")
        .entry(EntryType::Char, "dev/evil", "", b"");
    let upper = zstd::encode_all(&upper.bytes()[..], 1).unwrap();
    World::new(&[(GZIP, gzip(&lower.bytes())), (ZSTD, upper)])
}

fn check_two_layers(world: &World) {
    assert_eq!(world.read("etc/kept").unwrap(), "kept");
    assert_eq!(world.read("etc/gone"), None);
    assert_eq!(world.read("etc/changed").unwrap(), "new");
    assert_eq!(world.read("full/old"), None);
    assert_eq!(world.read("full/new").unwrap(), "new");
    assert_eq!(world.read("etc/linked").unwrap(), "kept");
    assert!(!world.root().join("dev/evil").exists());
    assert!(!world.root().join("etc/.wh.gone").exists());
    assert_eq!(
        fs::read_link(world.root().join("lib")).unwrap(),
        Path::new("usr/lib")
    );
    let kept = fs::metadata(world.root().join("etc/kept")).unwrap();
    assert_eq!(
        (kept.mode() & 0o777, kept.mtime(), kept.nlink()),
        (0o640, 77, 2)
    );
    assert_eq!(fs::metadata(world.root().join("etc")).unwrap().mtime(), 77);
}

#[test]
fn layers_are_applied_in_order_with_whiteouts() {
    let world = two_layers();
    let defaults = world.unpack().unwrap();
    check_two_layers(&world);
    assert_eq!(defaults.env, ["A=b"]);
    assert_eq!(
        (defaults.workdir.as_str(), defaults.user.as_str()),
        ("/srv", "app")
    );
    assert_eq!(
        (defaults.entrypoint.len(), defaults.cmd),
        (0, vec!["run".to_owned()])
    );
}

#[test]
fn an_archive_of_the_layout_is_the_same_image() {
    let world = two_layers();
    let archive = world.dir.path().join("image.tar");
    let mut builder = Builder::new(fs::File::create(&archive).unwrap());
    builder.append_dir_all(".", world.layout()).unwrap();
    builder.into_inner().unwrap();
    let image = Image::open(&archive).unwrap();
    let in_directory = Image::open(&world.layout()).unwrap();
    assert_eq!(image.manifest_digest(), in_directory.manifest_digest());
    image.unpack(&world.root(), BIG, &mut Silent).unwrap();
    check_two_layers(&world);

    let compressed = world.dir.path().join("image.tar.gz");
    fs::write(&compressed, gzip(&fs::read(&archive).unwrap())).unwrap();
    assert!(
        Image::open(&compressed)
            .unwrap_err()
            .to_string()
            .contains("gunzip")
    );
}

#[test]
fn changed_bytes_are_refused() {
    for position in [0, 40, 1] {
        let world = World::new(&[(GZIP, gzip(&Layer::new().file("a", "content").bytes()))]);
        let image = Image::open(&world.layout()).unwrap();
        let digest = image.manifest.layers[0].digest.replace("sha256:", "");
        let blob = world.layout().join("blobs/sha256").join(digest);
        let mut bytes = fs::read(&blob).unwrap();
        bytes[position] ^= 0xff;
        fs::write(&blob, &bytes).unwrap();
        let error = image.unpack(&world.root(), BIG, &mut Silent).unwrap_err();
        assert!(
            matches!(error, Error::Corrupt { .. }),
            "byte {position}: {error:?}"
        );

        fs::write(&blob, &bytes[..bytes.len() - 1]).unwrap();
        fs::remove_dir_all(world.root()).unwrap();
        assert!(matches!(world.unpack(), Err(Error::Corrupt { .. })));
    }
}

#[test]
fn a_changed_configuration_or_manifest_is_refused() {
    let world = two_layers();
    let image = Image::open(&world.layout()).unwrap();
    for digest in [&image.manifest.config.digest, &image.digest] {
        let blob = world
            .layout()
            .join("blobs/sha256")
            .join(digest.replace("sha256:", ""));
        let good = fs::read(&blob).unwrap();
        let mut bad = good.clone();
        bad[3] ^= 1;
        fs::write(&blob, bad).unwrap();
        assert!(matches!(
            Image::open(&world.layout()),
            Err(Error::Corrupt { .. })
        ));
        fs::write(&blob, good).unwrap();
    }
}

#[test]
fn nothing_is_written_outside_the_root() {
    let link = |name: &str, to: &str| Layer::new().entry(EntryType::Symlink, name, to, b"");
    let hard = |name: &str, to: &str| Layer::new().entry(EntryType::Link, name, to, b"");
    let attacks: Vec<(&str, Layer)> = vec![
        ("dot dot", Layer::new().file("../outside", "evil")),
        (
            "dot dot inside",
            Layer::new().file("a/../../outside", "evil"),
        ),
        (
            "absolute",
            Layer::new().file("/tmp/forkd-test-outside", "evil"),
        ),
        ("link up", link("up", "..").file("up/../outside", "evil")),
        (
            "absolute link",
            link("out", "/nonexistent-target").file("out/outside", "evil"),
        ),
        ("hard link up", hard("mine", "../victim")),
        ("hard link absolute", hard("mine", "/etc/hostname")),
        ("hard link to nothing", hard("mine", "nothing")),
        ("whiteout up", Layer::new().file(".wh...", "")),
        ("whiteout of itself", Layer::new().file("a/.wh..", "")),
        ("whiteout of nothing", Layer::new().file("a/.wh.", "")),
        ("link to nowhere", link("a", "")),
        (
            "unknown kind",
            Layer::new().entry(EntryType::new(b'Q'), "a", "", b""),
        ),
        (
            "sparse",
            Layer::new().entry(EntryType::GNUSparse, "a", "", b""),
        ),
    ];
    for (what, layer) in attacks {
        let world = World::new(&[(PLAIN, layer.bytes())]);
        let victim = world.dir.path().join("victim");
        fs::write(&victim, "victim").unwrap();
        let refused = world.unpack();
        assert!(refused.is_err(), "{what} was let in");
        assert_eq!(fs::read_to_string(&victim).unwrap(), "victim", "{what}");
        assert!(!world.dir.path().join("outside").exists(), "{what} got out");
        assert!(
            !Path::new("/tmp/forkd-test-outside").exists(),
            "{what} got out"
        );
    }
}

#[test]
fn links_that_climb_end_in_the_root() {
    let layer = Layer::new()
        .entry(EntryType::Symlink, "up", "../../..", b"")
        .file("up/landed", "inside")
        .entry(EntryType::Symlink, "self", "/", b"")
        .file("self/too", "inside");
    let world = World::new(&[(PLAIN, layer.bytes())]);
    world.unpack().unwrap();
    assert_eq!(world.read("landed").unwrap(), "inside");
    assert_eq!(world.read("too").unwrap(), "inside");
}

#[test]
fn a_whiteout_of_a_link_spares_its_target() {
    let lower = Layer::new().dir("real/").file("real/file", "x").entry(
        EntryType::Symlink,
        "link",
        "real",
        b"",
    );
    let world = World::new(&[
        (PLAIN, lower.bytes()),
        (PLAIN, Layer::new().file(".wh.link", "").bytes()),
    ]);
    world.unpack().unwrap();
    assert_eq!(world.read("real/file").unwrap(), "x");
    assert!(fs::symlink_metadata(world.root().join("link")).is_err());
}

#[test]
fn long_names_are_taken_up_to_a_limit() {
    let long = "d/".repeat(80) + "file";
    let mut builder = Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_size(1);
    header.set_mode(0o644);
    builder.append_data(&mut header, &long, &b"x"[..]).unwrap();
    let world = World::new(&[(PLAIN, builder.into_inner().unwrap())]);
    world.unpack().unwrap();
    assert_eq!(world.read(&long).unwrap(), "x");

    let bomb = Layer::new()
        .entry(EntryType::GNULongName, "x", "", &[b'a'; 9000])
        .file("a", "");
    let world = World::new(&[(PLAIN, bomb.bytes())]);
    assert!(matches!(world.unpack(), Err(Error::TooLarge { .. })));
}

#[test]
fn a_bomb_stops_at_the_budget() {
    let layer = gzip(&Layer::new().file("zeros", &"\0".repeat(1 << 20)).bytes());
    assert!(layer.len() < 20_000);
    let world = World::new(&[(GZIP, layer)]);
    let image = Image::open(&world.layout()).unwrap();
    let error = image
        .unpack(&world.root(), 1 << 19, &mut Silent)
        .unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
}

#[test]
fn the_platform_is_chosen_from_an_index() {
    let world = two_layers();
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(world.layout().join("index.json")).unwrap()).unwrap();
    let with = |architecture: &str, os: &str| {
        let mut entry = index["manifests"][0].clone();
        entry["platform"] = serde_json::json!({"architecture": architecture, "os": os});
        entry
    };
    let mut arm = with("arm64", "linux");
    arm["digest"] = format!("sha256:{}", "0".repeat(64)).into();
    let attestation = with("unknown", "unknown");
    let nested = serde_json::json!({"schemaVersion": 2,
        "manifests": [arm.clone(), with("amd64", "linux"), attestation]});
    world.index(&[world.blob(INDEX, &json(&nested))]);
    assert!(Image::open(&world.layout()).is_ok());

    world.index(std::slice::from_ref(&arm));
    let text = Image::open(&world.layout()).unwrap_err().to_string();
    assert!(text.contains("linux/arm64"), "{text}");

    arm["platform"] = serde_json::Value::Null;
    world.index(&[index["manifests"][0].clone(), arm]);
    assert!(matches!(
        Image::open(&world.layout()),
        Err(Error::Ambiguous { .. })
    ));
}

#[test]
fn what_is_no_layout_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let says = |path: &Path, what: &str| {
        let error = Image::open(path).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    };
    says(dir.path(), "index.json");
    fs::write(dir.path().join("manifest.json"), "[]").unwrap();
    says(dir.path(), "skopeo");
    says(&dir.path().join("none"), "cannot read");
    fs::write(dir.path().join("index.json"), "{").unwrap();
    says(dir.path(), "index is not understood");
    fs::write(dir.path().join("index.json"), "{}").unwrap();
    says(dir.path(), "no linux/amd64");
}
