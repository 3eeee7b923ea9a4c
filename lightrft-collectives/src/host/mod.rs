//! Ranks as processes: TCP between machines, shared memory within one
//!
//! A group holds a connection to each of its members. A call is a few steps of [`exchange`], or, where all
//! members share a machine, of [`shm`]. The [`watcher`] thread tells both when a rank has died.

mod exchange;
mod fate;
mod tcp;
mod watcher;
mod wire;
mod world;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use self::exchange::{Fault, Links};
use self::fate::Alarm;
use self::tcp::Tcp;
use self::wire::{Cause, Note};
pub(crate) use self::world::Join;
use self::world::{World, group_id};
use crate::communicator::Communicator;
use crate::error::{Error, Loss, Result};
use crate::group::check_members;
use crate::operation::{Call, Operation, Signature, digest};
use crate::single::Single;

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
    links: Mutex<Links>,
    groups: AtomicUsize,
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
        let (links, alarm) = world.links(&name, &ranks, limit)?;
        let rank = ranks.iter().position(|r| *r == world.rank()).unwrap_or_default();
        let (id, links, groups) = (group_id(&name), Mutex::new(links), AtomicUsize::new(0));
        Ok(Group { name, id, rank, ranks, timeout, world, alarm, links, groups })
    }

    /// Runs one step or more on the connections and turns a fault into the group's verdict.
    fn with_links(&self, call: Call, mine: Signature, work: impl FnOnce(&mut Tcp<'_>) -> Result<(), Fault>) -> Result<()> {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        if self.alarm.is_rung()
            && let Some(cause) = self.world.shared.fate.cause(self.id)
        {
            return Err(cause.error(call, &self.name));
        }
        let mut tcp = Tcp {
            links: &mut links,
            alarm: &self.alarm,
            rank: self.rank,
            world: self.ranks.len(),
            timeout: self.timeout,
        };
        work(&mut tcp).map_err(|fault| self.verdict(fault, call, mine))
    }

    /// What happened, agreed with the other ranks: the first cause that was recorded, here or elsewhere.
    fn verdict(&self, fault: Fault, call: Call, mine: Signature) -> Error {
        let fate = &self.world.shared.fate;
        let world_rank = |member: usize| self.ranks[member];
        let (group, cause) = match fault {
            Fault::System(source) => {
                return Error::Io { doing: format!("{call} on {}", self.name), source: Arc::new(source) };
            }
            Fault::Alarm => (None, None),
            Fault::Lost(peer) => {
                let rank = world_rank(peer);
                let known = fate.await_cause(self.id, rank, VERDICT);
                // Its process lives, or the watcher would know better: it has dropped its communicator.
                (None, known.is_none().then_some(Cause::Lost { rank, how: Loss::Left }))
            }
            Fault::Mismatch(peer, theirs) => {
                let Some(theirs) = theirs.filter(|theirs| *theirs != mine) else {
                    return Error::Protocol {
                        rank: world_rank(peer),
                        got: "a frame out of turn".into(),
                        expected: format!("the next frame of {mine}"),
                    };
                };
                let (rank, other) = (world_rank(self.rank), world_rank(peer));
                (Some(self.id), Some(Cause::Mismatch { rank, mine, other, theirs }))
            }
            Fault::Deadline(waited, missing) => {
                let missing = missing.into_iter().map(world_rank).collect();
                (Some(self.id), Some(Cause::Timeout { waited, missing }))
            }
        };
        if let Some(cause) = cause {
            self.world.shared.declare(group, cause);
        }
        match fate.cause(self.id) {
            Some(cause) => cause.error(call, &self.name),
            // An alarm is rung only after its cause was recorded.
            None => Error::PeerLost { call, group: self.name.clone(), rank: self.world.rank(), how: Loss::Failed },
        }
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

    fn run(&self, operation: Operation<'_>) -> Result<()> {
        operation.check(self.rank, self.ranks.len(), &self.name)?;
        let (call, signature) = (operation.call(), operation.signature());
        self.with_links(call, signature, |tcp| tcp.run(operation))
    }

    fn subgroup(&self, ranks: &[usize]) -> Result<Option<Arc<dyn Communicator>>> {
        check_members(self, ranks)?;
        let signature = Signature { digest: digest(ranks.iter().copied()), ..Signature::bare(Call::Subgroup) };
        self.with_links(Call::Subgroup, signature, |tcp| tcp.meet(signature))?;
        let index = self.groups.fetch_add(1, Ordering::Relaxed);
        if !ranks.contains(&self.rank) {
            return Ok(None);
        }
        let name = format!("{}/{index}", self.name);
        let ranks: Vec<usize> = ranks.iter().map(|r| self.ranks[*r]).collect();
        if ranks.len() == 1 {
            return Ok(Some(Single::group(name, ranks[0])));
        }
        let group = Group::new(self.world.clone(), name, ranks, self.timeout, self.timeout)?;
        Ok(Some(Arc::new(group)))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.world.shared.tell_all(&Note::LeftGroup { group: self.id });
    }
}
