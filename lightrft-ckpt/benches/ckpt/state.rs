//! The state that is saved: 64 tensors of f32, of numbers that no disk can compress

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use lightrft_ckpt::{
    Alone, Checkpoints, FileSystem, Part, Region, Restore, Rotation, SaveReport, Saver, Snapshot, Wanted,
};

const TENSORS: usize = 64;
const COLUMNS: usize = 1024;

/// The state, and memory of the same shape that loads end in.
pub(crate) struct State {
    shape: [usize; 2],
    tensors: Vec<(String, Vec<f32>)>,
    into: Vec<Vec<f32>>,
}

impl State {
    /// A state of `mib` MiB.
    pub(crate) fn new(mib: usize) -> Self {
        let shape = [(mib << 20) / 4 / TENSORS / COLUMNS, COLUMNS];
        let elems = shape[0] * shape[1];
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            // 23 random bits below an exponent of one: a number of 1..2.
            f32::from_bits(0x3f80_0000 | (random >> 41) as u32)
        };
        let tensor = |i| (format!("layers.{i}.weight"), (0..elems).map(|_| next()).collect());
        let tensors = (0..TENSORS).map(tensor).collect();
        // Written to, so that the pages are there before anything is timed.
        State { shape, tensors, into: vec![vec![1.0; elems]; TENSORS] }
    }

    pub(crate) fn bytes(&self) -> u64 {
        (TENSORS * self.shape[0] * self.shape[1] * 4) as u64
    }

    /// The part of the state that one rank of `world` holds: an even range of every tensor.
    pub(crate) fn snapshot(&self, step: u64, rank: usize, world: usize) -> Snapshot<'_> {
        let mut snapshot = Snapshot::of_step(step);
        for (name, elements) in &self.tensors {
            let mine = share(elements.len(), rank, world);
            let region = Region::Flat(mine.clone());
            snapshot.parts.push(Part::new(name.as_str(), &self.shape[..], region, &elements[mine]));
        }
        snapshot
    }

    /// Saves all of it.
    pub(crate) fn save(&self, saver: &Saver) -> lightrft_ckpt::Result<SaveReport> {
        saver.save(&Alone, &self.snapshot(1, 0, 1), &Rotation::KEEP_ALL)
    }

    /// Finds the newest checkpoint and loads all of it, verified.
    pub(crate) fn load(&mut self, fs: Arc<dyn FileSystem>, dir: &Path) -> lightrft_ckpt::Result<()> {
        let at = Checkpoints::open_on(fs, dir);
        at.restore(&Alone, &Restore::default(), self, |state, _| Ok(state.wanted())).map(drop)
    }

    fn wanted(&mut self) -> Vec<Wanted<'_>> {
        let State { shape, tensors, into } = self;
        let tensors = tensors.iter().zip(into);
        tensors.map(|((name, _), into)| Wanted::new(name.as_str(), &shape[..], Region::Whole, into)).collect()
    }

    /// Copies the state once with so many threads, as whoever wants to go on training must at least.
    pub(crate) fn copy(&mut self, threads: usize) {
        let each = TENSORS.div_ceil(threads);
        let copy = |from: &[(String, Vec<f32>)], into: &mut [Vec<f32>]| {
            from.iter().zip(into).for_each(|((_, from), into)| into.copy_from_slice(from));
        };
        let mut shares = self.tensors.chunks(each).zip(self.into.chunks_mut(each));
        let own = shares.next();
        thread::scope(|scope| {
            for (from, into) in shares {
                scope.spawn(move || copy(from, into));
            }
            if let Some((from, into)) = own {
                copy(from, into);
            }
        });
    }

    /// Sees to it that the last load brought what was saved, and forgets it.
    pub(crate) fn check(&mut self) -> Result<(), Box<dyn Error>> {
        for ((name, saved), into) in self.tensors.iter().zip(&mut self.into) {
            if saved != into {
                return Err(format!("what was loaded of {name} is not what was saved").into());
            }
            into.fill(1.0);
        }
        Ok(())
    }

    /// The shape of each tensor.
    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Names and elements of the tensors.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, &[f32])> {
        self.tensors.iter().map(|(name, elements)| (name.as_str(), &elements[..]))
    }
}

/// What rank `rank` of `world` holds of so many elements.
pub(crate) fn share(elems: usize, rank: usize, world: usize) -> std::ops::Range<usize> {
    elems * rank / world..elems * (rank + 1) / world
}
