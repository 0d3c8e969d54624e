//! A packed weight, and the scales of some of its rows.

use std::ops::Range;

use crate::blockwise::{self, ScaleDecoder};
use crate::layout::{Layout, NESTED_BLOCK_SIZE, check_length};
use crate::{Backend, BlockSize, Codebook, Result};

/// The scales of a weight's blocks.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    /// One number a block.
    Plain(&'a [f32]),
    /// Double quantization: a code of 8 bits a block, a scale for every 256 of them, their mean.
    Double {
        /// Codes.
        codes: &'a [u8],
        /// Scales of the codes.
        nested_absmax: &'a [f32],
        /// What is added.
        offset: f32,
    },
}

/// A weight [out, in] in packed codes, row-major, as [`crate::blockwise::quantize`] makes it.
#[derive(Debug, Clone, Copy)]
pub struct PackedMatrix<'a> {
    pub(super) packed: &'a [u8],
    pub(super) scales: Scales<'a>,
    pub(super) codebook: &'a Codebook,
    pub(super) block_size: BlockSize,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
}

impl<'a> PackedMatrix<'a> {
    /// # Errors
    /// [`crate::Error::Length`] for parts that do not have the lengths of such a weight;
    /// [`crate::Error::Overflow`] for one that 64 bits cannot count.
    pub fn new(
        packed: &'a [u8],
        scales: Scales<'a>,
        codebook: &'a Codebook,
        block_size: BlockSize,
        [out_features, in_features]: [usize; 2],
    ) -> Result<Self> {
        let elements = crate::layout::element_count(&[out_features as u64, in_features as u64])?;
        let layout = Layout::new(elements, block_size, codebook.code_bits());
        check_length("packed", layout.packed_bytes, packed.len())?;
        match scales {
            Scales::Plain(absmax) => check_length("absmax", layout.blocks, absmax.len())?,
            Scales::Double {
                codes,
                nested_absmax,
                ..
            } => {
                check_length("absmax", layout.blocks, codes.len())?;
                check_length("nested_absmax", layout.nested_blocks, nested_absmax.len())?;
            }
        }
        Ok(Self {
            packed,
            scales,
            codebook,
            block_size,
            out_features,
            in_features,
        })
    }

    /// Whether rows begin with blocks, and a byte is two codes.
    pub(super) fn is_regular(&self) -> bool {
        is_regular(self.codebook.code_bits(), self.block_size, self.in_features)
    }

    /// The blocks that a run of rows touches.
    fn blocks(&self, first: usize, count: usize) -> Range<usize> {
        let size = self.block_size.get();
        let (start, end) = (first * self.in_features, (first + count) * self.in_features);
        start / size..end.div_ceil(size)
    }
}

/// Whether rows of so many columns begin with blocks, and a byte is two codes.
pub(super) fn is_regular(code_bits: u32, block_size: BlockSize, in_features: usize) -> bool {
    code_bits == 4 && in_features.is_multiple_of(block_size.get())
}

/// Decodes the scales of some rows at a time.
pub(super) struct RowScales<'a> {
    matrix: PackedMatrix<'a>,
    decoder: ScaleDecoder,
    nearly: bool,
}

impl<'a> RowScales<'a> {
    /// Floats that kernels may read, and not use, after the last scale.
    const PADDING: usize = 4;

    pub(super) fn new(backend: Backend, matrix: &PackedMatrix<'a>) -> Self {
        Self {
            matrix: *matrix,
            decoder: ScaleDecoder::new(backend),
            nearly: false,
        }
    }

    /// Whether 2^-16 of a nested scale may be missed where that is faster.
    pub(super) fn nearly(self, nearly: bool) -> Self {
        Self { nearly, ..self }
    }

    /// Memory for the scales of so many rows.
    pub(super) fn buffer(&self, rows: usize) -> Vec<f32> {
        // Rows may begin and end inside blocks, and decoding begins with a block of scales.
        let blocks = (rows * self.matrix.in_features) / self.matrix.block_size.get() + 2;
        vec![0.0; NESTED_BLOCK_SIZE.get() + blocks + Self::PADDING]
    }

    /// Where that lies which [`Self::decode`] reads for these rows, as far as there are such.
    pub(super) fn memory(&self, first: usize, count: usize) -> Range<*const u8> {
        let outs = self.matrix.out_features;
        let first = first.min(outs);
        let blocks = self.matrix.blocks(first, count.min(outs - first));
        match self.matrix.scales {
            Scales::Plain(absmax) => {
                let found = absmax[blocks].as_ptr_range();
                found.start.cast()..found.end.cast()
            }
            Scales::Double { codes, .. } => codes[blocks].as_ptr_range(),
        }
    }

    /// The scales of the blocks that these rows touch, with some padding behind.
    pub(super) fn decode<'b>(
        &self,
        first: usize,
        count: usize,
        buffer: &'b mut [f32],
    ) -> &'b [f32] {
        let blocks = self.matrix.blocks(first, count);
        match self.matrix.scales {
            Scales::Plain(absmax) => {
                let found = &absmax[blocks];
                buffer[..found.len()].copy_from_slice(found);
                buffer
            }
            Scales::Double {
                codes,
                nested_absmax,
                offset,
            } => {
                let nested = NESTED_BLOCK_SIZE.get();
                let from = blocks.start / nested * nested;
                let length = blocks.end - from;
                let (codes, nested) = (&codes[from..blocks.end], &nested_absmax[from / nested..]);
                let scales = &mut buffer[..length];
                if self.nearly {
                    self.decoder.decode_nearly(codes, nested, offset, scales);
                } else {
                    self.decoder.decode(codes, nested, offset, scales);
                }
                &buffer[blocks.start - from..]
            }
        }
    }
}

/// Decodes a row at a time, of any width of codes and wherever its blocks begin.
pub(super) struct DecodedRows<'a> {
    matrix: PackedMatrix<'a>,
    backend: Backend,
}

impl<'a> DecodedRows<'a> {
    pub(super) fn new(backend: Backend, matrix: &PackedMatrix<'a>) -> Self {
        Self {
            matrix: *matrix,
            backend,
        }
    }

    /// The numbers of a row; `scales` begins with those of the row `first`. The buffer is made as
    /// large as need be.
    pub(super) fn decode<'b>(
        &self,
        scales: &[f32],
        first: usize,
        row: usize,
        buffer: &'b mut Vec<f32>,
    ) -> &'b [f32] {
        let (columns, size) = (self.matrix.in_features, self.matrix.block_size.get());
        let per_byte = 8 / self.matrix.codebook.code_bits() as usize;
        let start = row * columns;
        let block = start / size;
        let within = start - block * size;
        buffer.resize(within + columns, 0.0);
        blockwise::decode(
            self.backend,
            &self.matrix.packed[block * size / per_byte..],
            &scales[block - first * columns / size..],
            self.matrix.codebook,
            self.matrix.block_size,
            buffer,
        );
        &buffer[within..]
    }
}
