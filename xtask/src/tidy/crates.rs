//! Rules for the crates of the workspace: what each must have, and who may depend on whom.

use std::collections::{BTreeMap, BTreeSet};

use super::Problem;
use crate::examples::is_numbered;
use crate::workspace::Member;

/// The document that lists the dependency arrows.
pub(crate) const ARCHITECTURE: &str = "docs/ARCHITECTURE.md";

/// Parts of the names of crates that need a GPU's libraries or its compiler.
const DEVICE_CRATES: [&str; 6] = ["cuda", "nccl", "cublas", "cudnn", "nvrtc", "candle-kernels"];

/// Checks every member's manifest and the files around it; `paths` are all files of the workspace.
pub(crate) fn check(members: &[Member], paths: &[&str]) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut examples: BTreeMap<&str, &str> = BTreeMap::new();
    for member in members {
        let manifest_path = format!("{}/Cargo.toml", member.folder);
        if member.manifest.value("lints", "workspace") != Some("true") {
            problems.push(Problem::new(
                &manifest_path,
                0,
                "must take the workspace's lints: [lints] workspace = true",
            ));
        }
        if !member.is_published() {
            continue;
        }
        for name in ["README.md", "CHANGELOG.md"] {
            let path = format!("{}/{name}", member.folder);
            if !paths.contains(&path.as_str()) {
                problems.push(Problem::new(&path, 0, "missing; every published crate has one"));
            }
        }
        let folder = format!("{}/examples/", member.folder);
        let own: Vec<_> = paths.iter().filter_map(|path| example_name(path.strip_prefix(&folder)?)).collect();
        if !own.iter().any(|name| is_numbered(name)) {
            problems.push(Problem::new(&folder, 0, "needs a numbered example, such as 1_share_a_dataset.rs"));
        }
        for name in own {
            // Cargo puts all examples of a workspace into one folder.
            if let Some(other) = examples.insert(name, member.name()) {
                let what = format!("`{other}` has an example `{name}` too: one would overwrite the other");
                problems.push(Problem::new(&folder, 0, what));
            }
        }
    }
    problems
}

/// The name of the example whose path inside `examples/` is given; files of a larger example are none by themselves.
fn example_name(path: &str) -> Option<&str> {
    path.strip_suffix("/main.rs").or_else(|| path.strip_suffix(".rs")).filter(|name| !name.contains('/'))
}

/// The arrows between our crates are those that the document draws: no more, and no fewer. Development dependencies
/// count, for a crate whose tests need another is not tested by itself.
///
/// The document holds a fenced block opened by three backquotes and the word `arrows`, one arrow in a line:
/// `lightrft-sharding -> lightrft-collectives`. Anything after `#` is a comment.
pub(crate) fn check_arrows(members: &[Member], document: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut drawn: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let names: BTreeSet<&str> = members.iter().map(Member::name).collect();
    let lines = document.lines().enumerate().skip_while(|(_, line)| line.trim() != "```arrows");
    let mut block = lines.skip(1).take_while(|(_, line)| line.trim() != "```").peekable();
    if block.peek().is_none() {
        problems.push(Problem::new(
            ARCHITECTURE,
            0,
            "has no block ```arrows that lists the dependency arrows",
        ));
        return problems;
    }
    for (index, line) in block {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        match line.split_once("->").map(|(from, to)| (from.trim(), to.trim())) {
            Some(arrow) if names.contains(arrow.0) && names.contains(arrow.1) => {
                drawn.insert(arrow, index + 1);
            }
            Some(_) => problems.push(Problem::new(
                ARCHITECTURE,
                index + 1,
                format!("`{line}` names a crate that is not here"),
            )),
            None => {
                problems.push(Problem::new(ARCHITECTURE, index + 1, format!("`{line}` is no arrow `a -> b`")))
            }
        }
    }

    let mut used = BTreeSet::new();
    for member in members {
        for (to, line) in member.manifest.dependencies().filter(|(to, _)| names.contains(to)) {
            if to == member.name() {
                continue; // a crate's own tests switch its features on this way
            }
            let arrow = (member.name(), to);
            used.insert(arrow);
            if !drawn.contains_key(&arrow) {
                let what = format!("`{} -> {to}` is not among the arrows of {ARCHITECTURE}", arrow.0);
                problems.push(Problem::new(&format!("{}/Cargo.toml", member.folder), line, what));
            }
        }
    }
    for ((from, to), line) in drawn.iter().filter(|(arrow, _)| !used.contains(*arrow)) {
        let what = format!("`{from} -> {to}` is drawn, but {from} does not depend on {to}");
        problems.push(Problem::new(ARCHITECTURE, *line, what));
    }
    problems
}

