//! The board of a group of threads: contributions pinned up, taken when all have come

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::buffer::AlignedBytes;
use crate::error::{Error, Loss, Result};
use crate::group::next_name;
use crate::operation::{Call, Signature};

/// One rank's contribution to one call.
#[derive(Debug)]
pub(super) struct Posted {
    pub(super) signature: Signature,
    pub(super) bytes: AlignedBytes,
}

/// What happened to the ranks of a world; shared by all its boards.
#[derive(Debug, Default)]
pub(super) struct Fates {
    lost: Mutex<Vec<(usize, Loss)>>,
    boards: Mutex<Vec<Weak<Board>>>,
}

impl Fates {
    /// All boards of the world.
    fn boards(&self) -> MutexGuard<'_, Vec<Weak<Board>>> {
        self.boards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lost(&self) -> MutexGuard<'_, Vec<(usize, Loss)>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The loss that ends a group of these members, some of which are `missing`: that of the first that failed, whoever waits
    /// for it, since those after it may have failed because of it; else of the first missing one that has left. `bygone` are
    /// losses from before there was this group.
    fn loss_that_matters(
        &self,
        members: &[usize],
        missing: &[usize],
        bygone: usize,
    ) -> Option<(usize, Loss)> {
        let lost = self.lost();
        let failed = |(rank, how): &&(usize, Loss)| *how == Loss::Failed && members.contains(rank);
        let left = || lost.iter().position(|(rank, _)| missing.contains(rank));
        // Of a rank that failed elsewhere it is not known whether the others ended because of it, but that they did after it.
        let before = |at: usize| lost[bygone.min(at)..at].iter().find(|(_, how)| *how == Loss::Failed);
        let at = lost.iter().position(|loss| failed(&loss)).or_else(left)?;
        let (rank, how) = lost[at];
        Some((rank, before(at).map_or(how, |(lost, _)| Loss::LeftAfter { lost: *lost })))
    }
}

#[derive(Debug, Default)]
struct State {
    /// Contributions to the round being collected.
    arrived: Vec<Option<Posted>>,
    /// Rounds completed.
    rounds: u64,
    /// The last completed round. One is enough: the next completes only after every rank has come again.
    complete: Arc<Vec<Posted>>,
    /// Messages under way, by (sender, receiver).
    mail: HashMap<(usize, usize), VecDeque<Posted>>,
    /// The first failure; every later call returns it.
    failure: Option<Error>,
    /// Boards of groups below for which not all members have come yet, and how many have.
    new: HashMap<String, (Arc<Board>, usize)>,
    /// Who has come to make a group in the place of this one, by rank in this one.
    survivors: BTreeSet<usize>,
    /// That group, and who is in it.
    successor: Option<(Arc<Board>, BTreeSet<usize>)>,
}

#[derive(Debug)]
pub(super) struct Board {
    name: String,
    ranks: Vec<usize>,
    timeout: Duration,
    fates: Arc<Fates>,
    /// How many ranks had been lost when this board was made.
    bygone: usize,
    state: Mutex<State>,
    changed: Condvar,
}

