//! The rules of the tree that no compiler checks, each with its reason where it is written.
//!
//! Rules are functions from a text to problems; only this file reads the disk.

mod crates;
mod links;
mod rust;

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use crate::workspace::Workspace;

/// Folders that hold nothing of ours: results of builds and runs.
const NOT_OURS: [&str; 4] = ["target", "demo-out", "__pycache__", "node_modules"];
/// Hidden folders that do hold something of ours.
const HIDDEN_BUT_OURS: [&str; 3] = [".cargo", ".ci", ".github"];
/// Kinds of files that the rules read.
const READ: [&str; 6] = ["rs", "md", "toml", "py", "sh", "cu"];

/// A rule that is broken at a place.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Problem {
    /// Relative to the root of the workspace.
    path: String,
    /// From 1; 0 for the file as a whole.
    line: usize,
    what: String,
}

impl Problem {
    fn new(path: &str, line: usize, what: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, what: what.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.path, self.what),
            line => write!(f, "{}:{line}: {}", self.path, self.what),
        }
    }
}

/// A file of ours, read.
struct File {
    /// Relative to the root, with `/` between its parts.
    path: String,
    text: String,
}

/// `cargo xtask tidy`.
pub(crate) fn run(workspace: &Workspace) -> ExitCode {
    match check(workspace) {
        Ok(()) => {
            eprintln!("tidy: ok");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// Applies every rule; the error lists all that is wrong.
pub(crate) fn check(workspace: &Workspace) -> Result<(), String> {
    let files = read_tree(workspace.root()).map_err(|error| format!("tidy: {error}"))?;
    let members = workspace.members().map_err(|error| format!("tidy: {error}"))?;
    let exists = |path: &str| workspace.root().join(path).exists();

    let mut problems = Vec::new();
    for file in &files {
        problems.extend(machine_paths(file));
        if file.path.ends_with(".rs") {
            problems.extend(rust::check(&file.path, &file.text));
        }
        if file.path.ends_with(".md") {
            problems.extend(links::check(&file.path, &file.text, exists));
        }
    }
    let paths: Vec<_> = files.iter().map(|file| file.path.as_str()).collect();
    problems.extend(crates::check(&members, &paths));
    match files.iter().find(|file| file.path == crates::ARCHITECTURE) {
        Some(file) => problems.extend(crates::check_arrows(&members, &file.text)),
        None => {
            problems.push(Problem::new(crates::ARCHITECTURE, 0, "missing; it lists the dependency arrows"))
        }
    }
    for member in members.iter().filter(|m| m.is_published()) {
        let output = workspace
            .cargo()
            .args(["tree", "--package", member.name(), "--edges", "normal,build"])
            .args(["--prefix", "none", "--format", "{p}"])
            .output()
            .map_err(|error| format!("tidy: cargo tree: {error}"))?;
        if !output.status.success() {
            return Err(format!("tidy: cargo tree: {}", String::from_utf8_lossy(&output.stderr).trim_end()));
        }
        let tree = String::from_utf8_lossy(&output.stdout);
        problems.extend(crates::check_default_tree(&format!("{}/Cargo.toml", member.folder), &tree));
    }

    problems.sort();
    problems.dedup();
    if problems.is_empty() {
        return Ok(());
    }
    let lines: Vec<_> = problems.iter().map(Problem::to_string).collect();
    Err(format!("{}\ntidy: {} problems", lines.join("\n"), problems.len()))
}

/// A path of one person's machine means nothing on another's. Tests may name such paths: they do not open them.
fn machine_paths(file: &File) -> Vec<Problem> {
    // In two parts, so that this file does not break its own rule.
    const ROOTS: [&str; 4] =
        [concat!("/ro", "ot/"), concat!("/wo", "rk/"), concat!("/tm", "p/"), concat!("/ho", "me/")];
    let is_rust = file.path.ends_with(".rs");
    if is_rust && file.path.split('/').any(|part| part == "tests") {
        return Vec::new();
    }
    let text = if is_rust { rust::without_unit_tests(&file.text) } else { &file.text };
    let names_root = |line: &str, root: &str| {
        // `network/work/` or `$OUT/tmp/` is a relative place, not a machine's.
        let inside = |c: char| c.is_alphanumeric() || "._-$}>*".contains(c);
        line.match_indices(root).any(|(at, _)| !line[..at].ends_with(inside))
    };
    let mut problems = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for root in ROOTS.iter().filter(|root| names_root(line, root)) {
            problems.push(Problem::new(&file.path, index + 1, format!("a path of one machine, `{root}…`")));
        }
    }
    problems
}

/// All files the rules read, by path.
fn read_tree(root: &Path) -> std::io::Result<Vec<File>> {
    let mut files = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root.join(&folder))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
            let kind = entry.file_type()?;
            if kind.is_dir() {
                let hidden = name.starts_with('.') && !HIDDEN_BUT_OURS.contains(&name.as_str());
                if !hidden && !NOT_OURS.contains(&name.as_str()) {
                    folders.push(path);
                }
            } else if kind.is_file() && READ.iter().any(|kind| name.ends_with(&format!(".{kind}"))) {
                let text = fs::read_to_string(entry.path())
                    .map_err(|error| std::io::Error::new(error.kind(), format!("{path}: {error}")))?;
                files.push(File { path, text });
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths_in(path: &str, text: &str) -> usize {
        machine_paths(&File { path: path.to_owned(), text: text.to_owned() }).len()
    }

    #[test]
    fn a_machines_path_is_refused_in_documents_and_library_code() {
        assert_eq!(paths_in("a/README.md", "save to `/tmp/run`"), 1);
        assert_eq!(paths_in("a/src/lib.rs", "let p = \"/root/x\";"), 1);
        assert_eq!(paths_in("a/Cargo.toml", "path = \"/work/x\""), 1);
        assert_eq!(paths_in("a/README.md", "`$OUT/tmp/x`, network/work/x, /dev/shm"), 0);
    }

    #[test]
    fn a_machines_path_is_fine_in_tests() {
        assert_eq!(paths_in("a/tests/open.rs", "\"/tmp/x\""), 0);
        assert_eq!(paths_in("a/src/lib.rs", "\n#[cfg(test)]\nmod tests { const P: &str = \"/tmp/x\"; }"), 0);
    }

    #[test]
    fn a_problem_says_where_it_is() {
        assert_eq!(Problem::new("a.rs", 3, "bad").to_string(), "a.rs:3: bad");
        assert_eq!(Problem::new("a.rs", 0, "bad").to_string(), "a.rs: bad");
    }
}
