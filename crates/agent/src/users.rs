//! Who processes run as: the guest's `/etc/passwd`, read by ourselves, because the C library of a
//! static program would load plugins for it.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use forkd_wire::agent::connect::Code;
use http::HeaderMap;

use crate::rpc::Fault;

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// A user of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) home: PathBuf,
    pub(crate) shell: String,
}

impl User {
    fn root() -> Self {
        Self {
            name: "root".to_owned(),
            uid: 0,
            gid: 0,
            home: "/root".into(),
            shell: "/bin/sh".to_owned(),
        }
    }

    /// A path as this user writes it: absolute, relative to the home, or beginning with `~`.
    pub(crate) fn resolve(&self, path: &str) -> PathBuf {
        match path.strip_prefix('~') {
            Some("") => self.home.clone(),
            Some(rest) if rest.starts_with('/') => self.home.join(rest.trim_start_matches('/')),
            _ => self.home.join(path),
        }
    }
}

/// The user of a name or number. None, and `user` where there is no such user, is root.
pub(crate) fn find(name: Option<&str>) -> Result<User, Fault> {
    let name = name.filter(|name| !name.is_empty()).unwrap_or("root");
    let passwd = std::fs::read_to_string(PASSWD).unwrap_or_default();
    match lookup(&passwd, name) {
        Some(user) => Ok(user),
        None if matches!(name, "root" | "user" | "0") => Ok(User::root()),
        None => Err(Fault::new(
            Code::Unauthenticated,
            format!("there is no user {name:?} in the guest; leave the user out to be root"),
        )),
    }
}

fn lookup(passwd: &str, name: &str) -> Option<User> {
    passwd.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let [user, _, uid, gid, _, home, shell] = fields[..] else {
            return None;
        };
        (user == name || uid == name).then_some(())?;
        Some(User {
            name: user.to_owned(),
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            home: if home.is_empty() {
                "/".into()
            } else {
                Path::new(home).to_owned()
            },
            shell: if shell.is_empty() {
                "/bin/sh".to_owned()
            } else {
                shell.to_owned()
            },
        })
    })
}

/// The user a request is made for: the name in its basic `Authorization`, as E2B's clients send it.
pub(crate) fn of_request(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(http::header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("basic").then_some(())?;
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(token.trim())
        .ok()?;
    let text = String::from_utf8(bytes).ok()?;
    Some(text.split(':').next()?.to_owned())
}

/// Names of users and groups, for listings; read once for each.
#[derive(Debug)]
pub(crate) struct Names {
    users: Vec<(u32, String)>,
    groups: Vec<(u32, String)>,
}

impl Names {
    pub(crate) fn read() -> Self {
        Self {
            users: ids(PASSWD),
            groups: ids(GROUP),
        }
    }

    pub(crate) fn user(&self, uid: u32) -> String {
        name_of(&self.users, uid)
    }

    pub(crate) fn group(&self, gid: u32) -> String {
        name_of(&self.groups, gid)
    }
}

fn ids(file: &str) -> Vec<(u32, String)> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let row = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        Some((fields.nth(1)?.parse().ok()?, name))
    };
    text.lines().filter_map(row).collect()
}

fn name_of(names: &[(u32, String)], id: u32) -> String {
    names
        .iter()
        .find(|row| row.0 == id)
        .map_or_else(|| id.to_string(), |row| row.1.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_users_by_name_and_number() {
        let passwd = "root:x:0:0::/root:/bin/bash\nbroken\nbuild:x:7:8:,,,:/srv:\n";
        let build = lookup(passwd, "build").unwrap();
        assert_eq!(
            (build.uid, build.gid, build.shell.as_str()),
            (7, 8, "/bin/sh")
        );
        assert_eq!(lookup(passwd, "7"), Some(build));
        assert_eq!(lookup(passwd, "broken"), None);
    }

    #[test]
    fn paths_are_relative_to_home() {
        let root = User::root();
        assert_eq!(root.resolve("a/b"), Path::new("/root/a/b"));
        assert_eq!(root.resolve("~/a"), Path::new("/root/a"));
        assert_eq!(root.resolve("/a"), Path::new("/a"));
        assert_eq!(root.resolve("~"), Path::new("/root"));
    }
}
