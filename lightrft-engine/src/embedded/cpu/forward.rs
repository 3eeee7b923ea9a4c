//! One step through the decoder: new tokens of any sequences, at any positions, side by side.

use super::super::pages::{PAGE_TOKENS, PageId};
use super::super::step::{Column, Forward, Step};
use super::attention::{AttentionScratch, attend};
use super::cache::Cache;
use super::columns::Columns;
use super::lanes::LANES;
use super::linear::{Linear, Logits, Matrix, Output, linear};
use super::simd::{Vectors, rms_norm};
use super::team::Team;
use crate::{Error, Result};

/// A decoder's weights where they lie.
#[derive(Debug)]
pub(in super::super) struct Model<'a> {
    pub(in super::super) hidden: usize,
    pub(in super::super) heads: usize,
    pub(in super::super) eps: f32,
    /// Rotary frequencies, radians per position.
    pub(in super::super) frequencies: &'a [f32],
    /// `[vocabulary, hidden]`.
    pub(in super::super) embed: Matrix<'a>,
    pub(in super::super) layers: Vec<Layer<'a>>,
    pub(in super::super) norm: &'a [f32],
    /// `[vocabulary, hidden]`; the embedding where they are tied.
    pub(in super::super) head: Matrix<'a>,
}

impl Model<'_> {
    /// Number of token ids.
    pub(in super::super) fn vocabulary(&self) -> usize {
        self.head.elems() / self.hidden.max(1)
    }
}

/// One layer's weights.
#[derive(Debug)]
pub(in super::super) struct Layer<'a> {
    pub(in super::super) attention_norm: &'a [f32],
    pub(in super::super) q: Linear<'a>,
    pub(in super::super) k: Linear<'a>,
    pub(in super::super) v: Linear<'a>,
    /// RMSNorm of each query and key head, `[head_dim]`.
    pub(in super::super) head_norms: Option<(&'a [f32], &'a [f32])>,
    pub(in super::super) o: Linear<'a>,
    pub(in super::super) mlp_norm: &'a [f32],
    pub(in super::super) gate: Linear<'a>,
    pub(in super::super) up: Linear<'a>,
    pub(in super::super) down: Linear<'a>,
}

/// Memory that a step uses again.
#[derive(Debug, Default)]
pub(in super::super) struct Work {
    residual: Columns,
    normed: Columns,
    q: Columns,
    k: Columns,
    v: Columns,
    /// Attention's output, `[column, heads * head_dim]`.
    rows: Vec<f32>,
    mixed: Columns,
    act: Columns,
    last: Columns,
    /// Cosine and sine of each column's angles, `[column, head_dim / 2]`.
    turns: Vec<(f32, f32)>,
    /// What the step was for.
    logits: Logits,
}

/// The model on the CPU.
#[derive(Debug)]
pub(in super::super) struct CpuForward<'a> {
    pub(in super::super) model: Model<'a>,
    pub(in super::super) team: &'a Team,
    pub(in super::super) cache: &'a mut Cache,
    pub(in super::super) work: &'a mut Work,
}

impl Forward for CpuForward<'_> {
    fn vocabulary(&self) -> usize {
        self.model.vocabulary()
    }

    fn step(&mut self, step: &Step<'_>) -> Result<()> {
        self.cache.grow(step.pages).map_err(|source| Error::Backend {
            engine: "embedded",
            operation: "taking memory for the key-value cache",
            source: Box::new(source),
        })?;
        for (from, to) in step.copies {
            self.cache.copy(*from, *to);
        }
        let (work, cache, team) = (&mut *self.work, &mut *self.cache, self.team);
        team.enter(|| work.step(&self.model, team, cache, step));
        Ok(())
    }

    fn logits<'l>(&'l self, wanted: usize, scratch: &'l mut Vec<f32>) -> &'l [f32] {
        self.work.logits.row(wanted, scratch);
        scratch
    }
}

impl Work {
    /// Computes the columns of a step. Their keys and values are in the pages afterwards, and `self.logits` holds those
    /// that are wanted.
    fn step(&mut self, model: &Model<'_>, team: &Team, cache: &mut Cache, step: &Step<'_>) {
        let Step { columns, tables, wanted, .. } = *step;
        let layout = cache.layout();
        let (n, dim) = (columns.len(), layout.head_dim);
        self.embed(model, columns);
        self.turn(model, columns);
        self.normed.shape(model.hidden, n);
        self.q.shape(model.heads * dim, n);
        self.k.shape(layout.kv_heads * dim, n);
        self.v.shape(layout.kv_heads * dim, n);
        self.rows.resize(n * model.heads * dim, 0.0);
        self.mixed.shape(model.heads * dim, n);
        self.mixed.clear_from(n);
        for (index, layer) in model.layers.iter().enumerate() {
            norm(team, &self.residual, layer.attention_norm, model.eps, &mut self.normed);
            linear(
                team,
                &self.normed,
                [
                    (layer.q, Output::Store(&mut self.q)),
                    (layer.k, Output::Store(&mut self.k)),
                    (layer.v, Output::Store(&mut self.v)),
                ],
            );
            self.remember(model, index, cache, columns, tables);
            self.attention(model, team, index, cache, columns, tables);
            linear(team, &self.mixed, [(layer.o, Output::Add(&mut self.residual))]);
            norm(team, &self.residual, layer.mlp_norm, model.eps, &mut self.normed);
            self.act.shape(layer.gate.weight.elems() / model.hidden.max(1), n);
            linear(team, &self.normed, [(layer.gate, Output::Gate(layer.up, &mut self.act))]);
            linear(team, &self.act, [(layer.down, Output::Add(&mut self.residual))]);
        }
        self.last.shape(model.hidden, wanted.len());
        self.last.clear_from(wanted.len());
        let mut row = vec![0.0; model.hidden];
        for (to, from) in wanted.iter().enumerate() {
            self.residual.gather(*from, 0, &mut row);
            self.last.scatter(to, row.iter().copied());
        }
        self.normed.shape(model.hidden, wanted.len());
        norm(team, &self.last, model.norm, model.eps, &mut self.normed);
        self.logits.compute(team, model.head, &self.normed, wanted.len());
    }

