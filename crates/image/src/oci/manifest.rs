//! The documents of an image layout: index, manifest, configuration.

use serde::{Deserialize, Serialize};

use super::{Error, Layout};
use crate::rootfs::Defaults;

const INDEX_TYPES: &[&str] = &[
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
const MANIFEST_TYPES: &[&str] = &[
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
const REFERENCE: &str = "org.opencontainers.image.ref.name";
/// An index may name another; more turns than this are a circle.
const INDEX_DEPTH_MAX: usize = 4;
const OS: &str = "linux";
const ARCHITECTURE: &str = "amd64";

/// Names a blob.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: String,
    pub(super) size: u64,
    #[serde(default)]
    pub(super) platform: Option<Platform>,
    #[serde(default)]
    pub(super) annotations: std::collections::BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Platform {
    pub(super) architecture: String,
    pub(super) os: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    #[serde(default)]
    pub(super) layers: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Config {
    #[serde(default)]
    pub(super) architecture: String,
    #[serde(default)]
    pub(super) os: String,
    #[serde(default)]
    config: Option<Execution>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Execution {
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Config {
    /// Whether the image runs in our guests; an image that does not say is believed to.
    pub(super) fn fits(&self) -> bool {
        let fits = |value: &str, wanted| value.is_empty() || value == wanted;
        fits(&self.os, OS) && fits(&self.architecture, ARCHITECTURE)
    }

    pub(super) fn defaults(&self) -> Defaults {
        let none = Execution::default();
        let config = self.config.as_ref().unwrap_or(&none);
        let text = |value: &Option<String>, default: &str| match value.as_deref() {
            None | Some("") => default.to_owned(),
            Some(value) => value.to_owned(),
        };
        Defaults {
            env: config.env.clone().unwrap_or_default(),
            workdir: text(&config.working_dir, "/"),
            user: text(&config.user, "root"),
            entrypoint: config.entrypoint.clone().unwrap_or_default(),
            cmd: config.cmd.clone().unwrap_or_default(),
        }
    }
}

impl Descriptor {
    /// The digest's 64 digits; other algorithms than sha256 are refused.
    pub(super) fn sha256(&self) -> Result<&str, Error> {
        let hex = self.digest.strip_prefix("sha256:").filter(|hex| {
            hex.len() == 64
                && hex
                    .bytes()
                    .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        });
        hex.ok_or_else(|| Error::Refused {
            what: "descriptor",
            reason: format!("`{}` is no sha256 digest", self.digest.escape_debug()),
        })
    }

    pub(super) fn compression(&self) -> Result<Compression, Error> {
        let kind = self.media_type.as_str();
        let known = kind.starts_with("application/vnd.oci.image.layer.")
            || kind.starts_with("application/vnd.docker.image.rootfs.");
        match kind.rsplit(['.', '+']).next() {
            Some("tar") if known => Ok(Compression::None),
            Some("gzip") if known => Ok(Compression::Gzip),
            Some("zstd") if known => Ok(Compression::Zstd),
            _ => Err(Error::Refused {
                what: "layer",
                reason: format!("its type `{}` is unknown", kind.escape_debug()),
            }),
        }
    }

    fn is_index(&self) -> bool {
        INDEX_TYPES.contains(&self.media_type.as_str())
    }

    fn is_manifest(&self) -> bool {
        MANIFEST_TYPES.contains(&self.media_type.as_str())
    }

    fn fits(&self) -> bool {
        self.platform
            .as_ref()
            .is_none_or(|p| p.os == OS && p.architecture == ARCHITECTURE)
    }

    fn label(&self) -> String {
        match (self.annotations.get(REFERENCE), &self.platform) {
            (Some(reference), _) => reference.escape_debug().to_string(),
            (None, Some(p)) => format!("{}/{}", p.os, p.architecture)
                .escape_debug()
                .to_string(),
            (None, None) => self.digest.escape_debug().to_string(),
        }
    }
}

/// Finds the one manifest for this machine, through nested indexes.
pub(super) fn find(layout: &Layout) -> Result<Descriptor, Error> {
    let mut all: Vec<String> = Vec::new();
    let mut index: Index = layout.index()?;
    for _ in 0..INDEX_DEPTH_MAX {
        all.extend(index.manifests.iter().map(Descriptor::label));
        let mut fitting: Vec<Descriptor> = index.manifests;
        fitting.retain(|d| d.fits() && (d.is_index() || d.is_manifest()));
        // One image under several names is one image.
        fitting.sort_by(|a, b| a.digest.cmp(&b.digest));
        fitting.dedup_by(|a, b| a.digest == b.digest);
        let chosen = match fitting.len() {
            0 => {
                return Err(Error::Platform {
                    found: all.join(", "),
                });
            }
            1 => fitting.remove(0),
            _ => {
                let found: Vec<String> = fitting.iter().map(Descriptor::label).collect();
                return Err(Error::Ambiguous {
                    found: found.join(", "),
                });
            }
        };
        if chosen.is_manifest() {
            return Ok(chosen);
        }
        index = layout.document(&chosen, "index")?;
    }
    Err(Error::TooLarge {
        max: INDEX_DEPTH_MAX as u64,
        what: "nested indexes",
    })
}
