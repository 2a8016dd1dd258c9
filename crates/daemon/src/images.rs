//! What a snapshot request boots: an image of the store, or files named one by one.

use std::path::{Path, PathBuf};

use forkd_sandbox::spec::ImageFiles;
use forkd_wire::api::snapshot::CreateSnapshot;
use forkd_wire::error::ErrorCode;

use crate::ApiError;

/// The node's image store, opened anew for every question: the command line may write to it meanwhile.
#[derive(Debug, Clone)]
pub(crate) struct Images {
    root: PathBuf,
}

impl Images {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The files a request names.
    pub(crate) async fn resolve(&self, request: &CreateSnapshot) -> Result<ImageFiles, ApiError> {
        match (&request.image, &request.kernel, &request.rootfs) {
            (Some(name), None, None) => self.by_name(name.clone()).await,
            (None, Some(kernel), Some(rootfs)) => {
                let initramfs = match &request.initramfs {
                    Some(named) => named.clone(),
                    None => self.initramfs_of(kernel).await?,
                };
                by_path(kernel, &initramfs, rootfs).await
            }
            (Some(_), _, _) => Err(ApiError::invalid(
                "give either image, or kernel, initramfs and rootfs, not both",
            )),
            (None, _, _) => Err(ApiError::invalid("nothing to boot is named").remedy(
                "name an image in `image`, or the paths `kernel`, `initramfs` and `rootfs`",
            )),
        }
    }

    /// The initial root of the newest image that boots the same kernel: it holds the modules that fit, and the agent.
    async fn initramfs_of(&self, kernel: &Path) -> Result<PathBuf, ApiError> {
        let (root, wanted) = (self.root.clone(), kernel.to_owned());
        let found = tokio::task::spawn_blocking(move || {
            let images = forkd_image::Store::open(&root).and_then(|store| store.list());
            let images = images.unwrap_or_default().into_iter();
            let with_it = images.filter(|image| same_content(&image.kernel, &wanted));
            with_it.max_by_key(|image| image.created_at)
        });
        let found = found.await.map_err(|failure| broke_off(&failure))?;
        found.map(|image| image.initramfs).ok_or_else(|| {
            ApiError::invalid(format!(
                "kernel and rootfs are given, but no initramfs, and no image of this node boots the kernel {}",
                kernel.display()
            ))
            .remedy(
                "name an initramfs with forkd's agent in it; or build an image with `forkd image build`, and name \
                 it in `image` or its kernel in `kernel`",
            )
        })
    }

    async fn by_name(&self, name: String) -> Result<ImageFiles, ApiError> {
        let root = self.root.clone();
        let wanted = name.clone();
        let found = tokio::task::spawn_blocking(move || {
            forkd_image::Store::open(&root).and_then(|store| store.get(&wanted))
        });
        let found = found.await.map_err(|failure| broke_off(&failure))?;
        let image = found.map_err(|error| {
            ApiError::new(ErrorCode::Internal, crate::http::error::chain(&error))
        })?;
        let image = image.ok_or_else(|| {
            ApiError::new(ErrorCode::NotFound, format!("there is no image {name:?}"))
                .remedy("list images with `forkd image ls`, build one with `forkd image build`")
        })?;
        Ok(ImageFiles {
            name: image.name,
            digest: image.digest.to_string(),
            kernel: image.kernel,
            initramfs: image.initramfs,
            rootfs: image.rootfs,
        })
    }
}

/// Whether two files hold the same; one that cannot be read is like no other.
fn same_content(one: &Path, other: &Path) -> bool {
    let size = |path: &Path| std::fs::metadata(path).ok().map(|meta| meta.len());
    let hash = |path: &Path| {
        let mut hasher = blake3::Hasher::new();
        let file = std::fs::File::open(path).ok()?;
        hasher.update_reader(file).ok()?;
        Some(hasher.finalize())
    };
    let same_size = size(one).is_some_and(|bytes| size(other) == Some(bytes));
    same_size && hash(one).is_some_and(|found| hash(other) == Some(found))
}

/// Of what the files hold: the same names may hold something else tomorrow.
fn digest(files: &[PathBuf]) -> Result<String, ApiError> {
    let mut all = blake3::Hasher::new();
    for path in files {
        let failed = |error: std::io::Error| {
            ApiError::invalid(format!("{} cannot be read: {error}", path.display()))
        };
        let file = std::fs::File::open(path).map_err(failed)?;
        let mut one = blake3::Hasher::new();
        one.update_reader(file).map_err(failed)?;
        all.update(one.finalize().as_bytes());
    }
    Ok(format!("blake3:{}", all.finalize()))
}

fn broke_off(failure: &tokio::task::JoinError) -> ApiError {
    let text = format!("reading the image broke off: {failure}");
    ApiError::new(ErrorCode::Internal, text)
}

async fn by_path(kernel: &Path, initramfs: &Path, rootfs: &Path) -> Result<ImageFiles, ApiError> {
    for (what, path) in [
        ("kernel", kernel),
        ("initramfs", initramfs),
        ("rootfs", rootfs),
    ] {
        let usable = path.is_absolute()
            && tokio::fs::metadata(path)
                .await
                .is_ok_and(|meta| meta.is_file());
        if !usable {
            return Err(ApiError::invalid(format!(
                "{what} {} is not an absolute path of a file on the node",
                path.display()
            )));
        }
    }
    let name = kernel.file_name().unwrap_or(kernel.as_os_str());
    let files = [kernel, initramfs, rootfs].map(Path::to_owned);
    let digest = tokio::task::spawn_blocking(move || digest(&files)).await;
    let digest = digest.map_err(|failure| broke_off(&failure))??;
    Ok(ImageFiles {
        name: name.to_string_lossy().into_owned(),
        digest,
        kernel: kernel.to_owned(),
        initramfs: initramfs.to_owned(),
        rootfs: rootfs.to_owned(),
    })
}
