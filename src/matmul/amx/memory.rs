//! Memory that a thread uses again and again: fresh pages cost more than what is done in them.

use std::cell::RefCell;
use std::thread::LocalKey;

use super::tiles::ROW;

/// A line of the cache.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct Line([u8; ROW]);

/// What a thread keeps; it grows to what its largest product needed.
pub(super) type Kept = RefCell<Vec<Line>>;

thread_local! {
    /// For the operand that all threads of a product read: as large as its rows, at most
    /// [`super::MOST_ROWS_AT_ONCE`] of them.
    pub(super) static OPERAND: Kept = const { RefCell::new(Vec::new()) };
    /// For a thread's part of a product: 1.2 MB at most.
    pub(super) static TASK: Kept = const { RefCell::new(Vec::new()) };
}

/// Runs `work` with at least so many bytes, of any content.
pub(super) fn with_memory<T>(
    kept: &'static LocalKey<Kept>,
    bytes: usize,
    work: impl FnOnce(&mut [Line]) -> T,
) -> T {
    // Taken out, not borrowed: a thread that waits for others may begin another product meanwhile.
    let mut memory = kept.take();
    let lines = bytes.div_ceil(ROW);
    if memory.len() < lines {
        memory.resize(lines, Line([0; ROW]));
    }
    let result = work(&mut memory[..lines]);
    kept.set(memory);
    result
}
