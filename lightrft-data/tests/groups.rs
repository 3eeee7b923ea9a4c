//! Groups of copies: whole, dealt to one rank or over all, and resumable with any number of ranks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::BTreeMap;

use lightrft_data::{
    DistributedSampler, Draw, Error, GroupPlacement, Groups, Permutation, Resume, SamplerConfig,
    SamplerState, Shuffle, Tail,
};
use proptest::prelude::*;

fn sampler(
    len: usize,
    rank: usize,
    world: usize,
    groups: Groups,
    tail: Tail,
    shuffle: Shuffle,
) -> DistributedSampler {
    let config = SamplerConfig { len, rank, world, seed: 5, shuffle, tail };
    DistributedSampler::new(config).unwrap().in_groups(groups).unwrap()
}

fn groups() -> impl Strategy<Value = Groups> {
    let placement = prop_oneof![Just(GroupPlacement::OneRank), Just(GroupPlacement::Spread)];
    (1usize..9, placement).prop_map(|(size, placement)| Groups { size, placement })
}

fn tails() -> impl Strategy<Value = Tail> {
    prop_oneof![Just(Tail::Pad), Just(Tail::Drop)]
}

fn shuffles() -> impl Strategy<Value = Shuffle> {
    prop_oneof![Just(Shuffle::TorchExact), Just(Shuffle::Seekable)]
}

/// The ranks and copies that each group of an epoch was dealt to, with its sample.
fn by_group(ranks: &[Vec<Draw>]) -> BTreeMap<u64, (usize, Vec<(usize, usize)>)> {
    let mut found: BTreeMap<u64, (usize, Vec<(usize, usize)>)> = BTreeMap::new();
    for (rank, draws) in ranks.iter().enumerate() {
        for draw in draws {
            let (index, copies) = found.entry(draw.group).or_insert((draw.index, Vec::new()));
            assert_eq!(*index, draw.index, "a group is of one prompt");
            copies.push((draw.copy, rank));
        }
    }
    found.values_mut().for_each(|(_, copies)| copies.sort_unstable());
    found
}

proptest! {
    #[test]
    fn every_group_of_an_epoch_is_whole_and_prompts_come_in_the_order_of_the_epoch(
        len in 1usize..60, world in 1usize..9, groups in groups(), tail in tails(), shuffle in shuffles(),
    ) {
        let ranks: Vec<Vec<Draw>> = (0..world)
            .map(|rank| sampler(len, rank, world, groups, tail, shuffle).draws().unwrap().collect())
            .collect();
        prop_assert!(ranks.iter().all(|draws| draws.len() == ranks[0].len()), "ranks stay in step");
        let found = by_group(&ranks);
        let order = Permutation::new(shuffle, len, 5, 0).unwrap();
        for (place, (&group, (index, copies))) in found.iter().enumerate() {
            prop_assert_eq!(group, place as u64);
            prop_assert_eq!(Some(*index), order.at(place % len));
            prop_assert!(copies.iter().map(|(copy, _)| *copy).eq(0..groups.size), "{:?}", copies);
            let on: Vec<_> = copies.iter().map(|(_, rank)| *rank).collect();
            match groups.placement {
                GroupPlacement::OneRank => prop_assert!(on.iter().all(|rank| *rank == on[0])),
                // One after the other, from the rank after the last copy of the group before.
                GroupPlacement::Spread => {
                    prop_assert!((0..groups.size).all(|copy| on[copy] == (place * groups.size + copy) % world));
                }
            }
        }
        // No more is added or left out than makes whole rows of whole groups.
        let block = match groups.placement {
            GroupPlacement::OneRank => world,
            GroupPlacement::Spread => (1..=world).find(|count| (count * groups.size).is_multiple_of(world)).unwrap(),
        };
        match tail {
            Tail::Pad => prop_assert_eq!(found.len(), len.next_multiple_of(block)),
            Tail::Drop => prop_assert_eq!(found.len(), len / block * block),
        }
    }

    #[test]
    fn stopping_anywhere_and_resuming_equals_the_unbroken_run(
        len in 1usize..40, world in 1usize..6, groups in groups(), tail in tails(), stop in 0usize..60,
    ) {
        for rank in 0..world {
            let mut before = sampler(len, rank, world, groups, tail, Shuffle::Seekable);
            let whole: Vec<_> = before.indices().unwrap().collect();
            let mut pieces = before.next_indices(stop).unwrap();
            let text = serde_json::to_string(&before.state()).unwrap();
            let state: SamplerState = serde_json::from_str(&text).unwrap();
            let mut after = sampler(len, rank, world, groups, tail, Shuffle::Seekable);
            prop_assert_eq!(after.restore(&state).unwrap(), Resume::Exact);
            pieces.extend(after.indices().unwrap());
            prop_assert_eq!(pieces, whole);
        }
    }

    #[test]
    fn another_number_of_ranks_leaves_no_copy_out_and_repeats_what_it_says(
        len in 1usize..40, old in 1usize..7, new in 1usize..7, groups in groups(), tail in tails(), rows in 0usize..60,
    ) {
        let mut seen: BTreeMap<u64, usize> = BTreeMap::new();
        let mut state = None;
        for rank in 0..old {
            let mut before = sampler(len, rank, old, groups, tail, Shuffle::Seekable);
            let draws: Vec<_> = before.draws().unwrap().take(rows).collect();
            before.next_indices(rows).unwrap();
            for draw in draws {
                *seen.entry(draw.group).or_default() += 1;
            }
            state = Some(before.state());
        }
        let state = state.unwrap();
        let mut said = None;
        let mut again = 0;
        let mut wholes = 0;
        for rank in 0..new {
            let mut after = sampler(len, rank, new, groups, tail, Shuffle::Seekable);
            wholes = after.total() / groups.size as u64;
            let resume = after.restore(&state).unwrap();
            prop_assert_eq!(*said.get_or_insert(resume), resume, "every rank says the same");
            for draw in after.draws().unwrap() {
                let count = seen.entry(draw.group).or_default();
                if draw.group < len as u64 {
                    again += usize::from(*count >= groups.size);
                    *count += 1;
                }
            }
        }
        // Every group that this world has, and that is no padding, was seen whole, before or after.
        for group in 0..wholes.min(len as u64) {
            let count = seen.get(&group).copied().unwrap_or(0);
            prop_assert!(count >= groups.size, "group {}: {} of {}", group, count, groups.size);
        }
        match said.unwrap() {
            Resume::Exact => prop_assert_eq!(again, 0),
            Resume::Repeats { samples } => prop_assert!(again as u64 <= samples, "{} > {}", again, samples),
        }
    }
}

