//! A borrowed row-major matrix whose length was checked once, so the formulas need not.

use super::error::{Error, Result};

/// A borrowed `rows x cols` row-major matrix: one row per sequence, one column per token.
///
/// ```
/// use lightrft_strategy::rl::Matrix;
///
/// let m = Matrix::new(&[1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 3)?;
/// assert_eq!(m.row(1), [4.0, 5.0, 6.0]);
/// # Ok::<_, lightrft_strategy::rl::Error>(())
/// ```
#[derive(Debug)]
pub struct Matrix<'a, T = f32> {
    data: &'a [T],
    rows: usize,
    cols: usize,
}

/// Which tokens count: `true` where the model chose the token, `false` for prompt and padding.
pub type Mask<'a> = Matrix<'a, bool>;

impl<T> Clone for Matrix<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Matrix<'_, T> {}

impl<'a, T> Matrix<'a, T> {
    /// Views `data` as `rows` rows of `cols` elements.
    ///
    /// # Errors
    /// [`Error::Length`] unless `data.len() == rows * cols`.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Result<Self> {
        if rows.checked_mul(cols) != Some(data.len()) {
            return Err(Error::Length { len: data.len(), rows, cols });
        }
        Ok(Self { data, rows, cols })
    }

    /// Views `data` as a single row, for one unpadded sequence.
    pub fn single_row(data: &'a [T]) -> Self {
        Self { data, rows: 1, cols: data.len() }
    }

    /// Number of rows (sequences).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (tokens per row, padding included).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All elements, row after row.
    pub fn as_slice(&self) -> &'a [T] {
        self.data
    }

    /// Row `row`.
    ///
    /// # Panics
    /// If `row >= self.rows()`, as slice indexing does.
    pub fn row(&self, row: usize) -> &'a [T] {
        &self.data[row * self.cols..(row + 1) * self.cols]
    }

    /// The rows in order. A matrix without columns still yields its (empty) rows.
    pub fn iter_rows(&self) -> impl ExactSizeIterator<Item = &'a [T]> + use<'a, T> {
        let (data, cols) = (self.data, self.cols);
        (0..self.rows).map(move |row| &data[row * cols..(row + 1) * cols])
    }

    /// Refuses a matrix that is not `rows x cols`; `what` names it in the error.
    pub(crate) fn expect_shape(&self, what: &'static str, rows: usize, cols: usize) -> Result<()> {
        if (self.rows, self.cols) == (rows, cols) {
            return Ok(());
        }
        Err(Error::Shape { what, rows: self.rows, cols: self.cols, want_rows: rows, want_cols: cols })
    }

    /// Refuses a matrix whose shape differs from `other`'s.
    pub(crate) fn expect_like<U>(&self, what: &'static str, other: &Matrix<'_, U>) -> Result<()> {
        self.expect_shape(what, other.rows, other.cols)
    }
}

/// The mask of a row, where no mask at all means that every token counts.
#[derive(Clone, Copy)]
pub(crate) struct RowMask<'a>(Option<&'a [bool]>);

impl RowMask<'_> {
    /// Whether column `col` counts.
    pub(crate) fn keeps(&self, col: usize) -> bool {
        self.0.is_none_or(|mask| mask[col])
    }

    /// How many of `cols` columns count.
    pub(crate) fn count(&self, cols: usize) -> usize {
        self.0.map_or(cols, |mask| mask.iter().filter(|keep| **keep).count())
    }
}

/// Row `row` of an optional mask.
pub(crate) fn row_mask<'a>(mask: Option<Mask<'a>>, row: usize) -> RowMask<'a> {
    RowMask(mask.map(|mask| mask.row(row)))
}

/// Refuses an optional mask whose shape differs from `other`'s.
pub(crate) fn expect_mask<U>(mask: Option<Mask<'_>>, other: &Matrix<'_, U>) -> Result<()> {
    mask.map_or(Ok(()), |mask| mask.expect_like("mask", other))
}

/// Refuses a flat slice of the wrong length; `what` names it in the error.
pub(crate) fn expect_len(what: &'static str, got: usize, want: usize) -> Result<()> {
    if got == want {
        return Ok(());
    }
    Err(Error::Count { what, got, want })
}
