//! What passes and what does not.

use super::*;

#[test]
fn package_names_cannot_smuggle_options() {
    for good in [
        "python3-numpy",
        "g++",
        "libstdc++6",
        "git=1:2.39.5-0+deb12u2",
        "0ad",
    ] {
        assert_eq!(package(good), Ok(()), "{good}");
    }
    for bad in [
        "",
        "a",
        "-o",
        "--include=x",
        "a b",
        "a,b",
        "Python3",
        "a;b",
        "../x",
        "a/b",
        "?essential",
        "python3=",
        "python3=-1",
        "python3=1 2",
        "a\nb",
        "~nfoo",
        "a'b",
        "./x.deb",
        "a:any",
        "x-",
    ] {
        assert!(package(bad).is_err(), "{bad:?} must be refused");
    }
}

#[test]
fn image_names_stay_inside_their_directory() {
    for good in ["python3-numpy", "a", "ubuntu_22.04", "0"] {
        assert_eq!(image(good), Ok(()), "{good}");
    }
    let long = "a".repeat(65);
    for bad in [
        "", ".", "..", ".hidden", "a/b", "A", "a b", "a@b", "-x", &long,
    ] {
        assert!(image(bad).is_err(), "{bad:?} must be refused");
    }
}

#[test]
fn made_up_names_are_valid() {
    for text in [
        "My Image.tar",
        "///",
        "",
        "Ünï",
        &"x".repeat(200),
        "a--b",
        "-",
    ] {
        let name = image_from(text);
        assert_eq!(image(&name), Ok(()), "{text:?} became {name:?}");
    }
    assert_eq!(image_from("My Image.tar"), "my-image-tar");
}

#[test]
fn suites_and_mirrors() {
    assert!(suite("bookworm").is_ok() && suite("bookworm-backports").is_ok());
    assert!(suite("--help").is_err() && suite("a b").is_err() && suite("").is_err());
    assert!(mirror("http://deb.debian.org/debian").is_ok() && mirror("file:///srv/debian").is_ok());
    assert!(
        mirror("deb http://x y z").is_err() && mirror("-").is_err() && mirror("ftp://x").is_err()
    );
}

#[test]
fn module_names() {
    assert!(module("virtio_net").is_ok() && module("9p").is_ok());
    assert!(module("../x").is_err() && module("").is_err() && module("a.ko").is_err());
}
