//! Ranks as processes: TCP between machines, shared memory within one
//!
//! A group holds a connection to each of its members. A call is a few steps of [`exchange`], or, where all
//! members share a machine, of [`shm`], or of both where some do: see [`hierarchy`]. The [`watcher`] thread tells all when
//! a rank has died.

mod agreement;
#[cfg_attr(not(feature = "nccl"), allow(dead_code))] // Lent to the communicators of GPUs.
mod beside;
mod chain;
mod control;
mod exchange;
mod fate;
#[cfg(feature = "testing")]
pub(crate) mod fuzzing;
mod hello;
mod hierarchy;
#[cfg_attr(not(feature = "nccl"), allow(dead_code))] // As above.
mod ledger;
mod note;
mod patience;
mod pulse;
mod rebuild;
mod reduction;
mod segment;
mod sharing;
mod shm;
mod steps;
mod tcp;
mod topology;
mod verdict;
mod vigil;
mod watcher;
mod wire;
mod world;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub(crate) use self::beside::Beside;
use self::exchange::{Fault, Links, Wait};
use self::fate::Alarm;
use self::hierarchy::Hierarchy;
#[cfg(feature = "nccl")]
pub(crate) use self::ledger::Told;
use self::note::{Cause, Lateness, Note};
pub(crate) use self::shm::HeapMemory;
use self::shm::{Shm, Watch};
use self::tcp::Tcp;
use self::verdict::SETTLE;
use self::vigil::{Subject, Vigil};
use self::world::{AGREEMENT, World, group_id};
pub(crate) use self::world::{Join, node_name};
use crate::buffer::AlignedBytes;
use crate::communicator::{Communicator, CommunicatorExt, GroupOptions, Sharing};
use crate::error::{Error, Loss, Result};
use crate::flight::recorder::{Outcome, Slot};
use crate::group::{check_members, rebuilt_before};
use crate::live::Made;
use crate::memory::GroupMemory;
use crate::op::ReduceOp;
use crate::operation::{Call, Operation, Signature, digest};
use crate::single::Single;
use crate::site;

/// How long the watcher may take to say why a connection broke before it is taken for a rank that left.
const VERDICT: Duration = Duration::from_secs(1);

/// One rank's end of a group of processes.
#[derive(Debug)]
struct Group {
    name: String,
    id: u64,
    rank: usize,
    ranks: Vec<usize>,
    timeout: Duration,
    world: Arc<World>,
    alarm: Arc<Alarm>,
    channels: Mutex<Channels>,
    groups: AtomicUsize,
    /// The group's line in the flight recorder.
    slot: Slot,
    /// Whether another group has been made, or tried to be, in the place of this one.
    is_rebuilt: AtomicBool,
    /// Whether this rank has declared it dead, though the members may not have agreed yet.
    is_poisoned: AtomicBool,
}

/// What calls go through. One call at a time.
#[derive(Debug)]
struct Channels {
    links: Links,
    /// Where other ranks' contributions wait to be folded.
    staging: AlignedBytes,
    path: Path,
}

/// How collective calls go.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // One per group.
enum Path {
    /// Over the connections.
    Flat,
    /// All members share a machine.
    Shm(Shm),
    /// Some do.
    Hierarchical(Hierarchy),
}

impl Path {
    /// Returns when every rank has come with this signature.
    fn meet(&mut self, signature: Signature, tcp: &mut Tcp<'_>, watch: &Watch<'_>) -> Result<(), Fault> {
        match self {
            Path::Flat => tcp.meet(signature),
            Path::Shm(shm) => shm.meet(signature, watch),
            Path::Hierarchical(hierarchy) => hierarchy.meet(signature, tcp, watch),
        }
    }
}

/// How the ranks of a group exchange data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Transport {
    /// Shared memory where all ranks of a group are on one machine and can open each other's memory; else TCP.
    #[default]
    Auto,
    /// TCP only.
    Tcp,
}

/// Joins the world and makes its first group, of all ranks.
pub(crate) fn join(join: Join<'_>, timeout: Duration) -> Result<Arc<dyn Communicator>> {
    let ranks = (0..join.world_size).collect();
    let limit = join.timeout;
    let world = World::join(join)?;
    Ok(Arc::new(Group::new(world, "world".into(), ranks, timeout, limit)?))
}

