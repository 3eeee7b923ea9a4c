//! Sequences of different lengths to ranks and micro-batches, so that no rank waits for another.
//!
//! Ranks of a sharded model meet in collectives once or more in every micro-batch. So all of them make the same number
//! of passes, and each pass takes as long as the slowest rank's. A plan here keeps every micro-batch within a budget of
//! tokens (what fits the memory), uses few micro-batches, and puts those of similar cost side by side.

use std::cmp::Reverse;

use crate::Error;
use crate::partition::{Counts, partition};

/// What a sequence costs, as a function of its length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cost {
    /// Its tokens. Right where attention is a small part of the work.
    #[default]
    Tokens,
    /// The arithmetic of a decoder layer of this hidden size: `24 h^2 s + 4 h s^2` operations for `s` tokens (four
    /// projections, an MLP of four times the width, scores and values of attention), so `6 h s + s^2`.
    Decoder {
        /// Width of the model.
        hidden: usize,
    },
}

impl Cost {
    /// The cost of a sequence of `len` tokens. Comparable with other costs of the same kind only.
    pub fn of(self, len: usize) -> u64 {
        let len = len as u64;
        match self {
            Cost::Tokens => len,
            Cost::Decoder { hidden } => {
                let linear = (hidden as u64).saturating_mul(6).saturating_mul(len);
                linear.saturating_add(len.saturating_mul(len))
            }
        }
    }
}

/// How sequences are shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalanceConfig {
    /// How many ranks there are.
    pub world: usize,
    /// Most tokens in a micro-batch. A micro-batch is taken to be packed: what counts is the sum of its lengths.
    pub token_budget: usize,
    /// What is to be equal.
    pub cost: Cost,
}

/// Which rank computes which sequences in which pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// For each rank its micro-batches, for each of those the places of its sequences in the lengths that were given.
    /// Every rank has equally many micro-batches.
    ///
    /// A micro-batch is empty only where there are too few sequences to go round: at most `world - 1` are, and none
    /// where the sequences are a multiple of the world. Its rank must still make a pass, over any tokens with no loss.
    pub ranks: Vec<Vec<Vec<usize>>>,
}

impl Assignment {
    /// Passes that every rank makes.
    pub fn micro_batches(&self) -> usize {
        self.ranks.first().map_or(0, Vec::len)
    }
}

/// Shares sequences over ranks and micro-batches within a budget of tokens, with nearly equal costs.
///
/// A pure function: the same lengths give the same plan on every rank, so ranks need only exchange lengths. Nothing has
/// to be saved to resume.
///
/// ```
/// use lightrft_data::{BalanceConfig, Cost, balance};
///
/// let lengths = [900, 100, 500, 500, 800, 200, 700, 300];
/// let plan = balance(&lengths, &BalanceConfig { world: 2, token_budget: 1000, cost: Cost::Tokens })?;
/// assert_eq!(plan.micro_batches(), 2);
/// for micro_batch in plan.ranks.iter().flatten() {
///     assert_eq!(micro_batch.iter().map(|&sequence| lengths[sequence]).sum::<usize>(), 1000);
/// }
/// # Ok::<_, lightrft_data::Error>(())
/// ```
///
/// The number of micro-batches is the smallest for which the method of [`partition`](crate::partition()) or, where that
/// exceeds the budget, best-fit decreasing finds a plan; the latter needs at most 11/9 of the fewest possible bins
/// and four more (D. S. Johnson et al., "Worst-case performance bounds for simple one-dimensional packing algorithms", 1974).
///
/// # Errors
/// [`Error::Length`] with the place of a sequence that alone exceeds the budget; [`Error::Setting`] for a world of 0.
pub fn balance(lengths: &[usize], config: &BalanceConfig) -> Result<Assignment, Error> {
    let &BalanceConfig { world, token_budget, cost } = config;
    if world == 0 {
        return Err(Error::Setting { setting: "world", value: 0, expected: "at least 1" });
    }
    if let Some((row, &got)) = lengths.iter().enumerate().find(|&(_, &len)| len > token_budget) {
        return Err(Error::Length { row, what: "the sequence", got, expected: token_budget });
    }
    if lengths.is_empty() {
        return Ok(Assignment { ranks: vec![Vec::new(); world] });
    }
    let costs: Vec<u64> = lengths.iter().map(|&len| cost.of(len)).collect();
    let fits = |bin: &Vec<usize>| tokens(lengths, bin) <= token_budget as u128;

    let packed = best_fit(lengths, token_budget);
    let enough = packed.len().div_ceil(world);
    let all = lengths.iter().map(|&len| len as u128).sum::<u128>();
    // A budget of 0 with sequences of 0 tokens: one micro-batch holds them all.
    let least = all.div_ceil(token_budget.max(1) as u128 * world as u128).max(1) as usize;
    let mut bins = None;
    for micro_batches in least..=enough {
        let even = partition(&costs, micro_batches * world, Counts::Any)?;
        if even.iter().all(fits) {
            bins = Some(even);
            break;
        }
    }
    let bins = match bins {
        Some(bins) => bins,
        None => divided(packed, &costs, enough * world)?,
    };
    Ok(dealt(bins, &costs, world))
}

