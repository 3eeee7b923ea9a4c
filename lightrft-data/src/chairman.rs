//! Turns in fixed proportions, evenly: who goes next, so that nobody is ever far from their share.
//!
//! This is the chairman assignment problem: states of a union with weights, one of which provides the chairman each
//! year. Tijdeman's rule (R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980) keeps every
//! one of `n` states within `1 - 1/(2n - 2)` turns of its share at every moment, and no rule can promise less. Simply
//! letting the one that is furthest behind go next does not: with many of them some fall behind by more than a turn.
//!
//! Weights are whole numbers and so is all arithmetic, so the turns are the same everywhere. They repeat after as many
//! turns as the weights sum to, when each has had exactly its share; one such period is kept as a table.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// One period of turns, or the beginning of it.
#[derive(Debug)]
pub(crate) struct Turns {
    weights: Vec<u32>,
    period: u64,
    /// Whose turn it is, at each place of the period.
    who: Vec<u32>,
    /// How many turns the same one had in the period before.
    earlier: Vec<u32>,
    /// The places of each one's turns in the period, one after the other: `weights[i]` of them for each `i`.
    places: Vec<Vec<u32>>,
}

/// The next turn of one of them that is due. Which of two is more urgent never changes, so a heap holds them.
#[derive(PartialEq, Eq)]
struct Due {
    who: usize,
    weight: u32,
    /// By `weight` the place, up to a constant, at which it would be too far behind.
    latest: u64,
}

impl Ord for Due {
    /// By place; of two with the same one, the first goes first.
    fn cmp(&self, other: &Self) -> Ordering {
        let scaled = |a: &Self, b: &Self| u128::from(a.latest) * u128::from(b.weight);
        scaled(self, other).cmp(&scaled(other, self)).then(self.who.cmp(&other.who))
    }
}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Turns {
    /// A whole period. Weights are positive and sum to less than 2^31.
    pub(crate) fn new(weights: Vec<u32>) -> Self {
        Self::up_to(weights, |_, _| false)
    }

    /// A period up to the turn at which somebody has had as many turns as stand here, which comes perhaps before its end:
    /// what would follow is never asked for.
    pub(crate) fn until_one_has(weights: Vec<u32>, turns: &[u64]) -> Self {
        Self::up_to(weights, |who, had| turns.get(who) == Some(&had))
    }

    fn up_to(weights: Vec<u32>, is_last: impl Fn(usize, u64) -> bool) -> Self {
        let period: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
        // Whoever has had `k` turns out of its share at a place is ahead or behind by some deviation. It is due once the
        // next turn would leave it ahead by no more than the bound, and must go before it is behind by more than that.
        // All of this is multiplied by `scale`, so that the bound is a whole number.
        let scale = (2 * weights.len() as u64).saturating_sub(2).max(1);
        let due_from = |weight: u32, had: u64| -> u64 {
            if weights.len() == 1 {
                return had;
            }
            let turns = u128::from(period) * u128::from(had * scale + 1);
            // A place of the period, or the first of the next one: it fits.
            (turns.div_ceil(u128::from(weight) * u128::from(scale)) - 1) as u64
        };
        let mut waiting: BinaryHeap<Reverse<(u64, usize)>> =
            weights.iter().enumerate().map(|(who, &weight)| Reverse((due_from(weight, 0), who))).collect();
        let mut due: BinaryHeap<Reverse<Due>> = BinaryHeap::new();
        let mut places: Vec<Vec<u32>> = weights.iter().map(|_| Vec::new()).collect();
        let (mut who, mut earlier) = (Vec::new(), Vec::new());
        for place in 0..period {
            while let Some(&Reverse((from, who))) = waiting.peek()
                && from <= place
            {
                waiting.pop();
                let latest = scale - 1 + places[who].len() as u64 * scale;
                due.push(Reverse(Due { who, weight: weights[who], latest }));
            }
            // Tijdeman shows that somebody is always due.
            let next = due.pop().map_or(0, |Reverse(due)| due.who);
            who.push(next as u32);
            earlier.push(places[next].len() as u32);
            places[next].push(place as u32);
            let had = places[next].len() as u64;
            if is_last(next, had) {
                break;
            }
            waiting.push(Reverse((due_from(weights[next], had), next)));
        }
        Self { weights, period, who, earlier, places }
    }

    /// How many turns are in the table.
    pub(crate) fn len(&self) -> usize {
        self.who.len()
    }

    /// Whose turn it is, and how many the same one had before.
    pub(crate) fn at(&self, turn: u64) -> (usize, u64) {
        let (round, place) = (turn / self.period, (turn % self.period) as usize);
        let who = self.who[place] as usize;
        (who, round * u64::from(self.weights[who]) + u64::from(self.earlier[place]))
    }

    /// How many turns there are until `who` has had `count` of them; `None` above what a u64 can count, and beyond the
    /// end of the table where that is no whole period.
    pub(crate) fn until(&self, who: usize, count: u64) -> Option<u64> {
        let Some(last) = count.checked_sub(1) else { return Some(0) };
        let weight = u64::from(self.weights[who]);
        let place = u64::from(*self.places[who].get((last % weight) as usize)?);
        (last / weight).checked_mul(self.period)?.checked_add(place + 1)
    }

    /// How many turns `who` had in the first `turns`.
    pub(crate) fn count(&self, who: usize, turns: u64) -> u64 {
        let within = (turns % self.period) as u32;
        let rest = self.places[who].partition_point(|&place| place < within) as u64;
        turns / self.period * u64::from(self.weights[who]) + rest
    }
}

