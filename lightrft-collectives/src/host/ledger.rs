//! The comparison of calls that ranks make on another way than the group's own: on their GPUs
//!
//! Every rank tells a *clerk* which calls it has made, in their order, on the control connections; that one keeps the calls that
//! not all have made yet, and the first two that do not fit together are the group's verdict. Nothing waits for it. A call
//! of all members is one entry on one *strand*, and its clerk is the lowest member; a message between two, or what two ranks
//! exchange in an all-to-all of different lengths, is one on the strand of that pair, told by both, and its clerk is the lower of
//! them: so no rank hears more than a few entries of each other for a call, however many they are.

use std::collections::{HashMap, VecDeque};

use super::note::{Cause, Note};
use super::watcher::Shared;
use crate::operation::Signature;

/// The most calls by which a rank may be behind before its group's calls are not compared any more: no GPU takes as many.
const BEHIND: usize = 1 << 16;

/// The most calls in one note.
const TOLD: usize = 4096;

/// A call as it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    strand: u64,
    words: [u64; 3],
}

impl Told {
    /// A call that all members make.
    pub(crate) fn by_all(call: &Signature) -> Self {
        Told { strand: 0, words: call.encode() }
    }

    /// What rank `from` of a group of `world` sends to rank `to`, or `to` expects of it.
    pub(crate) fn between(from: usize, to: usize, world: usize, call: &Signature) -> Self {
        Told { strand: 1 + (from * world + to) as u64, words: call.encode() }
    }

    /// The member of a group of `world` that compares it.
    pub(super) fn clerk(&self, world: usize) -> usize {
        self.strand.checked_sub(1).map_or(0, |pair| (pair as usize / world).min(pair as usize % world))
    }
}

/// A call that not all have made.
#[derive(Debug)]
struct Entry {
    /// Who was the first to make it, by rank in the group.
    by: usize,
    words: [u64; 3],
    /// How many have.
    made: usize,
}

#[derive(Debug, Default)]
struct Strand {
    /// Calls that all have made.
    done: u64,
    open: VecDeque<Entry>,
    /// Calls made by each of those who make calls here.
    made: Vec<u64>,
}

/// Two members, by rank in the group, and their calls, which do not fit together.
type Pair = (usize, Signature, usize, Signature);

/// The calls of one line of a group.
#[derive(Debug)]
pub(super) struct Ledger {
    group: u64,
    members: Vec<usize>,
    strands: HashMap<u64, Strand>,
    /// Calls heard of each member, on all strands of this clerk together.
    heard: Vec<u64>,
    is_closed: bool,
}

impl Ledger {
    fn new(group: u64, members: Vec<usize>) -> Self {
        let heard = vec![0; members.len()];
        Ledger { group, members, strands: HashMap::new(), heard, is_closed: false }
    }

    /// Hears no more, and keeps nothing.
    fn close(&mut self) {
        self.is_closed = true;
        (self.members, self.strands, self.heard) = Default::default();
    }

    /// Takes down calls of member `by`, the first of which is its call number `first`.
    fn hear_all(&mut self, by: usize, first: u64, calls: impl IntoIterator<Item = Told>) -> Option<Pair> {
        if self.is_closed {
            return None;
        }
        if self.heard[by] != first {
            // Where some are not known, none that follow can be compared.
            tracing::warn!(
                rank = self.members[by],
                "some of its calls are not known: calls are not compared any more"
            );
            self.close();
        }
        calls.into_iter().find_map(|told| {
            *self.heard.get_mut(by)? += 1;
            self.hear(by, told)
        })
    }

    /// Takes down a call of member `by`.
    fn hear(&mut self, by: usize, told: Told) -> Option<Pair> {
        if self.is_closed {
            return None;
        }
        let world = self.members.len();
        // Whose calls go on this strand, and the place of `by` among them.
        let (makers, place) = match told.strand.checked_sub(1) {
            None => (world, by),
            Some(pair) => {
                let (from, to) = (pair as usize / world, pair as usize % world);
                if from >= world || from == to || (by != from && by != to) {
                    return None;
                }
                (2, usize::from(by == to))
            }
        };
        let strand = self.strands.entry(told.strand).or_default();
        strand.made.resize(makers, 0);
        let index = (strand.made[place] - strand.done) as usize;
        strand.made[place] += 1;
        let Some(entry) = strand.open.get_mut(index) else {
            strand.open.push_back(Entry { by, words: told.words, made: 1 });
            if strand.open.len() > BEHIND {
                tracing::warn!(members = ?self.members, "a rank is {BEHIND} calls behind: calls are not compared any more");
                self.close();
            }
            return None;
        };
        entry.made += 1;
        let (first, words) = (entry.by, entry.words);
        if entry.made == makers {
            // Everyone goes in order, so that this is the front.
            strand.open.pop_front();
            strand.done += 1;
        }
        let (one, other) = (Signature::decode(words)?, Signature::decode(told.words)?);
        let fit = match told.strand {
            0 => one == other,
            _ => (one.dtype, one.count) == (other.dtype, other.count),
        };
        (!fit).then_some((first, one, by, other))
    }
}

