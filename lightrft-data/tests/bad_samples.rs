//! Samples that cannot be read: refused, or left out with ranks in step, a count, a report and a bound.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::HashSet;

use lightrft_data::{
    BadSamples, Batch, DataLoader, Dataset, DistributedSampler, Error, GroupPlacement, Groups, InMemory,
    LoaderConfig, MicroBatch, Resume, SamplerConfig, Shuffle, Tail,
};
use proptest::prelude::*;

fn sampler(len: usize, rank: usize, world: usize) -> DistributedSampler {
    let (shuffle, tail) = (Shuffle::Seekable, Tail::Pad);
    DistributedSampler::new(SamplerConfig { len, rank, world, seed: 5, shuffle, tail }).unwrap()
}

fn config(batch_size: usize, workers: usize, most: u64) -> LoaderConfig {
    let bad_samples = BadSamples::Skip { most };
    LoaderConfig { workers, prefetch_batches: 3, bad_samples, ..LoaderConfig::new(batch_size) }
}

/// Numbers, some of which cannot be read.
fn numbers(len: usize, bad: HashSet<usize>) -> impl Dataset<Item = usize> + 'static {
    (0..len).collect::<InMemory<usize>>().map(move |number| match bad.contains(&number) {
        true => Err(Error::other(std::io::Error::other(format!("number {number} is torn")))),
        false => Ok(number),
    })
}

fn loader(
    len: usize,
    bad: &HashSet<usize>,
    sampler: DistributedSampler,
    config: LoaderConfig,
) -> DataLoader<impl Dataset<Item = usize> + 'static> {
    DataLoader::new(numbers(len, bad.clone()), sampler, config).unwrap()
}

fn all<D: Dataset + 'static, B: Send + 'static>(loader: &mut DataLoader<D, B>) -> Vec<B> {
    loader.batches().collect::<Result<_, _>>().unwrap()
}

/// What is there and what is missing, in one order.
fn planned(batch: &Batch<usize>) -> Vec<usize> {
    let mut all: Vec<_> =
        batch.indices.iter().copied().chain(batch.missing.iter().map(|b| b.index)).collect();
    all.sort_unstable();
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn batches_are_those_of_the_whole_data_set_without_the_bad_samples(
        len in 1usize..50, world in 1usize..4, batch_size in 1usize..7, most in 1usize..4, workers in 0usize..4,
        bad in proptest::collection::hash_set(0usize..50, 0..10),
    ) {
        let mut steps = HashSet::new();
        for rank in 0..world {
            let config = LoaderConfig { micro_batch: MicroBatch::Samples(most), ..config(batch_size, workers, 1000) };
            let good = all(&mut loader(len, &HashSet::new(), sampler(len, rank, world), config.clone()));
            let left = all(&mut loader(len, &bad, sampler(len, rank, world), config));
            prop_assert_eq!(left.len(), good.len());
            for (left, good) in left.iter().zip(&good) {
                prop_assert!(left.indices.iter().eq(good.indices.iter().filter(|index| !bad.contains(index))));
                prop_assert_eq!(&left.samples, &left.indices);
                prop_assert_eq!(left.micro_batches.len(), good.micro_batches.len());
                prop_assert_eq!(left.micro_batches.iter().sum::<usize>(), left.samples.len());
                prop_assert!(left.missing.iter().all(|missing| bad.contains(&missing.index)));
                prop_assert_eq!(planned(left), planned(good));
                for missing in &left.missing {
                    let at = good.indices.iter().position(|index| *index == missing.index).unwrap();
                    prop_assert_eq!((missing.group, missing.pass), (good.groups[at], at / most));
                }
            }
            steps.insert(left.iter().map(|batch| batch.micro_batches.len()).collect::<Vec<_>>());
        }
        prop_assert_eq!(steps.len(), 1, "ranks are out of step");
    }

    #[test]
    fn resuming_anywhere_equals_the_unbroken_run(
        len in 1usize..50, batch_size in 1usize..7, stop in 0usize..12, workers in 0usize..3,
        bad in proptest::collection::hash_set(0usize..50, 0..10),
    ) {
        let fresh = || loader(len, &bad, sampler(len, 0, 2), config(batch_size, workers, 1000));
        let whole = all(&mut fresh());
        let mut first = fresh();
        let mut pieces: Vec<_> = first.batches().take(stop).collect::<Result<_, _>>().unwrap();
        let state = first.state();
        let mut second = fresh();
        prop_assert_eq!(second.restore(&state).unwrap(), Resume::Exact);
        pieces.extend(all(&mut second));
        prop_assert_eq!(pieces, whole);
    }
}

#[test]
fn without_being_told_to_skip_the_loader_refuses() {
    let config = LoaderConfig { bad_samples: BadSamples::Refuse, ..config(4, 2, 0) };
    let mut loader = loader(20, &HashSet::from([7]), sampler(20, 0, 1), config);
    let error = loader.batches().find_map(Result::err).unwrap();
    assert!(matches!(error, Error::Sample { index: 7, .. }), "{error:?}");
}

