//! Whether an update has brought every parameter, as far as they are known.

use std::collections::{BTreeMap, BTreeSet};

use crate::{Error, Result, Version};

/// Projections that servers fuse into one parameter: all or none of them, or the rest is uninitialised memory.
const FUSED: [&[&str]; 2] = [&["q_proj", "k_proj", "v_proj"], &["gate_proj", "up_proj"]];

/// Refuses an update that leaves some of the model's parameters as they were. Where those are not known, parts of a fused
/// parameter call for its others.
pub(super) fn check_complete(
    engine: &'static str,
    version: Version,
    known: &BTreeMap<String, Vec<usize>>,
    pushed: &BTreeSet<String>,
) -> Result<()> {
    let missing: Vec<String> = if known.is_empty() {
        missing_parts(pushed)
    } else {
        known.keys().filter(|name| !pushed.contains(*name)).cloned().collect()
    };
    if !missing.is_empty() {
        let total = if known.is_empty() { pushed.len() + missing.len() } else { known.len() };
        let examples = missing.iter().take(4).cloned().collect();
        return Err(Error::MissingTensors { version, missing: missing.len(), total, examples });
    }
    if pushed.is_empty() {
        let source =
            "nothing was pushed, and what the model has is not known: all of its parameters were expected"
                .into();
        return Err(Error::Backend { engine, operation: "update weights", source });
    }
    Ok(())
}

/// Parts of fused parameters that are absent although others of the same layer are there.
fn missing_parts(names: &BTreeSet<String>) -> Vec<String> {
    let mut missing = BTreeSet::new();
    for name in names {
        for (parts, part) in FUSED.iter().flat_map(|parts| parts.iter().map(move |part| (parts, part))) {
            let Some((before, after)) = name.split_once(&format!(".{part}.")) else { continue };
            let others = parts.iter().map(|other| format!("{before}.{other}.{after}"));
            missing.extend(others.filter(|other| !names.contains(other)));
        }
    }
    missing.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_no_update() {
        let check = |known: &BTreeMap<String, Vec<usize>>, names: &[&str]| {
            let pushed = names.iter().map(|name| (*name).to_owned()).collect();
            check_complete("test", Version(3), known, &pushed).map_err(|error| error.to_string())
        };
        let known = BTreeMap::from([("a".to_owned(), vec![1]), ("b".to_owned(), vec![1])]);
        assert!(check(&known, &[]).unwrap_err().contains("2 of 2"));
        assert!(check(&known, &["a"]).unwrap_err().contains("1 of 2"));
        check(&known, &["a", "b"]).unwrap();
        assert!(check(&BTreeMap::new(), &[]).unwrap_err().contains("nothing was pushed"));
        check(&BTreeMap::new(), &["a"]).unwrap();
        assert!(check(&BTreeMap::new(), &["l.0.mlp.up_proj.weight"]).unwrap_err().contains("gate_proj"));
    }

    #[test]
    fn a_part_of_a_fused_layer_calls_for_the_others() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let found = missing_parts(&names(&[
            "l.0.attn.q_proj.weight",
            "l.0.attn.q_proj.bias",
            "l.0.attn.k_proj.bias",
        ]));
        let expected =
            ["l.0.attn.k_proj.weight", "l.0.attn.v_proj.bias", "l.0.attn.v_proj.weight"].map(str::to_owned);
        assert_eq!(found, expected);
        assert_eq!(missing_parts(&names(&["l.1.mlp.up_proj.weight"])), ["l.1.mlp.gate_proj.weight"]);
        assert!(
            missing_parts(&names(&["l.1.mlp.up_proj.weight", "l.1.mlp.gate_proj.weight", "norm"])).is_empty()
        );
    }
}
