//! Elementwise arithmetic in sixteen lanes, written once in safe code: the exponential, and sums over long rows.
//!
//! The order of operations is fixed: it depends neither on the instructions that a processor has nor on what else is
//! computed beside, so equal inputs give equal bits.

/// Elements that are computed side by side: one vector of AVX-512, two of AVX2.
pub(crate) const LANES: usize = 16;

/// How `a * b + c` is rounded.
pub(crate) trait Arithmetic: Copy {
    /// `a * b + c`.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
}

/// Rounded once. Fast only where the processor has the instruction.
#[derive(Clone, Copy)]
pub(crate) struct Fused;

/// Rounded twice, for processors without the instruction.
#[derive(Clone, Copy)]
pub(crate) struct Apart;

impl Arithmetic for Fused {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

impl Arithmetic for Apart {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

/// e to the power of `x`, within two units in the last place for `x` of [-87, 88]; 0 below, and NaN for NaN.
///
/// Cody and Waite's reduction by multiples of ln 2, and the polynomial of degree 6 from the Cephes library's `expf`.
#[inline(always)]
pub(crate) fn exp<A: Arithmetic>(x: f32) -> f32 {
    // Adding and subtracting 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.3, 88.0);
    let shifted = A::mul_add(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = A::mul_add(n, -0.693_359_4, clamped);
    let r = A::mul_add(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = A::mul_add(p, r, c);
    }
    let p = A::mul_add(p, r * r, r) + 1.0;
    let power = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    if x < -87.3 { 0.0 } else { power }
}

/// The greatest element, -inf of none; NaN if any is NaN or +inf.
#[inline(always)]
pub(super) fn greatest<A: Arithmetic>(row: &[f32]) -> f32 {
    let mut most = [f32::NEG_INFINITY; LANES];
    let mut usable = [true; LANES];
    let (whole, rest) = row.as_chunks::<LANES>();
    let mut see = |lane: usize, x: f32| {
        most[lane] = if x > most[lane] { x } else { most[lane] };
        usable[lane] &= x < f32::INFINITY;
    };
    for chunk in whole {
        for (lane, x) in chunk.iter().enumerate() {
            see(lane, *x);
        }
    }
    rest.iter().enumerate().for_each(|(lane, x)| see(lane, *x));
    if usable.contains(&false) {
        return f32::NAN;
    }
    most.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// Elements whose sum [`weigh`] gives as one.
pub(crate) const BLOCK: usize = 256;

/// Writes `exp((x - most) / temperature)` of each element, or 0 where that is below `least`; and the sum of each
/// [`BLOCK`], taken in f64.
#[inline(always)]
pub(super) fn weigh<A: Arithmetic>(
    row: &[f32],
    most: f32,
    temperature: f32,
    least: f32,
    weights: &mut [f32],
    sums: &mut [f64],
) {
    for ((row, weights), sum) in row.chunks(BLOCK).zip(weights.chunks_mut(BLOCK)).zip(sums) {
        for (w, x) in weights.iter_mut().zip(row) {
            let e = exp::<A>((x - most) / temperature);
            *w = if e >= least { e } else { 0.0 };
        }
        *sum = sum_f64(weights);
    }
}

/// The sum of `exp(x - most)`, taken in f64.
#[inline(always)]
pub(super) fn sum_exp<A: Arithmetic>(row: &[f32], most: f32) -> f64 {
    let mut total = 0.0;
    let mut weights = [0.0; BLOCK];
    for row in row.chunks(BLOCK) {
        for (w, x) in weights.iter_mut().zip(row) {
            *w = exp::<A>(x - most);
        }
        total += sum_f64(&weights[..row.len()]);
    }
    total
}

#[inline(always)]
fn sum_f64(values: &[f32]) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*value);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(*value);
    }
    lanes.iter().sum()
}

/// `sum += more`, element by element.
#[inline(always)]
pub(super) fn add<A: Arithmetic>(sum: &mut [f32], more: &[f32]) {
    for (sum, more) in sum.iter_mut().zip(more) {
        *sum += more;
    }
}

/// `silu(gate) * up` (Shazeer 2020), element by element, into `gate`.
#[inline(always)]
pub(super) fn swiglu<A: Arithmetic>(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp::<A>(-*gate)) * up;
    }
}

/// Replaces the first `count` of `scores` by `exp(scale * (score - most))` and the rest by 0; gives the inverse of their
/// sum. The length is a multiple of 16.
#[inline(always)]
pub(super) fn softmax<A: Arithmetic>(scores: &mut [f32], count: usize, scale: f32) -> f32 {
    let count = count.min(scores.len());
    let (seen, rest) = scores.split_at_mut(count);
    rest.fill(0.0);
    let mut most = [f32::NEG_INFINITY; LANES];
    let (whole, tail) = seen.as_chunks::<LANES>();
    for chunk in whole {
        for (most, x) in most.iter_mut().zip(chunk) {
            *most = if *x > *most { *x } else { *most };
        }
    }
    let most = most.iter().chain(tail).fold(f32::NEG_INFINITY, |most, x| if *x > most { *x } else { most });
    for x in seen.iter_mut() {
        *x = exp::<A>((*x - most) * scale);
    }
    let mut sums = [0.0_f32; LANES];
    let (whole, tail) = seen.as_chunks::<LANES>();
    for chunk in whole {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += x;
        }
    }
    for (sum, x) in sums.iter_mut().zip(tail) {
        *sum += x;
    }
    1.0 / sums.iter().sum::<f32>()
}

/// `x / sqrt(mean(x²) + eps) * weight` (Zhang and Sennrich 2019) of 16 columns: `x` and `out` are `[features, 16]`.
#[inline(always)]
pub(super) fn rms_norm<A: Arithmetic>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let (rows, _) = x.as_chunks::<LANES>();
    let (out, _) = out.as_chunks_mut::<LANES>();
    // Four chains, so that the next square does not wait for the last sum.
    let mut sums = [[0.0_f32; LANES]; 4];
    for rows in rows.chunks(4) {
        for (sum, row) in sums.iter_mut().zip(rows) {
            for (sum, x) in sum.iter_mut().zip(row) {
                *sum = A::mul_add(*x, *x, *sum);
            }
        }
    }
    let mut scale = [0.0_f32; LANES];
    for (lane, scale) in scale.iter_mut().enumerate() {
        let squares = (sums[0][lane] + sums[1][lane]) + (sums[2][lane] + sums[3][lane]);
        *scale = 1.0 / (squares / rows.len() as f32 + eps).sqrt();
    }
    for ((out, row), weight) in out.iter_mut().zip(rows).zip(weight) {
        for ((out, x), scale) in out.iter_mut().zip(row).zip(&scale) {
            *out = x * scale * weight;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_of_the_last_place() {
        for arithmetic in [exp::<Fused>, exp::<Apart>] {
            let mut x = -87.2_f32;
            while x < 87.9 {
                let (got, want) = (f64::from(arithmetic(x)), f64::from(x).exp());
                assert!(
                    (got - want).abs() <= 2.0 * f64::from(f32::EPSILON) * want,
                    "exp({x}) = {got}, {want}"
                );
                x += 0.003_1;
            }
            assert_eq!((arithmetic(0.0), arithmetic(f32::NEG_INFINITY), arithmetic(-100.0)), (1.0, 0.0, 0.0));
            assert!(arithmetic(f32::NAN).is_nan());
        }
    }
}