impl Group {
    /// Connects the members; all of them call this. `limit` bounds the connecting, `timeout` later calls.
    fn new(
        world: Arc<World>,
        name: String,
        ranks: Vec<usize>,
        timeout: Duration,
        limit: Duration,
    ) -> Result<Self> {
        let group = Group::connect(world, name, ranks, timeout, limit)?;
        match group.share() {
            // Members that are faster have the group already, and have disagreed in a call on it: so has this rank, and will
            // hear of that in its own.
            Ok(()) | Err(Error::Mismatch { .. }) => Ok(group),
            Err(error) => Err(error),
        }
    }

    /// Connects the members; the group works, over TCP.
    fn connect(
        world: Arc<World>,
        name: String,
        ranks: Vec<usize>,
        timeout: Duration,
        limit: Duration,
    ) -> Result<Self> {
        let (links, alarm) = world.links(&name, &ranks, limit)?;
        let rank = ranks.iter().position(|r| *r == world.rank()).unwrap_or_default();
        let (id, groups) = (group_id(&name), AtomicUsize::new(0));
        let channels = Mutex::new(Channels { links, staging: AlignedBytes::default(), path: Path::Flat });
        let slot = world.shared.recorder.enter(id, &name, ranks.len());
        let (is_rebuilt, is_poisoned) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Group {
            name,
            id,
            rank,
            ranks,
            timeout,
            world,
            alarm,
            channels,
            groups,
            slot,
            is_rebuilt,
            is_poisoned,
        })
    }

    fn channels(&self) -> MutexGuard<'_, Channels> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a call on the channels and turns a fault into the group's verdict.
    fn with_channels(
        &self,
        mine: Signature,
        timeout: Option<Duration>,
        work: impl FnOnce(&mut Tcp<'_>, &mut Path, &Watch<'_>) -> Result<(), Fault>,
    ) -> Result<()> {
        let mut channels = self.channels();
        let Channels { links, staging, path } = &mut *channels;
        let (alarm, shared, cards) = (&*self.alarm, &*self.world.shared, &self.world.cards);
        let timeout = timeout.unwrap_or(self.timeout);
        if self.is_poisoned.load(Ordering::Relaxed) {
            shared.fate.await_agreement(self.id, AGREEMENT);
        }
        if alarm.is_rung()
            && let Some(cause) = shared.fate.cause(self.id)
        {
            // The caller may end this process now.
            shared.accounts.await_written();
            return Err(cause.error(mine.call, &self.name, &self.ranks, cards));
        }
        let ticket = shared.recorder.begin(self.slot, mine.call, mine.encode(), site::current());
        let subject = Subject { group: &self.name, id: self.id, ranks: &self.ranks, call: mine, ticket };
        let vigil = &Vigil::new(shared, cards, alarm, self.world.patience, subject);
        let wait = Wait { alarm, vigil, timeout };
        let mut tcp = Tcp { links, staging, wait, rank: self.rank, world: self.ranks.len() };
        let watch = Watch { alarm, fate: &shared.fate, vigil, group: self.id, ranks: &self.ranks, timeout };
        let done = work(&mut tcp, path, &watch);
        let outcome = if done.is_ok() { Outcome::Done } else { Outcome::Failed };
        let result = done.map_err(|fault| {
            let error = self.verdict(fault, mine, vigil);
            shared.accounts.await_written();
            error
        });
        shared.recorder.end(ticket, outcome);
        result
    }

    /// What happened, as the members agree: one cause for all of them, whoever noticed what.
    fn verdict(&self, fault: Fault, mine: Signature, vigil: &Vigil<'_>) -> Error {
        let call = mine.call;
        let (shared, fate) = (&self.world.shared, &self.world.shared.fate);
        let world_rank = |member: usize| self.ranks[member];
        let cause = match fault {
            Fault::System(source) => {
                // A call that ended half way has left its bytes in the connections: nothing more may go there.
                let cause = Cause::Lost { rank: self.world.rank(), how: Loss::Failed };
                shared.declare(self.id, cause);
                fate.await_agreement(self.id, AGREEMENT);
                return Error::Io { doing: format!("{call} on {}", self.name), source: Arc::new(source) };
            }
            Fault::Alarm => None,
            Fault::Lost(peer) => {
                let rank = world_rank(peer);
                let known = fate.await_cause(self.id, rank, VERDICT);
                // Its process lives, or the watcher would know better: it has dropped its communicator.
                known.is_none().then(|| fate.departed(rank, self.id, SETTLE))
            }
            Fault::Mismatch(peer, theirs) => {
                let Some(theirs) = theirs.filter(|theirs| *theirs != mine) else {
                    let cause = Cause::Lost { rank: world_rank(peer), how: Loss::Failed };
                    shared.declare(self.id, cause);
                    fate.await_agreement(self.id, AGREEMENT);
                    return Error::Protocol {
                        rank: world_rank(peer),
                        got: "a frame out of turn".into(),
                        expected: format!("the next frame of {mine}"),
                    };
                };
                // The lower rank first, whoever of the two noticed.
                let (one, other) = ((world_rank(self.rank), mine), (world_rank(peer), theirs));
                let ((rank, mine), (other, theirs)) =
                    if one.0 < other.0 { (one, other) } else { (other, one) };
                Some(Cause::Mismatch { rank, mine, other, theirs })
            }
            Fault::Disagree { one, other } => {
                let cause = Cause::Mismatch {
                    rank: world_rank(one.0),
                    mine: one.1,
                    other: world_rank(other.0),
                    theirs: other.1,
                };
                Some(cause)
            }
            Fault::Deadline { waited, missing, come } => Some(vigil.lateness(waited, &missing, &come)),
        };
        if let Some(cause) = &cause {
            shared.declare(self.id, cause.clone());
        }
        let failed = || Cause::Lost { rank: self.world.rank(), how: Loss::Failed };
        // An alarm is rung only after its cause was recorded, and the watcher sees to it that all agree in time.
        let agreed = fate.await_agreement(self.id, AGREEMENT).or(cause).unwrap_or_else(failed);
        agreed.error(call, &self.name, &self.ranks, &self.world.cards)
    }
}

