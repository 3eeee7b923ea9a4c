//! One AdamW step has the same bits with any vectors, any number of threads, and any cut.

use half::slice::HalfFloatSliceExt as _;
use proptest::prelude::*;

use super::*;

const SCALARS: Scalars = Scalars {
    clip: 0.7,
    keep: 0.999,
    weight1: 0.1,
    beta2: 0.95,
    weight2: 0.05,
    scale2: 1.3,
    eps: 1e-8,
    step_size: 0.01,
};

/// Four arrays of the four kinds, with room before them so that they can begin anywhere in a cache line.
#[derive(Clone)]
struct Data {
    skip: [usize; 4],
    arrays: [Vec<f32>; 4],
}

impl Data {
    /// Numbers of all sizes, zeros, infinities and NaN among them.
    fn wild(len: usize, skip: [usize; 4], seed: u32) -> Self {
        let number = |array: usize, i: usize| {
            let bits = (i as u32).wrapping_mul(2_654_435_761).rotate_left(array as u32 * 7) ^ seed;
            let value = match bits % 23 {
                0 => f32::from_bits(bits),
                1 => 0.0,
                2 => f32::from_bits(bits & 0x80ff_ffff),
                _ => f32::from_bits((bits & 0x803f_ffff) | ((96 + bits % 40) << 23)),
            };
            // NaN with one payload: which of two operands' payloads survives is not for Rust to say.
            let value = if value.is_nan() { f32::NAN } else { value };
            if array == 3 { value.abs() } else { value }
        };
        let array = |a: usize| (0..skip[a] + len).map(|i| number(a, i)).collect();
        Self { skip, arrays: [0, 1, 2, 3].map(array) }
    }

    fn arrays(&mut self) -> Arrays<'_> {
        let [p, g, m, v] = &mut self.arrays;
        Arrays {
            param: &mut p[self.skip[0]..],
            grad: &g[self.skip[1]..],
            exp_avg: &mut m[self.skip[2]..],
            exp_avg_sq: &mut v[self.skip[3]..],
        }
    }

    fn bits(&self) -> Vec<Vec<u32>> {
        // A NaN is a NaN: its sign and payload are not part of the promise.
        let bits = |value: &f32| if value.is_nan() { u32::MAX } else { value.to_bits() };
        self.arrays.iter().map(|array| array.iter().map(bits).collect()).collect()
    }
}

/// The formula in its plainest form.
fn one_by_one(arrays: Arrays<'_>, scalars: Scalars) {
    for i in 0..arrays.param.len() {
        let g = arrays.grad[i] * scalars.clip;
        let m = arrays.exp_avg[i] + scalars.weight1 * (g - arrays.exp_avg[i]);
        let v = scalars.beta2 * arrays.exp_avg_sq[i] + scalars.weight2 * (g * g);
        let update = scalars.step_size * m / (v.sqrt() * scalars.scale2 + scalars.eps);
        arrays.param[i] = arrays.param[i] * scalars.keep - update;
        arrays.exp_avg[i] = m;
        arrays.exp_avg_sq[i] = v;
    }
}

fn at_hand() -> impl Iterator<Item = Vectors> {
    Vectors::ALL.iter().copied().filter(|vectors| vectors.at_hand())
}

fn half_bits<T: Copy>(values: &[T], bits: impl Fn(T) -> (u16, bool)) -> Vec<Option<u16>> {
    values.iter().map(|&value| bits(value)).map(|(bits, nan)| (!nan).then_some(bits)).collect()
}

