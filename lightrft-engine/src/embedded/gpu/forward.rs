//! One step through the decoder on a GPU
#![allow(unsafe_code)]

use std::collections::BTreeMap;

use lightrft_collectives::Result as DriverResult;
use lightrft_collectives::nccl::Stream;
use lightrft_collectives::nccl::driver::{Argument, Kernel};

use super::super::step::{Forward, Step};
use super::Gpu;
use super::blas::{Product, WORKSPACE_BYTES};
use super::graph::Graph;
use super::memory::{Block, Pinned, failed, wait};
use super::shape::{LayerPlan, Shape};
use crate::Result;

/// Most columns of one step while prompts are computed.
pub(in super::super) const STEP_COLUMNS: usize = 2048;

/// Columns of every product; the last one of a step is filled up.
pub(super) const WIDTH: usize = 256;

/// Threads of a block.
const THREADS: u32 = 256;

/// Memory that steps use again. It grows, and is cleared when it is taken.
#[derive(Debug)]
pub(super) struct Work {
    /// Columns that the activations have room for, a multiple of [`WIDTH`].
    columns: usize,
    residual: Block,
    /// What a product reads: a normed residual stream, attention's output, or a SwiGLU's.
    x: Block,
    qkv: Block,
    gate_up: Block,
    /// Cosine and sine of each column's angles.
    turns: Block,
    /// Logits of [`WIDTH`] columns.
    logits: Block,
    /// The numbers of a step: tokens, positions, tables, wanted columns, pages.
    numbers: Block,
    /// The page of columns that only fill a step up.
    spare_page: Block,
    /// The layers of steps of so many columns, with the weights and the memory of now.
    graphs: BTreeMap<usize, Recorded>,
    /// Where the weights of the graphs begin.
    weights: u64,
    staged: Pinned,
    /// Logits of all wanted columns.
    on_host: Pinned,
    frequencies: Block,
    workspace: Block,
}

/// What is known of a number of columns.
#[derive(Debug)]
enum Recorded {
    /// It was computed: all that is loaded at first use is loaded.
    Once,
    Ready(Graph),
    /// It could not be recorded.
    Never,
}

/// Where the numbers of a step lie.
#[derive(Clone, Copy, Debug)]
struct Numbers {
    pages: u64,
    tokens: u64,
    positions: u64,
    tables: u64,
    wanted: u64,
}

impl Work {
    pub(super) fn new(gpu: &Gpu) -> Result<Self> {
        let stream = &gpu.stream;
        let none = || Block::zeroed(stream, 0, "memory for a step");
        let bytes: Vec<u8> = gpu.frequencies.iter().flat_map(|f| f.to_ne_bytes()).collect();
        let mut frequencies = Block::zeroed(stream, bytes.len() as u64, "memory for a step")?;
        frequencies.write(0, &bytes)?;
        Ok(Self {
            columns: 0,
            residual: none()?,
            x: none()?,
            qkv: none()?,
            gate_up: none()?,
            turns: none()?,
            logits: Block::zeroed(stream, logit_bytes(&gpu.shape), "memory for logits")?,
            numbers: none()?,
            spare_page: Block::zeroed(stream, gpu.cache.page_bytes(), "memory for a step")?,
            graphs: BTreeMap::new(),
            weights: 0,
            staged: Pinned::new(stream, 0)?,
            on_host: Pinned::new(stream, 0)?,
            frequencies,
            workspace: Block::zeroed(stream, WORKSPACE_BYTES, "memory for products")?,
        })
    }

    /// Bytes that steps of so many columns will still take, apart from their numbers, with what `work` has.
    pub(super) fn missing_bytes(work: Option<&Self>, gpu: &Gpu, columns: usize) -> u64 {
        let columns = columns.next_multiple_of(WIDTH).saturating_sub(work.map_or(0, |work| work.columns));
        let activations = column_bytes(&gpu.shape).iter().sum::<u64>() * columns as u64;
        match work {
            Some(_) => activations,
            None => activations + logit_bytes(&gpu.shape) + gpu.cache.page_bytes() + WORKSPACE_BYTES,
        }
    }