/// The ledgers that this rank keeps, by the number of their line.
pub(super) type Ledgers = HashMap<u64, Ledger>;

impl Shared {
    /// Tells the calls that this rank has made on a line beside a group, from its call number `first` there on, to the `clerk`, a
    /// rank of the world, that compares them. Does not wait.
    pub(super) fn tell_calls(&self, group: u64, clerk: usize, (line, mut first): (u64, u64), calls: &[Told]) {
        for calls in calls.chunks(TOLD) {
            if clerk == self.rank {
                self.hear_calls(self.rank, group, (line, first), calls.iter().copied());
            } else {
                let calls = calls.iter().map(|told| (told.strand, told.words)).collect();
                self.tell([clerk], &Note::Calls { group, line, first, calls });
            }
            first += calls.len() as u64;
        }
    }

    /// Compares the calls that a rank of the world has made on a line beside a group, from its call number `first` there on.
    pub(super) fn hear_calls(
        &self,
        from: usize,
        group: u64,
        (line, first): (u64, u64),
        calls: impl IntoIterator<Item = Told>,
    ) {
        let mismatch = {
            let mut ledgers = self.ledgers();
            let ledger = match ledgers.entry(line) {
                std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
                std::collections::hash_map::Entry::Vacant(new) => {
                    let Some(members) = self.fate.members(group) else { return };
                    new.insert(Ledger::new(group, members))
                }
            };
            let Some(by) = ledger.members.iter().position(|rank| *rank == from) else { return };
            let pair = ledger.hear_all(by, first, calls);
            pair.map(|pair| {
                let members = std::mem::take(&mut ledger.members);
                ledger.close();
                (pair, members)
            })
        };
        if let Some(((one, mine, other, theirs), members)) = mismatch {
            let one = (members[one], mine);
            let other = (members[other], theirs);
            let ((rank, mine), (other, theirs)) = if one.0 < other.0 { (one, other) } else { (other, one) };
            self.declare(group, Cause::Mismatch { rank, mine, other, theirs });
        }
    }

    /// This rank has left a line: what the others still do there is not compared.
    pub(super) fn close_ledger(&self, group: u64, line: u64) {
        let mut ledgers = self.ledgers();
        if self.fate.members(group).is_some() {
            ledgers.entry(line).or_insert_with(|| Ledger::new(group, Vec::new())).close();
        } else {
            // Nobody opens it again.
            ledgers.remove(&line);
        }
    }

    /// This rank has left a group, and with it all lines beside it.
    pub(super) fn drop_ledgers(&self, group: u64) {
        self.ledgers().retain(|_, ledger| ledger.group != group);
    }
}

impl From<(u64, [u64; 3])> for Told {
    fn from((strand, words): (u64, [u64; 3])) -> Self {
        Told { strand, words }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Dtype, ReduceOp};
    use crate::operation::Call;
    use proptest::prelude::*;

    fn reduce(count: u64) -> Signature {
        let (dtype, op) = (Some(Dtype::F32), Some(ReduceOp::Sum));
        Signature { dtype, op, count, ..Signature::bare(Call::AllReduce) }
    }

    fn message(call: Call, count: u64) -> Signature {
        Signature { dtype: Some(Dtype::F32), count, ..Signature::bare(call) }
    }

    /// Calls of each rank of three, told in the order in which `turns` picks the ranks.
    fn told(calls: &[Vec<Told>; 3], turns: &[usize]) -> (Ledger, Option<Pair>) {
        let mut ledger = Ledger::new(7, vec![4, 5, 6]);
        let mut next = [0; 3];
        let all = turns.iter().copied().chain((0..3).flat_map(|rank| vec![rank; calls[rank].len()]));
        let pair = all.into_iter().find_map(|rank| {
            let told = calls[rank].get(next[rank])?;
            next[rank] += 1;
            ledger.hear(rank, *told)
        });
        (ledger, pair)
    }

