//! The rows of `x` in the order in which a kernel's numbers come.

use super::choice::Kernel;

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

/// Numbers, [rows, columns], as [steps, rows, columns of a step] in the order of a kernel, filled up
/// with zeros.
pub(super) fn arrange(kernel: Kernel, x: &[f32], rows: usize) -> Aligned {
    let columns = x.len() / rows.max(1);
    let mut arranged = Aligned::new(columns.next_multiple_of(kernel.step()) * rows);
    for (row, x) in x.chunks_exact(columns.max(1)).enumerate() {
        kernel.arrange(x, row, rows, arranged.numbers_mut());
    }
    arranged
}
