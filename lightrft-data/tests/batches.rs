//! Batches and micro-batches: the same samples on any number of ranks, equally many passes, resumable, also when loaded.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::sync::Arc;

use lightrft_data::{
    BatchConfig, BatchPlan, BatchSampler, Cost, DataLoader, DistributedSampler, Draw, Error, Exhausted,
    GroupPlacement, Groups, InMemory, LastBatch, LoaderConfig, MicroBatch, Mixture, Resume, SamplerConfig,
    Shuffle, Tail,
};
use proptest::prelude::*;

fn sampler(len: usize, rank: usize, world: usize, tail: Tail) -> DistributedSampler {
    let config = SamplerConfig { len, rank, world, seed: 8, shuffle: Shuffle::Seekable, tail };
    DistributedSampler::new(config).unwrap()
}

fn length(index: usize) -> u32 {
    10 + (index as u32).wrapping_mul(2_654_435_761) % 90
}

fn lengths(len: usize) -> Arc<[u32]> {
    (0..len).map(length).collect()
}

/// How batches are divided, for a data set of `len` samples.
fn micro_batch(kind: usize, len: usize) -> MicroBatch {
    match kind {
        0 => MicroBatch::Whole,
        1..4 => MicroBatch::Samples(kind),
        _ => MicroBatch::Tokens { lengths: lengths(len), budget: 50 * (kind - 2), cost: Cost::Tokens },
    }
}

fn all(mut batches: BatchSampler) -> Vec<BatchPlan> {
    let announced = batches.remaining();
    let plans: Vec<_> = std::iter::from_fn(|| batches.next_batch().unwrap()).collect();
    assert_eq!(plans.len() as u64, announced);
    assert!(batches.next_batch().unwrap().is_none(), "the end is the end");
    plans
}

fn sorted<'a>(draws: impl Iterator<Item = &'a Draw>) -> Vec<(u64, usize, usize)> {
    let mut sorted: Vec<_> = draws.map(|draw| (draw.group, draw.copy, draw.index)).collect();
    sorted.sort_unstable();
    sorted
}