proptest! {
    #[test]
    fn a_step_has_the_same_bits_with_any_vectors_length_and_misalignment(
        len in 0usize..200, skip in prop::array::uniform4(0usize..17), room in 0usize..33, seed: u32,
    ) {
        let start = Data::wild(len, skip, seed);
        let mut expected = start.clone();
        one_by_one(expected.arrays(), SCALARS);
        let (mut as_bf16, mut as_f16) = (vec![bf16::ZERO; len], vec![f16::ZERO; len]);
        as_bf16.convert_from_f32_slice(expected.arrays().param);
        as_f16.convert_from_f32_slice(expected.arrays().param);
        let bf16_bits = |v: &[bf16]| half_bits(v, |v| (v.to_bits(), v.is_nan()));
        let f16_bits = |v: &[f16]| half_bits(v, |v| (v.to_bits(), v.is_nan()));
        for vectors in at_hand() {
            let mut data = start.clone();
            simd::step::<()>(vectors, data.arrays(), &mut vec![(); len], SCALARS);
            prop_assert_eq!(data.bits(), expected.bits(), "{:?}", vectors);
            let mut data = start.clone();
            let mut out = vec![bf16::ZERO; room + len];
            simd::step(vectors, data.arrays(), &mut out[room..], SCALARS);
            prop_assert_eq!(data.bits(), expected.bits(), "{:?}", vectors);
            prop_assert_eq!(bf16_bits(&out[room..]), bf16_bits(&as_bf16));
            let mut data = start.clone();
            let mut out = vec![f16::ZERO; room + len];
            simd::step(vectors, data.arrays(), &mut out[room..], SCALARS);
            prop_assert_eq!(data.bits(), expected.bits(), "{:?}", vectors);
            prop_assert_eq!(f16_bits(&out[room..]), f16_bits(&as_f16));
        }
    }

    #[test]
    fn an_average_has_the_same_bits_with_any_vectors(len in 0usize..200, skip in 0usize..17, seed: u32) {
        let start = Data::wild(len, [skip, 3, 0, 0], seed);
        let mut expected = start.clone();
        let Arrays { param, grad, .. } = expected.arrays();
        param.iter_mut().zip(grad).for_each(|(a, v)| *a += 0.25 * (v - *a));
        for vectors in at_hand() {
            let mut data = start.clone();
            let Arrays { param, grad, .. } = data.arrays();
            simd::blend(vectors, param, grad, 0.25);
            prop_assert_eq!(data.bits(), expected.bits(), "{:?}", vectors);
        }
    }

    #[test]
    fn intervals_decide_what_decays_and_padding_is_only_copied(
        lens in prop::collection::vec((0usize..40, 0usize..3), 0..8), cut in 0usize..300, seed: u32,
    ) {
        let mut runs = Vec::new();
        let mut len = 0;
        for (elems, kind) in lens {
            match kind {
                0 => {}
                1 => runs.push((len..len + elems, Decay::Yes)),
                _ => runs.push((len..len + elems, Decay::No)),
            }
            len += elems;
        }
        let start = Data::wild(len, [0; 4], seed);
        let mut expected = start.clone();
        for (run, decay) in &runs {
            let keep = if *decay == Decay::Yes { SCALARS.keep } else { 1.0 };
            let (_, rest) = expected.arrays().split_at(run.start);
            one_by_one(rest.split_at(run.len()).0, Scalars { keep, ..SCALARS });
        }
        let mut data = start.clone();
        let mut out = vec![bf16::MAX; len];
        let work = Work { arrays: data.arrays(), copy: CopyOut::Bf16(&mut out), runs: &runs, start: 0 };
        let (left, right) = work.split_at(cut.min(len));
        step_all(vec![right, left], SCALARS);
        prop_assert_eq!(data.bits(), expected.bits());
        let rounded: Vec<bf16> = expected.arrays[0].iter().map(|&p| bf16::from_f32(p)).collect();
        let bits = |v: &[bf16]| half_bits(v, |v| (v.to_bits(), v.is_nan()));
        prop_assert_eq!(bits(&out), bits(&rounded));
    }
}

#[test]
fn threads_change_no_bit() {
    let len = PARALLEL + PIECE + 77;
    let runs = [(0..100, Decay::No), (100..PIECE + 3, Decay::Yes), (PIECE + 3..len - 5, Decay::No)];
    let start = Data::wild(len, [1, 2, 3, 4], 99);
    let with = |threads: usize| {
        let mut data = start.clone();
        let mut out = vec![f16::ZERO; len];
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let work = Work { arrays: data.arrays(), copy: CopyOut::F16(&mut out), runs: &runs, start: 0 };
        pool.install(|| step_all(vec![work], SCALARS));
        (data.bits(), half_bits(&out, |v: f16| (v.to_bits(), v.is_nan())))
    };
    let alone = with(1);
    for threads in 2..4 {
        assert!(with(threads) == alone, "{threads} threads");
    }
}
