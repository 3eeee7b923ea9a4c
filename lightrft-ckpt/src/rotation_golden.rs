//! Rotation beside LightRFT's, save by save: the same where LightRFT loses nothing, and where not, what ours keeps.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::rotation::{Candidate, MemCounts, Rotation, choose};

/// A case after some save of which ours leaves other checkpoints than LightRFT's.
struct Different {
    /// How the case's note begins.
    note: &'static str,
    /// The steps that ours leaves after each save.
    steps: &'static [&'static [u64]],
    /// What LightRFT would lose, or what ours promises more.
    why: &'static str,
}

/// Whatever the bytes count.
const ALWAYS_DIFFERENT: [Different; 4] = [
    Different {
        note: "re-saving the same tag",
        steps: &[&[1], &[1, 2], &[1, 2, 3], &[1, 2, 3]],
        why: "LightRFT lets an old one go for a checkpoint that is there already",
    },
    Different {
        note: "mtime order, not step order",
        steps: &[&[5], &[5, 6], &[5, 6, 7], &[6, 7, 8]],
        why: "LightRFT loses a later step when clocks differ or files were copied",
    },
    Different {
        note: "a foreign directory newer than all",
        steps: &[&[1], &[1, 2], &[1, 2, 3], &[2, 3, 4]],
        why: "in LightRFT foreign directories push checkpoints out",
    },
    Different {
        note: "latest names the newest save",
        steps: &[&[9], &[8, 9], &[7, 9], &[6, 9]],
        why: "LightRFT loses the highest step when a run goes back",
    },
];

/// When all bytes count, those of the checkpoint just saved too.
const DIFFERENT_WHEN_ALL_COUNT: [Different; 2] = [
    Different {
        note: "max_mem 1 GiB, 0.6 GiB each",
        steps: &[&[1], &[2], &[3], &[4], &[5]],
        why: "the limit holds after the save too",
    },
    Different {
        note: "max_mem exactly reached is not over",
        steps: &[&[1], &[1, 2], &[2, 3], &[2, 3, 4]],
        why: "exactly reached is not over here either, but the limit holds after the save too",
    },
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
fn rotation_as_lightrft_counts_is_lightrfts_wherever_that_loses_nothing() {
    compare(MemCounts::AllBeforeSave, &ALWAYS_DIFFERENT.iter().collect::<Vec<_>>(), 12);
}

#[test]
fn rotation_that_counts_all_is_lightrfts_but_for_the_limit_of_memory() {
    let different: Vec<_> = ALWAYS_DIFFERENT.iter().chain(&DIFFERENT_WHEN_ALL_COUNT).collect();
    compare(MemCounts::All, &different, 10);
}

/// LightRFT makes room before it saves. Whenever that leaves a run without any checkpoint until the save is done, ours
/// still has one to let go afterwards.
#[test]
fn lightrft_would_delete_the_only_checkpoint_before_the_next_one_exists() {
    let golden = golden();
    let mut without_any = Vec::new();
    for case in golden["rotation"].as_array().unwrap() {
        let mut before = BTreeSet::new();
        for save in case["saves"].as_array().unwrap() {
            let names = |key: &str| -> BTreeSet<&str> {
                save[key].as_array().unwrap().iter().filter_map(Value::as_str).collect()
            };
            if !before.is_empty() && before.is_subset(&names("deleted_in_order")) {
                without_any.push(case["note"].as_str().unwrap());
            }
            before = names("dirs_after");
        }
    }
    without_any.dedup();
    assert_eq!(without_any.len(), 3, "{without_any:?}");
    // `choose` is asked when the new one is there, and never names the newest: the old one outlives the save.
    let candidate = |step: u64| Candidate {
        name: step.to_string(),
        step,
        saved_unix_ms: 0,
        bytes: 10,
        saved_last: step == 2,
        protected: step == 2,
    };
    let limits = Rotation::lightrft(1, 1000.0);
    assert_eq!(choose(&[candidate(1)], &limits), [""; 0]);
    assert_eq!(choose(&[candidate(1), candidate(2)], &limits), ["1"]);
}

fn golden() -> Value {
    serde_json::from_str(include_str!("../tests/data/checkpoint_rotation.json")).unwrap()
}

fn compare(mem_counts: MemCounts, known: &[&Different], expected_same: usize) {
    let golden = golden();
    let (mut same, mut different) = (0, 0);
    for case in golden["rotation"].as_array().unwrap() {
        let note = case["note"].as_str().unwrap();
        let max_num = usize::try_from(case["max_num"].as_i64().unwrap());
        let max_mem_gib = case["max_mem_gib"].as_f64().unwrap();
        let limits = max_num.map(|max_num| Rotation { max_num, max_mem_gib, mem_counts });
        let Some(limits) = limits.ok().filter(|l| l.check().is_ok()) else {
            assert_eq!(
                case["saves"][0]["error"], "IndexError",
                "{note}: refused here, so LightRFT must crash"
            );
            continue;
        };
        let ours = known.iter().find(|different| note.starts_with(different.note));
        let (mut there, mut tags): (Vec<Candidate>, Vec<String>) = Default::default();
        let mut differed = false;
        for (i, save) in case["saves"].as_array().unwrap().iter().enumerate() {
            let tag = save["tag"].as_str().unwrap().to_owned();
            tags.push(tag.clone());
            let position = tags.iter().position(|t| *t == tag).unwrap();
            there.iter_mut().for_each(|c| (c.protected, c.saved_last) = (false, false));
            there.retain(|c| c.name != tag);
            there.push(Candidate {
                step: step_of(&tag, position),
                name: tag,
                saved_unix_ms: i as u64,
                bytes: save["size"].as_u64().unwrap(),
                saved_last: true,
                protected: true,
            });
            let gone = choose(&there, &limits);
            there.retain(|c| !gone.contains(&c.name));

            let left: BTreeSet<u64> = there.iter().map(|c| c.step).collect();
            let lightrft = steps_of(&save["dirs_after"], &tags);
            differed |= left != lightrft;
            let expected = ours.map_or(lightrft, |ours| ours.steps[i].iter().copied().collect());
            assert_eq!(left, expected, "{note}, save {i}: {}", ours.map_or("", |ours| ours.why));
        }
        assert_eq!(differed, ours.is_some(), "{note}: listed as different exactly when it is");
        if differed { different += 1 } else { same += 1 }
    }
    assert_eq!((same, different), (expected_same, known.len()), "every case was looked at");
}
