//! One of our ranks: takes orders from the bench and answers with the time of each iteration

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use half::bf16;
use lightrft_collectives::{Communicator, CommunicatorExt, Element, ReduceOp, Rendezvous, Result, Transport};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::cases::Type;

type Comm = Arc<dyn Communicator>;

/// Shorter than the bench's own patience, so that a hang is explained.
const TIMEOUT: Duration = Duration::from_secs(15);

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
pub(crate) fn serve(transport: Transport) -> Result<(), Box<dyn Error>> {
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
    for line in orders.lines() {
        let line = line?;
        let (buffers, warmup, iterations) = parse(&line).ok_or_else(|| format!("no order: `{line}`"))?;
        if prepared.as_ref().is_none_or(|(last, _)| last != buffers) {
            // Frees the old buffers first.
            prepared = None;
        }
        let work = match &mut prepared {
            Some((_, work)) => work,
            None => match prepare(&comm, buffers)? {
                Some(work) => &mut prepared.insert((buffers.into(), work)).1,
                None => {
                    writeln!(answers, "unsupported {buffers}")?;
                    continue;
                }
            },
        };
        let times = measure(&comm, &mut **work, warmup, iterations)?;
        let words: Vec<String> = times.iter().map(|time| time.as_nanos().to_string()).collect();
        writeln!(answers, "ok {}", words.join(" "))?;
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

/// Buffers and call for `OP DTYPE COUNT`, its results checked once; `None` if there is no such thing.
fn prepare(comm: &Comm, buffers: &str) -> Result<Option<Box<dyn Work>>, Box<dyn Error>> {
    let words: Vec<&str> = buffers.split(' ').collect();
    let [op, dtype, count] = words[..] else { return Ok(None) };
    let (dtype, count) = (Type::parse(dtype).ok_or("no such type")?, count.parse()?);
    let comm = comm.clone();
    Ok(match (op, dtype) {
        ("subgroup", _) => Some(Box::new(Subgroups { comm, made: None })),
        ("barrier", _) => Some(Box::new(move || comm.barrier())),
        ("all_gather_object", _) => Some(Box::new(objects(comm, count))),
        ("status_dict", _) => Some(Box::new(per_key(comm, status(count)))),
        ("status_dict_fused", _) => Some(Box::new(fused(comm, status(count)))),
        (_, Type::F32) => over_buffers::<f32>(comm, op, count)?,
        (_, Type::BF16) => over_buffers::<bf16>(comm, op, count)?,
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

fn fused(comm: Comm, status: BTreeMap<String, f32>) -> impl FnMut() -> Result<()> {
    move || {
        let mut values: Vec<f32> = status.values().copied().collect();
        comm.all_reduce(&mut values, ReduceOp::Sum)?;
        let reduced: BTreeMap<String, f32> = status.keys().cloned().zip(values).collect();
        std::hint::black_box(reduced);
        Ok(())
    }
}

/// Small whole numbers, whose sums over ranks are exact in every type.
fn value<T: Element + From<i8>>(rank: usize, i: usize) -> T {
    T::from(((i + 3 * rank) % 5) as i8)
}

fn filled<T: Element + From<i8>>(rank: usize, elements: usize) -> Vec<T> {
    (0..elements).map(|i| value(rank, i)).collect()
}

/// Zeros in memory that has been written: a page of zeros never written is everyone's, and always in cache.
fn written<T: Element + From<i8>>(elements: usize) -> Vec<T> {
    let mut memory = vec![T::from(1); elements];
    memory.fill(T::zeroed());
    memory
}

fn over_buffers<T: Element + From<i8> + std::ops::Add<Output = T>>(
    comm: Comm,
    op: &str,
    count: usize,
) -> Result<Option<Box<dyn Work>>, Box<dyn Error>> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let part = count / world;
    let sum = |i: usize| (1..world).fold(value::<T>(0, i), |sum, r| sum + value(r, i));
    // The right result first: a fast wrong one is worth nothing.
    let (data, right) = match op {
        "all_reduce" => {
            let mut data = filled(rank, count);
            comm.all_reduce(&mut data, ReduceOp::Sum)?;
            let right = (0..count).all(|i| data[i] == sum(i));
            (data, right)
        }
        "broadcast" => {
            let mut data = filled::<T>(rank, count);
            comm.broadcast(&mut data, 0)?;
            let right = (0..count).all(|i| data[i] == value(0, i));
            (data, right)
        }
        "all_gather" => {
            let mut output = written::<T>(count);
            comm.all_gather(&filled(rank, part), &mut output)?;
            let right = (0..count).all(|i| output[i] == value(i / part, i % part));
            (output, right)
        }
        "reduce_scatter" => {
            let mut output = written(part);
            comm.reduce_scatter(&filled::<T>(rank, count), &mut output, ReduceOp::Sum)?;
            let right = (0..part).all(|i| output[i] == sum(rank * part + i));
            (output, right)
        }
        "all_to_all" => {
            let mut output = written::<T>(count);
            comm.all_to_all(&filled(rank, count), &mut output)?;
            let right = (0..count).all(|i| output[i] == value(i / part, rank * part + i % part));
            (output, right)
        }
        _ => return Ok(None),
    };
    if !right {
        return Err(format!("rank {rank}: {op} of {count} elements gave a wrong result").into());
    }
    drop(data);
    Ok(Some(match op {
        "all_reduce" => {
            let mut data = written::<T>(count);
            Box::new(move || comm.all_reduce(&mut data, ReduceOp::Sum))
        }
        "broadcast" => {
            let mut data = written::<T>(count);
            Box::new(move || comm.broadcast(&mut data, 0))
        }
        "all_gather" => {
            let (input, mut output) = (written::<T>(part), written(count));
            Box::new(move || comm.all_gather(&input, &mut output))
        }
        "reduce_scatter" => {
            let (input, mut output) = (written::<T>(count), written(part));
            Box::new(move || comm.reduce_scatter(&input, &mut output, ReduceOp::Sum))
        }
        _ => {
            let (input, mut output) = (written::<T>(count), written(count));
            Box::new(move || comm.all_to_all(&input, &mut output))
        }
    }))
}
