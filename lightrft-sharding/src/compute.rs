//! The seam between sharding and a model library: what a model must be able to do so that its parameters can be
//! cut over ranks.

use std::ops::Range;

use crate::buffers::Lease;
use crate::error::{BoxError, Error, Result};
use crate::flat::FlatUnit;
use crate::host::HostMemory;
use crate::memory::Memory;
use crate::plan::UnitSpec;
use crate::precision::Combine;

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
/// - **Or keeps.** Under [`Activations::Keep`](crate::Activations::Keep), [`forward_saving`](Self::forward_saving) may
///   return what spares backward that work: activations, or a library's whole graph. Parameters come whole again in
///   backward; what is saved should not hold on to them, or the unit's memory stays (which costs nothing where units
///   stay whole anyway: stages 0 to 2, `ReshardAfterForward::Never`).
/// - **Stages may share units.** A tied output head names the embedding's unit beside its own. The parts of the
///   gradient add up before they are sent.
/// - **The plan decides, not the data.** Which collectives run, and in what order, follows from `stages` alone.
///   A stage that has nothing to do for this rank's batch (no image in it) says so by [`skips`](Self::skips): it is not
///   called, what comes in goes on as it is, and its gradients are zeros; its units are gathered and reduced all the
///   same, since other ranks may need them.
///
/// Stages must be deterministic: `backward` must see what `forward` saw, dropout masks included.
///
/// A model is staged for a memory: the host's, where nothing else is said, and `Mem::Values` is
/// [`UnitValues`](crate::UnitValues).
pub trait StagedModel<Mem: Memory = HostMemory> {
    /// What every stage of a pass can read and no stage changes: token ids, positions, masks.
    type Batch: ?Sized;
    /// What one stage hands to the next, and its gradient.
    type Activation;
    /// A whole unit in the model library's own terms.
    type Params;
    /// What a stage keeps from forward for backward where it is not recomputed; `()` for a model that always is.
    type Saved;
    /// The model's errors.
    type Error: Into<BoxError>;

    /// The units. The same on every rank; asked once.
    fn units(&self) -> Vec<UnitSpec>;

    /// The stages in forward order, at least one. The same on every rank; asked once.
    fn stages(&self) -> Vec<StageSpec>;

    /// Whether `stage` has nothing to do for this batch, which may differ from rank to rank: it then hands its input on.
    /// Asked in the forward pass; the answer holds for its backward. Some stage must run on every rank, the one that gives
    /// the output as a rule: a rank whose batch skips all has nothing to begin backward with, and fails.
    fn skips(&self, stage: usize, batch: &Self::Batch) -> bool {
        let _ = (stage, batch);
        false
    }

    /// Takes a unit's values, in the policy's `param_dtype`. A parameter's values lie at its
    /// [`range`](crate::FlatParam::range), row-major; there may be padding after them.
    ///
    /// # Errors
    /// The model's own.
    fn bind(&self, unit: &FlatUnit, values: Mem::Values) -> Result<Self::Params, Self::Error>;

    /// Takes back what `bind` made. Where the buffer can be had again, return it, and the next gather will use it.
    fn unbind(&self, params: Self::Params) -> Option<Mem::Values> {
        drop(params);
        None
    }

    /// Runs `stage` (an index into [`stages`](Self::stages)). `input` is the output of the stage before; `None` for
    /// the first stage that runs, which starts from the batch.
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

    /// As [`forward`](Self::forward), with what [`backward_saved`](Self::backward_saved) is to have. `None`, as by
    /// default, means that backward recomputes this stage.
    ///
    /// # Errors
    /// The model's own.
    #[allow(clippy::type_complexity)]
    fn forward_saving(
        &self,
        stage: usize,
        params: &[&Self::Params],
        batch: &Self::Batch,
        input: Option<&Self::Activation>,
    ) -> Result<(Self::Activation, Option<Self::Saved>), Self::Error> {
        Ok((self.forward(stage, params, batch, input)?, None))
    }

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
        grads: &mut StageGrads<'_, Mem>,
    ) -> Result<Option<Self::Activation>, Self::Error>;

    /// As [`backward`](Self::backward), from what [`forward_saving`](Self::forward_saving) returned.
    ///
    /// # Errors
    /// The model's own.
    #[allow(clippy::too_many_arguments)]
    fn backward_saved(
        &self,
        stage: usize,
        params: &[&Self::Params],
        batch: &Self::Batch,
        input: Option<&Self::Activation>,
        saved: Self::Saved,
        grad_output: Self::Activation,
        grads: &mut StageGrads<'_, Mem>,
    ) -> Result<Option<Self::Activation>, Self::Error> {
        drop(saved);
        self.backward(stage, params, batch, input, grad_output, grads)
    }
}

/// The whole gradient of one unit while a backward pass fills it.
#[derive(Debug)]
pub(crate) struct UnitGrads<Mem: Memory> {
    /// f32, as long as the trainable segment.
    pub(crate) values: Mem::Values,
    pub(crate) lease: Lease,
    /// Whether each parameter has been given a gradient in this pass.
    pub(crate) given: Vec<bool>,
}

