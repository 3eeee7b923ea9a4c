//! A group of ranks with a GPU each: the seam over a group on the host and an NCCL communicator beside it
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::comm::{Comm, Launch};
use super::cuda::Gpu;
use super::device::{DeviceMemory, Stream};
use super::enqueue::{enqueue, is_on_device, stream_of, tell};
use super::raw::{self, Progress, UniqueId};
use super::record::Enqueued;
use super::watchdog;
use crate::buffer::{Host, HostMut};
use crate::communicator::{Communicator, CommunicatorExt, GroupOptions};
use crate::device::{DeviceMut, StreamHandle};
use crate::error::{Error, Result};
use crate::host::Beside;
use crate::memory::GroupMemory;
use crate::op::{Dtype, ReduceOp};
use crate::operation::{Call, DeviceOperation, Exchange, Operation, Signature};
use crate::site;

/// Whether ranks compare their calls on device memory, and when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Check {
    /// They do, a few milliseconds later and without waiting for each other: a call is written down, and the watchdog tells it
    /// to the group's lowest rank, which compares. Ranks that have made different calls all get [`Error::Mismatch`], from the next
    /// call or from [`Nccl::health`], and their kernels are told to end. Until then a call may have computed nonsense, or may
    /// hang: NCCL does not compare. What was captured into a graph is compared when it is captured. Ranks that are threads
    /// of one process ([`local`](crate::local)) are not compared so.
    #[default]
    Beside,
    /// They do, on the host: ranks that make different calls all get [`Error::Mismatch`] and nothing is enqueued. A call then
    /// waits until the slowest rank has made it. Sends and receives are not compared. For tests and for the search
    /// after a hang; the same on all ranks.
    Calls,
    /// They do not. Ranks that make different calls hang until the deadline, or get wrong results.
    Off,
}

/// How a group with GPUs is made.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// How long a call may take from when it was made until its stream has done it, with all that the stream had to do
    /// before. 60 minutes by default.
    pub timeout: Duration,
    /// How long the ranks may take to connect their GPUs. 5 minutes by default.
    pub init_timeout: Duration,
    /// Whether calls are compared.
    pub check: Check,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            timeout: crate::DEFAULT_TIMEOUT,
            init_timeout: Duration::from_secs(300),
            check: Check::default(),
        }
    }
}

impl Options {
    /// Sets how long a call may take.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Options { timeout, ..self }
    }

    /// Sets how long the ranks may take to connect their GPUs.
    #[must_use]
    pub fn init_timeout(self, init_timeout: Duration) -> Self {
        Options { init_timeout, ..self }
    }

    /// Sets whether calls are compared.
    #[must_use]
    pub fn check(self, check: Check) -> Self {
        Options { check, ..self }
    }
}

/// A group of ranks with a GPU each; see the [module](crate::nccl).
#[derive(Debug)]
pub struct Nccl {
    host: Arc<dyn Communicator>,
    comm: Arc<Comm>,
    options: Options,
    /// Groups split off so far: the same number on all ranks, and so a colour that no other split has.
    splits: AtomicUsize,
    /// Groups split off that may live.
    live: Mutex<Vec<Split>>,
}

/// A group that was split off, and what it is on the host.
#[derive(Debug)]
struct Split {
    host: Weak<dyn Communicator>,
    group: Weak<Nccl>,
}

/// What a rank tells the others before they connect: their GPU, or why they have none.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Card {
    /// Of the GPU, the same in every process.
    uuid: [u8; 16],
    version: i32,
}

/// What one rank needs of its own machine.
fn prepare(ordinal: usize) -> Result<(&'static raw::Nccl, Arc<Gpu>, Card)> {
    let nccl = raw::Nccl::get()?;
    let gpu = Gpu::get(ordinal)?;
    let version =
        nccl.version().map_err(|fault| Error::Library { library: "NCCL", reason: fault.message })?;
    let card = Card { uuid: gpu.uuid, version };
    Ok((nccl, gpu, card))
}

