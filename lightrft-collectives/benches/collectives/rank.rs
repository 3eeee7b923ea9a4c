//! One of our ranks: takes orders from the bench and answers with the time of each iteration

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::ops::{Deref, DerefMut};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use half::bf16;
use lightrft_collectives::{
    Communicator, CommunicatorExt, Element, Error as Failure, GroupBuffer, ReduceOp, Rendezvous, Result,
    Transport,
};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::cases::Type;
use crate::failure::Fault;

type Comm = Arc<dyn Communicator>;

/// Shorter than the bench's own patience, so that a hang is explained.
const TIMEOUT: Duration = Duration::from_secs(15);

/// How our ranks exchange data, and where their buffers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Shared memory, the caller's own buffers.
    Shm,
    /// Shared memory, buffers from the group's heap.
    Heap,
    /// TCP over loopback.
    Tcp,
}

impl Way {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        [("shm", Way::Shm), ("heap", Way::Heap), ("tcp", Way::Tcp)]
            .into_iter()
            .find(|(n, _)| *n == name)
            .map(|(_, w)| w)
    }
}

/// Something that can be timed again and again.
trait Work {
    fn call(&mut self) -> Result<()>;

    /// What is not timed after a call.
    fn after(&mut self) {}
}

impl<F: FnMut() -> Result<()>> Work for F {
    fn call(&mut self) -> Result<()> {
        self()
    }
}

/// Serves orders until the bench closes the connection.
pub(crate) fn serve(way: Way) -> Result<(), Box<dyn Error>> {
    let transport = if way == Way::Tcp { Transport::Tcp } else { Transport::Auto };
    let comm = Rendezvous::from_env()?.transport(transport).timeout(TIMEOUT).init()?;
    if std::env::var("LIGHTRFT_BENCH_PIN").as_deref() == Ok("cores") {
        pin(comm.rank())?;
    }
    let path = std::env::var("LIGHTRFT_BENCH_SOCKET")?;
    let mut answers = UnixStream::connect(path)?;
    let orders = BufReader::new(answers.try_clone()?);
    let version = concat!("lightrft-collectives ", env!("CARGO_PKG_VERSION"));
    writeln!(answers, "hello {} {} {version}", comm.rank(), std::process::id())?;

    let mut prepared: Option<(String, Box<dyn Work>)> = None;
    let mut answer = String::new();
    for line in orders.lines() {
        let line = line?;
        let (buffers, warmup, iterations) = parse(&line).ok_or_else(|| format!("no order: `{line}`"))?;
        if buffers.starts_with(Fault::Mismatch.name()) {
            writeln!(answers, "{}", reduce_until_they_differ(&comm))?;
            return Ok(());
        }
        if buffers.starts_with("failure") {
            writeln!(answers, "{}", reduce_until_lost(&comm))?;
            return Ok(());
        }
        if prepared.as_ref().is_none_or(|(last, _)| last != buffers) {
            // Frees the old buffers first.
            prepared = None;
        }
        let work = match &mut prepared {
            Some((_, work)) => work,
            None => match prepare(&comm, way, buffers)? {
                Some(work) => &mut prepared.insert((buffers.into(), work)).1,
                None => {
                    writeln!(answers, "unsupported {buffers}")?;
                    continue;
                }
            },
        };
        let times = measure(&comm, &mut **work, warmup, iterations)?;
        answer.clear();
        answer.push_str("ok");
        for time in times {
            write!(answer, " {}", time.as_nanos())?;
        }
        answer.push('\n');
        answers.write_all(answer.as_bytes())?;
    }
    Ok(())
}

/// This thread only, and after joining, as the peers' ranks do: the crate's own threads go where there is room.
fn pin(rank: usize) -> Result<(), Box<dyn Error>> {
    let allowed = sched_getaffinity(None)?;
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).collect();
    let mut mine = CpuSet::new();
    mine.set(cores[rank % cores.len()]);
    Ok(sched_setaffinity(None, &mine)?)
}

/// The buffers' description, the warm-up and the iterations of an order.
fn parse(line: &str) -> Option<(&str, usize, usize)> {
    let (rest, iterations) = line.rsplit_once(' ')?;
    let (buffers, warmup) = rest.rsplit_once(' ')?;
    Some((buffers, warmup.parse().ok()?, iterations.parse().ok()?))
}

