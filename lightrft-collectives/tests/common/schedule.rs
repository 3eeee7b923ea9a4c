//! Schedules: endless sequences of calls and groups that all ranks draw alike from one seed

use lightrft_collectives::{Dtype, ReduceOp};

use super::random::Random;

/// Groups that exist at one time beside each other; none overlaps another. The world is family 0.
///
/// A mesh axis gives several groups at once, a rank list one.
#[derive(Clone, Debug)]
pub(crate) struct Family {
    /// Ranks of the world, in the order of their ranks in the group. All lists have one length.
    pub(crate) lines: Vec<Vec<usize>>,
}

impl Family {
    pub(crate) fn size(&self) -> usize {
        self.lines[0].len()
    }

    /// The group that `rank` of the world is in.
    pub(crate) fn line_of(&self, rank: usize) -> Option<&[usize]> {
        self.lines.iter().map(Vec::as_slice).find(|line| line.contains(&rank))
    }

    /// The groups of the ranks at `places` of each line.
    fn select(&self, places: &[Vec<usize>]) -> Family {
        let of = |line: &Vec<usize>| -> Vec<Vec<usize>> {
            places.iter().map(|places| places.iter().map(|p| line[*p]).collect()).collect()
        };
        Family { lines: self.lines.iter().flat_map(of).collect() }
    }
}

/// What all ranks do next. Families have numbers in the order in which they were made.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// A new family: in each group of `parent`, the group of these of its ranks.
    Split { parent: usize, members: Vec<usize> },
    /// A new family: in each group of `parent`, laid out as a mesh, the groups along one of its axes.
    Axis { parent: usize, sizes: Vec<usize>, axis: usize },
    /// Two new families: consecutive and strided groups of `size`.
    SubGroups { parent: usize, size: usize },
    /// All drop their ends of these groups.
    Leave { family: usize },
    /// Each rank takes so many bytes of its group's heap, in place of what it had taken before.
    Alloc { family: usize, bytes: usize },
    /// Each group makes this call.
    Call { family: usize, call: Call },
}

/// One call, as all members of a group make it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) kind: Kind,
    pub(crate) dtype: Dtype,
    /// Elements of one rank's part.
    pub(crate) count: usize,
    pub(crate) op: ReduceOp,
    /// A rank of the group.
    pub(crate) root: usize,
    /// What the ranks' values are drawn from.
    pub(crate) seed: u64,
}

/// The name of a call, as in `CommunicatorExt`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    AllReduce,
    AllReduceInto,
    Reduce,
    ReduceScatter,
    ReduceScatterInPlace,
    AllGather,
    AllGatherInPlace,
    AllGatherCounts,
    AllGatherV,
    Broadcast,
    Gather,
    Scatter,
    AllToAll,
    AllToAllV,
    Barrier,
    /// From the root to the rank after it; the others do nothing.
    SendRecv,
    /// Each rank to the next, even ranks sending first.
    Ring,
    AllGatherObject,
    GatherObject,
    BroadcastObject,
    ScatterObject,
}

impl Kind {
    pub(crate) const ALL: [Kind; 21] = [
        Kind::AllReduce,
        Kind::AllReduceInto,
        Kind::Reduce,
        Kind::ReduceScatter,
        Kind::ReduceScatterInPlace,
        Kind::AllGather,
        Kind::AllGatherInPlace,
        Kind::AllGatherCounts,
        Kind::AllGatherV,
        Kind::Broadcast,
        Kind::Gather,
        Kind::Scatter,
        Kind::AllToAll,
        Kind::AllToAllV,
        Kind::Barrier,
        Kind::SendRecv,
        Kind::Ring,
        Kind::AllGatherObject,
        Kind::GatherObject,
        Kind::BroadcastObject,
        Kind::ScatterObject,
    ];

    /// One operation of the seam over all ranks, whose signature tells it from the others.
    pub(crate) fn is_one_collective(self) -> bool {
        !matches!(
            self,
            Kind::SendRecv
                | Kind::Ring
                | Kind::AllGatherV
                | Kind::AllGatherObject
                | Kind::GatherObject
                | Kind::BroadcastObject
                | Kind::ScatterObject
        )
    }

    pub(crate) fn reduces(self) -> bool {
        matches!(
            self,
            Kind::AllReduce
                | Kind::AllReduceInto
                | Kind::Reduce
                | Kind::ReduceScatter
                | Kind::ReduceScatterInPlace
        )
    }

    pub(crate) fn has_root(self) -> bool {
        matches!(self, Kind::Reduce | Kind::Broadcast | Kind::Gather | Kind::Scatter)
    }

    /// Whether the element type is part of the call.
    pub(crate) fn has_data(self) -> bool {
        self.is_one_collective() && self != Kind::Barrier
    }
}

pub(crate) const DTYPES: [Dtype; 7] =
    [Dtype::F32, Dtype::F64, Dtype::BF16, Dtype::F16, Dtype::I32, Dtype::I64, Dtype::U8];

pub(crate) fn bytes_of(dtype: Dtype) -> usize {
    match dtype {
        Dtype::U8 => 1,
        Dtype::BF16 | Dtype::F16 => 2,
        Dtype::F32 | Dtype::I32 => 4,
        _ => 8,
    }
}

