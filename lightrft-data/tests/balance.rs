//! Sharing sequences of different lengths: nothing lost, within the budget, equally many passes, nearly equal costs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use lightrft_data::{Assignment, BalanceConfig, Cost, Counts, Error, balance, partition};
use proptest::prelude::*;

fn sums(costs: &[u64], parts: &[Vec<usize>]) -> Vec<u64> {
    parts.iter().map(|part| part.iter().map(|&place| costs[place]).sum()).collect()
}

fn spread(sums: &[u64]) -> u64 {
    sums.iter().max().unwrap() - sums.iter().min().unwrap()
}

/// The most equal parts that there are, by trying all.
fn best_spread(costs: &[u64], parts: usize) -> u64 {
    let ways = (parts as u64).pow(costs.len() as u32);
    let spread_of = |way: u64| {
        let mut sums = vec![0; parts];
        let mut rest = way;
        for cost in costs {
            sums[(rest % parts as u64) as usize] += cost;
            rest /= parts as u64;
        }
        spread(&sums)
    };
    (0..ways).map(spread_of).min().unwrap()
}

proptest! {
    #[test]
    fn every_number_is_in_one_part_and_no_part_is_empty_without_need(
        costs in proptest::collection::vec(0u64..1000, 0..60), parts in 1usize..9, equal: bool,
    ) {
        let counts = if equal { Counts::Equal } else { Counts::Any };
        let whole = costs.len() / parts * parts;
        let costs = if equal { &costs[..whole] } else { &costs[..] };
        let found = partition(costs, parts, counts).unwrap();
        prop_assert_eq!(found.len(), parts);
        let mut places = found.concat();
        places.sort_unstable();
        prop_assert!(places.into_iter().eq(0..costs.len()));
        prop_assert!(found.iter().all(|part| part.is_sorted()));
        let empty = found.iter().filter(|part| part.is_empty()).count();
        prop_assert_eq!(empty, parts.saturating_sub(costs.len()));
        if equal {
            prop_assert!(found.iter().all(|part| part.len() == costs.len() / parts));
        }
        // Never worse than the largest number: a part can exceed another by one number at most.
        let largest = costs.iter().max().copied().unwrap_or(0);
        if !equal {
            prop_assert!(spread(&sums(costs, &found)) <= largest);
        }
    }

    #[test]
    fn a_plan_loses_nothing_keeps_the_budget_and_gives_every_rank_equally_many_passes(
        lengths in proptest::collection::vec(0usize..300, 0..80), world in 1usize..9, over in 0usize..600,
        decoder: bool,
    ) {
        let token_budget = lengths.iter().max().copied().unwrap_or(0) + over;
        let cost = if decoder { Cost::Decoder { hidden: 16 } } else { Cost::Tokens };
        let plan = balance(&lengths, &BalanceConfig { world, token_budget, cost }).unwrap();
        prop_assert_eq!(plan.ranks.len(), world);
        prop_assert!(plan.ranks.iter().all(|rank| rank.len() == plan.micro_batches()));
        let all: Vec<_> = plan.ranks.iter().flatten().collect();
        let mut places: Vec<usize> = all.iter().copied().flatten().copied().collect();
        places.sort_unstable();
        prop_assert!(places.into_iter().eq(0..lengths.len()));
        for micro_batch in &all {
            prop_assert!(micro_batch.iter().map(|&place| lengths[place]).sum::<usize>() <= token_budget);
        }
        let empty = all.iter().filter(|micro_batch| micro_batch.is_empty()).count();
        prop_assert!(empty < world);
        prop_assert!(empty == 0 || !lengths.len().is_multiple_of(world));
        // Not more passes than packing without any balance would need, and not fewer than the tokens fill.
        let tokens: usize = lengths.iter().sum();
        prop_assert!(plan.micro_batches() * world * token_budget >= tokens);
        prop_assert!(plan.micro_batches() <= lengths.len().div_ceil(world));
    }

    #[test]
    fn a_plan_depends_on_nothing_but_the_lengths(
        lengths in proptest::collection::vec(1usize..50, 1..40), world in 1usize..5,
    ) {
        let config = BalanceConfig { world, token_budget: 64, cost: Cost::Tokens };
        prop_assert_eq!(balance(&lengths, &config).unwrap(), balance(&lengths, &config).unwrap());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn differencing_is_close_to_the_best_division(costs in proptest::collection::vec(100u64..1000, 7)) {
        let best = best_spread(&costs, 3);
        let found = spread(&sums(&costs, &partition(&costs, 3, Counts::Any).unwrap()));
        prop_assert!(found >= best);
        prop_assert!(found <= best + 450, "{} against {}", found, best);
    }
}

/// Lengths as rollouts have them: most short, a few at the limit.
fn rollouts(count: usize) -> Vec<usize> {
    let mut state = 1u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / (1u64 << 31) as f64
    };
    (0..count).map(|_| (100.0 + 3996.0 * next().powi(3)) as usize).collect()
}