fn tokens(lengths: &[usize], bin: &[usize]) -> u128 {
    bin.iter().map(|&place| lengths[place] as u128).sum()
}

/// The longest sequence first, each into the fullest bin that has room.
fn best_fit(lengths: &[usize], budget: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&place| (Reverse(lengths[place]), place));
    let mut bins: Vec<Vec<usize>> = Vec::new();
    // Room that is left, and the bin that has it.
    let mut rooms = std::collections::BTreeSet::new();
    for place in order {
        let found = rooms.range((lengths[place], 0)..).next().copied();
        let (room, bin) = found.unwrap_or((budget, bins.len()));
        if bin == bins.len() {
            bins.push(Vec::new());
        }
        rooms.remove(&(room, bin));
        rooms.insert((room - lengths[place], bin));
        bins[bin].push(place);
    }
    bins
}

/// As many bins as are wanted, the costliest ones divided until there are; empty ones where none can be divided.
fn divided(mut bins: Vec<Vec<usize>>, costs: &[u64], wanted: usize) -> Result<Vec<Vec<usize>>, Error> {
    while bins.len() < wanted {
        let divisible = bins.iter().enumerate().filter(|(_, bin)| bin.len() > 1);
        let costliest = divisible.max_by_key(|&(place, bin)| (cost_of(costs, bin), Reverse(place)));
        let Some((place, bin)) = costliest else {
            bins.push(Vec::new());
            continue;
        };
        let of_bin: Vec<u64> = bin.iter().map(|&sequence| costs[sequence]).collect();
        let halves = partition(&of_bin, 2, Counts::Any)?;
        let mut halves = halves.into_iter().map(|half| half.into_iter().map(|at| bin[at]).collect());
        let (first, second) = (halves.next().unwrap_or_default(), halves.next().unwrap_or_default());
        bins[place] = first;
        bins.push(second);
    }
    Ok(bins)
}

fn cost_of(costs: &[u64], bin: &[usize]) -> u128 {
    bin.iter().map(|&sequence| u128::from(costs[sequence])).sum()
}

/// Bins to ranks: neighbours in cost go to the same pass of all ranks, where they wait for each other, and within a
/// pass the costliest goes to the rank that has had least so far. Costly passes come first: what does not fit the
/// memory after all is known at once.
fn dealt(mut bins: Vec<Vec<usize>>, costs: &[u64], world: usize) -> Assignment {
    bins.iter_mut().for_each(|bin| bin.sort_unstable());
    bins.sort_by_cached_key(|bin| (Reverse(cost_of(costs, bin)), bin.is_empty(), bin.first().copied()));
    let mut ranks: Vec<Vec<Vec<usize>>> = vec![Vec::new(); world];
    let mut had = vec![0u128; world];
    let mut bins = bins.into_iter();
    loop {
        let mut by_least: Vec<usize> = (0..world).collect();
        by_least.sort_by_key(|&rank| (had[rank], rank));
        for rank in by_least {
            let Some(bin) = bins.next() else { return Assignment { ranks } };
            had[rank] += cost_of(costs, &bin);
            ranks[rank].push(bin);
        }
    }
}