fn measure(comm: &Comm, work: &mut dyn Work, warmup: usize, iterations: usize) -> Result<Vec<Duration>> {
    comm.barrier()?;
    for _ in 0..warmup {
        work.call()?;
        work.after();
    }
    comm.barrier()?;
    let mut times = Vec::with_capacity(iterations);
    for _ in 0..iterations {
        let begin = Instant::now();
        work.call()?;
        times.push(begin.elapsed());
        work.after();
    }
    Ok(times)
}

/// Calls until a rank is lost; then `lost RANK MESSAGE`, with `-` for the rank if the error names none.
fn reduce_until_lost(comm: &Comm) -> String {
    let mut data = vec![1f32; 1 << 18];
    loop {
        match comm.all_reduce(&mut data, ReduceOp::Max) {
            Ok(()) => {}
            Err(error @ Failure::PeerLost { rank, .. }) => return format!("lost {rank} {error}"),
            Err(error) => return format!("lost - {error}"),
        }
    }
}

/// Calls until the last rank makes another call than the others; then `lost RANK NANOSECONDS` of the call that failed, with `-`
/// for the rank if the error does not name it.
fn reduce_until_they_differ(comm: &Comm) -> String {
    let mut data = vec![1f32; 1 << 10];
    let culprit = comm.world_size() - 1;
    for call in 0.. {
        let other = call == 100 && comm.rank() == culprit;
        let begin = Instant::now();
        match comm.all_reduce(&mut data, if other { ReduceOp::Min } else { ReduceOp::Max }) {
            Ok(()) => {}
            Err(Failure::Mismatch { rank, other, .. }) if rank == culprit || other == culprit => {
                return format!("lost {culprit} {}", begin.elapsed().as_nanos());
            }
            Err(_) => break,
        }
    }
    "lost - 0".into()
}

/// Buffers and call for `OP DTYPE COUNT`, its results checked once; `None` if there is no such thing.
fn prepare(comm: &Comm, way: Way, buffers: &str) -> Result<Option<Box<dyn Work>>, Box<dyn Error>> {
    let words: Vec<&str> = buffers.split(' ').collect();
    let [op, dtype, count] = words[..] else { return Ok(None) };
    let (dtype, count) = (Type::parse(dtype).ok_or("no such type")?, count.parse()?);
    let comm = comm.clone();
    if way == Way::Heap
        && ["subgroup", "barrier", "all_gather_object", "status_dict", "status_dict_fused"].contains(&op)
    {
        return Ok(None);
    }
    Ok(match (op, dtype) {
        ("subgroup", _) => Some(Box::new(Subgroups { comm, made: None })),
        ("barrier", _) => Some(Box::new(move || comm.barrier())),
        ("all_gather_object", _) => Some(Box::new(objects(comm, count))),
        ("status_dict", _) => Some(Box::new(per_key(comm, status(count)))),
        ("status_dict_fused", _) => Some(Box::new(fused(comm, status(count)))),
        (_, Type::F32) => over_buffers::<f32>(comm, way, op, count)?,
        (_, Type::BF16) => over_buffers::<bf16>(comm, way, op, count)?,
    })
}

struct Subgroups {
    comm: Comm,
    made: Option<Comm>,
}

impl Work for Subgroups {
    fn call(&mut self) -> Result<()> {
        let ranks: Vec<usize> = (0..self.comm.world_size()).collect();
        self.made = self.comm.subgroup(&ranks)?;
        Ok(())
    }

    fn after(&mut self) {
        self.made = None;
    }
}

fn objects(comm: Comm, count: usize) -> impl FnMut() -> Result<()> {
    let tokens: Vec<Vec<i64>> =
        (0..count as i64).map(|row| (0..1024).map(|i| row * 31 + i).collect()).collect();
    move || comm.all_gather_object(&tokens).map(drop)
}

fn status(keys: usize) -> BTreeMap<String, f32> {
    (0..keys).map(|i| (format!("loss/{i:02}"), i as f32)).collect()
}

/// A call per key, which is what trainers written for torch do.
fn per_key(comm: Comm, status: BTreeMap<String, f32>) -> impl FnMut() -> Result<()> {
    move || {
        for value in status.values() {
            let mut scalar = [*value];
            comm.all_reduce(&mut scalar, ReduceOp::Sum)?;
            std::hint::black_box(scalar);
        }
        Ok(())
    }
}

/// One call for the whole map, which also makes sure that all ranks have the same keys.
fn fused(comm: Comm, mut status: BTreeMap<String, f32>) -> impl FnMut() -> Result<()> {
    move || comm.all_reduce_map(&mut status, ReduceOp::Mean)
}