    /// Makes room for the activations of so many columns.
    fn reserve(&mut self, stream: &Stream, shape: &Shape, columns: usize) -> Result<()> {
        let columns = columns.next_multiple_of(WIDTH);
        if columns <= self.columns {
            return Ok(());
        }
        let [residual, x, qkv, gate_up, turns] = column_bytes(shape);
        let block = |bytes| Block::zeroed(stream, columns as u64 * bytes, "memory for a step");
        // None of the old is kept beside the new.
        for old in [&mut self.residual, &mut self.x, &mut self.qkv, &mut self.gate_up, &mut self.turns] {
            *old = Block::zeroed(stream, 0, "memory for a step")?;
        }
        self.columns = 0;
        self.graphs.clear();
        self.residual = block(residual)?;
        self.x = block(x)?;
        self.qkv = block(qkv)?;
        self.gate_up = block(gate_up)?;
        self.turns = block(turns)?;
        self.columns = columns;
        Ok(())
    }
}

/// Bytes of one column: its residual stream, `x`, `qkv`, `gate_up`, turns.
fn column_bytes(shape: &Shape) -> [u64; 5] {
    let widest = shape.hidden.max(shape.queries()).max(shape.inner) as u64;
    let [hidden, qkv, inner, dim] = [shape.hidden, shape.qkv(), shape.inner, shape.dim].map(|n| n as u64);
    [4 * hidden, widest * shape.elements.bytes(), 4 * qkv, 4 * 2 * inner, 8 * (dim / 2)]
}

/// Bytes of the logits of [`WIDTH`] columns.
fn logit_bytes(shape: &Shape) -> u64 {
    (4 * WIDTH * shape.vocabulary) as u64
}

/// Pinned memory of at least so many bytes that no copy is under way with.
fn ready(pinned: &mut Pinned, stream: &Stream, bytes: usize) -> Result<()> {
    if pinned.bytes() < bytes || pinned.is_busy() {
        *pinned = Pinned::new(stream, bytes.next_power_of_two())?;
    }
    Ok(())
}

/// The model on a GPU.
#[derive(Debug)]
pub(in super::super) struct GpuForward<'a> {
    gpu: &'a mut Gpu,
    /// The GPU's own, taken out of it.
    work: &'a mut Work,
    /// Where the weights begin.
    weights: u64,
    most_pages: usize,
}

impl<'a> GpuForward<'a> {
    pub(super) fn new(gpu: &'a mut Gpu, work: &'a mut Work, weights: u64, most_pages: usize) -> Result<Self> {
        // SAFETY: it is freed in the order of the stream, and named anew before the next product.
        unsafe { gpu.blas.use_workspace(&work.workspace) }
            .map_err(failed(&gpu.stream, "naming memory for products"))?;
        if work.weights != weights {
            work.graphs.clear();
            work.weights = weights;
        }
        Ok(Self { gpu, work, weights, most_pages })
    }