/// Where a parameter's gradient goes, and whether there is one already.
#[derive(Debug)]
pub(crate) struct Slot<'a, Mem: Memory> {
    pub(crate) values: &'a mut Mem::Values,
    pub(crate) range: Range<usize>,
    pub(crate) how: Combine,
}

/// Where a stage puts the gradients of its parameters. Units and parameters go by their place: `unit` counts the
/// stage's own list of units, `param` the parameters of that unit.
#[derive(Debug)]
pub struct StageGrads<'a, Mem: Memory = HostMemory> {
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "slices need no help"))]
    pub(crate) memory: &'a Mem,
    units: &'a [usize],
    layouts: &'a [FlatUnit],
    grads: &'a mut [Option<UnitGrads<Mem>>],
}

impl<'a, Mem: Memory> StageGrads<'a, Mem> {
    /// `units` are the stage's; `grads` has one entry for every unit of the plan, present for those of the stage.
    pub(crate) fn new(
        memory: &'a Mem,
        units: &'a [usize],
        layouts: &'a [FlatUnit],
        grads: &'a mut [Option<UnitGrads<Mem>>],
    ) -> Self {
        Self { memory, units, layouts, grads }
    }

    /// The layouts of the stage's units, in the stage's order.
    pub fn layouts(&self) -> impl Iterator<Item = &'a FlatUnit> + '_ {
        self.units.iter().filter_map(|&unit| self.layouts.get(unit))
    }

    /// Whether the parameter learns: there is no need to compute the gradient of one that does not.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`], and [`Error::InvalidStage`] for a parameter that the unit does not have.
    pub fn wants(&self, unit: usize, param: usize) -> Result<bool> {
        let (index, param) = self.locate(unit, param)?;
        Ok(self.layouts[index].params()[param].is_trainable())
    }

    /// Where a gradient of `elems` elements of a parameter goes, and how; `None` for a frozen parameter.
    pub(crate) fn place(&mut self, unit: usize, param: usize, elems: usize) -> Result<Option<Slot<'_, Mem>>> {
        let (index, place) = self.locate(unit, param)?;
        let param = &self.layouts[index].params()[place];
        let range = param.range();
        if elems != range.len() {
            return Err(Error::Length {
                what: "the gradient",
                name: param.name().to_owned(),
                got: elems,
                expected: range.len(),
            });
        }
        let Some(UnitGrads { values, given, .. }) =
            self.grads[index].as_mut().filter(|_| param.is_trainable())
        else {
            return Ok(None);
        };
        let how = if std::mem::replace(&mut given[place], true) { Combine::Add } else { Combine::Set };
        Ok(Some(Slot { values, range, how }))
    }

    /// Where a parameter's gradient lies, to be added to.
    pub(crate) fn in_place(&mut self, unit: usize, param: usize) -> Result<(&mut Mem::Values, Range<usize>)> {
        let (index, place) = self.locate(unit, param)?;
        let param = &self.layouts[index].params()[place];
        if !param.is_trainable() {
            return Err(Error::FrozenParameter { name: param.name().to_owned() });
        }
        match &mut self.grads[index] {
            Some(UnitGrads { values, given, .. }) => {
                given[place] = true;
                Ok((values, param.range()))
            }
            None => Err(Error::NoSuchUnit { unit, units: self.units.len() }),
        }
    }

    /// The unit's index in the plan, and the parameter's in the unit.
    fn locate(&self, unit: usize, param: usize) -> Result<(usize, usize)> {
        let missing = Error::NoSuchUnit { unit, units: self.units.len() };
        let Some(&index) = self.units.get(unit) else {
            return Err(missing);
        };
        let Some(layout) =
            self.layouts.get(index).filter(|_| self.grads.get(index).is_some_and(Option::is_some))
        else {
            return Err(missing);
        };
        if param >= layout.params().len() {
            return Err(Error::InvalidStage {
                stage: layout.name().to_owned(),
                what: format!("parameter #{param} does not exist: the unit has {}", layout.params().len()),
            });
        }
        Ok((index, param))
    }
}

impl StageGrads<'_> {
    /// Adds `gradient` (row-major, the parameter's shape) to what the parameter has been given in this pass. That of a
    /// frozen parameter is dropped.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`]; [`Error::InvalidStage`] for a parameter that the unit does not have;
    /// [`Error::Length`] for a gradient of another length.
    pub fn add(&mut self, unit: usize, param: usize, gradient: &[f32]) -> Result<()> {
        match self.place(unit, param, gradient.len())? {
            Some(Slot { values, range, how: Combine::Set }) => {
                values.f32_mut()[range].copy_from_slice(gradient)
            }
            Some(Slot { values, range, how: Combine::Add }) => {
                for (sum, part) in values.f32_mut()[range].iter_mut().zip(gradient) {
                    *sum += part;
                }
            }
            None => {}
        }
        Ok(())
    }

    /// The parameter's gradient in place (zeros at first), to be added to.
    ///
    /// # Errors
    /// As [`wants`](Self::wants), and [`Error::FrozenParameter`] for one that does not learn.
    pub fn slice_mut(&mut self, unit: usize, param: usize) -> Result<&mut [f32]> {
        self.in_place(unit, param).map(|(values, range)| &mut values.f32_mut()[range])
    }
}
