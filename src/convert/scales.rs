//! The scales of one tensor, which wait for their mean: in memory up to a bound, beyond it in an
//! unnamed file of the destination's disk.

use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;

use rayon::ThreadPool;
use tempfile::SpooledTempFile;

use crate::Result;
use crate::double_quant::{MeanAccumulator, quantize_with_offset};
use crate::layout::NESTED_BLOCK_SIZE;

/// Scales that are quantized at a time: a multiple of the nested block size.
const PART: usize = 1 << 16;

/// Scales, and their mean so far.
pub(super) struct Scales {
    spool: SpooledTempFile,
    mean: MeanAccumulator,
    count: u64,
}

impl Scales {
    pub(super) fn new(folder: &Path, memory: usize) -> Self {
        Self {
            spool: tempfile::spooled_tempfile_in(memory, folder),
            mean: MeanAccumulator::default(),
            count: 0,
        }
    }

    /// Adds the next scales of the tensor.
    pub(super) fn add(&mut self, scales: &[f32]) -> Result<()> {
        self.mean.add(scales);
        self.count += scales.len() as u64;
        Ok(self.spool.write_all(bytemuck::cast_slice(scales))?)
    }

    /// Quantizes all scales on the pool, giving `write` codes and nested scales part by part.
    /// Returns the offset; None where `write` gave up.
    pub(super) fn finish(
        mut self,
        pool: &ThreadPool,
        write: &mut dyn FnMut(Vec<u8>, Vec<u8>) -> bool,
    ) -> Result<Option<f32>> {
        let offset = self.mean.mean();
        self.spool.rewind()?;
        let mut left = self.count;
        while left > 0 {
            let count = usize::try_from(left).unwrap_or(PART).min(PART);
            let mut scales = vec![0.0_f32; count];
            self.spool
                .read_exact(bytemuck::cast_slice_mut(&mut scales))?;
            let mut codes = vec![0; count];
            let mut nested = vec![0.0_f32; count.div_ceil(NESTED_BLOCK_SIZE.get())];
            pool.install(|| quantize_with_offset(&scales, offset, &mut codes, &mut nested))?;
            if !write(codes, bytemuck::cast_slice(&nested).to_vec()) {
                return Ok(None);
            }
            left -= count as u64;
        }
        Ok(Some(offset))
    }
}
