//! Fused operations with hand-written gradients, where the tensor library has none or a slow one.
//!
//! candle's fused `rms_norm`, `rope` and `softmax_last_dim` silently cut the gradient, and its composed forms keep a
//! temporary for every elementary step. Each function here computes its value in one pass and grafts that value into
//! the graph together with a closure for the vector-Jacobian product. On f32 tensors in host memory the passes are
//! loops over slices; anything else takes candle's own operations.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, D, DType, Layout, Result, Shape, Storage, Tensor,
};

type Backward1 = Box<dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor> + Send + Sync>;
type Backward2 = Box<dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<(Tensor, Tensor)> + Send + Sync>;

/// A value computed before it enters the graph.
enum Value {
    /// Host memory of our own, moved into the graph.
    Host(Vec<f32>, Shape),
    /// A tensor of the library, whose storage is copied once.
    Tensor(Tensor),
}

impl Value {
    /// The value outside of any graph.
    fn into_tensor(self, like: &Tensor) -> Result<Tensor> {
        match self {
            Value::Host(data, shape) => Tensor::from_vec(data, shape, like.device()),
            Value::Tensor(t) => Ok(t),
        }
    }
}

/// The value, handed out on the one forward call that the library makes.
struct Once(Mutex<Option<Value>>);

impl Once {
    fn new(value: Value) -> Self {
        Self(Mutex::new(Some(value)))
    }

    fn take(&self) -> Result<Value> {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slot.take().ok_or_else(|| candle_core::Error::Msg("a grafted value was asked for twice".into()).bt())
    }

    fn host(&self) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            Value::Host(data, shape) => Ok((CpuStorage::F32(data), shape)),
            Value::Tensor(t) => match &*t.storage_and_layout().0 {
                Storage::Cpu(s) => Ok((s.try_clone(t.layout())?, t.shape().clone())),
                _ => candle_core::bail!("a grafted value lies on another device than its operand"),
            },
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            Value::Tensor(t) => match &*t.storage_and_layout().0 {
                Storage::Cuda(s) => Ok((s.try_clone(t.layout())?, t.shape().clone())),
                _ => candle_core::bail!("a grafted value lies on another device than its operand"),
            },
            Value::Host(..) => candle_core::bail!("a grafted host value for an operand on a GPU"),
        }
    }
}

struct Graft1(Once, Backward1);
struct Graft2(Once, Backward2);

impl CustomOp1 for Graft1 {
    fn name(&self) -> &'static str {
        "graft1"
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.0.host()
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.cuda()
    }
    fn bwd(&self, x: &Tensor, y: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some((self.1)(&x.detach(), &y.detach(), g)?))
    }
}

impl CustomOp2 for Graft2 {
    fn name(&self) -> &'static str {
        "graft2"
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.0.host()
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.0.cuda()
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (da, db) = (self.1)(&a.detach(), &b.detach(), g)?;
        Ok((Some(da), Some(db)))
    }
}

fn graft1(x: &Tensor, value: Value, backward: Backward1) -> Result<Tensor> {
    if x.track_op() { x.apply_op1(Graft1(Once::new(value), backward)) } else { value.into_tensor(x) }
}

fn graft2(a: &Tensor, b: &Tensor, value: Value, backward: Backward2) -> Result<Tensor> {
    if a.track_op() || b.track_op() {
        a.apply_op2(b, Graft2(Once::new(value), backward))
    } else {
        value.into_tensor(a)
    }
}

/// Whether the loops over slices apply: contiguous f32 in host memory.
fn on_host(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32 && t.is_contiguous())
}

/// Calls `f` with the elements of a tensor for which [`on_host`] holds.
fn with_slice<R>(t: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = t.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(s), Some((start, end))) => Ok(f(&s.as_slice::<f32>()?[start..end])),
        _ => candle_core::bail!("a contiguous tensor in host memory was expected"),
    }
}

