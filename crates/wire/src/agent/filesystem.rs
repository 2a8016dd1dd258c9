//! Messages of the filesystem service (E2B's `filesystem.Filesystem`, Connect JSON), and the paths
//! of the plain HTTP requests that carry files.

use serde::{Deserialize, Serialize};

/// Unary: [`PathRequest`] to [`EntryResponse`].
pub const STAT_PATH: &str = "/filesystem.Filesystem/Stat";
/// Unary: [`PathRequest`] to [`EntryResponse`]. Makes parents too.
pub const MAKE_DIR_PATH: &str = "/filesystem.Filesystem/MakeDir";
/// Unary: [`MoveRequest`] to [`EntryResponse`].
pub const MOVE_PATH: &str = "/filesystem.Filesystem/Move";
/// Unary: [`ListDirRequest`] to [`ListDirResponse`].
pub const LIST_DIR_PATH: &str = "/filesystem.Filesystem/ListDir";
/// Unary: [`PathRequest`] to `{}`. Removes a directory with all it holds.
pub const REMOVE_PATH: &str = "/filesystem.Filesystem/Remove";

/// `GET ?path=&username=`: the file's bytes. `POST ?path=&username=&mode=`: writes it, makes its
/// parents, answers a list of [`WrittenFile`]. The body is the bytes themselves, or
/// `multipart/form-data` with one file or several. `mode` is octal.
pub const FILES_PATH: &str = "/files";
/// `GET`: the environment that every process gets.
pub const ENVS_PATH: &str = "/envs";
/// `GET`: [`Metrics`].
pub const METRICS_PATH: &str = "/metrics";

/// Names a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathRequest {
    /// Absolute, or relative to the user's home.
    #[serde(default)]
    pub path: String,
}

/// Renames a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveRequest {
    /// What it is called now.
    #[serde(default)]
    pub source: String,
    /// What it will be called.
    #[serde(default)]
    pub destination: String,
}

/// Lists a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListDirRequest {
    /// Which.
    #[serde(default)]
    pub path: String,
    /// How many levels; 0 and 1 are the directory's own entries.
    #[serde(default)]
    pub depth: u32,
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryResponse {
    /// The entry.
    pub entry: EntryInfo,
}

/// A directory's entries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListDirResponse {
    /// In order of path.
    #[serde(default)]
    pub entries: Vec<EntryInfo>,
}

/// What is known of a file or directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EntryInfo {
    /// The last part of the path.
    pub name: String,
    /// What it is; of a symbolic link, what it points to.
    #[serde(rename = "type", default)]
    pub kind: FileType,
    /// The absolute path.
    pub path: String,
    /// Bytes; a string on the wire, as protobuf has it.
    #[serde(default, with = "int64")]
    pub size: i64,
    /// Permission bits.
    #[serde(default)]
    pub mode: u32,
    /// The permission bits in letters, such as `-rw-r--r--`.
    #[serde(default)]
    pub permissions: String,
    /// The owner's name, or number if he has no name.
    #[serde(default)]
    pub owner: String,
    /// The group's name, or number if it has no name.
    #[serde(default)]
    pub group: String,
    /// When it was last changed, RFC 3339.
    #[serde(default)]
    pub modified_time: String,
    /// Where a symbolic link points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symlink_target: Option<String>,
}

/// What a directory entry is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileType {
    /// Neither of the others: a device, a socket, a link that leads nowhere.
    #[default]
    #[serde(rename = "FILE_TYPE_UNSPECIFIED")]
    Other,
    /// A regular file.
    #[serde(rename = "FILE_TYPE_FILE")]
    File,
    /// A directory.
    #[serde(rename = "FILE_TYPE_DIRECTORY")]
    Directory,
}

/// A file that was written by `POST /files`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenFile {
    /// The absolute path.
    pub path: String,
    /// The last part of the path.
    pub name: String,
    /// Always `file`.
    #[serde(rename = "type")]
    pub kind: String,
}

/// How the guest's machine is used.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Seconds since the Unix epoch, by the guest's clock.
    #[serde(default)]
    pub ts: i64,
    /// Number of processors.
    #[serde(default)]
    pub cpu_count: u32,
    /// Percent of all processors since the guest started.
    #[serde(default)]
    pub cpu_used_pct: f32,
    /// Bytes of RAM.
    #[serde(default)]
    pub mem_total: u64,
    /// Bytes of RAM not available.
    #[serde(default)]
    pub mem_used: u64,
    /// Bytes of the root file system.
    #[serde(default)]
    pub disk_total: u64,
    /// Bytes used of the root file system.
    #[serde(default)]
    pub disk_used: u64,
}

mod int64 {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &i64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(i64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(number) => Ok(number),
            Form::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}
