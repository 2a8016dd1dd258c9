//! Kernels found and refused; a real one is read where the machine has or can get it.

use super::*;
use crate::Silent;

fn touch(path: &Path) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, "x").unwrap();
}

#[test]
fn the_newest_installed_kernel_with_modules_wins() {
    let dir = tempfile::tempdir().unwrap();
    let (boot, modules) = (dir.path().join("boot"), dir.path().join("modules"));
    for release in [
        "6.1.0-9-cloud-amd64",
        "6.1.0-13-cloud-amd64",
        "6.9.0-1-amd64",
    ] {
        touch(&boot.join(format!("vmlinuz-{release}")));
        touch(&modules.join(release).join("kernel/a.ko"));
    }
    touch(&boot.join("vmlinuz-6.1.0-20-cloud-amd64"));
    let (kernel, found) = installed(&boot, &modules).unwrap();
    assert!(
        kernel.ends_with("vmlinuz-6.1.0-13-cloud-amd64"),
        "{}",
        kernel.display()
    );
    assert!(found.ends_with("6.1.0-13-cloud-amd64"));
    assert_eq!(installed(&dir.path().join("none"), &modules), None);
}

#[test]
fn what_is_no_kernel_is_refused() {
    for bytes in [&b""[..], b"\x7fELF", &[0; 4096]] {
        assert!(release(bytes).is_err());
        assert_eq!(vmlinux(bytes), None);
    }
    // A header that points past the end of the file.
    let mut lying = vec![0; 0x260];
    lying[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    lying[0x202..0x206].copy_from_slice(b"HdrS");
    lying[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    lying[0x20e..0x210].copy_from_slice(&0xffffu16.to_le_bytes());
    lying[0x248..0x250].copy_from_slice(&[0xff; 8]);
    assert!(release(&lying).is_err());
    assert_eq!(vmlinux(&lying), None);
}

#[test]
fn a_real_kernel_package_gives_kernel_and_modules() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, scratch) = (dir.path().join("cache"), dir.path().join("scratch"));
    fs::create_dir(&scratch).unwrap();
    let choice = Choice::Packaged {
        package: apt::META_PACKAGE,
    };
    let material = match obtain(&choice, &cache, &scratch, &mut Silent) {
        Ok(material) => material,
        Err(error) => {
            println!("skipped: apt gives no kernel here: {error}");
            return;
        }
    };
    let image = fs::read(&material.kernel).unwrap();
    let release = release(&image).unwrap();
    assert!(release.ends_with(FLAVOUR), "{release}");
    assert!(vmlinux(&image).unwrap().len() > image.len());

    let catalog = modules::Catalog::open(&material.modules).unwrap();
    let order = catalog.resolve(modules::GUEST, &[], &release).unwrap();
    let names: Vec<&str> = order.iter().map(|m| m.name.as_str()).collect();
    println!("{release}: {}", names.join(" "));
    let at = |name| names.iter().position(|n| *n == name).unwrap();
    assert!(at("virtio") < at("virtio_mmio") && at("virtio_ring") < at("virtio_mmio"));
    assert!(at("libcrc32c") < at("erofs") && at("failover") < at("net_failover"));
    assert!(at("vsock") < at("vmw_vsock_virtio_transport"));
    let other = catalog.resolve(modules::GUEST, &[], "1.2.3").unwrap_err();
    assert!(
        matches!(other, modules::Error::OtherKernel { .. }),
        "{other}"
    );

    // The second time nothing is downloaded: the package is in the cache.
    let again = tempfile::tempdir_in(dir.path()).unwrap();
    let second = obtain(&choice, &cache, again.path(), &mut Silent).unwrap();
    assert_eq!(second.origin, material.origin);
}