    /// Takes memory, and gives the GPU the numbers of the step, filled up to `filled` columns and as many wanted ones.
    fn prepare(&mut self, step: &Step<'_>, filled: usize) -> Result<Numbers> {
        let Gpu { stream, cache, shape, .. } = &mut *self.gpu;
        cache.grow(stream, step.pages, self.most_pages)?;
        for (from, to) in step.copies {
            let (from, to, bytes) = (cache.address(*from), cache.address(*to), cache.page_bytes() as usize);
            // SAFETY: two pages of the cache, which this stream alone uses.
            unsafe { stream.gpu().copy(to, from, bytes, stream.handle().0) }
                .map_err(failed(stream, "copying a page"))?;
        }
        self.work.reserve(stream, shape, step.columns.len())?;

        // Each kind of number has room for whole products, so that it lies at the same place in many steps.
        let room = filled.next_multiple_of(WIDTH);
        let pages: usize = 1 + step.tables.iter().map(|table| table.len()).sum::<usize>();
        let words = 4 * room + 2 * pages;
        ready(&mut self.work.staged, stream, 4 * words)?;
        if self.work.numbers.bytes() < 4 * words as u64 {
            let bytes = (4 * words).next_power_of_two() as u64;
            self.work.graphs.clear();
            self.work.numbers = Block::zeroed(stream, bytes, "memory for a step")?;
        }
        // The first page is the spare one.
        let mut starts = Vec::with_capacity(step.tables.len());
        let mut next = 1_u32;
        for table in step.tables {
            starts.push(next);
            next += table.len() as u32;
        }
        let (numbers, addresses) = self.work.staged.words_mut().split_at_mut(4 * room);
        // Columns that fill up are the first token of nobody.
        numbers.fill(0);
        for (at, column) in step.columns.iter().enumerate() {
            numbers[at] = column.token;
            numbers[room + at] = column.position as u32;
            numbers[2 * room + at] = starts[column.sequence];
        }
        // A row is normed once: those that fill up are the ones that nobody wants.
        let mut unwanted = vec![true; filled];
        step.wanted.iter().for_each(|column| unwanted[*column] = false);
        let others = (0..filled).filter(|column| unwanted[*column]);
        for (to, column) in numbers[3 * room..].iter_mut().zip(step.wanted.iter().copied().chain(others)) {
            *to = column as u32;
        }
        let used = step.tables.iter().flat_map(|table| table.iter()).map(|page| cache.address(*page));
        let used = std::iter::once(self.work.spare_page.address()).chain(used);
        for (to, address) in addresses.chunks_exact_mut(2).zip(used) {
            // Low word first: GPUs are little-endian.
            to.copy_from_slice(&[address as u32, (address >> 32) as u32]);
        }
        self.work.numbers.write_pinned(&mut self.work.staged, 4 * words)?;
        let at = |words: usize| self.work.numbers.address() + 4 * words as u64;
        Ok(Numbers {
            tokens: at(0),
            positions: at(room),
            tables: at(2 * room),
            wanted: at(3 * room),
            pages: at(4 * room),
        })
    }

    fn pass(&self, numbers: Numbers, columns: usize) -> Pass<'_> {
        Pass { gpu: self.gpu, work: self.work, weights: self.weights, numbers, columns }
    }

    /// Enqueues the layers for so many columns, all of them wanted: kernel by kernel at first, as one graph later.
    fn again(&mut self, numbers: Numbers, filled: usize) -> DriverResult<()> {
        let pass = self.pass(numbers, filled);
        let now = match self.work.graphs.get(&filled) {
            // SAFETY: graphs are forgotten when any memory that they use is taken anew.
            Some(Recorded::Ready(graph)) => return unsafe { graph.launch() },
            Some(Recorded::Never) => return pass.layers(filled),
            None => {
                pass.layers(filled)?;
                Recorded::Once
            }
            Some(Recorded::Once) => {
                // SAFETY: the layers of a step can be computed any number of times.
                let recorded = unsafe { Graph::record(&self.gpu.stream, || pass.layers(filled)) };
                match recorded {
                    Ok(graph) => {
                        // SAFETY: as above.
                        unsafe { graph.launch() }?;
                        Recorded::Ready(graph)
                    }
                    Err(error) => {
                        tracing::debug!(%error, filled, "steps are enqueued kernel by kernel");
                        pass.layers(filled)?;
                        Recorded::Never
                    }
                }
            }
        };
        self.work.graphs.insert(filled, now);
        Ok(())
    }

    /// Enqueues the step, and the copy of its logits.
    fn enqueue(&mut self, step: &Step<'_>) -> Result<()> {
        let (columns, wanted) = (step.columns.len(), step.wanted.len());
        let failed_at = failed(&self.gpu.stream, "computing a step");
        let numbers = if columns <= WIDTH && wanted > 0 {
            // Few numbers of columns, each of which is recorded.
            let filled = columns.next_power_of_two();
            let numbers = self.prepare(step, filled)?;
            self.again(numbers, filled).map_err(failed_at)?;
            numbers
        } else {
            let numbers = self.prepare(step, columns)?;
            self.pass(numbers, columns).layers(wanted).map_err(failed_at)?;
            numbers
        };
        let row = 4 * self.gpu.shape.vocabulary;
        ready(&mut self.work.on_host, &self.gpu.stream, wanted * row)?;
        for first in (0..wanted).step_by(WIDTH) {
            self.pass(numbers, wanted).head(first).map_err(failed(&self.gpu.stream, "computing logits"))?;
            let rows = WIDTH.min(wanted - first);
            let Work { logits, on_host, .. } = &mut *self.work;
            logits.read_pinned(on_host, first * row, rows * row)?;
        }
        Ok(())
    }
}

