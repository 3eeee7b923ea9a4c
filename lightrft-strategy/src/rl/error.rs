//! What the RL maths refuses, with the numbers that did not fit.

/// An input that has no answer. Nothing is computed and no output is half written when one is returned.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A matrix was built from a slice whose length is not `rows * cols`.
    #[error("a {rows} x {cols} matrix needs {} elements, got {len}", .rows.saturating_mul(*.cols))]
    Length {
        /// Elements in the slice.
        len: usize,
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
    },
    /// Two inputs that describe the same tokens have different shapes.
    #[error("`{what}` is {rows} x {cols}, expected {want_rows} x {want_cols}")]
    Shape {
        /// The input that differs.
        what: &'static str,
        /// Its rows.
        rows: usize,
        /// Its columns.
        cols: usize,
        /// Rows expected.
        want_rows: usize,
        /// Columns expected.
        want_cols: usize,
    },
    /// A flat input has the wrong number of elements.
    #[error("`{what}` has {got} elements, expected {want}")]
    Count {
        /// The input that differs.
        what: &'static str,
        /// Elements it has.
        got: usize,
        /// Elements expected.
        want: usize,
    },
    /// The rewards do not divide into groups of `group_size`.
    #[error("{rewards} rewards do not divide into groups of {group_size} samples per prompt")]
    Ungrouped {
        /// Number of rewards.
        rewards: usize,
        /// Samples per prompt.
        group_size: usize,
    },
    /// The estimator compares a sample with the others of its group, and there are none.
    #[error("{estimator} needs at least {at_least} samples per prompt, got {group_size}")]
    GroupTooSmall {
        /// The estimator.
        estimator: &'static str,
        /// Samples per prompt that it needs.
        at_least: usize,
        /// Samples per prompt.
        group_size: usize,
    },
    /// A label is not a column of the logits.
    #[error("label {label} at position {position} is outside the vocabulary of {vocab}")]
    Label {
        /// The label.
        label: i64,
        /// Its index among the labels.
        position: usize,
        /// Columns of the logits.
        vocab: usize,
    },
    /// A number is outside the range its formula is defined on.
    #[error("`{what}` is {got}, expected {want}")]
    Range {
        /// The argument.
        what: &'static str,
        /// Its value.
        got: f64,
        /// The range, in words.
        want: &'static str,
    },
    /// A logit is NaN, so no distribution exists.
    #[error("the logits of row {row} hold a NaN")]
    NanLogit {
        /// The row.
        row: usize,
    },
    /// An input that this estimator needs was not given.
    #[error("{estimator} needs `{what}`")]
    Missing {
        /// The estimator.
        estimator: &'static str,
        /// The input.
        what: &'static str,
    },
    /// A name is not one of the known ones.
    #[error("unknown {what} `{name}`, expected one of {known}")]
    UnknownName {
        /// What the name should have named.
        what: &'static str,
        /// The name given.
        name: String,
        /// The known names, separated by commas.
        known: &'static str,
    },
}

/// `Result` with this module's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
