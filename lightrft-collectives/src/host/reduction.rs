//! A reduction in one step of streams: each part goes to its owner, who folds it and, if all are to have it, sends it out
//!
//! The vector is cut into rounds and each round into one piece per owner. To each peer a rank sends its contributions to
//! that peer's pieces and, of an all-reduce, its own finished pieces, in an order that both know:
//!
//! ```text
//! contributions 0 and 1, result 0, contribution 2, result 1, contribution 3, ...
//! ```
//!
//! So while round `k` is folded, round `k + 1` is on its way. A contribution waits in staging until those of all peers
//! have come; a peer that is more than [`DEPTH`] rounds ahead is not read from. Nothing can lock: a piece of round `k`
//! waits for contributions to round `k` only, which each rank sends before its results of that round.

use std::ops::Range;

use super::exchange::Step;
use crate::buffer::{AlignedBytes, element_bytes};
use crate::op::{Dtype, ReduceOp};
use crate::reduce::fold_in_place;

/// Rounds under way at a time.
const DEPTH: usize = 4;

/// Bytes of staging for all peers' contributions together.
const STAGING: usize = 2 << 20;

/// The longest and the shortest piece: long ones cost fewer turns, short ones overlap better.
const LONGEST: usize = 256 << 10;
const SHORTEST: usize = 1 << 10;

/// Who owns which part of the vector of contributions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owners {
    /// A share of each round; every rank gets all results, each in its place.
    Shares,
    /// One of as many equal parts as there are ranks.
    Parts,
    /// The whole vector is this rank's.
    Root(usize),
}

/// What is reduced. Every rank describes the same reduction.
pub(super) struct Plan {
    pub(super) rank: usize,
    pub(super) world: usize,
    pub(super) op: ReduceOp,
    pub(super) dtype: Dtype,
    pub(super) owners: Owners,
    /// Bytes of one rank's contributions.
    pub(super) bytes: usize,
}

/// A piece of a stream.
#[derive(Clone, Copy)]
enum Item {
    Contribution(usize),
    Result(usize),
}

/// How far a stream has come: bytes before `begin` are those of the items before `item`.
#[derive(Clone, Copy, Default)]
struct Cursor {
    item: usize,
    begin: usize,
}

/// The step.
pub(super) struct Reduction<'a> {
    plan: Plan,
    /// This rank's contributions; `None` if they lie in `output`.
    input: Option<&'a [u8]>,
    output: &'a mut [u8],
    staging: &'a mut [u8],
    piece: usize,
    rounds: usize,
    /// Rounds whose own piece is finished.
    folded: usize,
    /// By round modulo [`DEPTH`]: contributions to this rank's piece that have come.
    come: [usize; DEPTH],
    /// By peer.
    sends: Vec<Cursor>,
    receives: Vec<Cursor>,
}

impl Plan {
    /// Bytes of a full piece, the same on every rank.
    fn piece(&self) -> usize {
        let share = match self.owners {
            Owners::Root(_) => self.bytes,
            _ => self.bytes / self.world,
        };
        let longest = (STAGING / DEPTH / (self.world - 1).max(1)).clamp(SHORTEST, LONGEST);
        // Four rounds at least, where that leaves pieces worth a turn.
        (share / 4).clamp(longest.min(32 << 10), longest) / 64 * 64
    }
}

impl<'a> Reduction<'a> {
    /// `staging` grows to what is needed. In place, with [`Owners::Parts`] too, the result lies where this rank's
    /// own contribution was; otherwise `output` has room for the results that this rank gets.
    pub(super) fn new(
        plan: Plan,
        input: Option<&'a [u8]>,
        output: &'a mut [u8],
        staging: &'a mut AlignedBytes,
    ) -> Self {
        let piece = plan.piece();
        let longest = match plan.owners {
            Owners::Shares => plan.bytes.div_ceil(plan.world),
            Owners::Parts => plan.bytes / plan.world,
            Owners::Root(_) => plan.bytes,
        };
        let rounds = longest.div_ceil(piece);
        let staging = staging.at_least(DEPTH.min(rounds) * (plan.world - 1) * piece);
        let cursors = vec![Cursor::default(); plan.world];
        let (sends, receives) = (cursors.clone(), cursors);
        let come = [0; DEPTH];
        let mut new =
            Reduction { plan, input, output, staging, piece, rounds, folded: 0, come, sends, receives };
        new.fold_what_has_come();
        new
    }

    /// Where in the vector of contributions the piece of `owner` in a round lies.
    fn range(&self, owner: usize, round: usize) -> Range<usize> {
        let Plan { world, bytes, dtype, .. } = self.plan;
        let from = round * self.piece;
        match self.plan.owners {
            Owners::Shares => {
                let (base, size) = (from * world, element_bytes(dtype));
                let length = (self.piece * world).min(bytes - base.min(bytes));
                // The last round is shorter; its pieces are equal, too, but for the last of them.
                let per = (length / size).div_ceil(world) * size;
                base + (owner * per).min(length)..base + ((owner + 1) * per).min(length)
            }
            Owners::Parts => {
                let part = bytes / world;
                owner * part + from.min(part)..owner * part + (from + self.piece).min(part)
            }
            Owners::Root(root) if root == owner => from.min(bytes)..(from + self.piece).min(bytes),
            Owners::Root(_) => 0..0,
        }
    }

