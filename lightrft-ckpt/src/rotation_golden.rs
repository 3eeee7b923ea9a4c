//! Rotation beside LightRFT's, save by save: the same where LightRFT loses nothing, and where not, what ours keeps.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::rotation::{Candidate, Rotation, choose};

/// Where ours leaves other checkpoints than LightRFT's after some save: the steps that ours leaves after each, and why.
const DIFFERENT: &[(&str, &[&[u64]], &str)] = &[
    (
        "max_mem 1 GiB, 0.6 GiB each",
        &[&[1], &[2], &[3], &[4], &[5]],
        "the limit counts what was just saved, so it holds after the save too",
    ),
    (
        "max_mem exactly reached is not over",
        &[&[1], &[1, 2], &[2, 3], &[2, 3, 4]],
        "exactly reached is not over here either, but the limit holds after the save too",
    ),
    ("re-saving the same tag", &[&[1], &[1, 2], &[1, 2, 3], &[1, 2, 3]], "the replaced one is not one more"),
    (
        "mtime order, not step order",
        &[&[5], &[5, 6], &[5, 6, 7], &[6, 7, 8]],
        "the step decides, no clock does",
    ),
    (
        "a foreign directory newer than all",
        &[&[1], &[1, 2], &[1, 2, 3], &[2, 3, 4]],
        "foreign directories do not push checkpoints out",
    ),
    (
        "latest names the newest save",
        &[&[9], &[8, 9], &[7, 9], &[6, 9]],
        "neither the highest step goes nor the one just saved",
    ),
];

fn step_of(tag: &str, save: usize) -> u64 {
    tag.strip_prefix("global_step").and_then(|n| n.parse().ok()).unwrap_or(save as u64)
}

/// The steps of the checkpoints among LightRFT's directories. Foreign ones, which it deletes too, never reach ours.
fn steps_of(dirs: &Value, tags: &[String]) -> BTreeSet<u64> {
    let dirs = dirs.as_array().unwrap().iter().filter_map(Value::as_str);
    dirs.filter_map(|d| tags.iter().position(|t| t == d).map(|i| step_of(d, i))).collect()
}

#[test]
fn rotation_is_lightrfts_where_that_loses_nothing() {
    let golden: Value = serde_json::from_str(include_str!("../tests/data/checkpoint_rotation.json")).unwrap();
    let (mut same, mut different) = (0, 0);
    for case in golden["rotation"].as_array().unwrap() {
        let note = case["note"].as_str().unwrap();
        let max_num = usize::try_from(case["max_num"].as_i64().unwrap());
        let limits =
            max_num.map(|max_num| Rotation { max_num, max_mem_gib: case["max_mem_gib"].as_f64().unwrap() });
        let Some(limits) = limits.ok().filter(|l| l.check().is_ok()) else {
            assert_eq!(
                case["saves"][0]["error"], "IndexError",
                "{note}: refused here, so LightRFT must crash"
            );
            continue;
        };
        let ours = DIFFERENT.iter().find(|(known, ..)| note.starts_with(known));
        let (mut there, mut tags): (Vec<Candidate>, Vec<String>) = Default::default();
        let mut differed = false;
        for (i, save) in case["saves"].as_array().unwrap().iter().enumerate() {
            let tag = save["tag"].as_str().unwrap().to_owned();
            tags.push(tag.clone());
            let position = tags.iter().position(|t| *t == tag).unwrap();
            there.iter_mut().for_each(|c| c.protected = false);
            there.retain(|c| c.name != tag);
            there.push(Candidate {
                step: step_of(&tag, position),
                name: tag,
                saved_unix_ms: i as u64,
                bytes: save["size"].as_u64().unwrap(),
                protected: true,
            });
            let gone = choose(&there, &limits);
            there.retain(|c| !gone.contains(&c.name));

            let left: BTreeSet<u64> = there.iter().map(|c| c.step).collect();
            let lightrft = steps_of(&save["dirs_after"], &tags);
            differed |= left != lightrft;
            let expected = ours.map_or(lightrft, |(_, steps, _)| steps[i].iter().copied().collect());
            assert_eq!(left, expected, "{note}, save {i}: {}", ours.map_or("", |(.., why)| why));
        }
        assert_eq!(differed, ours.is_some(), "{note}: listed as different exactly when it is");
        if differed { different += 1 } else { same += 1 }
    }
    assert_eq!((same, different), (10, DIFFERENT.len()), "every case was looked at");
}
