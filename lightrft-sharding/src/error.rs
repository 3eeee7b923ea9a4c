//! What can go wrong, and between whom.

use lightrft_collectives::Error as CollectiveError;

use crate::dtensor::Placement;
use crate::state::StateKind;

/// Any error that a model, or a reader of weights, may return into this crate.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// This crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in sharding.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A plan needs at least one rank and an alignment of at least one element.
    #[error("a plan over {world} ranks with an alignment of {alignment} elements: both must be at least 1")]
    InvalidPlan {
        /// Ranks asked for.
        world: usize,
        /// Alignment asked for, in elements.
        alignment: usize,
    },
    /// Two units, or two parameters, bear one name.
    #[error("{what} `{name}` stands twice: in {first} and in {second}")]
    DuplicateName {
        /// `"unit"` or `"parameter"`.
        what: &'static str,
        /// The name.
        name: String,
        /// Where it stands first.
        first: String,
        /// Where it stands again.
        second: String,
    },
    /// A unit's size in bytes does not fit the address space.
    #[error("unit `{unit}` is too large: its size in bytes cannot be addressed")]
    TooLarge {
        /// The unit.
        unit: String,
    },
    /// A unit was named that the plan does not have.
    #[error("unit #{unit} does not exist: the plan has {units} units")]
    NoSuchUnit {
        /// Index asked for.
        unit: usize,
        /// Units in the plan.
        units: usize,
    },
    /// The plan is for another number of ranks than the group has.
    #[error("the plan is for {plan} ranks, the group `{group}` has {world}")]
    WorldMismatch {
        /// Ranks of the plan.
        plan: usize,
        /// The group's name.
        group: String,
        /// Ranks of the group.
        world: usize,
    },
    /// Ranks disagree about the model. Every rank of the group returns this, and names the same first difference.
    #[error("ranks disagree about the model: rank {rank} has {ours}, rank {peer} has {theirs}")]
    PlanMismatch {
        /// The lower rank.
        rank: usize,
        /// What it has at the first difference.
        ours: String,
        /// The other rank.
        peer: usize,
        /// What that one has in the same place.
        theirs: String,
    },
    /// A buffer is not as long as the unit or the parameter.
    #[error("{what} of `{name}` has {got} elements, expected {expected}")]
    Length {
        /// What the buffer holds.
        what: &'static str,
        /// The unit or parameter.
        name: String,
        /// Elements given.
        got: usize,
        /// Elements needed.
        expected: usize,
    },
    /// Gradients were asked of units that are kept without them.
    #[error("unit `{unit}` is frozen: it has no gradient")]
    Frozen {
        /// The unit.
        unit: String,
    },
    /// The state of the optimizer and the units it is asked to step are not of one plan.
    #[error("the optimizer was made for another plan: {what}")]
    ForeignOptimizer {
        /// What differs.
        what: String,
    },
    /// An earlier backward pass failed half-way, so that some gradients contain its part and some do not.
    #[error("a backward pass failed half-way: zero the gradients before going on")]
    IncompleteBackward,
    /// A tape was played back after the parameters had changed, or on another model.
    #[error(
        "the forward pass belongs to other parameters (an optimizer step, a load, or another model came between): run it again"
    )]
    StaleTape,
    /// A value that a setting cannot have.
    #[error("{setting} = {value}: {expected}")]
    InvalidSetting {
        /// The setting's name.
        setting: &'static str,
        /// What it was.
        value: f64,
        /// What it may be.
        expected: &'static str,
    },
    /// The model's stages cannot be run.
    #[error("stage `{stage}`: {what}")]
    InvalidStage {
        /// The stage's name.
        stage: String,
        /// What is wrong with it.
        what: String,
    },
    /// The model failed. Other ranks may be waiting in a collective: leave, so that they notice.
    #[error("{phase} of `{what}` failed")]
    Compute {
        /// `"bind"`, `"forward"` or `"backward"`.
        phase: &'static str,
        /// The stage or unit.
        what: String,
        /// The model's own error.
        #[source]
        source: BoxError,
    },
    /// A reader of weights or state failed.
    #[error("reading {kind} of `{name}` (elements {start}..{end}) failed")]
    Read {
        /// Which of the tensors kept for a parameter.
        kind: StateKind,
        /// The parameter.
        name: String,
        /// First element of the flattened parameter.
        start: usize,
        /// One past the last element.
        end: usize,
        /// The reader's own error.
        #[source]
        source: BoxError,
    },
    /// A visitor of whole units failed.
    #[error("visiting unit `{unit}` failed")]
    Visit {
        /// The unit.
        unit: String,
        /// The visitor's own error.
        #[source]
        source: BoxError,
    },
    /// A collective failed.
    #[error("{op} of `{what}` failed")]
    Collective {
        /// What it was for: `"gather"`, `"gradient reduce-scatter"`, ...
        op: &'static str,
        /// The unit, or what else was sent.
        what: String,
        /// The group's error.
        #[source]
        source: Box<CollectiveError>,
    },
    /// Two choices of a policy do not go together.
    #[error("{first} and {second}: {why}")]
    Contradiction {
        /// One field with its value.
        first: String,
        /// The other.
        second: String,
        /// Why they do not.
        why: &'static str,
    },
    /// A mesh has other ranks than the group, or not one or two axes.
    #[error(
        "the mesh has axes {axes:?} of sizes {sizes:?}; one or two that make up the {world} ranks of `{group}` were expected"
    )]
    MeshMismatch {
        /// The mesh's axes.
        axes: Vec<String>,
        /// Their sizes.
        sizes: Vec<usize>,
        /// The group's name.
        group: String,
        /// Its ranks.
        world: usize,
    },
    /// A unit was used after its memory had been given up.
    #[error("unit `{unit}` is offloaded: reload it before it is used")]
    Offloaded {
        /// The unit.
        unit: String,
    },
    /// The gradient of a parameter that does not learn was asked for.
    #[error("parameter `{name}` is frozen: it has no gradient")]
    FrozenParameter {
        /// The parameter.
        name: String,
    },
    /// A gradient was added to one that the ranks have summed for the step already.
    #[error(
        "the gradient of unit `{unit}` is summed over ranks already: step or zero it before the next pass"
    )]
    AlreadySummed {
        /// The unit.
        unit: String,
    },
    /// A layout that cannot be, or not for this tensor.
    #[error("{what}: expected {expected}")]
    InvalidLayout {
        /// The layout, and the tensor where it has to do with it.
        what: String,
        /// What would do.
        expected: String,
    },
    /// A tensor cannot go from one mesh to another: save and load it.
    #[error("the tensor's mesh is {from}, that of the layout {to}")]
    ForeignMesh {
        /// The mesh that the tensor, or the group, is on.
        from: String,
        /// The mesh of the layout.
        to: String,
    },
    /// An axis cannot go from one placement to another. Nothing was sent.
    #[error("`{axis}` cannot go from {from} to {to}: {why}")]
    Redistribute {
        /// The axis.
        axis: String,
        /// Its placement.
        from: Placement,
        /// What it was to become.
        to: Placement,
        /// Why not, or by what way.
        why: &'static str,
    },
    /// Ranks disagree about a tensor. Every rank returns this, with the same two.
    #[error("ranks disagree about a tensor: rank {rank} has {ours}, rank {peer} has {theirs}")]
    TensorMismatch {
        /// The lower rank.
        rank: usize,
        /// Type, shape and layout there.
        ours: String,
        /// The other rank.
        peer: usize,
        /// Type, shape and layout there.
        theirs: String,
    },
    /// A rank's values are not as many as its part of a tensor. Every rank returns this.
    #[error("rank {rank} gave {got} elements for its part of {tensor}, expected {expected}")]
    LocalLength {
        /// The first rank of which this is so.
        rank: usize,
        /// Type, shape and layout.
        tensor: String,
        /// Elements given.
        got: usize,
        /// Elements needed.
        expected: usize,
    },
    /// Contributions to a tensor were to be saved or loaded as if they were its values. Replicate or shard it first.
    #[error("the values of {layout} are contributions to a tensor, not the tensor: redistribute it first")]
    PartialValues {
        /// The layout.
        layout: String,
    },
    /// A parameter was named that the plan does not have.
    #[error("parameter `{name}` does not exist in the plan")]
    NoSuchParam {
        /// The name.
        name: String,
    },
    /// A GPU refused, or there is none, or no driver, or no compiler for it.
    #[error("cannot {doing}")]
    Device {
        /// What was tried.
        doing: &'static str,
        /// The driver's error, or the library's.
        #[source]
        source: Box<CollectiveError>,
    },
    /// A buffer on a device is not where, or not of the type, that is asked for.
    #[error("{what} is {got}, expected {expected}")]
    Misplaced {
        /// The buffer.
        what: String,
        /// Where it is, or what it holds.
        got: String,
        /// Where it should be, or what it should hold.
        expected: String,
    },
    /// A step was asked of an optimizer whose state had been given up.
    #[error("the optimizer's state is offloaded: reload it before a step")]
    OptimizerOffloaded,
    /// An average that had been given up was to be used.
    #[error("the average is offloaded: reload it before it is used")]
    AverageOffloaded,
    /// An average and the units it is asked to follow are not of one plan and rank.
    #[error("the average was made for another plan: {what}")]
    ForeignAverage {
        /// What differs.
        what: String,
    },
}

impl Error {
    /// For `map_err` on a call of a device: it could not be made.
    #[cfg(feature = "cuda")]
    pub(crate) fn device(doing: &'static str) -> impl Fn(CollectiveError) -> Self {
        move |source| Self::Device { doing, source: Box::new(source) }
    }

    /// For `map_err` on a collective: `op` of `what` failed.
    pub(crate) fn collective(op: &'static str, what: &str) -> impl Fn(CollectiveError) -> Self {
        move |source| Self::Collective { op, what: what.to_owned(), source: Box::new(source) }
    }
}

/// So that a program which uses the group itself beside sharding needs one error type only.
impl From<CollectiveError> for Error {
    fn from(source: CollectiveError) -> Self {
        Self::collective("a call", "the caller")(source)
    }
}