    /// Where in `output` this rank's own finished piece of a round lies.
    fn result(&self, round: usize) -> Range<usize> {
        let range = self.range(self.plan.rank, round);
        if self.plan.owners == Owners::Parts && self.input.is_some() {
            let before = self.plan.rank * (self.plan.bytes / self.plan.world);
            return range.start - before..range.end - before;
        }
        range
    }

    fn has_results(&self) -> bool {
        self.plan.owners == Owners::Shares
    }

    /// Bytes of all pieces of `owner`.
    fn owned(&self, owner: usize) -> usize {
        let last = self.rounds.saturating_sub(1);
        (if last > 0 { last * self.range(owner, 0).len() } else { 0 })
            + if self.rounds > 0 { self.range(owner, last).len() } else { 0 }
    }

    /// Bytes of the stream from one rank to another.
    fn stream(&self, from: usize, to: usize) -> usize {
        self.owned(to) + if self.has_results() { self.owned(from) } else { 0 }
    }

    /// The order of the items in every stream; `None` after the last.
    fn item(&self, index: usize) -> Option<Item> {
        let ahead = DEPTH.min(self.rounds);
        if !self.has_results() {
            return (index < self.rounds).then_some(Item::Contribution(index));
        }
        let Some(after) = index.checked_sub(ahead) else { return Some(Item::Contribution(index)) };
        let alternating = 2 * (self.rounds - ahead);
        match after {
            _ if after < alternating && after % 2 == 0 => Some(Item::Result(after / 2)),
            _ if after < alternating => Some(Item::Contribution(ahead + after / 2)),
            _ if index < 2 * self.rounds => Some(Item::Result(index - self.rounds)),
            _ => None,
        }
    }

    fn length(&self, item: Item, from: usize, to: usize) -> usize {
        match item {
            Item::Contribution(round) => self.range(to, round).len(),
            Item::Result(round) => self.range(from, round).len(),
        }
    }

    /// Where the contribution of `peer` to this rank's piece of a round waits.
    fn place(&self, peer: usize, round: usize) -> Range<usize> {
        place(&self.plan, self.piece, peer, round, self.range(self.plan.rank, round).len())
    }

    /// Folds the rounds for which everyone's contribution is there, in order.
    fn fold_what_has_come(&mut self) {
        let (rank, world) = (self.plan.rank, self.plan.world);
        while self.folded < self.rounds {
            let round = self.folded;
            let range = self.range(rank, round);
            if !range.is_empty() {
                if self.come[round % DEPTH] < world - 1 {
                    return;
                }
                self.come[round % DEPTH] = 0;
                let result = self.result(round);
                let data = &mut self.output[result];
                if let Some(input) = self.input {
                    data.copy_from_slice(&input[range]);
                }
                let (plan, piece, staging, length) = (&self.plan, self.piece, &*self.staging, data.len());
                let part = |peer| &staging[place(plan, piece, peer, round, length)];
                fold_in_place(plan.op, plan.dtype, world, rank, &part, data);
            }
            self.folded += 1;
        }
    }
}

fn place(plan: &Plan, piece: usize, peer: usize, round: usize, length: usize) -> Range<usize> {
    let index = if peer > plan.rank { peer - 1 } else { peer };
    let start = (round % DEPTH * (plan.world - 1) + index) * piece;
    start..start + length
}

impl Step for Reduction<'_> {
    fn send_len(&self, peer: usize) -> Option<usize> {
        Some(self.stream(self.plan.rank, peer))
    }

    fn recv_len(&self, peer: usize) -> Option<usize> {
        Some(self.stream(peer, self.plan.rank))
    }

    fn outgoing(&mut self, peer: usize, at: usize) -> &[u8] {
        let mut cursor = self.sends[peer];
        let item = loop {
            let Some(item) = self.item(cursor.item) else { return &[] };
            let end = cursor.begin + self.length(item, self.plan.rank, peer);
            if at < end {
                break item;
            }
            cursor = Cursor { item: cursor.item + 1, begin: end };
        };
        self.sends[peer] = cursor;
        let within = at - cursor.begin;
        match item {
            Item::Contribution(round) => {
                let range = self.range(peer, round);
                &self.input.unwrap_or(self.output)[range][within..]
            }
            Item::Result(round) if round < self.folded => {
                let range = self.result(round);
                &self.output[range][within..]
            }
            Item::Result(_) => &[],
        }
    }

    fn incoming(&mut self, peer: usize, at: usize) -> &mut [u8] {
        let cursor = self.receives[peer];
        let within = at - cursor.begin;
        match self.item(cursor.item) {
            Some(Item::Contribution(round)) if round < self.folded + DEPTH => {
                let place = self.place(peer, round);
                &mut self.staging[place][within..]
            }
            Some(Item::Result(round)) => {
                let range = self.range(peer, round);
                &mut self.output[range][within..]
            }
            _ => &mut [],
        }
    }

    fn arrived(&mut self, peer: usize, at: usize) {
        let mut cursor = self.receives[peer];
        while let Some(item) = self.item(cursor.item) {
            let length = self.length(item, peer, self.plan.rank);
            if length > 0 && at < cursor.begin + length {
                break;
            }
            if let (Item::Contribution(round), 1..) = (item, length) {
                self.come[round % DEPTH] += 1;
            }
            cursor = Cursor { item: cursor.item + 1, begin: cursor.begin + length };
        }
        self.receives[peer] = cursor;
        self.fold_what_has_come();
    }
}