impl Nccl {
    /// Gives GPU `ordinal` of this process to this rank of `host`. Collective over `host`; each rank has a GPU of its own.
    ///
    /// # Errors
    /// On the rank that has no library, driver or GPU: [`Error::Library`] or [`Error::Cuda`]; on the others [`Error::Nccl`]
    /// naming it. [`Error::Nccl`] if two ranks have the same GPU, or libraries of different versions, or NCCL
    /// cannot connect them; [`Error::Timeout`] if it has not within `init_timeout`; otherwise as calls on `host`.
    #[track_caller]
    pub fn new(host: Arc<dyn Communicator>, ordinal: usize, options: &Options) -> Result<Arc<Nccl>> {
        let _site = site::mark();
        // What can fail on one rank alone comes first, and all learn of it: nobody waits for a rank that will not come.
        let mine = prepare(ordinal);
        let told: Result<Card, String> = match &mine {
            Ok((.., card)) => Ok(card.clone()),
            Err(error) => Err(error.to_string()),
        };
        let cards = host.all_gather_object(&told)?;
        let (nccl, gpu, _) = mine?;
        agree(&*host, &cards)?;

        let id = agree_on_id(&*host, nccl)?;
        let comm = Comm::init(nccl, &gpu, &host, id, options.init_timeout);
        Self::meet(host, comm, options)
    }

    /// All ranks have a communicator, or none has.
    fn meet(host: Arc<dyn Communicator>, comm: Result<Arc<Comm>>, options: &Options) -> Result<Arc<Nccl>> {
        let comm = comm.and_then(|comm| {
            let stream = Stream::new(comm.gpu.ordinal())?;
            let zero = DeviceMemory::zeroed::<f32>(&stream, 1)?;
            // Other streams will use it.
            stream.wait(options.init_timeout)?;
            let _ = comm.zero.set(zero);
            Ok(comm)
        });
        let told: Result<(), String> = comm.as_ref().map(drop).map_err(Error::to_string);
        let states = host.all_gather_object(&told)?;
        let nccl = Nccl {
            host,
            comm: comm?,
            options: options.clone(),
            splits: AtomicUsize::new(0),
            live: Mutex::default(),
        };
        for (rank, state) in states.into_iter().enumerate() {
            state.map_err(|message| failed(&*nccl.host, rank, message))?;
        }
        Ok(Arc::new(nccl))
    }

    /// The group on the host.
    pub fn host(&self) -> &Arc<dyn Communicator> {
        &self.host
    }

    /// The ordinal of this rank's GPU.
    pub fn ordinal(&self) -> usize {
        self.comm.gpu.ordinal()
    }

    /// What has gone wrong with calls that were enqueued, as far as it is known: ask after waiting for a stream, before using
    /// what it has computed.
    ///
    /// # Errors
    /// What every later call returns: [`Error::PeerLost`], [`Error::Timeout`] or [`Error::Nccl`], and [`Error::Mismatch`] where
    /// calls are compared ([`Check::Beside`](super::Check::Beside), the default).
    pub fn health(&self) -> Result<()> {
        self.healthy(Call::Barrier)
    }

    /// As [`health`](Nccl::health), on behalf of `call`.
    fn healthy(&self, call: Call) -> Result<()> {
        self.comm.alive()?;
        // Without outstanding calls the watchdog sleeps; a group whose host part is dead is dead.
        self.host.failure(call).map_or(Ok(()), |error| Err(watchdog::fail(&self.comm, error)))
    }

    /// The last 64 launches on this rank, the last one last, and how far each came. When a group fails, they are logged.
    pub fn enqueued(&self) -> Vec<Enqueued> {
        self.comm.record.read()
    }