/// A cache line. Buffers begin on one, as torch's tensors do: where they begin changes how fast they are copied.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u64; 8]);

/// A rank's buffer.
enum Memory<T> {
    /// That many elements of these lines.
    Own(Vec<Line>, usize),
    Heap(GroupBuffer<T>),
}

impl<T: Element> Deref for Memory<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Memory::Own(lines, len) => &bytemuck::cast_slice(lines)[..*len],
            Memory::Heap(data) => data,
        }
    }
}

impl<T: Element> DerefMut for Memory<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Memory::Own(lines, len) => &mut bytemuck::cast_slice_mut(lines)[..*len],
            Memory::Heap(data) => data,
        }
    }
}

/// The buffers of a call; a call in place has only an output.
struct Buffers<T> {
    comm: Comm,
    input: Memory<T>,
    output: Memory<T>,
}

type Call<T> = fn(&mut Buffers<T>) -> Result<()>;

/// A number that small whole numbers can be turned into.
trait Number: Element + From<i8> + std::ops::Add<Output = Self> {}

impl<T: Element + From<i8> + std::ops::Add<Output = T>> Number for T {}

/// Small whole numbers, whose sums over ranks are exact in every type.
fn value<T: Number>(rank: usize, i: usize) -> T {
    T::from(((i + 3 * rank) % 5) as i8)
}

impl<T: Number> Buffers<T> {
    fn new(comm: Comm, way: Way, input: usize, output: usize) -> Result<Self> {
        let memory = |len: usize| {
            let mut memory = match way {
                Way::Heap => Memory::Heap(comm.alloc(len)?),
                Way::Shm | Way::Tcp => {
                    let lines = (len * size_of::<T>()).div_ceil(size_of::<Line>());
                    Memory::Own(vec![Line([0; 8]); lines], len)
                }
            };
            let (rank, data) = (comm.rank(), &mut *memory);
            data.iter_mut().enumerate().for_each(|(i, x)| *x = value(rank, i));
            Ok(memory)
        };
        let (input, output) = (memory(input)?, memory(output)?);
        Ok(Buffers { comm, input, output })
    }

    /// Whether the first call's result is what it should be.
    fn is_right(&self, op: &str) -> bool {
        let (rank, world) = (self.comm.rank(), self.comm.world_size());
        let sum = |i: usize| (1..world).fold(value::<T>(0, i), |sum, r| sum + value(r, i));
        let part = self.output.len() / world;
        let expected = |i: usize| match op {
            "all_reduce" => sum(i),
            "broadcast" => value(0, i),
            "all_gather" => value(i / part, i % part),
            "reduce_scatter" => sum(rank * self.output.len() + i),
            _ => value(i / part, rank * part + i % part),
        };
        self.output.iter().enumerate().all(|(i, x)| *x == expected(i))
    }
}

/// The call `op` on buffers of `count` elements; `None` if there is no such call.
fn over_buffers<T: Number>(
    comm: Comm,
    way: Way,
    op: &str,
    count: usize,
) -> Result<Option<Box<dyn Work>>, Box<dyn Error>> {
    let part = count / comm.world_size();
    let (call, input, output): (Call<T>, _, _) = match op {
        "all_reduce" => (|b| b.comm.all_reduce(&mut b.output, ReduceOp::Sum), 0, count),
        "broadcast" => (|b| b.comm.broadcast(&mut b.output, 0), 0, count),
        "all_gather" => (|b| b.comm.all_gather(&b.input, &mut b.output), part, count),
        "reduce_scatter" => (|b| b.comm.reduce_scatter(&b.input, &mut b.output, ReduceOp::Sum), count, part),
        "all_to_all" => (|b| b.comm.all_to_all(&b.input, &mut b.output), count, count),
        _ => return Ok(None),
    };
    let mut buffers = Buffers::new(comm, way, input, output)?;
    // The right result first: a fast wrong one is worth nothing.
    call(&mut buffers)?;
    if !buffers.is_right(op) {
        let rank = buffers.comm.rank();
        return Err(format!("rank {rank}: {op} of {count} elements gave a wrong result").into());
    }
    // From then on zeros, which stay zeros however often they are summed.
    buffers.input.fill(T::zeroed());
    buffers.output.fill(T::zeroed());
    Ok(Some(Box::new(move || call(&mut buffers))))
}
