//! The crate's own kernels, compiled once for each GPU, and their launches over checked lengths
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use lightrft_collectives::Result as GroupResult;
use lightrft_collectives::nccl::Stream;
use lightrft_collectives::nccl::driver::{Argument, Kernel, Program};

use crate::optim::Scalars;
use crate::precision::{Combine, Precision};

/// Their source.
pub(super) const SOURCE: &str = include_str!("kernels.cu");

/// Products and sums are rounded apart, as on the host.
const OPTIONS: [&str; 1] = ["--fmad=false"];

/// Threads of a block; the kernels count on it.
const THREADS: u32 = 256;
/// Most blocks of a pass whose threads go on to further elements.
const BLOCKS: u64 = 4096;
/// Elements that one block sums the squares of.
const PIECE: u64 = 1 << 16;

/// The kernels of one GPU.
#[derive(Debug)]
pub(super) struct Kernels {
    /// By type of the target, of the source, and whether they add.
    combine: Vec<Kernel>,
    adamw: Kernel,
    blend: Kernel,
    swap: Kernel,
    squares: Kernel,
    add_partials: Kernel,
}

/// Elements in a GPU's memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) precision: Precision,
    pub(super) address: u64,
    pub(super) elems: usize,
}

fn number(precision: Precision) -> usize {
    match precision {
        Precision::F32 => 0,
        Precision::Bf16 => 1,
        Precision::F16 => 2,
    }
}

impl Kernels {
    /// Those of the GPU of `stream`, compiled when they are first asked for.
    pub(super) fn of(stream: &Stream) -> GroupResult<Arc<Kernels>> {
        static KERNELS: OnceLock<Mutex<HashMap<usize, Arc<Kernels>>>> = OnceLock::new();
        let mut kernels = KERNELS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = kernels.get(&stream.ordinal()) {
            return Ok(kernels.clone());
        }
        let program = Program::new(stream, SOURCE, &OPTIONS)?;
        let find = |name| program.kernel(stream, name);
        let combine = [
            [c"set_00", c"add_00"],
            [c"set_01", c"add_01"],
            [c"set_02", c"add_02"],
            [c"set_10", c"add_10"],
            [c"set_11", c"add_11"],
            [c"set_12", c"add_12"],
            [c"set_20", c"add_20"],
            [c"set_21", c"add_21"],
            [c"set_22", c"add_22"],
        ];
        let made = Arc::new(Kernels {
            combine: combine.into_iter().flatten().map(find).collect::<GroupResult<_>>()?,
            adamw: find(c"adamw")?,
            blend: find(c"blend")?,
            swap: find(c"swap")?,
            squares: find(c"squares")?,
            add_partials: find(c"add_partials")?,
        });
        kernels.insert(stream.ordinal(), made.clone());
        Ok(made)
    }

    /// Adds `from` to `into`, which is as long, or puts it there.
    ///
    /// # Safety
    /// Both are memory of the GPU of `stream`, `into` ours to write and `from` to read in turn on `stream`.
    pub(super) unsafe fn combine(
        &self,
        stream: &Stream,
        into: Run,
        from: Run,
        how: Combine,
    ) -> GroupResult<()> {
        let elems = into.elems.min(from.elems) as u64;
        if elems == 0 {
            return Ok(());
        }
        let adds = usize::from(how == Combine::Add);
        let kernel = self.combine[(number(into.precision) * 3 + number(from.precision)) * 2 + adds];
        let arguments =
            &mut [Argument::new(&into.address), Argument::new(&from.address), Argument::new(&elems)];
        // SAFETY: two addresses and a number, as it takes; each has at least so many elements of its type.
        unsafe { kernel.launch(stream, blocks(elems), THREADS, arguments) }
    }

    /// One step of AdamW over `elems` elements of each array. `runs` has `count` ends of intervals that cover them, and as
    /// many rules.
    ///
    /// # Safety
    /// As [`combine`](Self::combine): the arrays are f32, `grad` and `runs` are read, the others written.
    pub(super) unsafe fn adamw(
        &self,
        stream: &Stream,
        [param, grad, exp_avg, exp_avg_sq]: [u64; 4],
        elems: usize,
        (runs, count): (u64, usize),
        scalars: Scalars,
    ) -> GroupResult<()> {
        let (elems, count) = (elems as u64, count as u64);
        if elems == 0 || count == 0 {
            return Ok(());
        }
        let arguments = &mut [
            Argument::new(&param),
            Argument::new(&grad),
            Argument::new(&exp_avg),
            Argument::new(&exp_avg_sq),
            Argument::new(&elems),
            Argument::new(&runs),
            Argument::new(&count),
            Argument::new(&scalars),
        ];
        // SAFETY: in the kernel's order; `Scalars` has its layout. The rest is the caller's promise.
        unsafe { self.adamw.launch(stream, blocks(elems), THREADS, arguments) }
    }