proptest! {
    #[test]
    fn ranks_take_each_sample_of_an_epoch_once_in_equally_many_passes(
        len in 1usize..80, world in 1usize..6, batch_size in 1usize..9, kind in 0usize..7, drop: bool,
    ) {
        let last_batch = if drop { LastBatch::Drop } else { LastBatch::Keep };
        let config = BatchConfig { batch_size, micro_batch: micro_batch(kind, len), last_batch };
        let ranks: Vec<Vec<BatchPlan>> = (0..world)
            .map(|rank| all(BatchSampler::new(sampler(len, rank, world, Tail::Drop), config.clone()).unwrap()))
            .collect();
        let one = sampler(len, 0, 1, Tail::Drop);
        let order: Vec<Draw> = one.draws().unwrap().collect();
        let global = batch_size * world;
        let whole = if drop { len / global * global } else { len / world * world };
        for (step, expected) in order[..whole].chunks(global).enumerate() {
            let of_step: Vec<_> = ranks.iter().map(|rank| &rank[step]).collect();
            // The step's samples are a stretch of the epoch's order, whoever takes which.
            let taken = sorted(of_step.iter().flat_map(|plan| plan.micro_batches.iter().flatten()));
            prop_assert_eq!(taken, sorted(expected.iter()));
            for plan in &of_step {
                prop_assert_eq!(plan.micro_batches.len(), of_step[0].micro_batches.len());
                for pass in &plan.micro_batches {
                    prop_assert!(!pass.is_empty());
                    match &config.micro_batch {
                        MicroBatch::Whole => {}
                        MicroBatch::Samples(most) => prop_assert!(pass.len() <= *most),
                        MicroBatch::Tokens { budget, .. } => {
                            let tokens: u32 = pass.iter().map(|draw| length(draw.index)).sum();
                            prop_assert!(tokens as usize <= *budget);
                        }
                    }
                }
            }
        }
        prop_assert!(ranks.iter().all(|rank| rank.len() == whole.div_ceil(global)));
    }

    #[test]
    fn the_same_steps_follow_after_a_resume_with_another_number_of_ranks(
        len in 24usize..120, old in 0usize..4, new in 0usize..4, kind in 0usize..7, stop in 0usize..6, epoch in 0u64..3,
    ) {
        let worlds = [1, 2, 3, 6];
        let steps = |world: usize, skip: usize, state: Option<&lightrft_data::SamplerState>| {
            let mut saved = None;
            let ranks: Vec<Vec<BatchPlan>> = (0..world).map(|rank| {
                let config = BatchConfig {
                    micro_batch: micro_batch(kind, len),
                    last_batch: LastBatch::Drop,
                    ..BatchConfig::over_all_ranks(12, world).unwrap()
                };
                let mut batches = BatchSampler::new(sampler(len, rank, world, Tail::Drop), config).unwrap();
                match state {
                    None => batches.set_epoch(epoch, 0).unwrap(),
                    Some(state) => assert_eq!(batches.restore(state).unwrap(), Resume::Exact),
                }
                for _ in 0..skip {
                    batches.next_batch().unwrap();
                }
                saved = Some(batches.state());
                all(batches)
            }).collect();
            let plans = (0..ranks[0].len()).map(|step| {
                sorted(ranks.iter().flat_map(|rank| rank[step].micro_batches.iter().flatten()))
            });
            (plans.collect::<Vec<_>>(), saved.unwrap())
        };
        let (unbroken, _) = steps(worlds[old], 0, None);
        let (_, state) = steps(worlds[old], stop, None);
        let text = serde_json::to_string(&state).unwrap();
        let (rest, _) = steps(worlds[new], 0, Some(&serde_json::from_str(&text).unwrap()));
        prop_assert_eq!(&rest[..], &unbroken[stop.min(unbroken.len())..]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_loader_reads_what_the_batches_say_and_resumes(
        len in 1usize..60, world in 1usize..4, batch_size in 1usize..7, kind in 0usize..7, workers in 0usize..3,
        stop in 0usize..6,
    ) {
        let micro_batch = micro_batch(kind, len);
        for rank in 0..world {
            let of_batches = BatchConfig { micro_batch: micro_batch.clone(), ..BatchConfig::new(batch_size) };
            let expected = all(BatchSampler::new(sampler(len, rank, world, Tail::Pad), of_batches).unwrap());
            let loader = || {
                let config = LoaderConfig { micro_batch: micro_batch.clone(), workers, ..LoaderConfig::new(batch_size) };
                let numbers: InMemory<usize> = (0..len).map(|i| i * 10).collect();
                DataLoader::new(numbers, sampler(len, rank, world, Tail::Pad), config).unwrap()
            };
            let mut first = loader();
            let mut loaded: Vec<_> = first.batches().take(stop).collect::<Result<_, _>>().unwrap();
            let state = first.state();
            drop(first);
            let mut second = loader();
            prop_assert_eq!(second.restore(&state).unwrap(), Resume::Exact);
            loaded.extend(second.batches().collect::<Result<Vec<_>, _>>().unwrap());
            prop_assert_eq!(loaded.len(), expected.len());
            for (batch, plan) in loaded.iter().zip(&expected) {
                let draws: Vec<Draw> = plan.micro_batches.concat();
                prop_assert!(draws.iter().map(|draw| draw.index).eq(batch.indices.iter().copied()));
                prop_assert!(draws.iter().map(|draw| draw.group).eq(batch.groups.iter().copied()));
                prop_assert!(draws.iter().map(|draw| draw.copy).eq(batch.copies.iter().copied()));
                let passes: Vec<Vec<usize>> = batch.passes().map(<[_]>::to_vec).collect();
                let planned: Vec<Vec<usize>> = plan.micro_batches.iter()
                    .map(|pass| pass.iter().map(|draw| draw.index * 10).collect()).collect();
                prop_assert_eq!(passes, planned);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn steps_of_whole_groups_are_the_same_on_any_number_of_ranks(
        prompts in 12usize..90, size in 1usize..4, spread: bool, old in 0usize..4, new in 0usize..4, stop in 0usize..4,
    ) {
        let worlds = [1, 2, 3, 6];
        let placement = if spread { GroupPlacement::Spread } else { GroupPlacement::OneRank };
        let batches = |world, rank| {
            let sampler = sampler(prompts, rank, world, Tail::Drop).in_groups(Groups { size, placement }).unwrap();
            let of_36 = BatchConfig::over_all_ranks(36, world).unwrap();
            BatchSampler::new(sampler, BatchConfig { last_batch: LastBatch::Drop, ..of_36 }).unwrap()
        };
        let steps = |ranks: Vec<BatchSampler>| {
            let ranks: Vec<_> = ranks.into_iter().map(all).collect();
            let step = |step: usize| sorted(ranks.iter().flat_map(|rank| rank[step].micro_batches.iter().flatten()));
            (0..ranks[0].len()).map(step).collect::<Vec<_>>()
        };
        let (old, new) = (worlds[old], worlds[new]);
        let unbroken = steps((0..old).map(|rank| batches(old, rank)).collect());
        for step in &unbroken {
            for group in step.chunks(size) {
                prop_assert!(group.iter().map(|draw| draw.1).eq(0..size), "a step cuts a group");
            }
        }
        let mut stopped = batches(old, 0);
        for _ in 0..stop {
            stopped.next_batch().unwrap();
        }
        let resumed = (0..new).map(|rank| {
            let mut resumed = batches(new, rank);
            assert_eq!(resumed.restore(&stopped.state()).unwrap(), Resume::Exact);
            resumed
        });
        prop_assert_eq!(&steps(resumed.collect())[..], &unbroken[stop.min(unbroken.len())..]);
    }
}

#[test]
fn batches_and_passes_that_would_cut_groups_are_refused() {
    let new = |placement, batch_size, micro_batch| {
        let grouped = sampler(60, 0, 2, Tail::Drop).in_groups(Groups { size: 4, placement }).unwrap();
        BatchSampler::new(grouped, BatchConfig { micro_batch, ..BatchConfig::new(batch_size) }).map(drop)
    };
    let (one_rank, spread) = (GroupPlacement::OneRank, GroupPlacement::Spread);
    assert!(new(one_rank, 8, MicroBatch::Whole).is_ok());
    let cut = new(one_rank, 6, MicroBatch::Whole);
    assert!(matches!(cut, Err(Error::Setting { setting: "batch_size", value: 6, .. })), "{cut:?}");
    let cut = new(one_rank, 8, MicroBatch::Samples(3));
    assert!(matches!(cut, Err(Error::Setting { setting: "micro-batch", value: 3, .. })), "{cut:?}");
    assert!(new(one_rank, 8, MicroBatch::Samples(4)).is_ok());
    assert!(new(one_rank, 8, MicroBatch::Samples(9)).is_ok(), "one pass");
    // Two ranks: six on each are three groups of four, five on each are two and a half.
    assert!(new(spread, 6, MicroBatch::Samples(3)).is_ok(), "no pass of one rank holds whole groups there");
    let cut = new(spread, 5, MicroBatch::Whole);
    assert!(matches!(cut, Err(Error::Setting { setting: "batch_size", value: 5, .. })), "{cut:?}");
}

#[test]
fn groups_of_a_mixture_are_loaded_in_batches() {
    let mixture = Mixture::new([(30, 2), (30, 1)], Exhausted::Stop);
    let groups = Groups { size: 4, placement: GroupPlacement::OneRank };
    let sampler = sampler(60, 1, 2, Tail::Drop).mixing(mixture).unwrap().in_groups(groups).unwrap();
    let numbers: InMemory<usize> = (0..60).collect();
    let config = LoaderConfig { workers: 2, micro_batch: MicroBatch::Samples(4), ..LoaderConfig::new(8) };
    let mut loader = DataLoader::new(numbers, sampler, config).unwrap();
    let batches: Vec<_> = loader.batches().collect::<Result<_, _>>().unwrap();
    assert!(batches.len() > 5);
    for batch in &batches {
        for (pass, groups) in batch.passes().zip(batch.groups.chunks(4)) {
            assert!(pass.iter().all(|sample| *sample == pass[0]), "one prompt in each pass");
            assert!(groups.iter().all(|group| *group == groups[0]));
        }
        assert!(batch.copies.chunks(4).all(|copies| copies == [0, 1, 2, 3]));
    }
}

#[test]
fn what_cannot_be_divided_is_named() {
    let refused = |config| match BatchSampler::new(sampler(10, 0, 2, Tail::Drop), config) {
        Err(error) => error,
        Ok(batches) => panic!("{batches:?}"),
    };
    assert!(matches!(refused(BatchConfig::new(0)), Error::Setting { setting: "batch_size", .. }));
    let none = BatchConfig { micro_batch: MicroBatch::Samples(0), ..BatchConfig::new(1) };
    assert!(matches!(refused(none), Error::Setting { setting: "micro-batch", .. }));
    let tokens = |len, budget| BatchConfig {
        micro_batch: MicroBatch::Tokens { lengths: lengths(len), budget, cost: Cost::Tokens },
        ..BatchConfig::new(2)
    };
    assert!(matches!(refused(tokens(9, 100)), Error::Setting { setting: "lengths", value: 9, .. }));
    let long = (0..10).position(|index| length(index) > 60).unwrap();
    assert!(matches!(refused(tokens(10, 60)), Error::Length { row, expected: 60, .. } if row == long));
    let one_rank = Groups { size: 2, placement: GroupPlacement::OneRank };
    let grouped = sampler(10, 0, 2, Tail::Drop).in_groups(one_rank).unwrap();
    assert!(BatchSampler::new(grouped, tokens(10, 100)).is_err());
    let spread = Groups { size: 2, placement: GroupPlacement::Spread };
    let grouped = sampler(10, 0, 2, Tail::Drop).in_groups(spread).unwrap();
    assert!(BatchSampler::new(grouped, tokens(10, 100)).is_ok());
    let uneven = BatchConfig::over_all_ranks(9, 2);
    assert!(matches!(uneven, Err(Error::Setting { value: 9, .. })));
    assert!(BatchConfig::over_all_ranks(8, 0).is_err());
}
