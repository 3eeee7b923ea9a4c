//! The rule for Markdown: a link to a file leads to one that exists.

use super::Problem;

/// Checks the links of one document; `exists` answers for a path relative to the root.
pub(crate) fn check(path: &str, text: &str, exists: impl Fn(&str) -> bool) -> Vec<Problem> {
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut problems = Vec::new();
    let mut fence: Option<&str> = None;
    for (index, line) in text.lines().enumerate() {
        let trimmed = line.trim_start();
        let mark = ["```", "~~~"].into_iter().find(|mark| trimmed.starts_with(mark));
        match (fence, mark) {
            (None, Some(mark)) => fence = Some(mark),
            (Some(open), Some(mark)) if open == mark => fence = None,
            _ => {}
        }
        if fence.is_some() || mark.is_some() {
            continue;
        }
        for target in targets(line) {
            let file = target.split(['#', '?']).next().unwrap_or_default();
            let elsewhere = target.contains("://") || target.starts_with("mailto:");
            if elsewhere || file.is_empty() {
                continue;
            }
            match resolve(folder, file) {
                Some(resolved) if exists(&resolved) => {}
                Some(resolved) => {
                    problems.push(Problem::new(
                        path,
                        index + 1,
                        format!("link to `{resolved}`: no such file"),
                    ));
                }
                None => {
                    let what = format!("link to `{file}`: must be relative and inside the repository");
                    problems.push(Problem::new(path, index + 1, what));
                }
            }
        }
    }
    problems
}

/// Targets of `[text](target)` and `[name]: target` in one line, code spans left out.
fn targets(line: &str) -> Vec<String> {
    let mut prose = String::new();
    for (index, part) in line.split('`').enumerate() {
        // Every second part stands between backquotes: keep the quotes as a mark that something stood there.
        prose.push_str(if index % 2 == 0 { part } else { "`" });
    }
    let mut found = Vec::new();
    for (at, _) in prose.match_indices("](") {
        if let Some(end) = prose[at + 2..].find([')', ' ']) {
            found.push(prose[at + 2..at + 2 + end].trim_matches(['<', '>']).to_owned());
        }
    }
    if let Some((name, target)) = prose.trim_start().split_once("]: ")
        && name.starts_with('[')
        && !name.starts_with("[^")
    {
        found.extend(target.split_whitespace().next().map(|t| t.trim_matches(['<', '>']).to_owned()));
    }
    found
}

/// `target` as seen from `folder`, relative to the root; `None` when it leaves the repository.
fn resolve(folder: &str, target: &str) -> Option<String> {
    if target.starts_with('/') {
        return None;
    }
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            name => parts.push(name),
        }
    }
    Some(if parts.is_empty() { ".".to_owned() } else { parts.join("/") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(text: &str) -> usize {
        check("a/README.md", text, |path| matches!(path, "docs/ARCHITECTURE.md" | "a/src/lib.rs" | ".")).len()
    }

    #[test]
    fn a_link_leads_to_a_file_that_exists() {
        assert_eq!(broken("[x](../docs/ARCHITECTURE.md#top), [y](src/lib.rs \"title\") and [z](..)"), 0);
        assert_eq!(broken("[x](docs/ARCHITECTURE.md)"), 1);
        assert_eq!(broken("[x](src/gone.rs) [y](src/gone.rs)"), 2);
        assert_eq!(broken("[x]: src/gone.rs\n[y]: src/lib.rs\n[^1]: A footnote."), 1);
        assert_eq!(broken("[`code`](src/gone.rs)"), 1);
    }

    #[test]
    fn a_link_stays_inside_the_repository() {
        assert_eq!(broken("[x](../../docs/ARCHITECTURE.md)"), 1);
        assert_eq!(broken("[x](/etc/hosts)"), 1);
    }

    #[test]
    fn what_is_no_link_to_a_file_is_left_alone() {
        assert_eq!(broken("[x](https://example.org/a) [y](#part) <mailto:a@b.c>"), 0);
        assert_eq!(broken("`v[i](gone)`"), 0);
        assert_eq!(broken("```rust\nf[0](gone.rs)\n```\n[x](src/lib.rs)"), 0);
        assert_eq!(broken("```\n[x](gone)\n```\n[x](gone)"), 1);
    }
}