/// `x / sqrt(mean(x²) + eps) * w` over the last dimension (Zhang and Sennrich 2019).
pub(super) fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let x = &x.contiguous()?;
    let value = Value::Tensor(candle_nn::ops::rms_norm(&x.detach(), &w.detach(), eps as f32)?);
    graft2(x, w, value, Box::new(move |x, w, g| rms_norm_backward(x, w, g, eps)))
}

fn rms_norm_backward(x: &Tensor, w: &Tensor, g: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let width = x.dim(D::Minus1)?;
    let g = &g.contiguous()?;
    if on_host(&[x, w, g]) {
        let (dx, dw) = with_slice(x, |xs| {
            with_slice(w, |ws| with_slice(g, |gs| rms_norm_backward_rows(xs, ws, gs, eps as f32)))
        })???;
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        return Ok((dx, Tensor::from_vec(dw, width, x.device())?));
    }
    let (xf, gf) = (x.to_dtype(DType::F32)?, g.to_dtype(DType::F32)?);
    let inv = (xf.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    let normed = xf.broadcast_mul(&inv)?;
    let dw = (&gf * &normed)?.flatten_to(D::Minus2)?.sum(0)?.to_dtype(w.dtype())?;
    let gw = gf.broadcast_mul(&w.to_dtype(DType::F32)?)?;
    let m = (&gw * &normed)?.mean_keepdim(D::Minus1)?;
    let dx = (gw - normed.broadcast_mul(&m)?)?.broadcast_mul(&inv)?.to_dtype(x.dtype())?;
    Ok((dx, dw))
}

fn rms_norm_backward_rows(xs: &[f32], ws: &[f32], gs: &[f32], eps: f32) -> (Vec<f32>, Vec<f32>) {
    let width = ws.len();
    let (mut dx, mut dw) = (vec![0f32; xs.len()], vec![0f32; width]);
    for ((x, g), d) in xs.chunks_exact(width).zip(gs.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
        let inv = 1.0 / (sum(width, |j| x[j] * x[j]) / width as f32 + eps).sqrt();
        let k = sum(width, |j| x[j] * g[j] * ws[j]) * inv * inv * inv / width as f32;
        for j in 0..width {
            d[j] = g[j] * ws[j] * inv - x[j] * k;
            dw[j] += g[j] * x[j] * inv;
        }
    }
    (dx, dw)
}

/// A sum in eight interleaved lanes, so that the compiler may keep them in one register.
fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; 8];
    let whole = n / 8 * 8;
    for base in (0..whole).step_by(8) {
        for (k, lane) in lanes.iter_mut().enumerate() {
            *lane += f(base + k);
        }
    }
    let rest: f32 = (whole..n).map(f).sum();
    lanes.iter().sum::<f32>() + rest
}

/// `x Wᵀ + b` for `x` of shape `[..., in]` and `w` of shape `[out, in]`, as one two-dimensional product.
pub(super) fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    let (out, width) = w.dims2()?;
    let rows = x.elem_count() / width.max(1);
    let x = x.reshape((rows, width))?;
    let value = Value::Tensor(x.detach().matmul(&w.detach().t()?)?);
    let y = graft2(&x, w, value, Box::new(|x, w, g| Ok((g.matmul(w)?, g.t()?.matmul(x)?))))?;
    let y = match bias {
        Some(b) => add_bias(&y, b)?,
        None => y,
    };
    if let Some(last) = shape.last_mut() {
        *last = out;
    }
    y.reshape(shape)
}

/// `y + b` for every row of `y`; the bias' gradient is the sum over rows.
fn add_bias(y: &Tensor, b: &Tensor) -> Result<Tensor> {
    let value = Value::Tensor(y.detach().broadcast_add(&b.detach())?);
    graft2(y, b, value, Box::new(|_, _, g| Ok((g.clone(), g.sum(0)?))))
}

/// Rotary embedding of `x` `[batch, heads, positions, head_dim]`, halves rotated as HF does; `cos` and `sin` are
/// `[positions, head_dim / 2]`, or with a leading batch dimension when rows stand at different positions.
pub(super) fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let x = &x.contiguous()?;
    let value = Value::Tensor(candle_nn::rotary_emb::rope(&x.detach(), cos, sin)?);
    let (cos, sin) = (cos.clone(), sin.neg()?);
    // The rotation is orthogonal: its transpose turns the other way.
    graft1(x, value, Box::new(move |_, _, g| candle_nn::rotary_emb::rope(&g.contiguous()?, &cos, &sin)))
}

