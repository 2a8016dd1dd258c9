//! `forkd image …`

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// `forkd image`
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    after_help = "\
Examples:
  forkd image build --debian python3-numpy
  forkd image build --oci ./app.tar --name app
  forkd image ls
  forkd image rm app"
)]
pub struct Image {
    /// What to do with images.
    #[command(subcommand)]
    pub command: ImageCommand,
}

/// `forkd image build|ls|rm`
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Build an image; what is there already is reused
    Build(ImageBuild),
    /// List images
    Ls(ImageList),
    /// Remove images and what only they used
    Rm(ImageRemove),
}

/// `forkd image build`
#[derive(Debug, Args)]
#[command(
    group = clap::ArgGroup::new("source").required(true).args(["debian", "oci", "dir"]),
    after_help = "\
Examples:
  forkd image build --debian python3-numpy
  forkd image build --debian python3 git ripgrep --name tools
  forkd image build --oci ./layout --name app          an OCI image layout or archive
  forkd image build --dir ./rootfs --name mine         a directory with a root file system

The image is made of a Debian cloud kernel, an initramfs with forkd's agent, and the root file system
packed read-only. Every part is cached by what went into it. Needs root and the tools that
`forkd doctor` lists."
)]
pub struct ImageBuild {
    /// Make the root of a minimal Debian with these packages
    #[arg(long, value_name = "PACKAGE", num_args = 1.., value_delimiter = ',')]
    pub debian: Vec<String>,
    /// Make the root of an OCI image layout (directory) or archive (tar)
    #[arg(long, value_name = "PATH")]
    pub oci: Option<PathBuf>,
    /// Make the root of this directory
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Debian release the packages come from [default: bookworm]
    #[arg(long, value_name = "SUITE", requires = "debian")]
    pub suite: Option<String>,
    /// Archive the packages come from [default: Debian's]
    #[arg(long, value_name = "URL", requires = "debian")]
    pub mirror: Option<String>,
    /// Boot this kernel (bzImage) instead of Debian's cloud kernel
    #[arg(long, value_name = "FILE", requires = "modules")]
    pub kernel: Option<PathBuf>,
    /// Directory with that kernel's modules
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub modules: Option<PathBuf>,
    /// Kernel module the guest needs besides forkd's own list; may be repeated
    #[arg(long = "module", value_name = "NAME")]
    pub extra_modules: Vec<String>,
    /// Look for newer packages and build anew
    #[arg(long)]
    pub refresh: bool,
    /// The image's name [default: made of the source]
    #[arg(long)]
    pub name: Option<String>,
    /// Print the image as JSON
    #[arg(long)]
    pub json: bool,
}

/// `forkd image ls`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  forkd image ls\n  forkd image ls --json | jq -r '.[].name'")]
pub struct ImageList {
    /// Print the list as JSON
    #[arg(long)]
    pub json: bool,
}

/// `forkd image rm`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkd image rm app
  forkd image rm --force app       also when snapshots were booted from it

A snapshot that was booted from an image needs the image's files when it is forked, so an image that
is in use is not removed unless forced.")]
pub struct ImageRemove {
    /// Names of images
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// Remove it although snapshots need it; they cannot be forked afterwards
    #[arg(long)]
    pub force: bool,
}
