//! Which replica takes which samples: by length, longest first to the least loaded, the same every time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::Request;

/// Some samples of one request, which one replica draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Index of the request in the call.
    pub(super) request: usize,
    /// Index of the first of its samples.
    pub(super) first: usize,
    /// How many samples.
    pub(super) samples: usize,
    /// Tokens that it may take: the prompt once, as its samples share it, and the longest completion of each.
    pub(super) cost: u64,
}

impl Piece {
    fn new(at: usize, request: &Request, first: usize, samples: usize) -> Self {
        let longest = (request.sampling.max_new_tokens as u64).saturating_mul(samples as u64);
        Self { request: at, first, samples, cost: longest.saturating_add(request.prompt.len() as u64) }
    }
}

/// One piece for each request: its samples share their prompt's part of a cache. Only a request that alone is more than a
/// replica's fair part of the whole is cut, into as few pieces as are not.
pub(super) fn pieces(requests: &[Request], replicas: usize) -> Vec<Piece> {
    let whole: Vec<Piece> = requests
        .iter()
        .enumerate()
        .map(|(at, request)| Piece::new(at, request, 0, request.samples))
        .collect();
    let total = whole.iter().fold(0_u64, |sum, piece| sum.saturating_add(piece.cost));
    let fair = total.div_ceil(replicas.max(1) as u64).max(1);
    let cut = |piece: Piece| {
        let request = &requests[piece.request];
        // A greedy completion is drawn once, however often it is wanted.
        let most = if request.sampling.temperature == 0.0 { 1 } else { piece.samples };
        let count = usize::try_from(piece.cost.div_ceil(fair)).unwrap_or(most).clamp(1, most.max(1));
        (0..count).map(move |part| {
            let (first, end) = (piece.samples * part / count, piece.samples * (part + 1) / count);
            Piece::new(piece.request, request, first, end - first)
        })
    };
    whole.into_iter().flat_map(cut).collect()
}

/// The pieces of each replica, by their indices, ascending. Longest first to the least loaded (Graham 1969), and to the
/// lowest index among equals: no replica's cost is more than 4/3 - 1/(3 replicas) of what the best dealing gives.
pub(super) fn deal(pieces: &[Piece], replicas: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    order.sort_by_key(|at| Reverse(pieces[*at].cost));
    let mut loads: BinaryHeap<Reverse<(u64, usize)>> =
        (0..replicas).map(|replica| Reverse((0, replica))).collect();
    let mut shares = vec![Vec::new(); replicas];
    for at in order {
        let Some(mut least) = loads.peek_mut() else { break };
        let Reverse((load, replica)) = &mut *least;
        *load = load.saturating_add(pieces[at].cost);
        shares[*replica].push(at);
    }
    shares.iter_mut().for_each(|share| share.sort_unstable());
    shares
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Sampling;

    fn requests() -> impl Strategy<Value = Vec<Request>> {
        let request = (1..200_usize, 1..20_usize, 1..100_usize, prop::bool::ANY).prop_map(
            |(prompt, samples, max_new_tokens, greedy)| {
                let temperature = if greedy { 0.0 } else { 1.0 };
                let sampling = Sampling { temperature, max_new_tokens, ..Sampling::default() };
                Request::new(vec![1; prompt], sampling).samples(samples)
            },
        );
        prop::collection::vec(request, 0..40)
    }

    /// The least that the most loaded replica can have, by trying every dealing.
    fn best(costs: &[u64], loads: &mut Vec<u64>) -> u64 {
        let Some((cost, rest)) = costs.split_first() else { return loads.iter().copied().max().unwrap_or(0) };
        let mut least = u64::MAX;
        for replica in 0..loads.len() {
            loads[replica] += cost;
            least = least.min(best(rest, loads));
            loads[replica] -= cost;
        }
        least
    }

    fn most_loaded(pieces: &[Piece], shares: &[Vec<usize>]) -> u64 {
        shares.iter().map(|share| share.iter().map(|at| pieces[*at].cost).sum()).max().unwrap_or(0)
    }

    proptest! {
        #[test]
        fn every_sample_is_in_exactly_one_piece_and_every_piece_in_one_share(
            requests in requests(), replicas in 1..9_usize,
        ) {
            let pieces = pieces(&requests, replicas);
            let samples: Vec<_> = pieces.iter().flat_map(|p| (p.first..p.first + p.samples).map(|s| (p.request, s))).collect();
            let all: Vec<_> = requests.iter().enumerate().flat_map(|(at, r)| (0..r.samples).map(move |s| (at, s))).collect();
            prop_assert_eq!(samples, all);
            let mut dealt: Vec<usize> = deal(&pieces, replicas).into_iter().flatten().collect();
            dealt.sort_unstable();
            prop_assert_eq!(dealt, (0..pieces.len()).collect::<Vec<_>>());
        }

        #[test]
        fn no_replica_has_more_than_its_fair_part_and_the_longest_piece(
            requests in requests(), replicas in 1..9_usize,
        ) {
            let pieces = pieces(&requests, replicas);
            let shares = deal(&pieces, replicas);
            let total: u64 = pieces.iter().map(|p| p.cost).sum();
            let longest = pieces.iter().map(|p| p.cost).max().unwrap_or(0);
            prop_assert!(most_loaded(&pieces, &shares) <= total / replicas as u64 + longest);
        }

        #[test]
        fn the_longest_share_is_within_a_third_of_the_best_one(
            costs in prop::collection::vec(1..100_u64, 1..8), replicas in 1..4_usize,
        ) {
            let pieces: Vec<_> = costs.iter().enumerate().map(|(request, cost)| {
                Piece { request, first: 0, samples: 1, cost: *cost }
            }).collect();
            let found = most_loaded(&pieces, &deal(&pieces, replicas));
            let best = best(&costs, &mut vec![0; replicas]);
            let replicas = replicas as u64;
            prop_assert!(3 * replicas * found <= (4 * replicas - 1) * best, "{} for {}", found, best);
        }

        #[test]
        fn samples_stay_together_unless_their_request_is_more_than_a_fair_part(
            requests in requests(), replicas in 1..9_usize,
        ) {
            let total: u64 = requests.iter().enumerate().map(|(at, r)| Piece::new(at, r, 0, r.samples).cost).sum();
            for piece in pieces(&requests, replicas) {
                let request = &requests[piece.request];
                let whole = Piece::new(piece.request, request, 0, request.samples).cost;
                if whole <= total.div_ceil(replicas as u64) || request.sampling.temperature == 0.0 {
                    prop_assert_eq!(piece.samples, request.samples);
                }
            }
        }
    }

    #[test]
    fn one_prompt_is_drawn_by_all_replicas() {
        let request =
            Request::new([1; 8], Sampling { max_new_tokens: 100, ..Sampling::default() }).samples(6);
        let pieces = pieces(std::slice::from_ref(&request), 3);
        assert_eq!(pieces.iter().map(|p| (p.first, p.samples)).collect::<Vec<_>>(), [(0, 2), (2, 2), (4, 2)]);
        assert_eq!(deal(&pieces, 3), [[0], [1], [2]]);
    }
}
