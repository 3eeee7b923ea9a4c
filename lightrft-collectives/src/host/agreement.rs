//! Agreement of the living members of a group on one value, although members die meanwhile
//!
//! This is flooding consensus (Cachin, Guerraoui, Rodrigues: Introduction to Reliable and Secure Distributed Programming,
//! section 5.2.2). In each round a member tells all others what it knows and waits for those that live. Once it has
//! heard from the same members in two rounds running, nobody can know more than it does, and it decides.
//!
//! It rests on two things that the control connections give: a member's death is seen only after all that it said, and
//! a member that is taken for dead is not heard any more. Where the second fails, because a living member did not
//! answer in time, members may decide differently: see [`Agreement::give_up_on`].

use std::collections::{BTreeMap, BTreeSet};

/// What can be agreed on: values that can be joined, in any order and more than once, with one result.
pub(super) trait Agreed: Clone {
    /// Takes in another member's value.
    fn join(&mut self, other: &Self);

    /// Notes that a member is lost.
    fn lose(&mut self, member: usize);
}

/// What a member says to all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Word<V> {
    /// All that it knows at the beginning of a round.
    Round(u32, V),
    /// What it has decided; whoever has not, does.
    Decided(V),
}

#[derive(Clone, Debug)]
struct Round<V> {
    heard: BTreeSet<usize>,
    value: Option<V>,
}

/// One member's part in an agreement.
#[derive(Clone, Debug)]
pub(super) struct Agreement<V> {
    me: usize,
    /// All members; none of them was heard in "round 0", but all might have been.
    members: BTreeSet<usize>,
    lost: BTreeSet<usize>,
    /// The round that this member is in; 0 before it has proposed anything.
    round: u32,
    rounds: BTreeMap<u32, Round<V>>,
    decided: Option<V>,
}

impl<V: Agreed> Agreement<V> {
    /// An agreement among `members` that has not begun. `lost` of them are known to be dead.
    pub(super) fn new(
        me: usize,
        members: impl IntoIterator<Item = usize>,
        lost: impl IntoIterator<Item = usize>,
    ) -> Self {
        let members: BTreeSet<usize> = members.into_iter().collect();
        let lost = lost.into_iter().filter(|rank| *rank != me && members.contains(rank)).collect();
        Agreement { me, members, lost, round: 0, rounds: BTreeMap::new(), decided: None }
    }

    /// What was decided, once it is.
    pub(super) fn decided(&self) -> Option<&V> {
        self.decided.as_ref()
    }

    /// Whether this member has said what it knows.
    pub(super) fn has_begun(&self) -> bool {
        self.round > 0
    }

    /// Says what this member knows, the first time; returns what to tell the others, in this order.
    pub(super) fn propose(&mut self, mut value: V) -> Vec<Word<V>> {
        if self.has_begun() || self.decided.is_some() {
            return Vec::new();
        }
        self.lost.iter().for_each(|member| value.lose(*member));
        let mut words = Vec::new();
        self.enter(1, value, &mut words);
        self.advance(&mut words);
        words
    }

    /// Takes in what another member has said; returns what to tell the others.
    pub(super) fn hear(&mut self, from: usize, word: Word<V>) -> Vec<Word<V>> {
        if self.decided.is_some() || !self.members.contains(&from) || self.lost.contains(&from) {
            return Vec::new();
        }
        let mut words = Vec::new();
        match word {
            Word::Decided(value) => self.decide(value, &mut words),
            Word::Round(round, value) => {
                self.take(round, from, &value);
                self.advance(&mut words);
            }
        }
        words
    }

    /// Takes a member for dead; returns what to tell the others.
    pub(super) fn lose(&mut self, member: usize) -> Vec<Word<V>> {
        let mut words = Vec::new();
        if member != self.me && self.members.contains(&member) && self.lost.insert(member) {
            self.advance(&mut words);
        }
        words
    }

    /// Those that have neither been heard in this round nor lost, while there is one under way.
    pub(super) fn silent(&self) -> Vec<usize> {
        if !self.has_begun() || self.decided.is_some() {
            return Vec::new();
        }
        let heard = self.rounds.get(&self.round).map(|round| round.heard.clone()).unwrap_or_default();
        let known = |member: &usize| heard.contains(member) || self.lost.contains(member);
        self.members.iter().copied().filter(|member| !known(member)).collect()
    }

    /// Takes all for dead that have not been heard in this round. That is no certain knowledge: if such a member is
    /// merely slow, it is bound by the others' decision when it hears of it, unless it has decided before.
    pub(super) fn give_up_on(&mut self) -> Vec<Word<V>> {
        let silent = self.silent();
        let mut words = Vec::new();
        self.lost.extend(silent.into_iter().filter(|member| *member != self.me));
        self.advance(&mut words);
        words
    }

    fn take(&mut self, round: u32, from: usize, value: &V) {
        let entry = self.rounds.entry(round).or_insert(Round { heard: BTreeSet::new(), value: None });
        entry.heard.insert(from);
        match &mut entry.value {
            None => entry.value = Some(value.clone()),
            Some(known) => known.join(value),
        }
    }

    fn enter(&mut self, round: u32, value: V, words: &mut Vec<Word<V>>) {
        self.round = round;
        words.push(Word::Round(round, value.clone()));
        self.take(round, self.me, &value);
    }

    fn decide(&mut self, value: V, words: &mut Vec<Word<V>>) {
        words.push(Word::Decided(value.clone()));
        self.decided = Some(value);
    }