    proptest! {
        #[test]
        fn equal_calls_fit_in_whatever_order_they_are_told_and_leave_nothing(turns in proptest::collection::vec(0usize..3, 0..60), counts in proptest::collection::vec(0u64..4, 0..20)) {
            let mut calls: [Vec<Told>; 3] = std::array::from_fn(|_| counts.iter().map(|n| Told::by_all(&reduce(*n))).collect());
            // A message from rank 2 to rank 0 after each third call.
            for (i, n) in counts.iter().enumerate().filter(|(i, _)| i % 3 == 0) {
                calls[2].insert(i + i / 3, Told::between(2, 0, 3, &message(Call::Send, *n)));
                calls[0].push(Told::between(2, 0, 3, &message(Call::Recv, *n)));
            }
            let (ledger, pair) = told(&calls, &turns);
            prop_assert_eq!(pair, None);
            prop_assert!(ledger.strands.values().all(|strand| strand.open.is_empty()));
        }

        #[test]
        fn the_odd_call_is_found_whatever_the_order(turns in proptest::collection::vec(0usize..3, 0..60), at in 0usize..10, odd in 0usize..3) {
            let mut calls: [Vec<Told>; 3] = std::array::from_fn(|_| vec![Told::by_all(&reduce(8)); 10]);
            calls[odd][at] = Told::by_all(&reduce(9));
            let (_, pair) = told(&calls, &turns);
            let (one, mine, other, theirs) = pair.unwrap();
            prop_assert!((one == odd) != (other == odd));
            prop_assert_eq!([mine, theirs].map(|call| call.count), if one == odd { [9, 8] } else { [8, 9] });
        }

        #[test]
        fn any_words_are_heard_without_harm(heard in proptest::collection::vec((0usize..3, any::<u64>(), any::<[u64; 3]>()), 0..50)) {
            let mut ledger = Ledger::new(7, vec![0, 1, 2]);
            for (by, strand, words) in heard {
                ledger.hear(by, Told { strand: strand % 16, words });
                ledger.hear(by, Told { strand, words });
            }
        }
    }

    #[test]
    fn a_message_of_another_length_than_expected_is_a_mismatch() {
        let mut ledger = Ledger::new(7, vec![0, 1, 2]);
        assert_eq!(ledger.hear(2, Told::between(1, 2, 3, &message(Call::Recv, 3))), None);
        let (sent, expected) = (message(Call::Send, 2), message(Call::Recv, 3));
        assert_eq!(ledger.hear(1, Told::between(1, 2, 3, &sent)), Some((2, expected, 1, sent)));
    }

    #[test]
    fn calls_of_which_some_were_lost_are_not_compared() {
        let mut ledger = Ledger::new(7, vec![0, 1]);
        let [one, two] = [1, 2].map(|count| Told::by_all(&reduce(count)));
        assert_eq!(ledger.hear_all(0, 0, [one, two]), None);
        assert_eq!(ledger.hear_all(1, 0, [one]), None);
        assert!(!ledger.is_closed);
        // The note with the second call did not come.
        assert_eq!(ledger.hear_all(0, 2, [one]), None);
        assert_eq!(ledger.hear_all(1, 2, [one]), None);
        assert!(ledger.is_closed);
    }

    #[test]
    fn the_verdict_names_ranks_of_the_world_and_who_has_left_hears_no_more() {
        let shared = Shared::new(3, 4, 0).unwrap();
        let alarm = shared.fate.enter(7, &[3]).unwrap();
        shared.fate.enter(8, &[3, 1]).unwrap();
        shared.hear_calls(2, 7, (70, 0), [Told::by_all(&reduce(1))]);
        shared.tell_calls(7, 3, (70, 0), &[Told::by_all(&reduce(1)); 2]);
        assert!(!alarm.is_rung());
        shared.tell_calls(8, 3, (80, 0), &[Told::by_all(&reduce(1))]);
        shared.hear_calls(1, 8, (80, 0), [Told::by_all(&reduce(2))]);
        // Nobody answers the round of the agreement here.
        shared.court_sits(std::time::Instant::now() + super::super::verdict::PATIENCE);
        let expected = Cause::Mismatch { rank: 1, mine: reduce(2), other: 3, theirs: reduce(1) };
        assert_eq!(shared.fate.cause(8), Some(expected));
        shared.close_ledger(8, 90);
        shared.hear_calls(1, 8, (90, 0), [Told::by_all(&reduce(2))]);
        assert!(shared.ledgers()[&90].strands.is_empty());
        // Nothing is left of the lines of a group that this rank has left.
        shared.fate.leave(8);
        shared.drop_ledgers(8);
        shared.hear_calls(1, 8, (90, 1), [Told::by_all(&reduce(2))]);
        shared.close_ledger(8, 80);
        assert_eq!(shared.ledgers().keys().collect::<Vec<_>>(), [&70]);
    }
}
