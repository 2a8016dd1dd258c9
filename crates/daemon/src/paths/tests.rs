//! Where things are without flags, and with one.

use super::*;

#[test]
fn root_gets_the_systems_places() {
    let xdg = Some(PathBuf::from("/home/u/data"));
    assert_eq!(
        default_data(true, xdg.clone(), None),
        Path::new("/var/lib/forkd")
    );
    assert_eq!(
        default_run(true, xdg, Path::new("/d")),
        Path::new("/run/forkd")
    );
}

#[test]
fn others_get_their_own_places() {
    let home = Some(PathBuf::from("/home/u"));
    let data = default_data(false, None, home.clone());
    assert_eq!(data, Path::new("/home/u/.local/share/forkd"));
    let xdg = Some(PathBuf::from("/data"));
    assert_eq!(
        default_data(false, xdg.clone(), home),
        Path::new("/data/forkd")
    );
    assert_eq!(default_run(false, xdg, &data), Path::new("/data/forkd"));
    assert_eq!(default_run(false, None, &data), data.join("run"));
}

#[test]
fn a_flag_moves_only_what_it_names() {
    let args = PathArgs {
        data_dir: Some("/d".into()),
        state: Some("/s/one.db".into()),
        ..PathArgs::default()
    };
    let paths = args.resolve();
    assert_eq!(paths.snapshots, Path::new("/d/snapshots"));
    assert_eq!(paths.images, Path::new("/d/images"));
    assert_eq!(paths.workspaces(), Path::new("/s/one.workspaces.json"));
}
