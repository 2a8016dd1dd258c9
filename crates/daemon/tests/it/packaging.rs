//! What is shipped beside the programs fits them: the manifest for Kubernetes, the recipe of the image, the
//! documents.

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;
use forkd_daemon::{Config, ServeArgs};
use forkd_wire::error::ErrorCode;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Secret, Service};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    serve: ServeArgs,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The documents of a YAML file.
fn documents(text: &str) -> Vec<Value> {
    let parts = text.split("\n---\n");
    parts
        .map(|part| serde_saphyr::from_str(part).unwrap())
        .collect()
}

/// Reads a document as what it says it is. What the type does not know gets lost on the way, and shows.
fn typed<T: Serialize + DeserializeOwned>(document: &Value) -> T {
    let typed: T = serde_json::from_value(document.clone()).unwrap();
    let kept = serde_json::to_value(&typed).unwrap();
    assert_eq!(kept, *document, "a field is unknown or has another form");
    typed
}

#[test]
fn a_field_that_kubernetes_does_not_know_is_noticed() {
    let text = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: x\n  nmae: y\n";
    let document = documents(text).remove(0);
    let typo = std::panic::catch_unwind(|| typed::<Namespace>(&document));
    assert!(typo.is_err());
}

#[test]
fn the_manifest_is_one_of_kubernetes_and_of_this_daemon() {
    let documents = documents(&read("packaging/k8s/forkd-controller.yaml"));
    let [namespace, secret, deployment, service] = &documents[..] else {
        panic!("{} documents", documents.len());
    };
    let namespace: Namespace = typed(namespace);
    let secret: Secret = typed(secret);
    let deployment: Deployment = typed(deployment);
    let service: Service = typed(service);
    let name = namespace.metadata.name.unwrap();
    for other in [&secret.metadata, &deployment.metadata, &service.metadata] {
        assert_eq!(other.namespace.as_ref(), Some(&name));
    }
    let spec = deployment.spec.unwrap();
    assert_eq!(spec.strategy.unwrap().type_.as_deref(), Some("Recreate"));
    assert_eq!(spec.replicas, Some(1));
    let labels = spec.template.metadata.unwrap().labels.unwrap();
    let selects = |selector: &std::collections::BTreeMap<String, String>| {
        selector
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value))
    };
    assert!(selects(&spec.selector.match_labels.unwrap()));
    let service = service.spec.unwrap();
    assert!(selects(&service.selector.unwrap()));
    assert_eq!(service.ports.unwrap()[0].port, 8889);

    let pod = spec.template.spec.unwrap();
    let container = &pod.containers[0];
    let args = container.args.clone().unwrap();
    let args = std::iter::once("serve".to_owned()).chain(args);
    let config = Config::from_args(Cli::try_parse_from(args).unwrap().serve).unwrap();
    let grace = pod.termination_grace_period_seconds.unwrap();
    assert!(grace > i64::try_from(config.drain.as_secs()).unwrap());
    let port = &container.ports.as_ref().unwrap()[0];
    assert_eq!(port.container_port, i32::from(config.bind.port()));

    // Every path the daemon is told is inside of something mounted, and every mount is of a volume there is.
    let mounts = container.volume_mounts.as_ref().unwrap();
    for path in [
        &config.paths.data,
        &config.paths.state,
        &config.paths.snapshots,
        config.token_file.as_ref().unwrap(),
        config.audit_log.as_ref().unwrap(),
    ] {
        let inside = mounts
            .iter()
            .any(|mount| path.starts_with(&mount.mount_path));
        assert!(inside, "{} is not on a volume", path.display());
    }
    let volumes = pod.volumes.unwrap();
    assert_eq!(volumes.len(), 4);
    for mount in mounts {
        let volume = volumes.iter().find(|volume| volume.name == mount.name);
        assert!(volume.is_some(), "{} is no volume", mount.name);
    }
    // The placeholder in the secret is one that the daemon refuses.
    let token = &secret.string_data.unwrap()["token"];
    assert!(token.starts_with("REPLACE_ME"));
}