#[cfg(test)]
mod tests {
    use super::Turns;
    use proptest::prelude::*;

    /// The rule as it is stated: of those that are due, the one that must go first.
    fn by_the_rule(weights: &[u32]) -> Vec<u32> {
        let total: i128 = weights.iter().map(|&weight| i128::from(weight)).sum();
        let scale = (2 * weights.len() as i128 - 2).max(1);
        let mut had = vec![0i128; weights.len()];
        let mut turns = Vec::new();
        for place in 0..total {
            let mut next: Option<(usize, i128, i128)> = None;
            for (i, &weight) in weights.iter().enumerate() {
                let weight = i128::from(weight);
                let behind = (place + 1) * weight - total * had[i];
                // Not due yet: with this turn it would be too far ahead.
                if behind * scale < total && weights.len() > 1 {
                    continue;
                }
                // Turns until it would be too far behind, as a fraction.
                let (room, per_turn) = (total * (scale - 1) - behind * scale, weight);
                if next.is_none_or(|(_, least, per)| room * per < least * per_turn) {
                    next = Some((i, room, per_turn));
                }
            }
            let (i, ..) = next.expect("somebody is always due");
            had[i] += 1;
            turns.push(i as u32);
        }
        turns
    }

    proptest! {
        #[test]
        fn turns_are_those_of_the_rule_as_it_is_stated(weights in proptest::collection::vec(1u32..60, 1..12)) {
            prop_assert_eq!(Turns::new(weights.clone()).who, by_the_rule(&weights));
        }

        #[test]
        fn a_table_that_ends_with_somebodys_last_turn_is_the_beginning_of_the_whole_one(
            parts in proptest::collection::vec((1u32..60, 1u64..80), 1..12),
        ) {
            let (weights, ends): (Vec<u32>, Vec<u64>) = parts.into_iter().unzip();
            let (whole, part) = (Turns::new(weights.clone()), Turns::until_one_has(weights.clone(), &ends));
            let first = (0..ends.len()).filter_map(|who| whole.until(who, ends[who])).min();
            let found = (0..ends.len()).filter_map(|who| part.until(who, ends[who])).min();
            prop_assert_eq!(found, first);
            let sum: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
            prop_assert_eq!(part.len() as u64, sum.min(first.unwrap_or(sum)));
            prop_assert_eq!(&part.who[..], &whole.who[..part.len()]);
            for who in 0..ends.len() {
                prop_assert_eq!(part.count(who, first.unwrap_or(sum)), whole.count(who, first.unwrap_or(sum)));
            }
        }

        #[test]
        fn nobody_is_further_from_their_share_than_tijdemans_bound(
            weights in proptest::collection::vec(1u32..60, 1..12),
        ) {
            let turns = Turns::new(weights.clone());
            let sum: u64 = weights.iter().map(|&w| u64::from(w)).sum();
            let bound = 1.0 - 1.0 / (2.0 * weights.len() as f64 - 2.0).max(1.0);
            let mut had = vec![0u64; weights.len()];
            for turn in 0..3 * sum {
                let (who, earlier) = turns.at(turn);
                prop_assert_eq!(earlier, had[who]);
                had[who] += 1;
                prop_assert_eq!(turns.until(who, had[who]), Some(turn + 1));
                for (i, &weight) in weights.iter().enumerate() {
                    prop_assert_eq!(turns.count(i, turn + 1), had[i]);
                    let share = (turn + 1) as f64 * f64::from(weight) / sum as f64;
                    prop_assert!((had[i] as f64 - share).abs() <= bound + 1e-9, "{:?} {} {}", weights, i, turn);
                }
            }
        }
    }
}
