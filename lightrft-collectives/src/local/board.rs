//! The board of a group of threads: contributions pinned up, taken when all have come

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::buffer::AlignedBytes;
use crate::error::{Error, Loss, Result};
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

    /// The first rank that failed, whoever waits for it, since those after it may have failed because of it;
    /// else the first of the `missing` ranks that has left.
    fn first_loss_that_matters(&self, missing: &[usize]) -> Option<(usize, Loss)> {
        let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = lost.iter().find(|(_, how)| *how == Loss::Failed);
        failed.or_else(|| lost.iter().find(|(rank, _)| missing.contains(rank))).copied()
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
}

#[derive(Debug)]
pub(super) struct Board {
    name: String,
    ranks: Vec<usize>,
    timeout: Duration,
    fates: Arc<Fates>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Board {
    pub(super) fn new(name: String, ranks: Vec<usize>, timeout: Duration, fates: Arc<Fates>) -> Arc<Self> {
        let state = State { arrived: ranks.iter().map(|_| None).collect(), ..State::default() };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let board = Arc::new(Board { name, ranks, timeout, fates, state, changed });
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
        self.fates.lost.lock().unwrap_or_else(PoisonError::into_inner).push((world_rank, how));
        let boards: Vec<Arc<Board>> = self.fates.boards().iter().filter_map(Weak::upgrade).collect();
        for board in boards {
            // Whoever is about to wait holds the lock: it has seen the loss, or hears this.
            drop(board.lock());
            board.changed.notify_all();
        }
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
        if let Some((rank, how)) = self.fates.first_loss_that_matters(&missing) {
            let (pid, host) = (std::process::id(), crate::host::node_name());
            return Some(Error::PeerLost { call, group: group(), rank, pid, host, how });
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