    /// Enqueues several calls as one, in one launch. All their buffers name one stream; calls on host memory are refused.
    ///
    /// # Errors
    /// [`Error::Place`] for buffers on other streams, GPUs or the host; otherwise as [`Communicator::run_within`].
    #[track_caller]
    pub fn run_fused(&self, operations: Vec<Operation<'_>>, timeout: Option<Duration>) -> Result<()> {
        let _site = site::mark();
        let mut calls = Vec::with_capacity(operations.len());
        for operation in operations {
            operation.check(self.rank(), self.world_size(), self.name())?;
            calls.push(operation.on_device()?);
        }
        self.enqueue(&calls, timeout)
    }

    /// Lets `stream` go on only when the streams that the other ranks give have come to this call.
    ///
    /// [`Operation::Barrier`] is the barrier of the group on the host.
    ///
    /// # Errors
    /// As a call on device memory.
    #[track_caller]
    pub fn barrier_on(&self, stream: &Stream) -> Result<()> {
        let _site = site::mark();
        let pointer = self.comm.zero.get().map_or(0, DeviceMemory::pointer);
        let stream = (stream.ordinal(), stream.handle());
        // SAFETY: one f32 that lives as long as the communicator and is used by its barriers only; NCCL does them one after
        // the other. A stream that is dropped now goes when its work is done.
        let data = unsafe { DeviceMut::from_raw(Dtype::F32, stream.0, pointer, 1, stream.1) };
        self.enqueue(&[Operation::AllReduce { data, op: ReduceOp::Sum }], None)
    }

    /// The group over this group on the host that lives and is healthy.
    fn known(&self, host: &Arc<dyn Communicator>) -> Option<Arc<Nccl>> {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        // Addresses alone: one group may have several virtual tables.
        let known = live.iter().find(|its| its.host.as_ptr().cast::<()>() == Arc::as_ptr(host).cast::<()>());
        known.and_then(|its| its.group.upgrade()).filter(|group| group.comm.alive().is_ok())
    }

