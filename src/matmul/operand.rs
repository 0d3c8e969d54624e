//! The rows of `x` in the order in which a kernel's numbers come.

use crate::blockwise::convert;
use crate::{Backend, Element};

/// Memory for numbers that begins with a line of the cache: registers that cross lines are read at
/// half the speed.
pub(super) struct Aligned {
    memory: Vec<f32>,
    start: usize,
    length: usize,
}

impl Aligned {
    const LINE: usize = 64;

    /// Zeros.
    pub(super) fn new(length: usize) -> Self {
        let memory = vec![0.0_f32; length + Self::LINE / size_of::<f32>()];
        let start = memory
            .as_ptr()
            .align_offset(Self::LINE)
            .min(memory.len() - length);
        Self {
            memory,
            start,
            length,
        }
    }

    pub(super) fn numbers(&self) -> &[f32] {
        &self.memory[self.start..self.start + self.length]
    }

    pub(super) fn numbers_mut(&mut self) -> &mut [f32] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

/// The order of a step: which column is at each place.
pub(super) type Order = Vec<u8>;

/// [rows, columns] as [steps, rows, columns of a step] in `order`, filled up with zeros; as it is
/// where there is no order.
pub(super) fn arrange<T: Element>(backend: Backend, x: &[T], rows: usize, order: &[u8]) -> Aligned {
    let step = order.len();
    if step == 0 {
        let mut numbers = Aligned::new(x.len());
        convert(backend, x, numbers.numbers_mut());
        return numbers;
    }
    let columns = x.len() / rows.max(1);
    let mut arranged = Aligned::new(columns.div_ceil(step) * rows * step);
    let mut straight = vec![0.0_f32; columns.next_multiple_of(step)];
    for (row, x) in x.chunks_exact(columns.max(1)).enumerate() {
        convert(backend, x, &mut straight[..columns]);
        let places = arranged.numbers_mut().chunks_exact_mut(step);
        let targets = places.skip(row).step_by(rows);
        for (target, source) in targets.zip(straight.chunks_exact(step)) {
            for (number, &column) in target.iter_mut().zip(order) {
                *number = source[usize::from(column)];
            }
        }
    }
    arranged
}