    /// Moves `average` by `weight` towards `values`, which is as long.
    ///
    /// # Safety
    /// As [`combine`](Self::combine), both f32.
    pub(super) unsafe fn blend(
        &self,
        stream: &Stream,
        average: Run,
        values: Run,
        weight: f32,
    ) -> GroupResult<()> {
        let elems = average.elems.min(values.elems) as u64;
        if elems == 0 {
            return Ok(());
        }
        let (average, values) = (average.address, values.address);
        let arguments = &mut [
            Argument::new(&average),
            Argument::new(&values),
            Argument::new(&elems),
            Argument::new(&weight),
        ];
        // SAFETY: in the kernel's order. The rest is the caller's promise.
        unsafe { self.blend.launch(stream, blocks(elems), THREADS, arguments) }
    }

    /// Exchanges two arrays of one length.
    ///
    /// # Safety
    /// As [`combine`](Self::combine), both f32 and ours to write.
    pub(super) unsafe fn swap(&self, stream: &Stream, values: Run, others: Run) -> GroupResult<()> {
        let elems = values.elems.min(others.elems) as u64;
        if elems == 0 {
            return Ok(());
        }
        let arguments =
            &mut [Argument::new(&values.address), Argument::new(&others.address), Argument::new(&elems)];
        // SAFETY: in the kernel's order. The rest is the caller's promise.
        unsafe { self.swap.launch(stream, blocks(elems), THREADS, arguments) }
    }

    /// Partial sums that `elems` elements have.
    pub(super) fn partials(elems: usize) -> usize {
        elems.div_ceil(PIECE as usize)
    }

    /// Writes the partial sums of squares of f32 `values`.
    ///
    /// # Safety
    /// As [`combine`](Self::combine): `partial` is the address of [`partials`](Self::partials) f64 to write.
    pub(super) unsafe fn squares(&self, stream: &Stream, values: Run, partial: u64) -> GroupResult<()> {
        let elems = values.elems as u64;
        if elems == 0 {
            return Ok(());
        }
        let arguments = &mut [
            Argument::new(&values.address),
            Argument::new(&elems),
            Argument::new(&PIECE),
            Argument::new(&partial),
        ];
        // SAFETY: in the kernel's order; a block for each partial sum. The rest is the caller's promise.
        unsafe { self.squares.launch(stream, Self::partials(values.elems) as u32, THREADS, arguments) }
    }

    /// Adds `count` partial sums to the one f64 at `total`.
    ///
    /// # Safety
    /// As [`combine`](Self::combine).
    pub(super) unsafe fn add_partials(
        &self,
        stream: &Stream,
        (partial, count): (u64, usize),
        total: u64,
    ) -> GroupResult<()> {
        let count = count as u64;
        let arguments = &mut [Argument::new(&partial), Argument::new(&count), Argument::new(&total)];
        // SAFETY: in the kernel's order. The rest is the caller's promise.
        unsafe { self.add_partials.launch(stream, 1, THREADS, arguments) }
    }
}

/// Blocks for a pass over so many elements.
fn blocks(elems: u64) -> u32 {
    elems.div_ceil(u64::from(THREADS)).min(BLOCKS) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use lightrft_collectives::Error;
    use lightrft_collectives::nccl::driver::compile;

    #[test]
    fn the_kernels_compile_for_every_generation_that_has_bf16() {
        for capability in [[8, 0], [8, 6], [9, 0], [10, 0]] {
            match compile(SOURCE, capability, &OPTIONS) {
                Ok(image) => assert!(image.len() > 1000, "{capability:?}: {} bytes", image.len()),
                Err(Error::Library { reason, .. }) if reason.contains("cannot open shared object") => {
                    return eprintln!(
                        "SKIPPED: NVRTC is not on this machine, nothing was compiled ({reason})"
                    );
                }
                Err(error) => panic!("{capability:?}: {error}"),
            }
        }
    }

    #[test]
    fn the_compilers_words_are_in_the_error() {
        match compile("extern \"C\" __global__ void f() { undeclared(); }", [9, 0], &OPTIONS) {
            Err(Error::Library { library: "NVRTC", reason }) if reason.contains("undeclared") => {}
            Err(Error::Library { reason, .. }) if reason.contains("cannot open shared object") => {
                eprintln!("SKIPPED: NVRTC is not on this machine ({reason})");
            }
            other => panic!("{other:?}"),
        }
    }
}