fn slowest_over_mean(plan: &Assignment, lengths: &[usize], cost: Cost) -> f64 {
    // Ranks meet in every pass: a pass takes as long as its slowest rank.
    let of = |rank: &[Vec<usize>], pass: usize| rank[pass].iter().map(|&s| cost.of(lengths[s])).sum::<u64>();
    let slowest: u64 =
        (0..plan.micro_batches()).map(|pass| plan.ranks.iter().map(|r| of(r, pass)).max().unwrap()).sum();
    let all: u64 = lengths.iter().map(|&len| cost.of(len)).sum();
    slowest as f64 * plan.ranks.len() as f64 / all as f64
}

#[test]
fn ranks_wait_for_each_other_less_than_a_fiftieth_of_the_time() {
    let lengths = rollouts(1024);
    for (world, cost) in [(8, Cost::Tokens), (32, Cost::Tokens), (8, Cost::Decoder { hidden: 896 })] {
        let config = BalanceConfig { world, token_budget: 16_384, cost };
        let plan = balance(&lengths, &config).unwrap();
        let ratio = slowest_over_mean(&plan, &lengths, cost);
        assert!(ratio < 1.02, "{world} ranks, {cost:?}: {ratio}");
        // As they come, in equal numbers, ranks would wait for a fifth of the time or more.
        let per_rank = lengths.len() / world;
        let passes = plan.micro_batches();
        let naive = (0..world).map(|rank| {
            let own: Vec<_> = (rank * per_rank..(rank + 1) * per_rank).collect();
            own.chunks(per_rank.div_ceil(passes)).map(<[_]>::to_vec).collect()
        });
        let naive = slowest_over_mean(&Assignment { ranks: naive.collect() }, &lengths, cost);
        assert!(naive > 1.1, "{naive}");
    }
}

#[test]
fn equal_costs_with_attention_are_not_equal_tokens() {
    // One sequence of 4000 tokens costs more than eight of 500 under a narrow model.
    let lengths = [4000, 500, 500, 500, 500, 500, 500, 500, 500];
    let config = |cost| BalanceConfig { world: 2, token_budget: 8000, cost };
    let by_tokens = balance(&lengths, &config(Cost::Tokens)).unwrap();
    let by_work = balance(&lengths, &config(Cost::Decoder { hidden: 64 })).unwrap();
    let beside = |plan: &Assignment| {
        let long = plan.ranks.iter().flatten().find(|micro_batch| micro_batch.contains(&0)).unwrap();
        long.len() - 1
    };
    assert_eq!((beside(&by_tokens), beside(&by_work)), (0, 0));
    assert!(Cost::Decoder { hidden: 64 }.of(4000) > 8 * Cost::Decoder { hidden: 64 }.of(500));
    assert_eq!(Cost::Decoder { hidden: 2 }.of(3), 6 * 2 * 3 + 9);
}

#[test]
fn a_full_budget_is_packed_even_where_equal_parts_would_not_fit() {
    // Two bins of exactly 100: dividing by cost alone may miss them, packing does not.
    let lengths = [60, 50, 50, 40, 70, 30];
    let plan = balance(&lengths, &BalanceConfig { world: 3, token_budget: 100, cost: Cost::Tokens }).unwrap();
    assert_eq!(plan.micro_batches(), 1);
}

#[test]
fn what_cannot_be_shared_is_named() {
    let config = |world, token_budget| BalanceConfig { world, token_budget, cost: Cost::Tokens };
    let long = balance(&[5, 11, 10], &config(2, 10));
    assert!(matches!(long, Err(Error::Length { row: 1, got: 11, expected: 10, .. })));
    assert!(matches!(balance(&[1], &config(0, 10)), Err(Error::Setting { setting: "world", .. })));
    assert_eq!(balance(&[], &config(3, 10)).unwrap().micro_batches(), 0);
    assert_eq!(balance(&[0, 0], &config(1, 0)).unwrap().ranks, [[[0, 1]]]);
    assert!(matches!(partition(&[1], 0, Counts::Any), Err(Error::Setting { setting: "parts", .. })));
    let uneven = partition(&[1, 2, 3], 2, Counts::Equal);
    assert!(matches!(uneven, Err(Error::Setting { setting: "numbers", value: 3, .. })));
    // Lengths whose costs do not fit the number that holds them are still only large.
    let huge = balance(&[usize::MAX, usize::MAX], &config(2, usize::MAX)).unwrap();
    assert_eq!(huge.micro_batches(), 1);
}
