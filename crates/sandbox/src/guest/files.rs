//! Files in a guest.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use forkd_wire::agent::filesystem::{
    EntryInfo, EntryResponse, FILES_PATH, LIST_DIR_PATH, ListDirRequest, ListDirResponse,
    MAKE_DIR_PATH, METRICS_PATH, MOVE_PATH, Metrics, MoveRequest, PathRequest, REMOVE_PATH,
    STAT_PATH, WrittenFile,
};
use futures_util::{Stream, StreamExt};
use http::Method;
use http::header::CONTENT_TYPE;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};

use super::rpc;
use super::{Client, Error, within};

/// How long a file may take to open, and metadata to be read.
const CALL_LIMIT: Duration = Duration::from_secs(30);
/// How long a tree may take to list or remove.
const TREE_LIMIT: Duration = Duration::from_secs(300);
/// How long a transfer may stand still.
const STALL_LIMIT: Duration = Duration::from_secs(60);

/// A file that is being read from a guest.
#[derive(Debug)]
pub struct FileStream {
    size: Option<u64>,
    body: Incoming,
    /// Keeps the connection.
    _client: Client,
}

impl FileStream {
    /// Its size in bytes, as the guest announced it.
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// The next bytes, or `None` at the end. A guest that stalls is an error.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let what = "read file";
        loop {
            let frame = tokio::time::timeout(STALL_LIMIT, self.body.frame())
                .await
                .map_err(|_| Error::timeout(what, STALL_LIMIT))?;
            match frame {
                None => return Ok(None),
                Some(Err(source)) => {
                    return Err(Error::Lost {
                        what,
                        source: Some(source),
                    });
                }
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// All of it, if it is no longer than `limit` bytes.
    pub async fn collect(mut self, limit: usize) -> Result<Vec<u8>, Error> {
        let mut all = Vec::new();
        while let Some(bytes) = self.next().await? {
            if all.len() + bytes.len() > limit {
                let detail = format!("the file is longer than {limit} bytes");
                return Err(Error::Request {
                    what: "read file",
                    detail,
                });
            }
            all.extend_from_slice(&bytes);
        }
        Ok(all)
    }

    /// The bytes as a stream; it ends after the first error.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, Error>> + Send {
        futures_util::stream::unfold(Some(self), async |file| {
            let mut file = file?;
            match file.next().await {
                Ok(Some(bytes)) => Some((Ok(bytes), Some(file))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
    }
}

impl Client {
    /// Opens a file of the guest. The path is absolute, or relative to root's home.
    pub async fn read_file(&self, path: &str) -> Result<FileStream, Error> {
        let what = "read file";
        let request = rpc::request(Method::GET, &files_uri(path, None), rpc::full(""), what)?;
        within(what, CALL_LIMIT, async {
            let response = rpc::check(what, self.send(what, request).await?).await?;
            let body = response.into_body();
            Ok(FileStream {
                size: body.size_hint().exact(),
                body,
                _client: self.clone(),
            })
        })
        .await
    }

    /// Writes a file of the guest, and the directories above it. `mode` is its permission bits. An
    /// error of `content` fails the call and leaves the file cut off.
    pub async fn write_file(
        &self,
        path: &str,
        content: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
        mode: Option<u32>,
    ) -> Result<WrittenFile, Error> {
        let what = "write file";
        let body =
            BodyExt::boxed_unsync(StreamBody::new(content.map(|item| item.map(Frame::data))));
        let mut request = rpc::request(Method::POST, &files_uri(path, mode), body, what)?;
        let kind = http::HeaderValue::from_static("application/octet-stream");
        request.headers_mut().insert(CONTENT_TYPE, kind);
        let written: Vec<WrittenFile> = rpc::unary(self, what, request, Duration::MAX).await?;
        let none = || Error::protocol(what, "it names no file");
        written.into_iter().next().ok_or_else(none)
    }

    /// What is known of a file.
    pub async fn stat(&self, path: &str) -> Result<EntryInfo, Error> {
        self.entry("stat", STAT_PATH, path).await
    }

    /// Makes a directory and those above it.
    pub async fn make_dir(&self, path: &str) -> Result<EntryInfo, Error> {
        self.entry("make directory", MAKE_DIR_PATH, path).await
    }

    async fn entry(
        &self,
        what: &'static str,
        call: &'static str,
        path: &str,
    ) -> Result<EntryInfo, Error> {
        let message = PathRequest {
            path: path.to_owned(),
        };
        let response: EntryResponse = self.call(what, call, &message, CALL_LIMIT).await?;
        Ok(response.entry)
    }

    /// A directory's entries, `depth` levels of them.
    pub async fn list_dir(&self, path: &str, depth: u32) -> Result<Vec<EntryInfo>, Error> {
        let message = ListDirRequest {
            path: path.to_owned(),
            depth,
        };
        let response: ListDirResponse = self
            .call("list directory", LIST_DIR_PATH, &message, TREE_LIMIT)
            .await?;
        Ok(response.entries)
    }

    /// Renames a file or directory.
    pub async fn rename(&self, source: &str, destination: &str) -> Result<EntryInfo, Error> {
        let message = MoveRequest {
            source: source.to_owned(),
            destination: destination.to_owned(),
        };
        let response: EntryResponse = self.call("move", MOVE_PATH, &message, TREE_LIMIT).await?;
        Ok(response.entry)
    }

    /// Removes a file, or a directory with all it holds.
    pub async fn remove(&self, path: &str) -> Result<(), Error> {
        let message = PathRequest {
            path: path.to_owned(),
        };
        self.call::<_, serde_json::Value>("remove", REMOVE_PATH, &message, TREE_LIMIT)
            .await?;
        Ok(())
    }

    /// How the guest's machine is used.
    pub async fn metrics(&self, deadline: Duration) -> Result<Metrics, Error> {
        let what = "metrics";
        let request = rpc::request(Method::GET, METRICS_PATH, rpc::full(""), what)?;
        rpc::unary(self, what, request, deadline).await
    }
}

fn files_uri(path: &str, mode: Option<u32>) -> String {
    let mut uri = format!("{FILES_PATH}?path=");
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' | b'~' => {
                uri.push(char::from(byte));
            }
            other => uri.push_str(&format!("%{other:02X}")),
        }
    }
    if let Some(mode) = mode {
        uri.push_str(&format!("&mode={mode:o}"));
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_escaped() {
        assert_eq!(
            files_uri("/a b/ü", Some(0o755)),
            "/files?path=/a%20b/%C3%BC&mode=755"
        );
        assert_eq!(files_uri("a&b=c#?", None), "/files?path=a%26b%3Dc%23%3F");
    }
}