impl Communicator for Group {
    fn name(&self) -> &str {
        &self.name
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    fn run_within(&self, operation: Operation<'_>, timeout: Option<Duration>) -> Result<()> {
        operation.check(self.rank, self.ranks.len(), &self.name)?;
        let operation = operation.on_host()?;
        let signature = operation.signature(self.ranks.len());
        self.with_channels(signature, timeout, |tcp, path, watch| match (path, operation) {
            (_, operation @ (Operation::Send { .. } | Operation::Recv { .. })) | (Path::Flat, operation) => {
                tcp.run(operation)
            }
            (Path::Shm(shm), operation) => shm.run(operation, signature, watch),
            (Path::Hierarchical(hierarchy), operation) => hierarchy.run(operation, signature, tcp, watch),
        })
    }

    fn alloc_bytes(&self, len: usize) -> Result<GroupMemory> {
        // The length is part of what ranks must agree on.
        let signature = Signature { count: len as u64, ..Signature::bare(Call::Alloc) };
        self.with_channels(signature, None, |tcp, path, watch| path.meet(signature, tcp, watch))?;
        Ok(self.share_region(len)?.map_or_else(|| GroupMemory::own(len), GroupMemory::shared))
    }

    fn subgroup_with(
        &self,
        ranks: &[usize],
        options: &GroupOptions,
    ) -> Result<Option<Arc<dyn Communicator>>> {
        check_members(self, ranks)?;
        let digest = digest(ranks.iter().copied().chain([options.sharing as usize]));
        let signature = Signature { digest, ..Signature::bare(Call::Subgroup) };
        self.with_channels(signature, None, |tcp, path, watch| path.meet(signature, tcp, watch))?;
        let index = self.groups.fetch_add(1, Ordering::Relaxed);
        let is_member = ranks.contains(&self.rank);
        let ranks: Vec<usize> = ranks.iter().map(|r| self.ranks[*r]).collect();
        let name = format!("{}/{index}", self.name);
        if ranks.len() == 1 {
            return Ok(is_member.then(|| Single::group(name, ranks[0])));
        }
        let timeout = options.timeout.unwrap_or(self.timeout);
        let made = Made { ranks, timeout };
        if options.sharing == Sharing::Shared {
            let held = self.world.live.find(&made, |group| self.world.shared.fate.cause(group.id).is_none());
            let mut all_hold = [u8::from(held.is_some() || !is_member)];
            self.all_reduce(&mut all_hold, ReduceOp::Min)?;
            if all_hold == [1] {
                return Ok(held.map(|group| group as Arc<dyn Communicator>));
            }
        }
        if !is_member {
            return Ok(None);
        }
        let group = Group::new(self.world.clone(), name, made.ranks.clone(), timeout, self.timeout)?;
        let group = Arc::new(group);
        if options.sharing == Sharing::Shared {
            self.world.live.insert(made, &group);
        }
        Ok(Some(group))
    }

    fn rebuild(&self, timeout: Duration) -> Result<Arc<dyn Communicator>> {
        if self.is_rebuilt.swap(true, Ordering::Relaxed) {
            return Err(rebuilt_before(self));
        }
        rebuild::rebuild(self, timeout)
    }

    fn failure(&self, call: Call) -> Option<Error> {
        if !self.alarm.is_rung() {
            return None;
        }
        let cause = self.world.shared.fate.cause(self.id)?;
        Some(cause.error(call, &self.name, &self.ranks, &self.world.cards))
    }

    fn poison(&self, error: &Error) {
        let reporter = self.world.rank();
        let cause = match error {
            Error::PeerLost { rank, how, .. } => Cause::Lost { rank: *rank, how: *how },
            Error::Mismatch { rank, mine, other, theirs, .. } => {
                Cause::Mismatch { rank: *rank, mine: **mine, other: *other, theirs: **theirs }
            }
            Error::Timeout { waited, missing, report, .. } => Cause::Timeout(Lateness {
                waited: *waited,
                step: 0,
                missing: missing.iter().copied().collect(),
                present: BTreeSet::new(),
                reporter,
                report: report.clone(),
            }),
            _ => Cause::Lost { rank: reporter, how: Loss::Failed },
        };
        self.is_poisoned.store(true, Ordering::Relaxed);
        self.world.shared.declare(self.id, cause);
    }

    fn beside(&self, line: u64, name: &str) -> Option<Beside> {
        Some(Beside::new(self.world.shared.clone(), self.id, &self.ranks, line, name))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let shared = &self.world.shared;
        shared.tell(self.ranks.iter().copied(), &Note::LeftGroup { group: self.id });
        shared.fate.leave(self.id);
        shared.drop_ledgers(self.id);
        shared.recorder.leave(self.slot);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::thread;

    use super::*;
    use crate::store::MemoryStore;

    #[test]
    fn a_call_that_failed_half_way_on_one_rank_kills_the_group_on_all() {
        let store = &MemoryStore::new();
        let limit = Duration::from_secs(20);
        thread::scope(|scope| {
            for rank in [0, 1] {
                scope.spawn(move || {
                    let join = Join {
                        store,
                        prefix: "test".into(),
                        rank,
                        world_size: 2,
                        interface: Ipv4Addr::LOCALHOST.into(),
                        timeout: limit,
                        patience: limit,
                        transport: Transport::Tcp,
                        server: None,
                        token: None,
                    };
                    let world = World::join(join).unwrap();
                    let group = Group::new(world, "world".into(), vec![0, 1], limit, limit).unwrap();
                    if rank == 1 {
                        let refused = Fault::System(std::io::ErrorKind::OutOfMemory.into());
                        let barrier = Signature::bare(Call::Barrier);
                        let error = group.with_channels(barrier, None, |_, _, _| Err(refused)).unwrap_err();
                        assert!(matches!(error, Error::Io { .. }), "{error}");
                    }
                    let after = group.barrier();
                    let dead = matches!(after, Err(Error::PeerLost { rank: 1, how: Loss::Failed, .. }));
                    assert!(dead, "{after:?}");
                });
            }
        });
    }
}