/// `softmax(x * scale + mask)` over the last dimension of `x` `[batch, heads, queries, keys]`; `mask` is
/// `[batch or 1, 1, queries, keys]`, 0 or -inf, with at least one 0 in every row, and gets no gradient.
pub(super) fn masked_softmax(x: &Tensor, mask: &Tensor, scale: f64) -> Result<Tensor> {
    let x = &x.contiguous()?;
    let ((batch, _, queries, keys), (masks, _, mask_queries, mask_keys)) = (x.dims4()?, mask.dims4()?);
    if (mask_queries, mask_keys) != (queries, keys) || (masks != 1 && masks != batch) {
        candle_core::bail!(
            "attention of shape {:?} with a mask of shape {:?}: the frame is for another batch, length or cache",
            x.dims(),
            mask.dims()
        );
    }
    let value = if on_host(&[x, mask]) {
        let heads = x.dim(1)?;
        let shared = mask.dim(0)? == 1;
        let data = with_slice(x, |xs| {
            with_slice(mask, |ms| {
                let mut out = vec![0f32; xs.len()];
                let rows = batch * heads * queries;
                for row in 0..rows {
                    let (b, q) = (row / (heads * queries), row % queries);
                    let m = (if shared { q } else { b * queries + q }) * keys;
                    softmax_row(
                        &xs[row * keys..(row + 1) * keys],
                        &ms[m..m + keys],
                        scale as f32,
                        &mut out[row * keys..(row + 1) * keys],
                    );
                }
                out
            })
        })??;
        Value::Host(data, x.shape().clone())
    } else {
        let scores = (x.detach() * scale)?.broadcast_add(mask)?;
        Value::Tensor(candle_nn::ops::softmax_last_dim(&scores)?)
    };
    graft1(
        x,
        value,
        Box::new(move |_, y, g| {
            let g = &g.contiguous()?;
            if on_host(&[y, g]) {
                let keys = y.dim(D::Minus1)?;
                let dx = with_slice(y, |ys| {
                    with_slice(g, |gs| {
                        let mut dx = vec![0f32; ys.len()];
                        for ((y, g), d) in
                            ys.chunks_exact(keys).zip(gs.chunks_exact(keys)).zip(dx.chunks_exact_mut(keys))
                        {
                            let dot = sum(keys, |j| y[j] * g[j]);
                            for j in 0..keys {
                                d[j] = (g[j] - dot) * y[j] * scale as f32;
                            }
                        }
                        dx
                    })
                })??;
                return Tensor::from_vec(dx, y.shape(), y.device());
            }
            let gy = (g * y)?;
            (&gy - y.broadcast_mul(&gy.sum_keepdim(D::Minus1)?)?)? * scale
        }),
    )
}

fn softmax_row(x: &[f32], mask: &[f32], scale: f32, out: &mut [f32]) {
    let mut max = f32::NEG_INFINITY;
    for ((o, x), m) in out.iter_mut().zip(x).zip(mask) {
        *o = x * scale + m;
        max = max.max(*o);
    }
    let mut total = 0f32;
    for o in out.iter_mut() {
        *o = (*o - max).exp();
        total += *o;
    }
    let inv = 1.0 / total;
    for o in out.iter_mut() {
        *o *= inv;
    }
}