    fn embed(&mut self, model: &Model<'_>, columns: &[Column]) {
        self.residual.shape(model.hidden, columns.len());
        self.residual.clear_from(columns.len());
        let mut wide = Vec::new();
        for (c, column) in columns.iter().enumerate() {
            let start = column.token as usize * model.hidden;
            let row = model.embed.wide(start..start + model.hidden, &mut wide);
            self.residual.scatter(c, row.iter().copied());
        }
    }

    fn turn(&mut self, model: &Model<'_>, columns: &[Column]) {
        self.turns.clear();
        for column in columns {
            self.turns.extend(model.frequencies.iter().map(|f| {
                let angle = f64::from(column.position as f32 * f);
                (angle.cos() as f32, angle.sin() as f32)
            }));
        }
    }

    /// Writes the new keys and values into the pages.
    fn remember(
        &self,
        model: &Model<'_>,
        layer: usize,
        cache: &mut Cache,
        columns: &[Column],
        tables: &[&[PageId]],
    ) {
        let layout = cache.layout();
        let dim = layout.head_dim;
        let (mut k, mut v) = (vec![0.0; dim], vec![0.0; dim]);
        let weights = model.layers[layer].head_norms.map(|(_, k)| k);
        for (c, column) in columns.iter().enumerate() {
            let page = tables[column.sequence][column.position / PAGE_TOKENS];
            let page = cache.page_mut(page);
            for head in 0..layout.kv_heads {
                self.k.gather(c, head * dim, &mut k);
                self.v.gather(c, head * dim, &mut v);
                place(&mut k, weights, model.eps, self.turns_of(c, dim));
                layout.write(page, layer, head, column.position % PAGE_TOKENS, &k, &v);
            }
        }
    }

    fn turns_of(&self, c: usize, dim: usize) -> &[(f32, f32)] {
        &self.turns[c * dim / 2..(c + 1) * dim / 2]
    }

    fn attention(
        &mut self,
        model: &Model<'_>,
        team: &Team,
        layer: usize,
        cache: &Cache,
        columns: &[Column],
        tables: &[&[PageId]],
    ) {
        let layout = cache.layout();
        let dim = layout.head_dim;
        let group = model.heads / layout.kv_heads * dim;
        let mut rows = std::mem::take(&mut self.rows);
        let jobs: Vec<_> = rows.chunks_mut(group.max(1)).enumerate().collect();
        let work = columns.iter().map(|c| 2 * (c.position + 1) * model.heads * dim).sum();
        let weights = model.layers[layer].head_norms.map(|(q, _)| q);
        team.each(work, jobs, AttentionScratch::default, |scratch, (at, out)| {
            let (c, head) = (at / layout.kv_heads, at % layout.kv_heads);
            scratch.q.resize(group, 0.0);
            self.q.gather(c, head * group, &mut scratch.q);
            for q in scratch.q.chunks_exact_mut(dim) {
                place(q, weights, model.eps, self.turns_of(c, dim));
            }
            let pages = tables[columns[c].sequence].iter().map(|id| cache.page(*id));
            attend(layout, (layer, head), columns[c].position + 1, pages, scratch, out);
        });
        for (c, row) in rows.chunks_exact((model.heads * dim).max(1)).enumerate() {
            self.mixed.scatter(c, row.iter().copied());
        }
        self.rows = rows;
    }
}

/// Norms a head where the model does, and turns it to its position: halves rotated as HF does.
fn place(head: &mut [f32], norm: Option<&[f32]>, eps: f32, turns: &[(f32, f32)]) {
    if let Some(weights) = norm {
        let squares: f32 = head.iter().map(|x| x * x).sum();
        let scale = 1.0 / (squares / head.len() as f32 + eps).sqrt();
        head.iter_mut().zip(weights).for_each(|(x, w)| *x = *x * scale * w);
    }
    let (low, high) = head.split_at_mut(turns.len());
    for ((a, b), (cos, sin)) in low.iter_mut().zip(high).zip(turns) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

fn norm(team: &Team, x: &Columns, weight: &[f32], eps: f32, out: &mut Columns) {
    let jobs: Vec<_> = x.groups().zip(out.groups_mut()).collect();
    let work = 4 * jobs.len() * x.features() * LANES;
    team.each(work, jobs, || (), |(), (x, out)| rms_norm(Vectors::widest(), x, weight, eps, out));
}
