//! Keys and values of the tokens seen so far, so that a step computes one token only.

use candle_core::{Result, Tensor};

/// Keys and values of one layer: `[batch, kv_heads, capacity, head_dim]`, of which the first `len` positions are filled.
#[derive(Debug, Default)]
pub struct LayerCache {
    kv: Option<(Tensor, Tensor)>,
    len: usize,
}

/// The cache of every layer of a decoder for one batch.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
}

impl LayerCache {
    /// Appends `k` and `v` `[batch, kv_heads, new, head_dim]` and returns everything cached, as views.
    pub(super) fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (batch, heads, new, dim) = k.dims4()?;
        let needed = self.len + new;
        let capacity = match &self.kv {
            Some((k, _)) => k.dim(2)?,
            None => 0,
        };
        if needed > capacity {
            // Doubling keeps the copying per token constant on average.
            let capacity = needed.max(2 * capacity).next_multiple_of(16);
            let grow = |old: Option<&Tensor>| -> Result<Tensor> {
                let fresh = Tensor::zeros((batch, heads, capacity, dim), k.dtype(), k.device())?;
                if let Some(old) = old.filter(|_| self.len > 0) {
                    fresh.slice_set(&old.narrow(2, 0, self.len)?.contiguous()?, 2, 0)?;
                }
                Ok(fresh)
            };
            let grown = (grow(self.kv.as_ref().map(|kv| &kv.0))?, grow(self.kv.as_ref().map(|kv| &kv.1))?);
            self.kv = Some(grown);
        }
        let Some((all_k, all_v)) = &self.kv else {
            return Ok((k.clone(), v.clone()));
        };
        all_k.slice_set(&k.contiguous()?, 2, self.len)?;
        all_v.slice_set(&v.contiguous()?, 2, self.len)?;
        self.len = needed;
        Ok((all_k.narrow(2, 0, needed)?, all_v.narrow(2, 0, needed)?))
    }

    fn select(&mut self, rows: &Tensor) -> Result<()> {
        if let Some((k, v)) = &self.kv {
            self.kv = Some((k.index_select(rows, 0)?, v.index_select(rows, 0)?));
        }
        Ok(())
    }
}

impl KvCache {
    /// An empty cache for a decoder of `layers` layers.
    pub fn new(layers: usize) -> Self {
        Self { layers: (0..layers).map(|_| LayerCache::default()).collect() }
    }

    /// Positions filled, padding included; the same in every row and layer.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, |l| l.len)
    }

    /// Whether nothing is cached yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes held, unfilled capacity included.
    pub fn bytes(&self) -> usize {
        let size = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        self.layers.iter().filter_map(|l| l.kv.as_ref()).map(|(k, v)| size(k) + size(v)).sum()
    }

    /// Makes row `i` of the batch what row `rows[i]` was: drops finished rows, or repeats a prompt for its samples.
    ///
    /// # Errors
    /// Those of the tensor library, for a row outside of the batch.
    pub fn select_rows(&mut self, rows: &[u32]) -> Result<()> {
        let Some((k, _)) = self.layers.first().and_then(|l| l.kv.as_ref()) else { return Ok(()) };
        let rows = Tensor::new(rows, k.device())?;
        self.layers.iter_mut().try_for_each(|l| l.select(&rows))
    }

    pub(super) fn layer(&mut self, i: usize) -> Option<&mut LayerCache> {
        self.layers.get_mut(i)
    }
}
