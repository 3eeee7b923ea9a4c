//! Where the workspace lies, which crates it has, and how cargo is called in it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use crate::manifest::Manifest;

/// The workspace this program was built from.
pub(crate) struct Workspace {
    root: PathBuf,
}

/// One crate of the workspace.
pub(crate) struct Member {
    /// Folder, relative to the root.
    pub(crate) folder: String,
    pub(crate) manifest: Manifest,
}

impl Workspace {
    pub(crate) fn of_this_build() -> Self {
        // Cargo sets the variable when it runs the program; the constant serves a program started by hand.
        let here = std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        Self { root: here.parent().map_or_else(|| here.clone(), Path::to_path_buf) }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Cargo, to be run at the root: the one that runs us, so that the toolchain is the same.
    pub(crate) fn cargo(&self) -> Command {
        let program = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
        let mut command = Command::new(program);
        command.current_dir(&self.root);
        command
    }

    /// All member crates, in the order of the root's `Cargo.toml`.
    pub(crate) fn members(&self) -> io::Result<Vec<Member>> {
        let read = |path: &Path| {
            fs::read_to_string(path)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
        };
        let root = Manifest::parse(&read(&self.root.join("Cargo.toml"))?);
        root.strings("workspace", "members")
            .into_iter()
            .map(|folder| {
                let manifest = Manifest::parse(&read(&self.root.join(&folder).join("Cargo.toml"))?);
                Ok(Member { folder, manifest })
            })
            .collect()
    }
}

impl Member {
    pub(crate) fn name(&self) -> &str {
        // A crate without a name would not have passed cargo, which has built us from the same manifests.
        self.manifest.value("package", "name").unwrap_or(&self.folder)
    }

    /// Whether the crate is one of those we publish, which must explain themselves to strangers.
    pub(crate) fn is_published(&self) -> bool {
        self.manifest.value("package", "publish") != Some("false")
    }

    /// Names of the crate's features, `default` left out.
    pub(crate) fn features(&self) -> Vec<&str> {
        self.manifest.keys("features").into_iter().filter(|&name| name != "default").collect()
    }
}
