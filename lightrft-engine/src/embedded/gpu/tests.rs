//! Products on a GPU: their values, and that a column's bits do not depend on its place
#![allow(unsafe_code)]

use std::time::Instant;

use candle_core::{DType, Tensor};
use half::bf16;
use lightrft_collectives::nccl::{DeviceMemory, Stream};

use super::blas::{Blas, Product, WORKSPACE_BYTES};
use super::forward::WIDTH;
use super::memory::{Block, wait};
use super::shape::Elements;

/// Numbers without a pattern, from -1 to 1.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

struct Bench {
    stream: Stream,
    blas: Blas,
    _workspace: Block,
}

impl Bench {
    fn new() -> Self {
        let stream = Stream::new(0).expect("a GPU test on a machine without GPUs");
        let blas = Blas::new(&stream).unwrap();
        let workspace = Block::zeroed(&stream, WORKSPACE_BYTES, "products").unwrap();
        // SAFETY: it is dropped with the handle.
        unsafe { blas.use_workspace(&workspace) }.unwrap();
        Self { stream, blas, _workspace: workspace }
    }

    fn upload(&self, values: &[f32], elements: Elements) -> DeviceMemory {
        match elements {
            Elements::F32 => DeviceMemory::upload(&self.stream, values).unwrap(),
            _ => {
                let narrow: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
                DeviceMemory::upload(&self.stream, &narrow).unwrap()
            }
        }
    }

    fn multiply(&self, weight: &DeviceMemory, x: &DeviceMemory, out: &DeviceMemory, product: Product) {
        let product = Product { weight: weight.pointer(), x: x.pointer(), out: out.pointer(), ..product };
        // SAFETY: the memory was made for these numbers by the callers below.
        unsafe { self.blas.multiply(&product) }.unwrap();
    }
}

fn product([rows, inner, columns]: [usize; 3], elements: Elements) -> Product {
    Product { weight: 0, x: 0, out: 0, rows, inner, columns, elements, adds: false }
}

/// The products of SmolLM2-135M, of Qwen2.5-0.5B, and odd ones.
const SHAPES: [[usize; 2]; 11] = [
    [960, 576],
    [576, 576],
    [3072, 576],
    [576, 1536],
    [49152, 576],
    [1152, 896],
    [9728, 896],
    [896, 4864],
    [151_936, 896],
    [168, 40],
    [40, 120],
];

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_a_column_of_a_product_has_the_same_bits_at_every_place() {
    let bench = Bench::new();
    for [rows, inner] in SHAPES {
        for elements in [Elements::F32, Elements::Bf16] {
            let weight = bench.upload(&numbers(rows * inner, 1), elements);
            let column = numbers(inner, 2);
            let mut first: Option<Vec<f32>> = None;
            for place in [0, 1, 31, 77, WIDTH - 1] {
                let mut x = numbers(inner * WIDTH, 3 + place as u32);
                x[place * inner..(place + 1) * inner].copy_from_slice(&column);
                let x = bench.upload(&x, elements);
                let out = DeviceMemory::zeroed::<f32>(&bench.stream, rows * WIDTH).unwrap();
                bench.multiply(&weight, &x, &out, product([rows, inner, WIDTH], elements));
                let out: Vec<f32> = out.download(std::time::Duration::from_secs(60)).unwrap();
                let out = out[place * rows..(place + 1) * rows].to_vec();
                let first = first.get_or_insert_with(|| out.clone());
                let differ = out.iter().zip(&*first).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                assert_eq!(differ, 0, "{rows} of {inner} in {elements:?} at {place}");
            }
            if rows * inner > 1 << 20 {
                continue;
            }
            let dtype = elements.dtype();
            let host = |values: Vec<f32>, shape: (usize, usize)| {
                let tensor = Tensor::from_vec(values, shape, &candle_core::Device::Cpu).unwrap();
                tensor.to_dtype(dtype).and_then(|t| t.to_dtype(DType::F32)).unwrap()
            };
            let expected = host(numbers(rows * inner, 1), (rows, inner))
                .matmul(&host(column, (inner, 1)))
                .and_then(|t| t.flatten_all())
                .and_then(|t| t.to_vec1::<f32>())
                .unwrap();
            for (got, expected) in first.unwrap_or_default().iter().zip(expected) {
                assert!(
                    (got - expected).abs() < 2e-4,
                    "{rows} of {inner} in {elements:?}: {got}, {expected}"
                );
            }
        }
    }
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu bench"]
fn gpu_bench_products_by_their_width() {
    let bench = Bench::new();
    let widths = [16, 32, 64, 128, 256, 512];
    println!("| bf16 product | {} |", widths.map(|w| w.to_string()).join(" | "));
    for [rows, inner] in SHAPES {
        let weight = bench.upload(&numbers(rows * inner, 1), Elements::Bf16);
        let x = bench.upload(&numbers(inner * 512, 2), Elements::Bf16);
        let out = DeviceMemory::zeroed::<f32>(&bench.stream, rows * 512).unwrap();
        let times = widths.map(|width| {
            let times = 50;
            let mut best = f64::INFINITY;
            for _ in 0..3 {
                wait(&bench.stream, "measuring").unwrap();
                let begin = Instant::now();
                for _ in 0..times {
                    bench.multiply(&weight, &x, &out, product([rows, inner, width], Elements::Bf16));
                }
                wait(&bench.stream, "measuring").unwrap();
                best = best.min(begin.elapsed().as_secs_f64() * 1e6 / f64::from(times));
            }
            format!("{best:.1}")
        });
        println!("| {rows} of {inner} | {} |", times.join(" | "));
    }
}
