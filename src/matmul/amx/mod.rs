//! Products of `bf16` on the tiles of AMX: the weight is decoded, a piece that fits the cache at a
//! time, into tiles, which a matrix instruction multiplies.
//!
//! Decoding rounds as [`crate::blockwise::dequantize`] does, so the result is that of a dense
//! product with the dequantized weight, but for the order of the sum. Where a chip has tiles they
//! win from a few rows on.
//!
//! | file | what it holds |
//! |---|---|
//! | `tiles` | the registers and the loops that multiply |
//! | `decode` | codes to numbers |
//! | `shuffle` | numbers into and out of the order that tiles want |
//! | `forward` | `x W^T` |
//! | `transposed` | `y W` |
//! | `memory` | memory that threads keep |

mod decode;
mod forward;
mod memory;
mod shuffle;
mod tiles;
mod transposed;

pub(super) use self::forward::multiply;
pub(super) use self::transposed::multiply_transposed;

/// Rows of an operand that are multiplied at a time; more make several products, for each of which
/// the weight is decoded anew. 512 rows take as long as decoding 15 times.
const MOST_ROWS_AT_ONCE: usize = 512;

/// How an operand of many rows is cut: pieces of equal size, but for the last, in whole pairs of
/// tiles.
fn rows_at_once(rows: usize) -> usize {
    let pieces = rows.div_ceil(MOST_ROWS_AT_ONCE).max(1);
    rows.div_ceil(pieces).next_multiple_of(2 * tiles::ROWS)
}

/// An output that several threads write, each its own columns.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);

#[allow(unsafe_code)]
// SAFETY: whoever writes through the pointer says why nobody else writes there.
unsafe impl<T: Send> Send for Shared<T> {}
#[allow(unsafe_code)]
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn pointer(self) -> *mut T {
        self.0
    }
}
