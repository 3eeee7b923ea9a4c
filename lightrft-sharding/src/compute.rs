//! The seam between sharding and a model library: what a model must be able to do so that its parameters can be
//! cut over ranks.

use std::ops::Range;

use crate::error::{BoxError, Error, Result};
use crate::flat::FlatUnit;
use crate::plan::UnitSpec;

/// One stage of a model: a name, and the units whose parameters it uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageSpec {
    /// What to call it in errors: `layer 3`.
    pub name: String,
    /// Indices into [`StagedModel::units`], each at most once. The parameters arrive in this order.
    pub units: Vec<usize>,
}

impl StageSpec {
    /// A stage called `name` that uses these units.
    pub fn new(name: impl Into<String>, units: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), units: units.into() }
    }
}

/// A model as a list of stages, run one after another, whose parameters come and go.
///
/// Sharding knows nothing of tensors; a model library knows nothing of ranks. This trait is all that they share.
/// Implement it for your model, and [`ShardedModel`](crate::ShardedModel) trains it over any number of ranks.
///
/// # How a stage is run
///
/// ```text
/// forward    all-gather ─► bind ─► forward(stage) ─► unbind          only the stage's input is kept
/// backward   all-gather ─► bind ─► backward(stage) ─► unbind ─► reduce-scatter
/// ```
///
/// - **The buffer moves.** [`bind`](Self::bind) is given a unit's values as an owned `Vec`, so that one tensor can
///   take them without a copy; parameters are views of it. What `bind` returns is dropped (or given to
///   [`unbind`](Self::unbind)) as soon as no stage needs it: do not keep clones of its tensors, or the memory stays.
/// - **Backward recomputes.** Between the two passes nothing lives but the inputs of the stages. `backward` runs
///   the stage again on that input, and returns the vector-Jacobian product: the gradient with respect to the
///   input, with the gradients of parameters added through [`StageGrads`].
/// - **Stages may share units.** A tied output head names the embedding's unit beside its own. The parts of the
///   gradient add up before they are sent.
/// - **The plan decides, not the data.** Which collectives run, and in what order, follows from `stages` alone.
///   A stage that has nothing to do for this batch (no image in it) is still called on every rank; it returns its
///   input and adds no gradient, and that gradient counts as zero.
///
/// Stages must be deterministic: `backward` must see what `forward` saw, dropout masks included.
pub trait StagedModel {
    /// What every stage of a pass can read and no stage changes: token ids, positions, masks.
    type Batch: ?Sized;
    /// What one stage hands to the next, and its gradient.
    type Activation;
    /// A whole unit in the model library's own terms.
    type Params;
    /// The model's errors.
    type Error: Into<BoxError>;

    /// The units. The same on every rank; asked once.
    fn units(&self) -> Vec<UnitSpec>;

    /// The stages in forward order, at least one. The same on every rank; asked once.
    fn stages(&self) -> Vec<StageSpec>;

    /// Takes a unit's values. A parameter's values lie at its [`range`](crate::FlatParam::range), row-major; there
    /// may be padding at the end.
    ///
    /// # Errors
    /// The model's own.
    fn bind(&self, unit: &FlatUnit, values: Vec<f32>) -> Result<Self::Params, Self::Error>;

    /// Takes back what `bind` made. Where the buffer can be had again, return it, and the next gather will use it.
    fn unbind(&self, params: Self::Params) -> Option<Vec<f32>> {
        drop(params);
        None
    }

    /// Runs `stage` (an index into [`stages`](Self::stages)). `input` is the output of the stage before; `None` for
    /// the first stage, which starts from the batch.
    ///
    /// # Errors
    /// The model's own.
    fn forward(
        &self,
        stage: usize,
        params: &[&Self::Params],
        batch: &Self::Batch,
        input: Option<&Self::Activation>,
    ) -> Result<Self::Activation, Self::Error>;