#[test]
fn groups_that_fit_the_new_number_of_ranks_resume_exactly() {
    for placement in [GroupPlacement::OneRank, GroupPlacement::Spread] {
        let groups = Groups { size: 4, placement };
        let mut before = sampler(48, 0, 4, groups, Tail::Drop, Shuffle::Seekable);
        before.advance(8).unwrap(); // 32 samples: 8 prompts, four times each
        for world in [1, 2, 8] {
            let mut after = sampler(48, 0, world, groups, Tail::Drop, Shuffle::Seekable);
            assert_eq!(after.restore(&before.state()).unwrap(), Resume::Exact);
            assert_eq!(after.consumed(), 32);
        }
    }
}

#[test]
fn a_position_with_other_groups_is_refused_and_groups_of_one_are_none() {
    let groups = |size| Groups { size, placement: GroupPlacement::OneRank };
    let mut fours = sampler(48, 0, 2, groups(4), Tail::Drop, Shuffle::Seekable);
    let eights = sampler(48, 0, 2, groups(8), Tail::Drop, Shuffle::Seekable);
    let error = fours.restore(&eights.state()).unwrap_err();
    assert!(matches!(error, Error::StateMismatch { field: "groups", .. }), "{error}");
    let spread = Groups { size: 1, placement: GroupPlacement::Spread };
    let mut ones = sampler(48, 0, 2, spread, Tail::Drop, Shuffle::Seekable);
    let plain = sampler(48, 0, 2, groups(1), Tail::Drop, Shuffle::Seekable);
    assert_eq!(ones.restore(&plain.state()).unwrap(), Resume::Exact);
    let config =
        SamplerConfig { len: 3, rank: 0, world: 1, seed: 0, shuffle: Shuffle::InOrder, tail: Tail::Pad };
    let none = DistributedSampler::new(config.clone()).unwrap().in_groups(groups(0));
    assert!(matches!(none, Err(Error::Setting { setting: "group size", .. })));
    let many = DistributedSampler::new(config).unwrap().in_groups(groups(usize::MAX));
    assert!(matches!(many, Err(Error::TooLarge { .. })));
}
