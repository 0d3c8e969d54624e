//! Some rows of a weight, and the way through them: which columns, which rows, what the memory is
//! asked for ahead.
#![allow(unsafe_code)]

use super::kernel::Kernel;
use super::matrix::PackedMatrix;

/// Rows of the weight whose scales are decoded at a time, and that a thread takes at a time.
pub(super) const TILE_ROWS: usize = 16;

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
}

impl<'a> Tile<'a> {
    /// The rows from `first` on; `scales` begins with theirs.
    pub(super) fn new(
        matrix: &'a PackedMatrix<'a>,
        scales: &'a [f32],
        first: usize,
        count: usize,
    ) -> Self {
        let bytes = matrix.in_features / 2;
        let blocks = matrix.in_features / matrix.block_size.get();
        assert!(count <= TILE_ROWS && matrix.is_regular());
        Self {
            matrix,
            codes: &matrix.packed[first * bytes..(first + count) * bytes],
            scales: &scales[..count * blocks + 3],
            count,
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
    /// Step 0. A row that is behind the last is the last once more.
    #[inline(always)]
    pub(super) fn new(tile: &Tile<'_>, row: usize) -> Self {
        let bytes = tile.matrix.in_features / 2;
        let blocks = tile.matrix.in_features / tile.matrix.block_size.get();
        let mut made = Self {
            codes: [tile.codes.as_ptr(); R],
            scales: [tile.scales.as_ptr(); R],
        };
        for r in 0..R {
            let row = (row + r).min(tile.count - 1);
            made.codes[r] = made.codes[r].wrapping_add(row * bytes);
            made.scales[r] = made.scales[r].wrapping_add(row * blocks);
        }
        made
    }

    /// How many.
    #[inline(always)]
    pub(super) const fn rows(&self) -> usize {
        R
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

/// Calls `$one` with whole steps and what is left in the columns `$from..$to`.
macro_rules! each_step {
    ($tile:ident, $K:ident, $place:ident, $from:expr, $to:expr, $ahead:ident,
     |$column:ident, $codes:ident, $scales:ident| $one:expr) => {{
        let block_size = $tile.matrix.block_size.get();
        let shift = block_size.trailing_zeros();
        let lanes = $K::lanes(block_size, $K::STEP);
        let whole = $to / $K::STEP * $K::STEP;
        let mut $column = $from;
        while $column < whole {
            for _ in 0..$place.rows() {
                $K::prefetch($ahead);
                $ahead = $ahead.wrapping_add($K::STEP / 2);
            }
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

/// Columns that a loop goes over again and again for all rows of a tile. With one or two rows of
/// `x` it is all of them: reading the weight from its first byte to its last is worth more there,
/// and `x` comes from the second-level cache quickly enough.
pub(super) const fn columns_at_a_time(step: usize, rows: usize, all: usize) -> usize {
    let columns = RESIDENT / 4 / rows / step * step;
    if rows <= 2 {
        all
    } else if columns == 0 {
        step
    } else {
        columns
    }
}

/// What to ask the memory for first, and then line after line: some lines ahead where the tile is
/// read from its first byte to its last; else the next tile, in order. (Where several rows were
/// read at a time, with nothing asked for in order, one row of `x` took twice as long.)
pub(super) fn ahead(tile: &Tile<'_>, in_order: bool) -> *const u8 {
    let codes = tile.codes.as_ptr_range();
    if in_order {
        codes.start.wrapping_add(2048)
    } else {
        codes.end
    }
}