    /// The vector-Jacobian product of `stage` at `input`: adds the gradients of its parameters to `grads`, and
    /// returns the gradient with respect to `input`. The first stage's return value is not used.
    ///
    /// # Errors
    /// The model's own.
    fn backward(
        &self,
        stage: usize,
        params: &[&Self::Params],
        batch: &Self::Batch,
        input: Option<&Self::Activation>,
        grad_output: Self::Activation,
        grads: &mut StageGrads<'_>,
    ) -> Result<Option<Self::Activation>, Self::Error>;
}

/// The whole gradient of one unit while a backward pass fills it.
#[derive(Debug)]
pub(crate) struct UnitGrads {
    pub(crate) values: Vec<f32>,
    /// Whether each parameter has been given a gradient in this pass.
    pub(crate) given: Vec<bool>,
}

/// Where a stage puts the gradients of its parameters. Units and parameters go by their place: `unit` counts the
/// stage's own list of units, `param` the parameters of that unit.
#[derive(Debug)]
pub struct StageGrads<'a> {
    units: &'a [usize],
    layouts: &'a [FlatUnit],
    grads: &'a mut [Option<UnitGrads>],
}

impl<'a> StageGrads<'a> {
    /// `units` are the stage's; `grads` has one entry for every unit of the plan, present for those of the stage.
    pub(crate) fn new(
        units: &'a [usize],
        layouts: &'a [FlatUnit],
        grads: &'a mut [Option<UnitGrads>],
    ) -> Self {
        Self { units, layouts, grads }
    }

    /// The layouts of the stage's units, in the stage's order.
    pub fn layouts(&self) -> impl Iterator<Item = &'a FlatUnit> + '_ {
        self.units.iter().filter_map(|&unit| self.layouts.get(unit))
    }

    /// Adds `gradient` (row-major, the parameter's shape) to what the parameter has been given in this pass.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`]; [`Error::InvalidStage`] for a parameter that the unit does not have;
    /// [`Error::Length`] for a gradient of another length.
    pub fn add(&mut self, unit: usize, param: usize, gradient: &[f32]) -> Result<()> {
        let (index, range) = self.locate(unit, param)?;
        if gradient.len() != range.len() {
            let name = self.layouts[index].params()[param].name().to_owned();
            return Err(Error::Length {
                what: "the gradient",
                name,
                got: gradient.len(),
                expected: range.len(),
            });
        }
        if let Some(UnitGrads { values, given }) = &mut self.grads[index] {
            let sum = &mut values[range];
            if std::mem::replace(&mut given[param], true) {
                for (sum, part) in sum.iter_mut().zip(gradient) {
                    *sum += part;
                }
            } else {
                sum.copy_from_slice(gradient);
            }
        }
        Ok(())
    }

    /// The parameter's gradient in place (zeros at first), to be added to.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn slice_mut(&mut self, unit: usize, param: usize) -> Result<&mut [f32]> {
        let (index, range) = self.locate(unit, param)?;
        match &mut self.grads[index] {
            Some(UnitGrads { values, given }) => {
                given[param] = true;
                Ok(&mut values[range])
            }
            None => Err(Error::NoSuchUnit { unit, units: self.units.len() }),
        }
    }

    /// The unit's index in the plan, and the parameter's elements in its buffer.
    fn locate(&self, unit: usize, param: usize) -> Result<(usize, Range<usize>)> {
        let missing = Error::NoSuchUnit { unit, units: self.units.len() };
        let Some(&index) = self.units.get(unit) else {
            return Err(missing);
        };
        let Some(layout) =
            self.layouts.get(index).filter(|_| self.grads.get(index).is_some_and(Option::is_some))
        else {
            return Err(missing);
        };
        let place = layout.params().get(param).ok_or_else(|| Error::InvalidStage {
            stage: layout.name().to_owned(),
            what: format!("parameter #{param} does not exist: the unit has {}", layout.params().len()),
        })?;
        Ok((index, place.range()))
    }
}
