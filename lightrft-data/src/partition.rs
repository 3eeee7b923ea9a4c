//! Dividing numbers into parts of nearly equal sums.
//!
//! The differencing method (N. Karmarkar and R. M. Karp, "The differencing method of set partitioning", UCB/CSD-82-113,
//! 1982; for more than two parts as in R. E. Korf, "A complete anytime algorithm for number partitioning", 1998) keeps
//! a heap of partial solutions, takes the two whose parts differ most, and joins the largest part of one with the
//! smallest of the other, until one solution is left. Handing the largest number to the part that has least (R. L.
//! Graham's LPT, 1969) is simpler and leaves differences of about one of the smallest numbers; this leaves far smaller
//! ones, at a cost of the numbers times the parts.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::Error;

/// How many numbers each part has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counts {
    /// As many as make the sums most equal; at least one where there are as many numbers as parts.
    Any,
    /// All parts equally many. The number of numbers is a multiple of the number of parts.
    Equal,
}

/// A part of a partial solution. Ordered by sum, then so that nothing is left to chance.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Part {
    sum: u128,
    items: Vec<usize>,
}

impl Part {
    fn absorb(&mut self, mut other: Self) {
        self.sum += other.sum;
        if self.items.len() < other.items.len() {
            std::mem::swap(&mut self.items, &mut other.items);
        }
        self.items.append(&mut other.items);
    }
}

/// A partial solution. Its parts from the largest to the smallest, without the empty ones: all solutions together
/// so never hold more than there are numbers.
#[derive(Debug, PartialEq, Eq)]
struct Solution {
    /// By how much its largest part exceeds its smallest, which may be an empty one.
    spread: u128,
    parts: Vec<Part>,
}

impl Solution {
    /// `count` parts, of which those that are not given are empty.
    fn new(mut parts: Vec<Part>, count: usize) -> Self {
        parts.sort_by(|a, b| b.cmp(a));
        let largest = parts.first().map_or(0, |part| part.sum);
        let smallest = parts.get(count - 1).map_or(0, |part| part.sum);
        Self { spread: largest - smallest, parts }
    }

    /// Joins the largest part of the one with the smallest of the other, and so on.
    fn join(mut self, other: Self, count: usize) -> Self {
        let here = self.parts.len();
        for (place, part) in other.parts.into_iter().enumerate() {
            match self.parts[..here].get_mut(count - 1 - place) {
                Some(opposite) => opposite.absorb(part),
                None => self.parts.push(part),
            }
        }
        Self::new(self.parts, count)
    }
}

impl PartialOrd for Solution {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Solution {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.spread.cmp(&other.spread).then_with(|| self.parts.cmp(&other.parts))
    }
}

/// Divides `costs` into parts of nearly equal sums. What comes back are places in `costs`, rising in each part, each
/// place once; parts come in the order of their first places, empty ones last.
///
/// The same costs are divided in the same way everywhere: ranks that know all lengths need not talk about it.
///
/// ```
/// use lightrft_data::{Counts, partition};
///
/// assert_eq!(partition(&[8, 7, 6, 5, 4], 2, Counts::Any)?, [[0, 2].as_slice(), &[1, 3, 4]]);
/// assert_eq!(partition(&[9, 1, 8, 2], 2, Counts::Equal)?, [[0, 1], [2, 3]]);
/// # Ok::<_, lightrft_data::Error>(())
/// ```
///
/// # Errors
/// [`Error::Setting`] for no parts, or for [`Counts::Equal`] where the numbers do not divide.
pub fn partition(costs: &[u64], parts: usize, counts: Counts) -> Result<Vec<Vec<usize>>, Error> {
    if parts == 0 {
        return Err(Error::Setting { setting: "parts", value: 0, expected: "at least 1" });
    }
    let per_solution = match counts {
        Counts::Any => 1,
        Counts::Equal if costs.len().is_multiple_of(parts) => parts,
        Counts::Equal => {
            let expected = "a multiple of the number of parts";
            return Err(Error::Setting { setting: "numbers", value: costs.len(), expected });
        }
    };
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by_key(|&item| (Reverse(costs[item]), item));
    // Solutions begin with as many items as make their counts equal, one in each part: neighbours in size, so that
    // they differ little. Those with one item differ by all of it.
    let begin = |items: &[usize]| {
        let part = |&item| Part { sum: u128::from(costs[item]), items: vec![item] };
        Solution::new(items.iter().map(part).collect(), parts)
    };
    let mut heap: BinaryHeap<Solution> = order.chunks(per_solution).map(begin).collect();
    let solution = loop {
        match (heap.pop(), heap.pop()) {
            (Some(a), Some(b)) => heap.push(a.join(b, parts)),
            (last, _) => break last.map_or(Vec::new(), |last| last.parts),
        }
    };
    let mut found: Vec<Vec<usize>> = solution.into_iter().map(|part| part.items).collect();
    found.iter_mut().for_each(|items| items.sort_unstable());
    found.sort_by_key(|items| items.first().copied());
    found.resize(parts, Vec::new());
    Ok(found)
}