/// SwiGLU: `silu(gate) * up` (Shazeer 2020).
pub(super) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (gate, up) = (&gate.contiguous()?, &up.contiguous()?);
    let value = if on_host(&[gate, up]) {
        let data = with_slice(gate, |a| {
            with_slice(up, |u| a.iter().zip(u).map(|(a, u)| a / (1.0 + (-a).exp()) * u).collect::<Vec<_>>())
        })??;
        Value::Host(data, gate.shape().clone())
    } else {
        Value::Tensor((gate.detach().silu()? * up.detach())?)
    };
    graft2(
        gate,
        up,
        value,
        Box::new(|a, u, g| {
            let g = &g.contiguous()?;
            if on_host(&[a, u, g]) {
                let (da, du) = with_slice(a, |a| {
                    with_slice(u, |u| {
                        with_slice(g, |g| {
                            let (mut da, mut du) = (vec![0f32; a.len()], vec![0f32; a.len()]);
                            for j in 0..a.len() {
                                let s = 1.0 / (1.0 + (-a[j]).exp());
                                let silu = a[j] * s;
                                du[j] = g[j] * silu;
                                da[j] = g[j] * u[j] * (s + silu * (1.0 - s));
                            }
                            (da, du)
                        })
                    })
                })???;
                let make = |v| Tensor::from_vec(v, a.shape(), a.device());
                return Ok((make(da)?, make(du)?));
            }
            let s = candle_nn::ops::sigmoid(a)?;
            let silu = (a * &s)?;
            let da = ((g * u)? * (&s + (&silu * (1.0 - &s)?)?)?)?;
            Ok((da, (g * &silu)?))
        }),
    )
}

/// Log-probability, f32 `[rows]`, of the token `targets[row]` under `softmax(logits[row])`, for `logits` `[rows, vocab]`.
pub(super) fn token_log_probs(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (rows, vocab) = logits.dims2()?;
    let logits = &logits.contiguous()?;
    if on_host(&[logits]) {
        let ids = targets.to_vec1::<u32>()?;
        let (value, lse) = with_slice(logits, |l| {
            let mut value = Vec::with_capacity(rows);
            let mut lse = Vec::with_capacity(rows);
            for (row, id) in l.chunks_exact(vocab).zip(&ids) {
                let z = log_sum_exp(row);
                value.push(row[*id as usize] - z);
                lse.push(z);
            }
            (value, lse)
        })?;
        let backward = move |l: &Tensor, _: &Tensor, g: &Tensor| {
            let g = g.contiguous()?;
            let d = with_slice(l, |l| {
                with_slice(&g, |g| {
                    let mut d = vec![0f32; l.len()];
                    for (row, out) in d.chunks_exact_mut(vocab).enumerate() {
                        if g[row] == 0.0 {
                            continue;
                        }
                        for (o, x) in out.iter_mut().zip(&l[row * vocab..(row + 1) * vocab]) {
                            *o = -(x - lse[row]).exp() * g[row];
                        }
                        out[ids[row] as usize] += g[row];
                    }
                    d
                })
            })??;
            Tensor::from_vec(d, l.shape(), l.device())
        };
        return graft1(logits, Value::Host(value, rows.into()), Box::new(backward));
    }
    let l = logits.detach().to_dtype(DType::F32)?;
    let max = l.max_keepdim(1)?;
    let lse = (l.broadcast_sub(&max)?.exp()?.sum_keepdim(1)?.log()? + max)?;
    let targets = targets.unsqueeze(1)?;
    let value = Value::Tensor((l.gather(&targets, 1)? - &lse)?.squeeze(1)?);
    graft1(
        logits,
        value,
        Box::new(move |l, _, g| {
            let g = g.unsqueeze(1)?;
            let p = l.to_dtype(DType::F32)?.broadcast_sub(&lse)?.exp()?.broadcast_mul(&g.neg()?)?;
            p.scatter_add(&targets, &g, 1)?.to_dtype(l.dtype())
        }),
    )
}