impl Board {
    pub(super) fn new(name: String, ranks: Vec<usize>, timeout: Duration, fates: Arc<Fates>) -> Arc<Self> {
        let state = State { arrived: ranks.iter().map(|_| None).collect(), ..State::default() };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let bygone = fates.lost().len();
        let board = Arc::new(Board { name, ranks, timeout, fates, bygone, state, changed });
        let mut boards = board.fates.boards();
        boards.retain(|board| board.strong_count() > 0);
        boards.push(Arc::downgrade(&board));
        drop(boards);
        board
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    pub(super) fn is_dead(&self) -> bool {
        self.lock().failure.is_some()
    }

    /// Why the group is dead, if it is.
    pub(super) fn death(&self) -> Option<Error> {
        self.lock().failure.clone()
    }

    /// Ends the group, unless it is dead already, and wakes all who wait in it.
    pub(super) fn die(&self, error: Error) -> Error {
        let error = self.lock().failure.get_or_insert(error).clone();
        self.changed.notify_all();
        error
    }

    /// The board of a new group; the first member to come makes it.
    pub(super) fn child(&self, name: String, ranks: Vec<usize>, timeout: Duration) -> Arc<Board> {
        let mut state = self.lock();
        let members = ranks.len();
        let make = || (Board::new(name.clone(), ranks, timeout, self.fates.clone()), 0);
        let (board, came) = state.new.remove(&name).unwrap_or_else(make);
        if came + 1 < members {
            state.new.insert(name, (board.clone(), came + 1));
        }
        board
    }

    /// Marks a rank of the world as gone and wakes all that may wait for it, in any group.
    pub(super) fn lose(&self, world_rank: usize, how: Loss) {
        self.fates.lost().push((world_rank, how));
        let boards: Vec<Arc<Board>> = self.fates.boards().iter().filter_map(Weak::upgrade).collect();
        for board in boards {
            // Whoever is about to wait holds the lock: it has seen the loss, or hears this.
            drop(board.lock());
            board.changed.notify_all();
        }
    }

    /// The board of the group that takes the place of this one: of the members that come here within `timeout`, or within
    /// that of another who came earlier, and live.
    pub(super) fn successor(&self, rank: usize, timeout: Duration) -> Result<Arc<Board>> {
        let begin = Instant::now();
        let mut state = self.lock();
        if state.successor.is_none() {
            state.survivors.insert(rank);
            self.changed.notify_all();
        }
        loop {
            if let Some((board, members)) = &state.successor {
                // Who comes later was left behind.
                let late = || self.peer_lost(Call::Rebuild, self.ranks[rank], Loss::Silent);
                return if members.contains(&rank) { Ok(board.clone()) } else { Err(late()) };
            }
            let rest = timeout.saturating_sub(begin.elapsed());
            let lost: Vec<usize> = self.fates.lost().iter().map(|(rank, _)| *rank).collect();
            let living = (0..self.ranks.len()).filter(|member| !lost.contains(&self.ranks[*member]));
            let members: BTreeSet<usize> = living.clone().filter(|m| state.survivors.contains(m)).collect();
            if members.len() == living.count() || rest.is_zero() {
                let ranks = members.iter().map(|member| self.ranks[*member]).collect();
                let board = Board::new(next_name(&self.name), ranks, self.timeout, self.fates.clone());
                state.successor = Some((board, members));
                self.changed.notify_all();
            } else {
                state = self.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    fn peer_lost(&self, call: Call, rank: usize, how: Loss) -> Error {
        let (pid, host) = (std::process::id(), crate::host::node_name());
        Error::PeerLost { call, group: self.name.clone(), rank, pid, host, how }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No caller's code runs under this lock, so a poisoned one still guards whole data.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Posts a contribution and waits for all others'.
    pub(super) fn exchange(
        &self,
        rank: usize,
        posted: Posted,
        timeout: Option<Duration>,
    ) -> Result<Arc<Vec<Posted>>> {
        let call = posted.signature.call;
        let mut state = self.lock();
        if let Some(error) = &state.failure {
            return Err(error.clone());
        }
        let round = state.rounds;
        state.arrived[rank] = Some(posted);
        if state.arrived.iter().all(Option::is_some) {
            state.complete = Arc::new(state.arrived.iter_mut().filter_map(Option::take).collect());
            state.rounds += 1;
            self.changed.notify_all();
        }
        state = self.wait(state, call, timeout, |state| {
            if state.rounds > round {
                return Vec::new();
            }
            (0..self.ranks.len()).filter(|r| state.arrived[*r].is_none()).collect()
        })?;
        let complete = state.complete.clone();
        // All compare with the lowest rank that differs from rank 0, so all return the same error.
        let odd = complete.iter().position(|p| p.signature != complete[0].signature);
        match odd {
            None => Ok(complete),
            Some(odd) => {
                let error = self.mismatch((0, complete[0].signature), (odd, complete[odd].signature));
                Err(state.failure.get_or_insert(error).clone())
            }
        }
    }

    pub(super) fn send(&self, rank: usize, to: usize, posted: Posted) -> Result<()> {
        let mut state = self.lock();
        if let Some(error) = &state.failure {
            return Err(error.clone());
        }
        state.mail.entry((rank, to)).or_default().push_back(posted);
        self.changed.notify_all();
        Ok(())
    }

    pub(super) fn receive(
        &self,
        rank: usize,
        from: usize,
        signature: Signature,
        timeout: Option<Duration>,
    ) -> Result<AlignedBytes> {
        let state = self.lock();
        if let Some(error) = &state.failure {
            return Err(error.clone());
        }
        let mut state = self.wait(state, Call::Recv, timeout, |state| {
            let empty = state.mail.get(&(from, rank)).is_none_or(VecDeque::is_empty);
            if empty { vec![from] } else { Vec::new() }
        })?;
        // `wait` saw a message in this very box under this very lock.
        let message = state.mail.get_mut(&(from, rank)).and_then(VecDeque::pop_front);
        let Some(message) = message else { return Ok(AlignedBytes::default()) };
        if (Signature { call: Call::Send, ..signature }) == message.signature {
            return Ok(message.bytes);
        }
        let error = self.mismatch((rank, signature), (from, message.signature));
        self.changed.notify_all();
        Err(state.failure.get_or_insert(error).clone())
    }

    /// Waits until no rank of this group is `missing`, a failure, the loss of a missing rank, or the deadline.
    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        call: Call,
        timeout: Option<Duration>,
        missing: impl Fn(&State) -> Vec<usize>,
    ) -> Result<MutexGuard<'a, State>> {
        let (begin, timeout) = (Instant::now(), timeout.unwrap_or(self.timeout));
        loop {
            let missing: Vec<usize> = missing(&state).into_iter().map(|rank| self.ranks[rank]).collect();
            if missing.is_empty() {
                return Ok(state);
            }
            if let Some(error) = self.failure(&state, call, missing, begin.elapsed(), timeout) {
                self.changed.notify_all();
                return Err(state.failure.get_or_insert(error).clone());
            }
            let rest = timeout.saturating_sub(begin.elapsed());
            state = self.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Why waiting for the `missing` ranks of the world is in vain, if it is.
    fn failure(
        &self,
        state: &State,
        call: Call,
        missing: Vec<usize>,
        waited: Duration,
        timeout: Duration,
    ) -> Option<Error> {
        let group = || self.name.clone();
        if let Some(error) = &state.failure {
            return Some(error.clone());
        }
        if let Some((rank, how)) = self.fates.loss_that_matters(&self.ranks, &missing, self.bygone) {
            return Some(self.peer_lost(call, rank, how));
        }
        let report = String::from("they have not called");
        (waited >= timeout).then(|| Error::Timeout { call, group: group(), waited, missing, report })
    }

    /// Ends the group because two ranks, by rank in the group, made calls that do not fit together.
    pub(super) fn disagree(&self, one: (usize, Signature), other: (usize, Signature)) -> Error {
        self.die(self.mismatch(one, other))
    }

    fn mismatch(&self, one: (usize, Signature), other: (usize, Signature)) -> Error {
        Error::Mismatch {
            group: self.name.clone(),
            rank: self.ranks[one.0],
            mine: Box::new(one.1),
            other: self.ranks[other.0],
            theirs: Box::new(other.1),
        }
    }
}