/// `make image-test` builds the image, which takes minutes. What can be known without: that everything the recipe
/// names is there.
#[test]
fn the_recipe_of_the_image_names_what_there_is() {
    let text = read("packaging/docker/Dockerfile").replace("\\\n", " ");
    let instructions: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let words = |name: &str| -> Vec<Vec<&str>> {
        let found = instructions
            .iter()
            .filter_map(|line| line.strip_prefix(name));
        found
            .map(|rest| rest.split_whitespace().collect())
            .collect()
    };
    let built: Vec<String> = packages();
    let mut programs = vec![];
    for run in words("RUN ") {
        for pair in run.windows(2) {
            if let ["-p", package] = pair {
                assert!(
                    built.contains(&(*package).to_owned()),
                    "there is no package {package}"
                );
            }
        }
        if let Some(at) = run
            .iter()
            .position(|word| *word == "--no-install-recommends")
        {
            let wanted = run[at + 1..].iter().take_while(|word| **word != "&&");
            wanted.for_each(|package| known_to_debian(package));
        }
    }
    for copy in words("COPY ") {
        let (options, paths): (Vec<&str>, Vec<&str>) =
            copy.iter().partition(|word| word.starts_with("--"));
        let (_target, sources) = paths.split_last().unwrap();
        for source in sources {
            match options.is_empty() {
                true => assert!(root().join(source).exists(), "{source} is not there"),
                false => programs.push(source.rsplit('/').next().unwrap().to_owned()),
            }
        }
    }
    programs.sort();
    assert_eq!(
        programs,
        ["forkd", "forkd-agent", "forkd-controller", "forkd-vmm"]
    );
    let entry = words("ENTRYPOINT ").concat().concat();
    assert_eq!(entry, "[\"forkd-controller\",\"serve\"]");
    let default: Vec<String> = serde_json::from_str(&words("CMD ").concat().join(" ")).unwrap();
    let args = std::iter::once("serve".to_owned()).chain(default);
    Config::from_args(Cli::try_parse_from(args).unwrap().serve).unwrap();
}

/// The packages of this workspace.
fn packages() -> Vec<String> {
    let crates = std::fs::read_dir(root().join("crates")).unwrap();
    let manifests = crates.map(|entry| entry.unwrap().path().join("Cargo.toml"));
    let name = |path: PathBuf| {
        let text = std::fs::read_to_string(path).ok()?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("name = \""))?;
        Some(line.trim_end_matches('"').to_owned())
    };
    manifests.filter_map(name).collect()
}

/// Asks apt, where it knows anything at all.
fn known_to_debian(package: &str) {
    let knows = |package: &str| {
        let shown = Command::new("apt-cache").args(["show", package]).output();
        shown.is_ok_and(|output| output.status.success() && !output.stdout.is_empty())
    };
    if !knows("erofs-utils") {
        println!("not looked up: apt knows no packages here: {package}");
        return;
    }
    assert!(knows(package), "Debian has no package {package}");
}

#[test]
fn every_error_code_is_explained_to_operators() {
    let document = read("docs/operations.md");
    let (_, table) = document.split_once("## Troubleshooting").unwrap();
    for code in ErrorCode::ALL {
        let row = format!("| `{}` | ", code.as_str());
        let row = table.lines().find_map(|line| line.strip_prefix(&row));
        let row = row.unwrap_or_else(|| panic!("{} is not explained", code.as_str()));
        let cells: Vec<&str> = row.trim_end_matches('|').split(" | ").collect();
        assert_eq!(cells.len(), 2, "{row}");
        assert!(cells.iter().all(|cell| cell.trim().len() > 8), "{row}");
    }
    let rows = table.lines().filter(|line| line.starts_with("| `")).count();
    assert_eq!(
        rows,
        ErrorCode::ALL.len(),
        "a row explains a code there is not"
    );
}

#[test]
fn the_readme_shows_the_interface_in_six_lines_each() {
    let readme = read("README.md");
    let (_, section) = readme.split_once("\n## HTTP API\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let lines = section.lines().filter_map(|line| line.strip_prefix("    "));
    let (curl, python): (Vec<&str>, Vec<&str>) = lines.partition(|line| line.starts_with("curl "));
    assert_eq!((curl.len(), python.len()), (6, 6), "{section}");
}
