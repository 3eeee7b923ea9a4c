//! How the ranks of one machine come to share memory: all of them map it, or none does.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use super::hierarchy::Hierarchy;
use super::segment::{Mapping, Segment};
use super::shm::{Cores, HeapMemory, Shm};
use super::topology::Topology;
use super::{Group, Path, Transport};
use crate::communicator::CommunicatorExt;
use crate::error::Result;
use crate::op::ReduceOp;

/// What each rank tells the others when they make their shared memory.
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Offer {
    /// The memory file that it holds open; -1 for none.
    file: i64,
    /// Where in its own memory it has a word for the others to try to read.
    word: u64,
    cores: Cores,
}

/// A memory file as its maker tells the others of it; -1 for none.
fn told<T>(made: Option<&io::Result<(T, OwnedFd)>>) -> i64 {
    made.and_then(|made| made.as_ref().ok()).map_or(-1, |(_, file)| file.as_raw_fd().into())
}

/// The maker's mapping, or one opened by what its maker told.
fn made_or_opened<T>(
    made: Option<io::Result<(T, OwnedFd)>>,
    told: i64,
    open: impl FnOnce(u64) -> io::Result<T>,
) -> io::Result<(T, Option<OwnedFd>)> {
    match made {
        Some(made) => made.map(|(mapped, file)| (mapped, Some(file))),
        None => {
            let file = u64::try_from(told).map_err(|_| io::Error::other("its maker could not make it"))?;
            open(file).map(|mapped| (mapped, None))
        }
    }
}

impl Group {
    /// Goes over to shared memory among members of one machine.
    pub(super) fn share(&self) -> Result<()> {
        if self.world.transport == Transport::Auto {
            let machines: Vec<&str> = self.ranks.iter().map(|rank| &*self.world.cards[*rank].host).collect();
            let path = if machines.iter().all(|machine| *machine == machines[0]) {
                self.share_memory(0..machines.len())?.flatten().map_or(Path::Flat, Path::Shm)
            } else if let Some(topology) = Topology::new(&machines, self.rank) {
                let local = self.share_memory(topology.host())?;
                let hierarchical = |local| Path::Hierarchical(Hierarchy::new(topology, local));
                local.map_or(Path::Flat, hierarchical)
            } else {
                Path::Flat
            };
            self.channels().path = path;
        }
        Ok(())
    }

    /// Makes and maps shared memory of the `members` on this machine, while those on others make theirs. `None`, on all
    /// ranks alike, if one of them cannot; `Some(None)` for a rank alone on its machine.
    fn share_memory(&self, members: Range<usize>) -> Result<Option<Option<Shm>>> {
        let (nonce, world, local) = (self.world.shared.nonce ^ self.id, self.ranks.len(), members.len());
        let place = self.rank - members.start;
        let pids: Vec<u32> = self.ranks[members.clone()].iter().map(|r| self.world.cards[*r].pid).collect();
        let made = (place == 0 && local > 1).then(|| Segment::create(nonce, local, 0));
        // A word of this process's own memory, for the others to try to read.
        let word = Box::new(nonce);
        let (file, word_at) = (told(made.as_ref()), std::ptr::from_ref(&*word) as u64);
        let offer = Offer { file, word: word_at, cores: Cores::mine() };
        let mut offers = vec![Offer::default(); world];
        self.all_gather::<u8>(bytemuck::bytes_of(&offer), bytemuck::cast_slice_mut(&mut offers))?;
        let offers = &offers[members];
        let mapped = if local == 1 {
            Ok(None)
        } else {
            let open = |fd| Segment::open(pids[0], fd, nonce, local, place);
            made_or_opened(made, offers[0].file, open).map(Some)
        };
        if let Err(error) = &mapped {
            tracing::info!(group = self.name, %error, "no shared memory, taking TCP");
        }
        let reads = (0..local).all(|r| r == place || Shm::can_read(pids[r], offers[r].word, nonce));
        let mut all = [u8::from(mapped.is_ok()), u8::from(reads)];
        self.all_reduce(&mut all, ReduceOp::Min)?;
        drop(word);
        let shared = |(segment, _)| {
            let cores: Vec<Cores> = offers.iter().map(|offer| offer.cores).collect();
            let mut shm = Shm::new(segment, pids, Cores::of_all(&cores));
            shm.reads_peers(all[1] == 1);
            shm
        };
        Ok(mapped.ok().filter(|_| all[0] == 1).map(|mapped| mapped.map(shared)))
    }

    /// Maps a file for the group's heap on all ranks; `None`, on all ranks alike, if one of them cannot.
    pub(super) fn share_region(&self, len: usize) -> Result<Option<HeapMemory>> {
        let bytes = {
            let channels = self.channels();
            let Path::Shm(shm) = &channels.path else { return Ok(None) };
            shm.region_bytes(len)
        };
        let made = (self.rank == 0).then(|| Mapping::create("lightrft-heap", bytes));
        let mut file = [told(made.as_ref())];
        self.broadcast(&mut file, 0)?;
        let pid = self.world.cards[self.ranks[0]].pid;
        let mapped = made_or_opened(made, file[0], |fd| Mapping::open(pid, fd, bytes));
        if let Err(error) = &mapped {
            tracing::warn!(group = self.name, len, %error, "no heap memory, taking ordinary memory");
        }
        let mut all_mapped = [u8::from(mapped.is_ok())];
        self.all_reduce(&mut all_mapped, ReduceOp::Min)?;
        let mut channels = self.channels();
        let mapping = mapped.ok().filter(|_| all_mapped == [1]).map(|(mapping, _)| mapping);
        let Path::Shm(shm) = &mut channels.path else { return Ok(None) };
        Ok(mapping.map(|mapping| shm.add_region(mapping, len)))
    }
}