/// Byte counts at which some backend changes its way of doing things, in all or for each rank.
const EDGES: [usize; 9] = [32, 64, 4 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 4 << 20];

/// Families alive at one time: each holds connections and memory.
const MOST_FAMILIES: usize = 7;

/// Draws steps without end. Equal seeds and worlds give equal steps, on every rank.
#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    pub(crate) random: Random,
    pub(crate) families: Vec<Option<Family>>,
    /// Bytes of the largest part.
    largest: usize,
}

impl Schedule {
    pub(crate) fn new(seed: u64, world: usize, largest: usize) -> Self {
        let everyone = Family { lines: vec![(0..world).collect()] };
        Schedule { random: Random::new(seed), families: vec![Some(everyone)], largest }
    }

    pub(crate) fn family(&self, family: usize) -> &Family {
        self.families[family].as_ref().expect("a family that has not been left")
    }

    fn live(&self) -> Vec<usize> {
        (0..self.families.len()).filter(|f| self.families[*f].is_some()).collect()
    }

    /// A family of which no group is a single rank, if there is one; else the world.
    pub(crate) fn any_company(&mut self) -> usize {
        let live = self.live();
        let company: Vec<usize> = live.into_iter().filter(|f| self.family(*f).size() > 1).collect();
        if company.is_empty() { 0 } else { *self.random.pick(&company) }
    }

    /// The next step of all ranks.
    pub(crate) fn next(&mut self) -> Step {
        let live = self.live();
        let family = *self.random.pick(&live);
        let size = self.family(family).size();
        let choice = self.random.below(100);
        if choice < 6 && live.len() < MOST_FAMILIES {
            let members = self.random.some_of(size);
            let made = self.family(family).select(std::slice::from_ref(&members));
            self.families.push(Some(made));
            Step::Split { parent: family, members }
        } else if choice < 10 && live.len() < MOST_FAMILIES {
            let sizes = self.factors(size);
            let axis = self.random.below(sizes.len());
            let made = self.family(family).select(&lines(&sizes, axis));
            self.families.push(Some(made));
            Step::Axis { parent: family, sizes, axis }
        } else if choice < 12 && live.len() + 1 < MOST_FAMILIES {
            let part = self.divisor(size);
            for axis in [1, 0] {
                let made = self.family(family).select(&lines(&[size / part, part], axis));
                self.families.push(Some(made));
            }
            Step::SubGroups { parent: family, size: part }
        } else if choice < 17 && family != 0 {
            self.families[family] = None;
            Step::Leave { family }
        } else if choice < 21 {
            Step::Alloc { family, bytes: self.random.below(2 * size * self.largest) }
        } else {
            let call = self.call(size);
            Step::Call { family, call }
        }
    }

    /// A call of a group of `size` ranks.
    pub(crate) fn call(&mut self, size: usize) -> Call {
        let mut kind = *self.random.pick(&Kind::ALL);
        if size == 1 && matches!(kind, Kind::SendRecv | Kind::Ring) {
            kind = Kind::Barrier;
        }
        let dtype = *self.random.pick(&DTYPES);
        let ops: Vec<ReduceOp> = ReduceOp::ALL.into_iter().filter(|op| op.allows(dtype)).collect();
        Call {
            kind,
            dtype,
            count: self.count(dtype, size),
            op: *self.random.pick(&ops),
            root: self.random.below(size),
            seed: self.random.next(),
        }
    }

    /// A call that every backend makes as one operation over all ranks.
    pub(crate) fn collective(&mut self, size: usize) -> Call {
        loop {
            let call = self.call(size);
            if call.kind.is_one_collective() {
                return call;
            }
        }
    }

    fn count(&mut self, dtype: Dtype, size: usize) -> usize {
        let (random, element) = (&mut self.random, bytes_of(dtype));
        let count = match random.below(20) {
            0 => 0,
            1..=3 => 1,
            4..=8 => random.below(41),
            9..=12 => random.below(2000),
            // Around an edge of the whole, or of each rank's part.
            13..=17 => {
                let edge = *random.pick(&EDGES) / element / *random.pick(&[1, size]);
                (edge + random.below(3)).saturating_sub(1)
            }
            _ => random.below(self.largest / element),
        };
        count.min(self.largest / element)
    }

    fn divisor(&mut self, n: usize) -> usize {
        let divisors: Vec<usize> = (1..=n).filter(|d| n.is_multiple_of(*d)).collect();
        *self.random.pick(&divisors)
    }

    /// Up to three sizes whose product is `n`.
    fn factors(&mut self, n: usize) -> Vec<usize> {
        let first = self.divisor(n);
        if self.random.chance(50) {
            return vec![first, n / first];
        }
        let second = self.divisor(n / first);
        vec![first, second, n / first / second]
    }
}

/// The places along `axis` of a mesh, the last axis running fastest, for each choice of the others.
fn lines(sizes: &[usize], axis: usize) -> Vec<Vec<usize>> {
    let total: usize = sizes.iter().product();
    let stride: usize = sizes[axis + 1..].iter().product();
    let firsts = (0..total).filter(|place| (place / stride).is_multiple_of(sizes[axis]));
    firsts.map(|first| (0..sizes[axis]).map(|i| first + i * stride).collect()).collect()
}
