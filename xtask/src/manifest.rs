//! As much of `Cargo.toml` as our rules ask about: sections, keys, plain values and lists of strings.
//!
//! Cargo itself has accepted the file before we read it, so this needs to be right, not strict.

/// The entries of one `Cargo.toml`.
#[derive(Debug, Default)]
pub(crate) struct Manifest {
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    section: String,
    key: String,
    /// Everything after `=`, over several lines where brackets are open, with a plain string's quotes removed.
    value: String,
    line: usize,
}

impl Manifest {
    pub(crate) fn parse(text: &str) -> Self {
        let mut entries = Vec::new();
        let mut section = String::new();
        let mut lines = text.lines().enumerate();
        while let Some((index, line)) = lines.next() {
            let line = without_comment(line).trim();
            if let Some(name) = line.strip_prefix('[') {
                section = name.trim_matches(['[', ']']).trim().to_owned();
                // `[dependencies.half]` is the entry `half` of `[dependencies]`.
                if let Some((table, key)) = section.clone().rsplit_once('.')
                    && table.ends_with("dependencies")
                {
                    let key = key.trim_matches('"').to_owned();
                    entries.push(Entry {
                        section: table.to_owned(),
                        key,
                        value: String::new(),
                        line: index + 1,
                    });
                }
                continue;
            }
            let Some((key, value)) = line.split_once('=') else { continue };
            let mut value = value.trim().to_owned();
            while value.matches('[').count() > value.matches(']').count() {
                let Some((_, more)) = lines.next() else { break };
                value.push(' ');
                value.push_str(without_comment(more).trim());
            }
            if value.len() >= 2 && value.starts_with('"') && value.ends_with('"') {
                value = value[1..value.len() - 1].to_owned();
            }
            let key = key.trim().trim_matches('"').to_owned();
            entries.push(Entry { section: section.clone(), key, value, line: index + 1 });
        }
        Self { entries }
    }

    pub(crate) fn value(&self, section: &str, key: &str) -> Option<&str> {
        self.entries.iter().find(|e| e.section == section && e.key == key).map(|e| e.value.as_str())
    }

    pub(crate) fn keys(&self, section: &str) -> Vec<&str> {
        self.entries.iter().filter(|e| e.section == section).map(|e| e.key.as_str()).collect()
    }

    /// The strings of a list, for instance `members = ["a", "b"]`.
    pub(crate) fn strings(&self, section: &str, key: &str) -> Vec<String> {
        let value = self.value(section, key).unwrap_or_default();
        value.split('"').skip(1).step_by(2).map(str::to_owned).collect()
    }

    /// Every crate this one depends on, of whatever kind and target, with the line that says so.
    pub(crate) fn dependencies(&self) -> impl Iterator<Item = (&str, usize)> {
        self.entries.iter().filter_map(|e| {
            let of_ours = e.section.ends_with("dependencies") && e.section != "workspace.dependencies";
            let name = e.key.split('.').next().unwrap_or(&e.key);
            of_ours.then_some((name, e.line))
        })
    }
}

fn without_comment(line: &str) -> &str {
    let mut quoted = false;
    for (at, c) in line.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '#' if !quoted => return &line[..at],
            _ => {}
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
[package]
name = "a-crate" # not "other"
publish = false

[features]
default = []
testing = [
    "dep:proptest", # generators
]

[dependencies]
half.workspace = true
serde = { version = "1", features = ["derive"] }

[target.'cfg(unix)'.dependencies]
rustix = "1"

[dependencies.lightrft-data]
path = "../data"
"#;

    #[test]
    fn values_lose_quotes_and_comments() {
        let manifest = Manifest::parse(TEXT);
        assert_eq!(manifest.value("package", "name"), Some("a-crate"));
        assert_eq!(manifest.value("package", "publish"), Some("false"));
        assert_eq!(manifest.value("package", "license"), None);
    }

    #[test]
    fn lists_may_span_lines() {
        let manifest = Manifest::parse(TEXT);
        assert_eq!(manifest.keys("features"), ["default", "testing"]);
        assert_eq!(manifest.strings("features", "testing"), ["dep:proptest"]);
    }

    #[test]
    fn dependencies_are_found_in_every_notation() {
        let manifest = Manifest::parse(TEXT);
        let names: Vec<_> = manifest.dependencies().map(|(name, _)| name).collect();
        assert_eq!(names, ["half", "serde", "rustix", "lightrft-data"]);
    }
}