#[test]
fn what_is_missing_is_named_with_place_and_causes() {
    let mut loader = loader(20, &HashSet::from([7]), sampler(20, 0, 1), config(20, 2, 1));
    let batch = loader.next_batch().unwrap().unwrap();
    assert_eq!(batch.missing.len(), 1);
    let missing = &batch.missing[0];
    assert_eq!((missing.index, missing.copy, missing.pass), (7, 0, 0));
    assert_eq!((missing.at.as_str(), missing.problem.as_str()), ("sample 7", "number 7 is torn"));
}

#[test]
fn one_more_than_allowed_is_an_error_that_does_not_move_the_loader_and_each_epoch_counts_anew() {
    let bad = HashSet::from([3, 8, 15]);
    for workers in [0, 2] {
        let mut enough = loader(20, &bad, sampler(20, 0, 1), config(4, workers, 3));
        for epoch in 0..3 {
            enough.set_epoch(epoch, 0).unwrap();
            let missing: usize = all(&mut enough).iter().map(|batch| batch.missing.len()).sum();
            assert_eq!(missing, 3, "epoch {epoch}");
        }
        let mut few = loader(20, &bad, sampler(20, 0, 1), config(4, workers, 2));
        let order: Vec<_> = sampler(20, 0, 1).indices().unwrap().collect();
        let third = order.iter().filter(|index| bad.contains(index)).nth(2).unwrap();
        let mut batches = 0;
        while few.next_batch().is_ok() {
            batches += 1;
        }
        assert_eq!(batches, order.iter().position(|index| index == third).unwrap() / 4);
        for _ in 0..2 {
            let before = few.state();
            match few.next_batch() {
                Err(Error::TooManyBadSamples { most: 2, at, problem }) => {
                    assert_eq!(at, format!("sample {third}"));
                    assert_eq!(problem, format!("number {third} is torn"));
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(few.state(), before);
        }
    }
}

#[test]
fn copies_are_left_out_each_and_a_pass_may_be_left_without_samples() {
    let groups = Groups { size: 2, placement: GroupPlacement::OneRank };
    let config = LoaderConfig { micro_batch: MicroBatch::Samples(2), ..config(4, 2, 2) };
    let order: Vec<_> = sampler(6, 0, 1).indices().unwrap().collect();
    let bad = HashSet::from([order[1]]);
    let sampler = sampler(6, 0, 1).in_groups(groups).unwrap();
    let mut counted = loader(6, &bad, sampler, config).collating(|samples: Vec<usize>| Ok(samples.len()));
    let batch = counted.next_batch().unwrap().unwrap();
    assert_eq!(batch.passes.iter().map(|pass| pass.data).collect::<Vec<_>>(), [2, 0]);
    let missing: Vec<_> = batch.missing.iter().map(|bad| (bad.index, bad.copy, bad.pass)).collect();
    assert_eq!(missing, [(order[1], 0, 1), (order[1], 1, 1)]);
    assert_eq!(batch.missing[0].group, batch.missing[1].group);
}

#[test]
fn a_panic_is_never_skipped() {
    for workers in [0, 2] {
        let torn = (0..8).collect::<InMemory<usize>>().map(|number| match number {
            5 => panic!("number {number} is torn"),
            other => Ok(other),
        });
        let mut loader = DataLoader::new(torn, sampler(8, 0, 1), config(8, workers, 100)).unwrap();
        assert!(matches!(loader.next_batch(), Err(Error::SamplePanicked { index: 5, .. })));
    }
}

#[cfg(feature = "images")]
#[test]
fn a_prompt_whose_image_cannot_be_decoded_is_left_out_and_the_others_come_with_pixels() {
    use lightrft_data::{BadLines, DecodeConfig, MediaDecoder, PromptDataset, PromptFormat};

    let recorded: serde_json::Value = serde_json::from_str(include_str!("data/images.json")).unwrap();
    let png = recorded["images"][0]["file"].as_str().unwrap();
    let record =
        |image: String| serde_json::json!({"prompt": "?", "label": 1, "images": [image]}).to_string();
    let url = |base64: &str| format!("data:image/png;base64,{base64}");
    let lines = [url(png), "not-there.png".into(), url(&png[..40]), url(png)].map(record);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("images.jsonl");
    std::fs::write(&path, lines.join("\n")).unwrap();

    let decoder = MediaDecoder::new(DecodeConfig::default()).unwrap();
    let prompts = PromptDataset::open(path, PromptFormat::default(), BadLines::Refuse).unwrap();
    let decoded = prompts.map(move |record| decoder.image(&record.images[0]).map_err(Error::other));
    let in_order = SamplerConfig { shuffle: Shuffle::InOrder, ..sampler(4, 0, 1).config().clone() };
    let sampler = DistributedSampler::new(in_order).unwrap();
    let mut loader = DataLoader::new(decoded, sampler, config(4, 2, 2)).unwrap();
    let batch = loader.next_batch().unwrap().unwrap();
    assert_eq!(batch.indices, [0, 3]);
    assert_eq!(batch.samples[0], batch.samples[1]);
    let at: Vec<_> = batch.missing.iter().map(|bad| bad.at.rsplit('/').next().unwrap()).collect();
    assert_eq!(at, ["images.jsonl:2", "images.jsonl:3"]);
    assert!(batch.missing[0].problem.contains("not-there.png"), "{}", batch.missing[0].problem);
}