    /// Goes on for as long as all that live have been heard.
    fn advance(&mut self, words: &mut Vec<Word<V>>) {
        while self.has_begun() && self.decided.is_none() {
            let Some(Round { heard, value: Some(value) }) = self.rounds.get(&self.round).cloned() else {
                return;
            };
            if !self.members.iter().all(|member| heard.contains(member) || self.lost.contains(member)) {
                return;
            }
            let before = self.rounds.get(&(self.round - 1)).map_or(&self.members, |round| &round.heard);
            if heard == *before {
                self.decide(value, words);
            } else {
                let mut value = value;
                self.lost.iter().for_each(|member| value.lose(*member));
                self.enter(self.round + 1, value, words);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    /// The smallest number proposed, and who is lost.
    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Least(u32, BTreeSet<usize>);

    impl Agreed for Least {
        fn join(&mut self, other: &Self) {
            self.0 = self.0.min(other.0);
            self.1.extend(&other.1);
        }

        fn lose(&mut self, member: usize) {
            self.1.insert(member);
        }
    }

    /// What travels from one member to another: words, and at last its death.
    type Wire = VecDeque<Option<Word<Least>>>;

    struct Net {
        members: Vec<Option<Agreement<Least>>>,
        wires: Vec<Vec<Wire>>,
        /// Words that each member may yet send before it dies.
        lives: Vec<usize>,
    }

    impl Net {
        fn new(lives: Vec<usize>) -> Self {
            let n = lives.len();
            let members = (0..n).map(|me| Some(Agreement::new(me, 0..n, []))).collect();
            Net { members, wires: vec![vec![Wire::new(); n]; n], lives }
        }

        /// Sends to one member after the other; death may come between any two.
        fn say(&mut self, from: usize, words: Vec<Word<Least>>) {
            for word in words {
                for to in (0..self.members.len()).filter(|to| *to != from) {
                    if self.lives[from] == 0 {
                        return self.die(from);
                    }
                    self.lives[from] -= 1;
                    self.wires[from][to].push_back(Some(word.clone()));
                }
            }
        }

        fn die(&mut self, rank: usize) {
            if self.members[rank].take().is_some() {
                self.wires[rank].iter_mut().for_each(|wire| wire.push_back(None));
            }
        }

        /// Delivers the first of one wire; `false` if there is none.
        fn deliver(&mut self, pick: usize) -> bool {
            let n = self.members.len();
            let full: Vec<(usize, usize)> = (0..n)
                .flat_map(|from| (0..n).map(move |to| (from, to)))
                .filter(|(from, to)| !self.wires[*from][*to].is_empty())
                .collect();
            let Some((from, to)) = full.get(pick % full.len().max(1)).copied() else { return false };
            let word = self.wires[from][to].pop_front().flatten();
            let Some(member) = &mut self.members[to] else { return true };
            let words = match word {
                None => member.lose(from),
                Some(word) => {
                    // Whoever hears of it says what it knows, as the watcher does.
                    let mut words = member.propose(Least(100 + to as u32, BTreeSet::new()));
                    words.extend(member.hear(from, word));
                    words
                }
            };
            self.say(to, words);
            true
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn all_who_live_decide_the_same_whoever_dies_when(
            lives in proptest::collection::vec(prop_oneof![2 => Just(usize::MAX), 1 => 0usize..12], 2..6),
            proposers in proptest::collection::vec((0usize..6, 0u32..50), 1..4),
            picks in proptest::collection::vec(any::<usize>(), 600),
        ) {
            let n = lives.len();
            let mut net = Net::new(lives);
            let mut picks = picks.into_iter().cycle();
            for (rank, value) in proposers {
                let rank = rank % n;
                if let Some(member) = &mut net.members[rank] {
                    let words = member.propose(Least(value, BTreeSet::new()));
                    net.say(rank, words);
                }
                net.deliver(picks.next().unwrap_or(0));
            }
            while net.deliver(picks.next().unwrap_or(0)) {}
            let begun: Vec<_> = net.members.iter().flatten().filter(|member| member.has_begun()).collect();
            let decided: Vec<_> = net.members.iter().flatten().filter_map(|member| member.decided()).collect();
            // Who never heard of it, because all that knew are dead, has nothing to decide.
            prop_assert!(decided.len() >= begun.len());
            prop_assert!(decided.windows(2).all(|pair| pair[0] == pair[1]), "{decided:?}");
        }
    }

    #[test]
    fn a_member_that_does_not_answer_is_given_up_and_bound_by_what_the_others_decide() {
        let mut a = Agreement::new(0, 0..3, []);
        let mut b = Agreement::new(1, 0..3, []);
        let mut silent = Agreement::new(2, 0..3, []);
        let mut to_b = a.propose(Least(5, BTreeSet::new()));
        let mut to_a = b.propose(Least(7, BTreeSet::new()));
        for round in 0..3 {
            let (for_a, for_b) = (std::mem::take(&mut to_a), std::mem::take(&mut to_b));
            for_b.into_iter().for_each(|word| to_a.extend(b.hear(0, word)));
            for_a.into_iter().for_each(|word| to_b.extend(a.hear(1, word)));
            if round == 0 {
                assert!(a.decided().is_none() && b.decided().is_none());
                to_b.extend(a.give_up_on());
                to_a.extend(b.give_up_on());
            }
        }
        let decided = a.decided().cloned();
        assert_eq!(decided, Some(Least(5, [2].into())));
        assert_eq!(b.decided(), decided.as_ref());
        silent.hear(1, Word::Decided(decided.clone().unwrap()));
        assert_eq!(silent.decided(), decided.as_ref());
    }
}
