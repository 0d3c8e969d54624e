//! Some rows of a weight, and the way through them: which columns, which rows, what the memory is
//! asked for ahead.
#![allow(unsafe_code)]

use super::kernel::Kernel;
use super::matrix::PackedMatrix;

/// Rows of the weight that a loop goes over again and again with a piece of `x` or of the sums.
pub(super) const TILE_ROWS: usize = 16;

/// The most rows of the weight that a thread takes at a time.
pub(super) const MOST_TASK_ROWS: usize = 4 * TILE_ROWS;

/// How far ahead the memory is asked for a stream: as long as it takes to answer.
const AHEAD: usize = 1024;

/// Bytes of `x` or of sums that a loop goes over again and again: half a first-level cache of 48
/// KiB, most of one of 32.
const RESIDENT: usize = 24 << 10;

/// Some rows of a weight whose blocks do not cross rows.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    pub(super) matrix: &'a PackedMatrix<'a>,
    /// Of those rows alone.
    pub(super) codes: &'a [u8],
    /// Three more than there are.
    scales: &'a [f32],
    pub(super) count: usize,
    /// Bytes from the first row's codes to those of the tile that comes next, if one does.
    onward: usize,
}

impl<'a> Tile<'a> {
    /// The rows from `first` on; `scales` begins with theirs. The tile that the thread takes next
    /// is `onward` rows from there, as far as is known.
    pub(super) fn new(
        matrix: &'a PackedMatrix<'a>,
        scales: &'a [f32],
        first: usize,
        count: usize,
        onward: usize,
    ) -> Self {
        let bytes = matrix.in_features / 2;
        let blocks = matrix.in_features / matrix.block_size.get();
        assert!(count <= MOST_TASK_ROWS && matrix.is_regular());
        Self {
            matrix,
            codes: &matrix.packed[first * bytes..(first + count) * bytes],
            scales: &scales[..count * blocks + 3],
            count,
            onward: onward * bytes,
        }
    }
}

/// A step of some rows.
#[derive(Clone, Copy)]
pub(super) struct Place<const R: usize> {
    codes: [*const u8; R],
    scales: [*const f32; R],
}

impl<const R: usize> Place<R> {
    /// Step 0 of rows that are so many `apart`. One that is behind the last is the last once more.
    #[inline(always)]
    pub(super) fn new(tile: &Tile<'_>, row: usize, apart: usize) -> Self {
        let bytes = tile.matrix.in_features / 2;
        let blocks = tile.matrix.in_features / tile.matrix.block_size.get();
        let mut made = Self {
            codes: [tile.codes.as_ptr(); R],
            scales: [tile.scales.as_ptr(); R],
        };
        for r in 0..R {
            let row = (row + r * apart).min(tile.count - 1);
            made.codes[r] = made.codes[r].wrapping_add(row * bytes);
            made.scales[r] = made.scales[r].wrapping_add(row * blocks);
        }
        made
    }

    /// Codes and scales of the step that begins with a column.
    ///
    /// # Safety
    /// `columns` columns are there from it on, and three scales after the last.
    #[inline(always)]
    pub(super) unsafe fn read<K: Kernel>(
        self,
        column: usize,
        columns: usize,
        shift: u32,
        lanes: K::Lanes,
    ) -> ([K::Codes; R], [K::Sum; R]) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut codes = [K::codes(self.codes[0].add(column / 2), columns); R];
            let mut scales = [K::scale(self.scales[0].add(column >> shift), lanes); R];
            for r in 1..R {
                codes[r] = K::codes(self.codes[r].add(column / 2), columns);
                scales[r] = K::scale(self.scales[r].add(column >> shift), lanes);
            }
            (codes, scales)
        }
    }
}

/// Calls `$one` with whole steps and what is left in the columns `$from..$to`, and `$ask` before each
/// whole one.
macro_rules! each_step {
    ($tile:ident, $K:ident, $place:ident, $from:expr, $to:expr,
     |$column:ident| $ask:expr, |$codes:ident, $scales:ident| $one:expr) => {{
        let block_size = $tile.matrix.block_size.get();
        let shift = block_size.trailing_zeros();
        let lanes = $K::lanes(block_size, $K::STEP);
        let whole = $to / $K::STEP * $K::STEP;
        let mut $column = $from;
        while $column < whole {
            $ask;
            let ($codes, $scales) = $place.read::<$K>($column, $K::STEP, shift, lanes);
            $one;
            $column += $K::STEP;
        }
        if $column < $to {
            let left = $to - $column;
            let lanes = $K::lanes(block_size, left);
            let ($codes, $scales) = $place.read::<$K>($column, left, shift, lanes);
            $one;
        }
    }};
}
pub(super) use each_step;

/// Asks the memory ahead for `R` streams, of as many rows each, and at their ends for those of the
/// tile that comes next.
pub(super) struct Streams<const R: usize> {
    start: *const u8,
    length: usize,
    onward: usize,
}

impl<const R: usize> Streams<R> {
    pub(super) fn new(tile: &Tile<'_>, rows: usize) -> Self {
        Self {
            start: tile.codes.as_ptr(),
            length: rows * (tile.matrix.in_features / 2),
            onward: tile.onward,
        }
    }

    /// A line of each stream; `at` is how many bytes of it are behind.
    ///
    /// # Safety
    /// The processor has the features of `K`.
    #[inline(always)]
    pub(super) unsafe fn ask<K: Kernel>(&self, at: usize) {
        let mut at = at + AHEAD;
        if at >= self.length {
            at = at - self.length + self.onward;
        }
        for r in 0..R {
            // SAFETY: the caller answers for the features.
            unsafe { K::prefetch(self.start.wrapping_add(r * self.length + at)) };
        }
    }
}

/// Columns that a loop goes over again and again for all rows of a tile.
pub(super) const fn columns_at_a_time(step: usize, rows: usize) -> usize {
    let columns = RESIDENT / 4 / rows / step * step;
    if columns == 0 { step } else { columns }
}

/// Asks the memory for the next tile, line after line and in order, while this one is worked on.
/// (Where several rows were read at a time, with nothing asked for in order, one row of `x` took
/// twice as long.)
pub(super) struct NextTile(*const u8);

impl NextTile {
    pub(super) fn new(tile: &Tile<'_>) -> Self {
        Self(tile.codes.as_ptr().wrapping_add(tile.onward))
    }

    /// As many lines as steps of so many rows read.
    ///
    /// # Safety
    /// The processor has the features of `K`.
    #[inline(always)]
    pub(super) unsafe fn ask<K: Kernel>(&mut self, rows: usize) {
        for _ in 0..rows {
            // SAFETY: the caller answers for the features.
            unsafe { K::prefetch(self.0) };
            self.0 = self.0.wrapping_add(K::STEP / 2);
        }
    }
}