    /// Enqueues calls that have been checked, as one.
    fn enqueue(&self, calls: &[DeviceOperation<'_>], timeout: Option<Duration>) -> Result<()> {
        let mut stream = None;
        for call in calls {
            let its = stream_of(call, self.ordinal())?;
            if let (Some(stream), Some(its)) = (stream, its)
                && stream != its
            {
                let (got, expected) = ("on another stream", "on the stream of the calls fused with it");
                return Err(Error::Place { call: call.call(), got, expected });
            }
            stream = stream.or(its);
        }
        let (Some(first), Some(StreamHandle(stream))) = (calls.first(), stream) else { return Ok(()) };
        self.healthy(first.call())?;
        if self.options.check == Check::Calls {
            let compared = calls.iter().try_for_each(|call| self.compare(call, timeout));
            compared.map_err(|error| watchdog::fail(&self.comm, error))?;
        }
        let (rank, world) = (self.rank(), self.world_size());
        let limit = timeout.unwrap_or(self.options.timeout);
        let mut told = Vec::new();
        if self.options.check == Check::Beside && world > 1 {
            calls.iter().for_each(|call| tell(call, rank, world, &mut told));
        }
        let launch = Launch { first: first.signature(world), fused: calls.len(), told: &told, limit };
        // SAFETY: the buffers were made under the promise that they and their stream live, and are used by nobody else,
        // until the stream has done what it is given before this returns; they are on this communicator's GPU (`stream_of`),
        // and `Operation::check` has compared their lengths.
        unsafe {
            self.comm.enqueue(launch, stream, |lane| match calls {
                [call] => enqueue(lane, call, rank, world),
                calls => lane.fused(|| {
                    calls.iter().try_for_each(|call| enqueue(lane, call, rank, world).map(|_: Progress| ()))
                }),
            })
        }
    }

    /// Compares the calls of all ranks on the host.
    fn compare(&self, call: &DeviceOperation<'_>, timeout: Option<Duration>) -> Result<()> {
        if matches!(call, Operation::Send { .. } | Operation::Recv { .. }) {
            return Ok(());
        }
        let world = self.world_size();
        let mine = call.signature(world);
        let disagree = |one: (usize, Signature), other: (usize, Signature)| {
            // The lower rank first, whoever of the two noticed.
            let (one, other) = if one.0 <= other.0 { (one, other) } else { (other, one) };
            let (rank, other, theirs) = (self.ranks()[one.0], self.ranks()[other.0], Box::new(other.1));
            Err(Error::Mismatch { group: self.name().into(), rank, mine: Box::new(one.1), other, theirs })
        };
        let all = self.gather_words(&mine.encode(), timeout)?;
        for (other, words) in all.as_chunks::<3>().0.iter().enumerate() {
            if let Some(theirs) = Signature::decode(*words)
                && theirs != mine
            {
                return disagree((self.rank(), mine), (other, theirs));
            }
        }
        if let Operation::AllToAllV { send_counts, recv_counts, .. } = call {
            let counts = self.gather_words(&Exchange::row(send_counts, recv_counts), timeout)?;
            if let Some((one, its, other, theirs)) = (Exchange { counts: &counts, world }).disagreement(mine)
            {
                return disagree((one, its), (other, theirs));
            }
        }
        Ok(())
    }

    /// As many words from each rank, in rank order, on the host.
    fn gather_words(&self, words: &[u64], timeout: Option<Duration>) -> Result<Vec<u64>> {
        let mut all = vec![0u64; words.len() * self.world_size()];
        let input = Host::from_bytes(Dtype::I64, bytemuck::cast_slice(words))?.into();
        let output = HostMut::from_bytes(Dtype::I64, bytemuck::cast_slice_mut(&mut all))?.into();
        self.host.run_within(Operation::AllGather { input, output }, timeout)?;
        Ok(all)
    }
}

/// Where the members of `host` meet in a new communicator: what rank 0 says.
fn agree_on_id(host: &dyn Communicator, nccl: &raw::Nccl) -> Result<UniqueId> {
    let id = (host.rank() == 0).then(|| nccl.unique_id());
    let told: Result<Vec<u8>, String> = match &id {
        Some(Ok(id)) => Ok(id.0.to_vec()),
        Some(Err(fault)) => Err(fault.message.clone()),
        None => Ok(Vec::new()),
    };
    let id = host.broadcast_object(Some(&told), 0)?.map_err(|message| failed(host, 0, message))?;
    Ok(UniqueId(id.try_into().map_err(|_| failed(host, 0, "sent no id".into()))?))
}

/// An error of NCCL on rank `rank` of the group.
fn failed(host: &dyn Communicator, rank: usize, message: String) -> Error {
    let rank = host.ranks()[rank];
    Error::Nccl { call: Call::Subgroup, group: host.name().into(), rank, code: 0, message }
}

/// Whether the ranks' GPUs can make a group: each has one, no two the same, and all have the same NCCL.
fn agree(host: &dyn Communicator, cards: &[Result<Card, String>]) -> Result<()> {
    for (rank, card) in cards.iter().enumerate() {
        let card = card.as_ref().map_err(|message| failed(host, rank, message.clone()))?;
        for (other, its) in cards[..rank].iter().enumerate().filter_map(|(r, c)| Some((r, c.as_ref().ok()?)))
        {
            let other = host.ranks()[other];
            if its.uuid == card.uuid {
                let message = format!("has the same GPU as rank {other}; NCCL needs one for each rank");
                return Err(failed(host, rank, message));
            }
            if its.version != card.version {
                let message = format!("has NCCL {}, rank {other} has {}", card.version, its.version);
                return Err(failed(host, rank, message));
            }
        }
    }
    Ok(())
}

impl Communicator for Nccl {
    fn name(&self) -> &str {
        self.host.name()
    }

    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn ranks(&self) -> &[usize] {
        self.host.ranks()
    }

