//! Turns in fixed proportions, evenly: who goes next, so that nobody is ever far from their share.
//!
//! This is the chairman assignment problem: states of a union with weights, one of which provides the chairman each
//! year. Tijdeman's rule (R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980) keeps every
//! one of `n` states within `1 - 1/(2n - 2)` turns of its share at every moment, and no rule can promise less. Simply
//! letting the one that is furthest behind go next does not: with many of them some fall behind by more than a turn.
//!
//! Weights are whole numbers and so is all arithmetic, so the turns are the same everywhere. They repeat after as many
//! turns as the weights sum to, when each has had exactly its share; one such period is kept as a table.

/// One period of turns.
#[derive(Debug)]
pub(crate) struct Turns {
    weights: Vec<u32>,
    /// Whose turn it is, at each place of the period.
    who: Vec<u32>,
    /// How many turns the same one had in the period before.
    earlier: Vec<u32>,
    /// The places of each one's turns in the period, one after the other: `weights[i]` of them for each `i`.
    places: Vec<Vec<u32>>,
}

impl Turns {
    /// Weights are positive and sum to less than 2^31.
    pub(crate) fn new(weights: Vec<u32>) -> Self {
        let period: u32 = weights.iter().sum();
        let slots = weights.len() as i128;
        // All deviations below are multiplied by `period` and by `scale`, so that they are whole numbers.
        let scale = (2 * slots - 2).max(1);
        let total = i128::from(period);
        let mut places: Vec<Vec<u32>> = weights.iter().map(|_| Vec::new()).collect();
        let (mut who, mut earlier) = (Vec::new(), Vec::new());
        for place in 0..period {
            let mut next: Option<(usize, i128, i128)> = None;
            for (i, &weight) in weights.iter().enumerate() {
                let weight = i128::from(weight);
                let behind = (i128::from(place) + 1) * weight - total * places[i].len() as i128;
                // Not due yet: with this turn it would be too far ahead.
                if behind * scale < total && slots > 1 {
                    continue;
                }
                // Turns until it would be too far behind, as a fraction; the most urgent one goes.
                let (room, per_turn) = (total * (scale - 1) - behind * scale, weight);
                if next.is_none_or(|(_, least, per)| room * per < least * per_turn) {
                    next = Some((i, room, per_turn));
                }
            }
            // Tijdeman shows that somebody is always due.
            let (i, ..) = next.unwrap_or_default();
            who.push(i as u32);
            earlier.push(places[i].len() as u32);
            places[i].push(place);
        }
        Self { weights, who, earlier, places }
    }

    /// Whose turn it is, and how many the same one had before.
    pub(crate) fn at(&self, turn: u64) -> (usize, u64) {
        let period = self.who.len() as u64;
        let (round, place) = (turn / period, (turn % period) as usize);
        let who = self.who[place] as usize;
        (who, round * u64::from(self.weights[who]) + u64::from(self.earlier[place]))
    }

    /// How many turns there are until `who` has had `count` of them; `None` above what a u64 can count.
    pub(crate) fn until(&self, who: usize, count: u64) -> Option<u64> {
        let Some(last) = count.checked_sub(1) else { return Some(0) };
        let weight = u64::from(self.weights[who]);
        let place = u64::from(self.places[who][(last % weight) as usize]);
        (last / weight).checked_mul(self.who.len() as u64)?.checked_add(place + 1)
    }

    /// How many turns `who` had in the first `turns`.
    pub(crate) fn count(&self, who: usize, turns: u64) -> u64 {
        let period = self.who.len() as u64;
        let within = (turns % period) as u32;
        let rest = self.places[who].partition_point(|&place| place < within) as u64;
        turns / period * u64::from(self.weights[who]) + rest
    }
}

#[cfg(test)]
mod tests {
    use super::Turns;
    use proptest::prelude::*;

    proptest! {
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