/// `ln(sum(exp(row)))`, shifted by the maximum, accumulated in f64.
pub(super) fn log_sum_exp(row: &[f32]) -> f32 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        return max;
    }
    let total: f64 = row.iter().map(|x| f64::from((x - max).exp())).sum();
    max + total.ln() as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// Compares the vector-Jacobian product of `f` at pseudo-random inputs with central differences in f32.
    fn check(shapes: &[&[usize]], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
        let mut seed = 1u64;
        let mut next = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let mut data: Vec<Vec<f32>> =
            shapes.iter().map(|s| (0..s.iter().product::<usize>()).map(|_| next()).collect()).collect();
        let vars: Vec<Var> = data
            .iter()
            .zip(shapes)
            .map(|(d, s)| Var::from_tensor(&Tensor::from_slice(d, *s, &Device::Cpu).unwrap()).unwrap())
            .collect();
        let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let y = f(&inputs).unwrap();
        let weights: Vec<f32> = (0..y.elem_count()).map(|_| next()).collect();
        let w = Tensor::from_slice(&weights, y.shape(), &Device::Cpu).unwrap();
        let grads = (y * w).unwrap().sum_all().unwrap().backward().unwrap();
        let loss = |data: &[Vec<f32>]| -> f64 {
            let inputs: Vec<Tensor> = data
                .iter()
                .zip(shapes)
                .map(|(d, s)| Tensor::from_slice(d, *s, &Device::Cpu).unwrap())
                .collect();
            let y = f(&inputs).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            y.iter().zip(&weights).map(|(y, w)| f64::from(*y) * f64::from(*w)).sum()
        };
        for (k, var) in vars.iter().enumerate() {
            let g = grads.get(var.as_tensor()).expect("a gradient for every input");
            let g = g.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for i in 0..data[k].len() {
                let (x, h) = (data[k][i], 1e-2f32);
                data[k][i] = x + h;
                let up = loss(&data);
                data[k][i] = x - h;
                let down = loss(&data);
                data[k][i] = x;
                let numeric = (up - down) / (2.0 * f64::from(h));
                let diff = (numeric - f64::from(g[i])).abs();
                assert!(
                    diff < 2e-3 * (1.0 + numeric.abs()),
                    "input {k}, element {i}: {numeric} and {}",
                    g[i]
                );
            }
        }
    }

    #[test]
    fn gradients_agree_with_central_differences() {
        check(&[&[3, 10], &[10]], |t| rms_norm(&t[0], &t[1], 1e-5));
        check(&[&[2, 3, 5], &[4, 5], &[4]], |t| linear(&t[0], &t[1], Some(&t[2])));
        check(&[&[2, 3, 4], &[2, 3, 4]], |t| swiglu(&t[0], &t[1]));
        let angle = Tensor::from_slice(&[0.0f32, 0.0, 1.0, 0.3, 2.0, 0.6], (3, 2), &Device::Cpu).unwrap();
        let (cos, sin) = (angle.cos().unwrap(), angle.sin().unwrap());
        check(&[&[2, 2, 3, 4]], move |t| rope(&t[0], &cos, &sin));
        let inf = f32::NEG_INFINITY;
        let mask = Tensor::from_slice(&[0.0f32, inf, 0.0, 0.0], (1, 1, 2, 2), &Device::Cpu).unwrap();
        check(&[&[2, 2, 2, 2]], move |t| masked_softmax(&t[0], &mask, 0.7));
        let targets = Tensor::from_slice(&[1u32, 4, 0], 3, &Device::Cpu).unwrap();
        check(&[&[3, 5]], move |t| token_log_probs(&t[0], &targets));
    }

    #[test]
    fn a_mask_of_another_frame_is_refused() {
        let zeros = |shape| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let x = zeros((2, 1, 2, 3));
        for mask in [(1, 1, 3, 3), (1, 1, 2, 2), (3, 1, 2, 3)] {
            assert!(masked_softmax(&x, &zeros(mask), 1.0).is_err(), "{mask:?}");
        }
    }

    #[test]
    fn a_mask_per_row_of_the_batch_hides_only_its_own_keys() {
        let inf = f32::NEG_INFINITY;
        let x = Tensor::zeros((2, 1, 1, 3), DType::F32, &Device::Cpu).unwrap();
        let mask =
            Tensor::from_slice(&[0.0f32, 0.0, 0.0, inf, 0.0, 0.0], (2, 1, 1, 3), &Device::Cpu).unwrap();
        let y = masked_softmax(&x, &mask, 1.0).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(y[3], 0.0);
        assert!((y[0] - 1.0 / 3.0).abs() < 1e-7 && (y[4] - 0.5).abs() < 1e-7, "{y:?}");
    }
}