impl Forward for GpuForward<'_> {
    fn vocabulary(&self) -> usize {
        self.gpu.shape.vocabulary
    }

    fn step(&mut self, step: &Step<'_>) -> Result<()> {
        let enqueued = self.enqueue(step);
        // Also where not all of it could be enqueued: what was must be over before its memory is used again.
        wait(&self.gpu.stream, "computing a step")?;
        self.work.staged.settled();
        self.work.on_host.settled();
        enqueued
    }

    fn logits<'l>(&'l self, wanted: usize, _: &'l mut Vec<f32>) -> &'l [f32] {
        let vocabulary = self.gpu.shape.vocabulary;
        let all = self.work.on_host.floats();
        all.get(wanted * vocabulary..(wanted + 1) * vocabulary).unwrap_or_default()
    }
}

/// A step on its way to the stream.
#[derive(Debug)]
struct Pass<'a> {
    gpu: &'a Gpu,
    work: &'a Work,
    weights: u64,
    numbers: Numbers,
    columns: usize,
}

/// A kernel's arguments, in its order.
macro_rules! arguments {
    ($($value:expr),* $(,)?) => { &mut [$(Argument::new(&$value)),*] };
}

impl Pass<'_> {
    /// Computes every layer, and leaves the normed columns that are wanted in `x`.
    fn layers(&self, wanted: usize) -> DriverResult<()> {
        let Gpu { shape, plan, kernels, .. } = self.gpu;
        let numbers = self.numbers;
        let (embedding, residual) = (self.weights + plan.embed, self.work.residual.address());
        let (frequencies, turns) = (self.work.frequencies.address(), self.work.turns.address());
        let hidden = shape.hidden as u32;
        // SAFETY: the kernel's arguments; tokens are of the vocabulary, and each column has a row of the residual stream.
        unsafe {
            let arguments = arguments![embedding, numbers.tokens, residual, hidden];
            self.launch(&kernels.embed, self.columns, THREADS, arguments)?;
        }
        // SAFETY: the kernel's arguments; each column has half a head of turns.
        unsafe {
            let arguments = arguments![numbers.positions, frequencies, turns];
            self.launch(&kernels.turn, self.columns, 32, arguments)?;
        }
        let mut bias = None;
        for (index, layer) in plan.layers.iter().enumerate() {
            self.layer(index, layer, bias)?;
            bias = layer.down_bias;
        }
        if wanted > 0 {
            self.norm(bias, plan.norm, Some(numbers.wanted), wanted)?;
        }
        Ok(())
    }

    /// One layer. `bias` is what the layer before it has still to add to the residual stream.
    fn layer(&self, index: usize, layer: &LayerPlan, bias: Option<u64>) -> DriverResult<()> {
        let Gpu { shape, kernels, .. } = self.gpu;
        let Numbers { pages, positions, tables, .. } = self.numbers;
        let (qkv, x, gate_up) = (self.work.qkv.address(), self.work.x.address(), self.work.gate_up.address());
        let (residual, turns) = (self.work.residual.address(), self.work.turns.address());
        let at = index as u64 * shape.page_layer_elems();

        self.norm(bias, layer.attention_norm, None, self.columns)?;
        self.product(layer.qkv, [shape.qkv(), shape.hidden], qkv, Onto::Nothing)?;
        let (query_norm, key_norm) = layer.head_norms.unzip();
        let (bias, query_norm, key_norm) =
            (self.weight(layer.qkv_bias), self.weight(query_norm), self.weight(key_norm));
        // SAFETY: the kernel's arguments; each column has a row of `qkv` and of turns, and its sequence's table a page for
        // its position, which no other sequence has.
        unsafe {
            let arguments =
                arguments![qkv, bias, query_norm, key_norm, turns, positions, tables, pages, at, shape.eps];
            self.launch(&kernels.place, self.columns, 128, arguments)?;
        }
        let blocks = self.columns * (shape.heads / shape.shared_heads());
        // SAFETY: the kernel's arguments; the table of a column's sequence has pages for all positions up to its own.
        unsafe {
            let arguments = arguments![qkv, positions, tables, pages, at, x];
            self.launch(&kernels.attend, blocks, kernels.attend_threads, arguments)?;
        }
        self.product(layer.o, [shape.hidden, shape.queries()], residual, Onto::Sum)?;

        self.norm(layer.o_bias, layer.mlp_norm, None, self.columns)?;
        self.product(layer.gate_up, [2 * shape.inner, shape.hidden], gate_up, Onto::Nothing)?;
        // Each thread has about four elements.
        let blocks = shape.inner.div_ceil(4 * THREADS as usize);
        let (bias, inner, each) = (self.weight(layer.gate_up_bias), shape.inner as u32, blocks as u32);
        // SAFETY: the kernel's arguments; each column has a row of both.
        unsafe {
            let arguments = arguments![gate_up, bias, x, inner, each];
            self.launch(&kernels.gated, self.columns * blocks, THREADS, arguments)?;
        }
        self.product(layer.down, [shape.hidden, shape.inner], residual, Onto::Sum)
    }

    /// Logits of the wanted columns from `first` on, [`WIDTH`] at most.
    fn head(&self, first: usize) -> DriverResult<()> {
        let Gpu { shape, plan, .. } = self.gpu;
        let product = Product {
            weight: self.weights + plan.head,
            x: self.work.x.address() + (first * shape.hidden) as u64 * shape.elements.bytes(),
            out: self.work.logits.address(),
            rows: shape.vocabulary,
            inner: shape.hidden,
            columns: WIDTH,
            elements: shape.elements,
            adds: false,
        };
        // SAFETY: `x` has room for a multiple of so many columns, and the logits for one such product.
        unsafe { self.gpu.blas.multiply(&product) }
    }

    /// RMSNorm of the first `count` columns, or of those that `rows` names, into `x`.
    fn norm(&self, bias: Option<u64>, weight: u64, rows: Option<u64>, count: usize) -> DriverResult<()> {
        let shape = &self.gpu.shape;
        let (residual, x) = (self.work.residual.address(), self.work.x.address());
        let (bias, weight, rows) = (self.weight(bias), self.weights + weight, rows.unwrap_or(0));
        let (hidden, many) = (shape.hidden as u32, count as u32);
        // SAFETY: the kernel's arguments; there is room for whole products of columns, and rows are columns of the step.
        unsafe {
            let arguments = arguments![residual, bias, weight, rows, x, hidden, many, shape.eps];
            self.launch(&self.gpu.kernels.rms_norm, count.next_multiple_of(WIDTH), THREADS, arguments)
        }
    }

    /// Multiplies a weight with what is in `x`, as often as it takes for all columns.
    fn product(&self, weight: u64, [rows, inner]: [usize; 2], out: u64, onto: Onto) -> DriverResult<()> {
        let elements = self.gpu.shape.elements;
        for first in (0..self.columns).step_by(WIDTH) {
            let product = Product {
                weight: self.weights + weight,
                x: self.work.x.address() + (first * inner) as u64 * elements.bytes(),
                out: out + (first * rows * size_of::<f32>()) as u64,
                rows,
                inner,
                columns: WIDTH,
                elements,
                adds: onto == Onto::Sum,
            };
            // SAFETY: the plan's weight of this shape; activations have room for whole products.
            unsafe { self.gpu.blas.multiply(&product)? };
        }
        Ok(())
    }

    /// The address of a weight, 0 for none.
    fn weight(&self, at: Option<u64>) -> u64 {
        at.map_or(0, |at| self.weights + at)
    }

    /// # Safety
    /// As [`Kernel::launch`].
    unsafe fn launch(
        &self,
        kernel: &Kernel,
        blocks: usize,
        threads: u32,
        arguments: &mut [Argument<'_>],
    ) -> DriverResult<()> {
        // SAFETY: the caller's promise.
        unsafe { kernel.launch(&self.gpu.stream, blocks as u32, threads, arguments) }
    }
}

/// What a product is added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Onto {
    Nothing,
    /// What its target holds.
    Sum,
}
