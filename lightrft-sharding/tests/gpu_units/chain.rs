//! A model that is the same, bit for bit, on the host and on a GPU: each layer scales its columns and adds a bias, and the head
//! uses the first layer's scale again.
#![allow(unsafe_code, unreachable_pub, dead_code, clippy::unwrap_used, clippy::panic)]

use std::convert::Infallible;

use lightrft_collectives::nccl::driver::{Argument, Kernel, Program};
use lightrft_collectives::nccl::{DeviceMemory, Stream};
use lightrft_collectives::{Device, Dtype, Error as CollectiveError};
use lightrft_sharding::cuda::{Gpu, GpuValues};
use lightrft_sharding::{
    BoxError, FlatParam, FlatUnit, HostMemory, ParamSpec, StageGrads, StageSpec, StagedModel, UnitSpec,
    UnitValues,
};

/// Inputs of so many rows, and what should come of them.
#[derive(Clone, Debug)]
pub struct Batch {
    pub input: Vec<f32>,
    pub target: Vec<f32>,
}

/// What both kinds of the model have in common.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    pub layers: usize,
    pub width: usize,
    pub rows: usize,
}

/// Numbers without a pattern, from -1 to 1.
pub fn noise(seed: u32, at: usize) -> f32 {
    let mut x = seed.wrapping_mul(0x9e37_79b9) ^ at as u32;
    for _ in 0..3 {
        x = (x ^ (x >> 16)).wrapping_mul(0x045d_9f3b);
    }
    (x >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// Where a parameter begins.
pub fn start(param: &FlatParam, range: std::ops::Range<usize>, out: &mut [f32]) -> Result<(), Infallible> {
    let seed = param.name().bytes().fold(1, |seed: u32, byte| seed.wrapping_mul(31) + u32::from(byte));
    let middle = if param.name().ends_with("weight") { 1.0 } else { 0.0 };
    out.iter_mut().zip(range).for_each(|(value, at)| *value = middle + 0.3 * noise(seed, at));
    Ok(())
}

impl Chain {
    pub fn elems(&self) -> usize {
        self.rows * self.width
    }

    pub fn specs(&self) -> Vec<UnitSpec> {
        let param = |layer: usize, what: &str| ParamSpec::new(format!("layer{layer}.{what}"), [self.width]);
        let unit =
            |layer| UnitSpec::new(format!("layer{layer}"), [param(layer, "weight"), param(layer, "bias")]);
        (0..self.layers).map(unit).collect()
    }

    pub fn stage_specs(&self) -> Vec<StageSpec> {
        let stage = |layer| match layer {
            last if last + 1 == self.layers => StageSpec::new("head", [0, last]),
            _ => StageSpec::new(format!("stage{layer}"), [layer]),
        };
        (0..self.layers).map(stage).collect()
    }

    pub fn batch(&self, seed: u32) -> Batch {
        let values = |seed| (0..self.elems()).map(|at| noise(seed, at)).collect();
        Batch { input: values(seed), target: values(seed + 1000) }
    }

    /// The gradient of half the squared distance.
    pub fn grad(&self, output: &[f32], batch: &Batch, scale: f32) -> Vec<f32> {
        output.iter().zip(&batch.target).map(|(y, t)| (y - t) * scale).collect()
    }
}

/// The model on slices.
#[derive(Clone, Copy, Debug)]
pub struct OnHost(pub Chain);

impl OnHost {
    fn layer(&self, weight: &[f32], bias: &[f32], input: &[f32]) -> Vec<f32> {
        let columns = weight.iter().zip(bias).cycle();
        input.iter().zip(columns).map(|(x, (w, b))| x * w + b).collect()
    }

    fn sum_rows(&self, each: impl Fn(usize) -> f32, column: usize) -> f32 {
        (0..self.0.rows).fold(0.0, |sum, row| sum + each(row * self.0.width + column))
    }

    /// Adds the gradients of a layer, and returns that of its input.
    fn layer_back(
        &self,
        unit: usize,
        weight: &[f32],
        input: &[f32],
        grad: &[f32],
        grads: &mut StageGrads<'_>,
    ) -> lightrft_sharding::Result<Vec<f32>> {
        let columns = 0..self.0.width;
        let of_weight: Vec<f32> = columns.clone().map(|c| self.sum_rows(|i| input[i] * grad[i], c)).collect();
        grads.add(unit, 0, &of_weight)?;
        if grads.wants(unit, 1)? {
            let of_bias = grads.slice_mut(unit, 1)?;
            columns.for_each(|c| of_bias[c] += self.sum_rows(|i| grad[i], c));
        }
        Ok(grad.iter().zip(weight.iter().cycle()).map(|(g, w)| g * w).collect())
    }
}

impl StagedModel<HostMemory> for OnHost {
    type Batch = Batch;
    type Activation = Vec<f32>;
    type Params = Vec<f32>;
    type Saved = ();
    type Error = lightrft_sharding::Error;

    fn units(&self) -> Vec<UnitSpec> {
        self.0.specs()
    }

    fn stages(&self) -> Vec<StageSpec> {
        self.0.stage_specs()
    }

    fn bind(&self, _: &FlatUnit, values: UnitValues) -> Result<Vec<f32>, Self::Error> {
        Ok(values.into_f32())
    }

    fn forward(
        &self,
        _: usize,
        params: &[&Vec<f32>],
        batch: &Batch,
        input: Option<&Vec<f32>>,
    ) -> Result<Vec<f32>, Self::Error> {
        let (w, own) = (self.0.width, params[params.len() - 1]);
        let mut output = self.layer(&own[..w], &own[w..2 * w], input.unwrap_or(&batch.input));
        if let [tied, _] = params {
            output.iter_mut().zip(tied[..w].iter().cycle()).for_each(|(y, w)| *y *= w);
        }
        Ok(output)
    }

    fn backward(
        &self,
        _: usize,
        params: &[&Vec<f32>],
        batch: &Batch,
        input: Option<&Vec<f32>>,
        grad_output: Vec<f32>,
        grads: &mut StageGrads<'_>,
    ) -> Result<Option<Vec<f32>>, Self::Error> {
        let (w, last) = (self.0.width, params.len() - 1);
        let (own, input) = (params[last], input.unwrap_or(&batch.input));
        let mut grad = grad_output;
        if let [tied, _] = params {
            let middle = self.layer(&own[..w], &own[w..2 * w], input);
            let of_tied: Vec<f32> = (0..w).map(|c| self.sum_rows(|i| middle[i] * grad[i], c)).collect();
            grads.add(0, 0, &of_tied)?;
            grad.iter_mut().zip(tied[..w].iter().cycle()).for_each(|(g, w)| *g *= w);
        }
        self.layer_back(last, &own[..w], input, &grad, grads).map(Some)
    }
}

const KERNELS: &str = r#"
typedef unsigned int u32; typedef unsigned short u16; typedef unsigned long long u64;
__device__ float param(const void *values, int half, u64 at) {
    return half ? __uint_as_float((u32)((const u16 *)values)[at] << 16) : ((const float *)values)[at];
}
extern "C" __global__ void layer(float *out, const float *in, const void *unit, int half, u64 rows, u64 width) {
    u64 c = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    if (c >= width) return;
    for (u64 i = c; i < rows * width; i += width) out[i] = in[i] * param(unit, half, c) + param(unit, half, width + c);
}
extern "C" __global__ void scale(float *out, const float *in, const void *unit, int half, u64 rows, u64 width) {
    u64 c = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    if (c >= width) return;
    for (u64 i = c; i < rows * width; i += width) out[i] = in[i] * param(unit, half, c);
}
extern "C" __global__ void sum_products(float *sum, const float *a, const float *b, u64 rows, u64 width) {
    u64 c = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    if (c >= width) return;
    float total = 0.0f;
    for (u64 i = c; i < rows * width; i += width) total = total + (a ? a[i] * b[i] : b[i]);
    sum[c] = a ? total : sum[c] + total;
}
extern "C" __global__ void spin(long long clocks) {
    long long begin = clock64();
    while (clock64() - begin < clocks) {}
}
"#;

/// The model as kernels.
#[derive(Debug)]
pub struct OnGpu {
    pub chain: Chain,
    stream: Stream,
    layer: Kernel,
    scale: Kernel,
    sum_products: Kernel,
    spin: Kernel,
}

/// An activation, or its gradient.
#[derive(Debug)]
pub struct Rows(pub DeviceMemory);

/// Inputs on the GPU.
#[derive(Debug)]
pub struct GpuBatch {
    pub input: Rows,
}

type Gr<T> = Result<T, CollectiveError>;

impl OnGpu {
    pub fn new(chain: Chain, gpu: &Gpu) -> Self {
        let stream = gpu.compute().clone();
        let program = Program::new(&stream, KERNELS, &["--fmad=false"]).unwrap();
        let find = |name| program.kernel(&stream, name).unwrap();
        OnGpu {
            chain,
            layer: find(c"layer"),
            scale: find(c"scale"),
            sum_products: find(c"sum_products"),
            spin: find(c"spin"),
            stream: stream.clone(),
        }
    }

    pub fn batch(&self, batch: &Batch) -> GpuBatch {
        GpuBatch { input: self.rows(&batch.input) }
    }

    pub fn rows(&self, values: &[f32]) -> Rows {
        Rows(DeviceMemory::upload(&self.stream, values).unwrap())
    }

    /// Keeps the compute stream busy.
    pub fn spin(&self, clocks: i64) {
        // SAFETY: the kernel takes one number.
        unsafe { self.spin.launch(&self.stream, 1, 1, &mut [Argument::new(&clocks)]) }.unwrap();
    }

    fn empty(&self) -> Gr<Rows> {
        DeviceMemory::unset(&self.stream, Dtype::F32, self.chain.elems()).map(Rows)
    }

    fn blocks(&self) -> u32 {
        self.chain.width.div_ceil(128) as u32
    }

    fn map(&self, kernel: &Kernel, input: &Rows, unit: &GpuValues) -> Gr<Rows> {
        let output = self.empty()?;
        let half = i32::from(unit.precision() != lightrft_sharding::Precision::F32);
        let (to, from, unit) = (output.0.pointer(), input.0.pointer(), unit.as_device().pointer());
        let (rows, width) = (self.chain.rows as u64, self.chain.width as u64);
        let arguments = &mut [
            Argument::new(&to),
            Argument::new(&from),
            Argument::new(&unit),
            Argument::new(&half),
            Argument::new(&rows),
            Argument::new(&width),
        ];
        // SAFETY: the kernel's arguments in their order; buffers of rows times width, and of a unit.
        unsafe { kernel.launch(&self.stream, self.blocks(), 128, arguments)? };
        Ok(output)
    }

    /// Sums over rows of `a` times `b`, or, added to what is there, of `b` alone.
    fn sum(&self, to: u64, a: Option<&Rows>, b: &Rows) -> Gr<()> {
        let (a, b) = (a.map_or(0, |a| a.0.pointer()), b.0.pointer());
        let (rows, width) = (self.chain.rows as u64, self.chain.width as u64);
        let arguments = &mut [
            Argument::new(&to),
            Argument::new(&a),
            Argument::new(&b),
            Argument::new(&rows),
            Argument::new(&width),
        ];
        // SAFETY: as above.
        unsafe { self.sum_products.launch(&self.stream, self.blocks(), 128, arguments) }
    }

    fn sum_of_products(&self, a: &Rows, b: &Rows) -> Gr<DeviceMemory> {
        let sum = DeviceMemory::unset(&self.stream, Dtype::F32, self.chain.width)?;
        self.sum(sum.pointer(), Some(a), b)?;
        Ok(sum)
    }
}

/// The memory as a gradient is handed over.
pub fn device(memory: &DeviceMemory) -> Device<'_> {
    let lightrft_collectives::Buffer::Device(device) = memory.as_buffer() else { panic!("on the host") };
    device
}

impl StagedModel<Gpu> for OnGpu {
    type Batch = GpuBatch;
    type Activation = Rows;
    type Params = GpuValues;
    type Saved = ();
    type Error = BoxError;

    fn units(&self) -> Vec<UnitSpec> {
        self.chain.specs()
    }

    fn stages(&self) -> Vec<StageSpec> {
        self.chain.stage_specs()
    }

    fn bind(&self, _: &FlatUnit, values: GpuValues) -> Result<GpuValues, BoxError> {
        Ok(values)
    }

    fn unbind(&self, params: GpuValues) -> Option<GpuValues> {
        Some(params)
    }

    fn forward(
        &self,
        _: usize,
        params: &[&GpuValues],
        batch: &GpuBatch,
        input: Option<&Rows>,
    ) -> Result<Rows, BoxError> {
        let output = self.map(&self.layer, input.unwrap_or(&batch.input), params[params.len() - 1])?;
        Ok(if let [tied, _] = params { self.map(&self.scale, &output, tied)? } else { output })
    }

    fn backward(
        &self,
        _: usize,
        params: &[&GpuValues],
        batch: &GpuBatch,
        input: Option<&Rows>,
        grad_output: Rows,
        grads: &mut StageGrads<'_, Gpu>,
    ) -> Result<Option<Rows>, BoxError> {
        let last = params.len() - 1;
        let (own, input) = (params[last], input.unwrap_or(&batch.input));
        let mut grad = grad_output;
        if let [tied, _] = params {
            let middle = self.map(&self.layer, input, own)?;
            grads.add(0, 0, device(&self.sum_of_products(&middle, &grad)?))?;
            grad = self.map(&self.scale, &grad, tied)?;
        }
        grads.add(last, 0, device(&self.sum_of_products(input, &grad)?))?;
        if grads.wants(last, 1)? {
            self.sum(grads.device_mut(last, 1)?.pointer(), None, &grad)?;
        }
        Ok(Some(self.map(&self.scale, &grad, own)?))
    }
}
