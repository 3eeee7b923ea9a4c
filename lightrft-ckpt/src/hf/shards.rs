//! Which tensor goes into which file: the greedy rule of `huggingface_hub`, so that folders come out as its own do.

/// The shard of each tensor, counted from 0, and the number of shards.
///
/// The rule is that of `huggingface_hub.split_torch_state_dict_into_shards`: tensors fill a shard in their order until
/// the next would make it larger than `max_bytes`; a tensor that alone is larger gets a shard of its own, numbered
/// before the one that is being filled, which goes on after it.
pub(super) fn split(tensor_bytes: &[u64], max_bytes: u64) -> (Vec<usize>, usize) {
    let mut shard_of = Vec::with_capacity(tensor_bytes.len());
    let (mut closed, mut filled, mut filling_since) = (0, 0u64, None);
    for (i, &bytes) in tensor_bytes.iter().enumerate() {
        if bytes > max_bytes {
            shard_of.push(closed);
            closed += 1;
            continue;
        }
        if filled.saturating_add(bytes) > max_bytes {
            if let Some(since) = filling_since.replace(i) {
                close(&mut shard_of[since..], closed);
                closed += 1;
            }
            filled = 0;
        }
        filling_since.get_or_insert(i);
        shard_of.push(FILLING);
        filled += bytes;
    }
    if let Some(since) = filling_since {
        close(&mut shard_of[since..], closed);
        closed += 1;
    }
    (shard_of, closed)
}

/// Stands for the number of the shard that is being filled, which is known when it is full.
const FILLING: usize = usize::MAX;

fn close(shard_of: &mut [usize], number: usize) {
    shard_of.iter_mut().filter(|s| **s == FILLING).for_each(|s| *s = number);
}

/// The name of shard `index` (from 0) of `count`.
pub(super) fn file_name(index: usize, count: usize) -> String {
    if count == 1 {
        return super::SINGLE.to_owned();
    }
    format!("model-{:05}-of-{count:05}.safetensors", index + 1)
}

/// Whether a file of this name holds weights as they are written here, or is their index.
pub(super) fn is_weights_name(name: &str) -> bool {
    let numbers = name.strip_prefix("model-").and_then(|n| n.strip_suffix(".safetensors"));
    let is_number = |n: &str| n.len() >= 5 && n.bytes().all(|b| b.is_ascii_digit());
    name == super::SINGLE
        || name == super::INDEX
        || numbers.and_then(|n| n.split_once("-of-")).is_some_and(|(i, n)| is_number(i) && is_number(n))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Case {
        max: u64,
        sizes: Vec<u64>,
        shards: Vec<usize>,
    }

    #[test]
    fn tensors_are_split_as_huggingface_hub_splits_them() {
        let cases: Vec<Case> = serde_json::from_str(include_str!("../../tests/data/hf_shards.json")).unwrap();
        assert!(cases.len() > 10);
        for case in cases {
            let (shard_of, count) = split(&case.sizes, case.max);
            let numbers: Vec<usize> = shard_of.iter().map(|s| s + 1).collect();
            assert_eq!(numbers, case.shards, "{:?} at most {}", case.sizes, case.max);
            assert_eq!(count, case.shards.iter().copied().max().unwrap());
        }
    }

    proptest! {
        #[test]
        fn a_shard_is_too_large_only_when_one_tensor_is(
            sizes in prop::collection::vec(0u64..50, 1..30),
            max in 0u64..60,
        ) {
            let (shard_of, count) = split(&sizes, max);
            for shard in 0..count {
                let inside: Vec<u64> = (0..sizes.len()).filter(|&i| shard_of[i] == shard).map(|i| sizes[i]).collect();
                prop_assert!(!inside.is_empty());
                prop_assert!(inside.iter().sum::<u64>() <= max || inside.len() == 1);
            }
        }
    }

    #[test]
    fn only_weights_are_called_weights() {
        for weights in
            ["model.safetensors", "model-00001-of-00012.safetensors", "model.safetensors.index.json"]
        {
            assert!(is_weights_name(weights), "{weights}");
        }
        for other in
            ["config.json", "model-1-of-2.safetensors", "model-00001.safetensors", "optimizer.safetensors"]
        {
            assert!(!is_weights_name(other), "{other}");
        }
    }
}