/// Every crate builds and runs on a laptop by default. `tree` is `cargo tree`'s list, one `name version` in a line.
pub(crate) fn check_default_tree(manifest_path: &str, tree: &str) -> Vec<Problem> {
    let names: BTreeSet<&str> = tree.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let of_device = |name: &&str| DEVICE_CRATES.iter().any(|part| name.contains(part));
    names
        .into_iter()
        .filter(of_device)
        .map(|name| {
            let what = format!("`{name}` is in the default dependency tree; it belongs behind a feature");
            Problem::new(manifest_path, 0, what)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Manifest;

    fn member(name: &str, more: &str) -> Member {
        let text = format!("[package]\nname = \"{name}\"\n[lints]\nworkspace = true\n{more}");
        Member { folder: name.to_owned(), manifest: Manifest::parse(&text) }
    }

    fn whats(problems: &[Problem]) -> Vec<String> {
        problems.iter().map(Problem::to_string).collect()
    }

    #[test]
    fn a_published_crate_explains_itself_and_shows_an_example() {
        let crates = [member("a", "")];
        let whole = ["a/README.md", "a/CHANGELOG.md", "a/examples/1_first.rs"];
        assert_eq!(whats(&check(&crates, &whole)), Vec::<String>::new());
        for missing in 0..whole.len() {
            let mut paths = whole.to_vec();
            paths.remove(missing);
            assert_eq!(check(&crates, &paths).len(), 1, "without {}", whole[missing]);
        }
        assert_eq!(check(&crates, &["a/README.md", "a/CHANGELOG.md", "a/examples/demo.rs"]).len(), 1);
        assert!(check(&crates, &["a/README.md", "a/CHANGELOG.md", "a/examples/1_first/main.rs"]).is_empty());
        assert!(check(&[member("a", "[package]\npublish = false")], &[]).is_empty());
    }

    #[test]
    fn two_crates_do_not_share_the_name_of_an_example() {
        let crates = [member("a", ""), member("b", "")];
        let files = |second: &'static str| {
            let mut paths = vec!["a/README.md", "a/CHANGELOG.md", "a/examples/1_first.rs"];
            paths.extend(["b/README.md", "b/CHANGELOG.md", second]);
            paths
        };
        assert_eq!(check(&crates, &files("b/examples/1_first.rs")).len(), 1);
        assert!(check(&crates, &files("b/examples/1_other.rs")).is_empty());
    }

    #[test]
    fn every_member_takes_the_workspaces_lints() {
        let without = Manifest::parse("[package]\nname = \"a\"\npublish = false\n");
        assert_eq!(check(&[Member { folder: "a".to_owned(), manifest: without }], &[]).len(), 1);
    }

    #[test]
    fn arrows_are_those_of_the_document_and_no_others() {
        let crates = [
            member("a", ""),
            member("b", "[dev-dependencies]\na.workspace = true\nb = { path = \".\" }\nserde = \"1\""),
        ];
        let arrows =
            |list: &str| check_arrows(&crates, &format!("# Title\n\n```arrows\n{list}\n```\nb -> b\n"));
        assert_eq!(whats(&arrows("b -> a # tests only")), Vec::<String>::new());
        assert_eq!(arrows("# none").len(), 1, "an arrow that is not drawn");
        assert_eq!(arrows("b -> a\na -> b").len(), 1, "an arrow that is drawn but not there");
        assert_eq!(arrows("b -> a\nb -> c").len(), 1, "an arrow to a crate that is not there");
        assert_eq!(arrows("b -> a\nb depends on a").len(), 1, "a line that is no arrow");
        assert_eq!(check_arrows(&crates, "b -> a").len(), 1, "no block at all");
    }

    #[test]
    fn no_device_library_comes_by_default() {
        let tree = "lightrft-engine v0.1.0 (path)\nserde v1.0.0\nserde v1.0.0 (*)\n";
        assert!(check_default_tree("a/Cargo.toml", tree).is_empty());
        assert_eq!(
            check_default_tree("a/Cargo.toml", &format!("{tree}cudarc v0.19.0\ncudarc v0.19.0 (*)")).len(),
            1
        );
        assert_eq!(check_default_tree("a/Cargo.toml", &format!("{tree}candle-kernels v0.11.1")).len(), 1);
    }
}