    /// Calls on host memory, and barriers, are those of the group on the host. Calls on device memory are enqueued.
    fn run_within(&self, operation: Operation<'_>, timeout: Option<Duration>) -> Result<()> {
        if !is_on_device(&operation) {
            return self.host.run_within(operation, timeout);
        }
        operation.check(self.rank(), self.world_size(), self.name())?;
        self.enqueue(&[operation.on_device()?], timeout)
    }

    fn subgroup_with(
        &self,
        ranks: &[usize],
        options: &GroupOptions,
    ) -> Result<Option<Arc<dyn Communicator>>> {
        self.healthy(Call::Subgroup)?;
        // Compares the lists, and is refused as it would be there.
        let host = self.host.subgroup_with(ranks, options)?;
        let known = host.as_ref().and_then(|host| self.known(host));
        // Where the host gave all members a group that they hold already, there is a communicator for it too, unless one
        // of them has dropped that.
        let mut all_know = [u8::from(known.is_some() || host.is_none())];
        self.host.all_reduce(&mut all_know, ReduceOp::Min)?;
        if all_know == [1] && host.is_some() == known.is_some() {
            return Ok(known.map(|known| known as Arc<dyn Communicator>));
        }
        let colour = self.splits.fetch_add(1, Ordering::Relaxed) & i32::MAX as usize;
        let id = self.comm.needs_root().then(|| agree_on_id(&*self.host, self.comm.nccl)).transpose()?;
        let comm = self.comm.split(&*self.host, colour as i32, host.as_ref(), id, self.options.init_timeout);
        let Some(host) = host else { return comm.map(|_| None) };
        let timeout = options.timeout.unwrap_or(self.options.timeout);
        let missing = || failed(&*host, host.rank(), "got no communicator of a split".into());
        let comm = comm.and_then(|comm| comm.ok_or_else(missing));
        let group = Self::meet(host.clone(), comm, &Options { timeout, ..self.options.clone() })?;
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.retain(|split| split.group.strong_count() > 0);
        live.push(Split { host: Arc::downgrade(&host), group: Arc::downgrade(&group) });
        Ok(Some(group))
    }

    /// The survivors' GPUs are connected anew, within `timeout`.
    fn rebuild(&self, timeout: Duration) -> Result<Arc<dyn Communicator>> {
        let host = self.host.rebuild(timeout)?;
        let options = Options { init_timeout: timeout, ..self.options.clone() };
        Ok(Nccl::new(host, self.ordinal(), &options)?)
    }

    /// Host memory, of the group on the host.
    fn alloc_bytes(&self, len: usize) -> Result<GroupMemory> {
        self.host.alloc_bytes(len)
    }

    fn failure(&self, call: Call) -> Option<Error> {
        self.healthy(call).err()
    }

    fn poison(&self, error: &Error) {
        watchdog::fail(&self.comm, error.clone());
    }

    fn beside(&self, line: u64, name: &str) -> Option<Beside> {
        self.host.beside(line, name)
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.comm.clone().retire();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::World;

    fn card(uuid: u8, version: i32) -> Result<Card, String> {
        Ok(Card { uuid: [uuid; 16], version })
    }

    #[test]
    fn ranks_agree_only_if_each_has_a_gpu_of_its_own_and_all_the_same_nccl() {
        World::run(3, |comm| {
            let host: &dyn Communicator = &*comm;
            let rank_of = |cards: &[_]| match agree(host, cards) {
                Ok(()) => None,
                Err(Error::Nccl { rank, .. }) => Some(rank),
                Err(error) => panic!("{error}"),
            };
            assert_eq!(rank_of(&[card(1, 22809), card(2, 22809), card(3, 22809)]), None);
            assert_eq!(rank_of(&[card(1, 22809), card(2, 22809), card(1, 22809)]), Some(2));
            assert_eq!(rank_of(&[card(1, 22809), card(2, 22809), card(3, 23000)]), Some(2));
            assert_eq!(rank_of(&[card(1, 22809), Err("no GPU".into()), card(3, 22809)]), Some(1));
            Ok(())
        })
        .unwrap();
    }
}
