//! The kernels against the host's loops, bit for bit: `cargo xtask gpu test`
#![allow(unsafe_code)]

use half::{bf16, f16};
use lightrft_collectives::nccl::DeviceMemory;
use lightrft_collectives::{Element, Single};

use super::gpu::Gpu;
use super::kernels::{Kernels, Run};
use super::values::{GpuValues, precision};
use crate::host::HostMemory;
use crate::memory::{AdamWork, Operations, ShardRuns};
use crate::optim::{Decay, Scalars};
use crate::precision::{Combine, Precision, UnitValues};

fn gpu() -> Gpu {
    Gpu::with_ordinal(0).expect("a GPU test on a machine without GPUs")
}

/// What the kernel makes of `from`, put into or added to `into`.
fn combined<A: Element, B: Element>(gpu: &Gpu, into: &[A], from: &[B], how: Combine) -> Vec<A> {
    let kernels = Kernels::of(gpu.compute()).unwrap();
    let on_gpu = |memory: &DeviceMemory| Run {
        precision: precision(memory.dtype()).unwrap(),
        address: memory.pointer(),
        elems: memory.len(),
    };
    let (to, source) = (
        DeviceMemory::upload(gpu.compute(), into).unwrap(),
        DeviceMemory::upload(gpu.compute(), from).unwrap(),
    );
    // SAFETY: both were just uploaded on this stream.
    unsafe { kernels.combine(gpu.compute(), on_gpu(&to), on_gpu(&source), how) }.unwrap();
    to.download(std::time::Duration::from_secs(60)).unwrap()
}

/// f32 of every kind: all exponents, fractions around where half precision rounds, NaN, infinities, subnormals.
fn samples() -> Vec<f32> {
    let mut samples = Vec::new();
    for high in 0..=u16::MAX {
        for low in [0u32, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xffff] {
            samples.push(f32::from_bits((u32::from(high) << 16) | low));
        }
    }
    samples
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_casts_have_the_bits_of_the_hosts() {
    let gpu = gpu();
    let all: Vec<u16> = (0..=u16::MAX).collect();
    // Every bf16 and every f16.
    let (halves, others): (Vec<bf16>, Vec<f16>) =
        all.iter().map(|&bits| (bf16::from_bits(bits), f16::from_bits(bits))).unzip();
    let zeros = vec![0f32; all.len()];
    let host = |values: UnitValues| bits(&values.into_f32());
    let widened = combined(&gpu, &zeros, &halves, Combine::Set);
    assert_eq!(bits(&widened), host(UnitValues::Bf16(halves.clone())));
    let widened = combined(&gpu, &zeros, &others, Combine::Set);
    assert_eq!(bits(&widened), host(UnitValues::F16(others.clone())));
    // And back.
    let samples = samples();
    let source = UnitValues::F32(samples.clone());
    let mut expected = UnitValues::zeros(Precision::Bf16, samples.len());
    expected.take_in(0..samples.len(), &source, 0..samples.len(), Combine::Set);
    let got = combined(&gpu, &vec![bf16::ZERO; samples.len()], &samples, Combine::Set);
    let UnitValues::Bf16(expected) = expected else { panic!("bf16") };
    assert!(got.iter().zip(&expected).all(|(got, expected)| got.to_bits() == expected.to_bits()));
    let mut expected = UnitValues::zeros(Precision::F16, samples.len());
    expected.take_in(0..samples.len(), &source, 0..samples.len(), Combine::Set);
    let got = combined(&gpu, &vec![f16::ZERO; samples.len()], &samples, Combine::Set);
    let UnitValues::F16(expected) = expected else { panic!("f16") };
    for ((got, expected), sample) in got.iter().zip(&expected).zip(&samples) {
        assert_eq!(got.to_bits(), expected.to_bits(), "{:#x}", sample.to_bits());
    }
    // What is of one type already stays as it is.
    assert_eq!(bits(&combined(&gpu, &vec![1.0; samples.len()], &samples, Combine::Set)), bits(&samples));
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_sums_of_any_two_types_are_rounded_once() {
    let gpu = gpu();
    let values = |seed: u32| -> Vec<f32> {
        (0..5000u32).map(|i| f32::from_bits((i.wrapping_mul(2_654_435_761) ^ seed) % 0x7f00_0000)).collect()
    };
    let (a, b) = (values(1), values(0x5555_5555));
    fn check<A: Element, B: Element>(gpu: &Gpu, a: &[A], b: &[B], wrap: [UnitValues; 2]) {
        let [mut into, from] = wrap;
        let got = combined(gpu, a, b, Combine::Add);
        into.take_in(0..a.len(), &from, 0..b.len(), Combine::Add);
        let expected: &[u8] = match &into {
            UnitValues::F32(values) => bytemuck::cast_slice(values),
            UnitValues::Bf16(values) => bytemuck::cast_slice(values),
            UnitValues::F16(values) => bytemuck::cast_slice(values),
        };
        assert!(bytemuck::cast_slice::<A, u8>(&got) == expected);
    }
    let narrow = |values: &[f32]| values.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>();
    let other = |values: &[f32]| values.iter().map(|v| f16::from_f32(*v % 100.0)).collect::<Vec<_>>();
    check(&gpu, &a, &b, [UnitValues::F32(a.clone()), UnitValues::F32(b.clone())]);
    check(&gpu, &a, &narrow(&b), [UnitValues::F32(a.clone()), UnitValues::Bf16(narrow(&b))]);
    check(&gpu, &narrow(&a), &b, [UnitValues::Bf16(narrow(&a)), UnitValues::F32(b.clone())]);
    check(&gpu, &narrow(&a), &narrow(&b), [UnitValues::Bf16(narrow(&a)), UnitValues::Bf16(narrow(&b))]);
    check(&gpu, &other(&a), &other(&b), [UnitValues::F16(other(&a)), UnitValues::F16(other(&b))]);
    check(&gpu, &a, &other(&b), [UnitValues::F32(a.clone()), UnitValues::F16(other(&b))]);
}

fn upload(gpu: &Gpu, values: &[f32]) -> GpuValues {
    let mut there = gpu.unset(Precision::F32, values.len()).unwrap();
    gpu.overwrite(&mut there, |out| {
        out.copy_from_slice(values);
        Ok(())
    })
    .unwrap();
    there
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_steps_of_adamw_have_the_bits_of_the_hosts() {
    let gpu = gpu();
    for elems in [1, 31, 257, 70_001] {
        let noise = |seed: u32, scale: f32| -> Vec<f32> {
            let value =
                |i: usize| ((i as u32 ^ seed).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32;
            (0..elems).map(|i| (value(i) - 0.5) * scale).collect()
        };
        let mut host: Vec<UnitValues> =
            [noise(1, 2.0), vec![0.0; elems], vec![0.0; elems]].map(UnitValues::F32).into();
        let mut device: Vec<GpuValues> = host.iter().map(|values| upload(&gpu, values.f32())).collect();
        // Gaps, parameters that do not decay, padding at the end.
        let cut = [0, elems / 5, elems / 3, elems / 2, elems - elems / 7];
        let runs =
            vec![(cut[0]..cut[1], Decay::Yes), (cut[2]..cut[3], Decay::No), (cut[3]..cut[4], Decay::Yes)];
        let runs: Vec<_> = runs.into_iter().filter(|(run, _)| !run.is_empty()).collect();
        // Behind the table of another shard.
        let before = ShardRuns { runs: vec![(0..9, Decay::No)], elems: 9 };
        let table = gpu.runs(vec![before, ShardRuns { runs: runs.clone(), elems }]).unwrap().remove(1);
        for step in 1..=4 {
            // Large, small and subnormal gradients.
            let grad = noise(step * 77, [1.0, 1e-3, 1e-20, 1e-40][step as usize % 4]);
            let scalars = Scalars {
                clip: 0.37,
                keep: 1.0 - 1e-3,
                weight1: 0.1,
                beta2: 0.95,
                weight2: 0.05,
                scale2: (1.0 / (1.0 - 0.95f64.powf(f64::from(step))).sqrt()) as f32,
                eps: 1e-8,
                step_size: 1e-2,
            };
            let (there, here) = (upload(&gpu, &grad), UnitValues::F32(grad));
            let [param, exp_avg, exp_avg_sq] = &mut host[..] else { panic!("three") };
            let own = 0..elems;
            let work = AdamWork {
                param,
                copy: None,
                grad: &here,
                own: own.clone(),
                exp_avg,
                exp_avg_sq,
                runs: &runs,
            };
            HostMemory.adamw(vec![work], scalars).unwrap();
            let [param, exp_avg, exp_avg_sq] = &mut device[..] else { panic!("three") };
            let work = AdamWork { param, copy: None, grad: &there, own, exp_avg, exp_avg_sq, runs: &table };
            gpu.adamw(vec![work], scalars).unwrap();
            for (which, (device, host)) in device.iter().zip(&host).enumerate() {
                let got = gpu.read(device, bits).unwrap();
                assert!(got == bits(host.f32()), "array {which} of {elems} elements after step {step}");
            }
        }
    }
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_sums_of_squares_are_exact_to_f64_and_always_the_same() {
    let gpu = gpu();
    let comm = Single::world();
    let values: Vec<f32> = (0..300_007).map(|i| ((i as f32) * 0.37).sin() * 1e3).collect();
    let there = upload(&gpu, &values);
    let parts = [(&there, 0..65_536), (&there, 65_536..65_537), (&there, 0..0), (&there, 65_537..300_007)];
    let sum = |earlier| gpu.squares(earlier, &parts).unwrap();
    let total = gpu.total(sum(None), &*comm).unwrap();
    let exact: f64 = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
    assert!((total - exact).abs() < 1e-12 * exact, "{total} {exact}");
    for _ in 0..20 {
        assert_eq!(gpu.total(sum(None), &*comm).unwrap().to_bits(), total.to_bits());
    }
    assert_eq!(gpu.total(sum(Some(sum(None))), &*comm).unwrap(), 2.0 * total);
    assert_eq!(gpu.total(gpu.squares(None, &[]).unwrap(), &*comm).unwrap(), 0.0);
    let bad = upload(&gpu, &[1.0, f32::NAN]);
    assert!(gpu.total(gpu.squares(None, &[(&bad, 0..2)]).unwrap(), &*comm).unwrap().is_nan());
}
