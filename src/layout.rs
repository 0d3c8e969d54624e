//! Every size in blocks and bytes. Nothing else multiplies shapes.

use crate::{Error, Result};

/// Elements of a block of block scales in double quantization (paper, section 3).
pub const NESTED_BLOCK_SIZE: BlockSize = BlockSize(256);

/// How many elements share one scale: a power of two from 32 to 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockSize(u32);

impl BlockSize {
    /// The block size of the QLoRA paper, and our default.
    pub const DEFAULT: Self = Self(64);

    /// # Errors
    /// [`Error::BlockSize`] unless `size` is a power of two from 32 to 4096.
    pub const fn new(size: u64) -> Result<Self> {
        if size.is_power_of_two() && size >= 32 && size <= 4096 {
            // The range was just checked, so nothing is cut off.
            #[allow(clippy::cast_possible_truncation)]
            return Ok(Self(size as u32));
        }
        Err(Error::BlockSize { got: size })
    }

    /// The number of elements.
    #[must_use]
    pub const fn get(self) -> usize {
        self.0 as usize
    }
}

/// The number of elements of a shape; 1 for the empty shape of a 0-dimensional tensor.
///
/// # Errors
/// [`Error::Overflow`] where 64 bits cannot count them.
pub fn element_count(shape: &[u64]) -> Result<u64> {
    // A zero anywhere makes the tensor empty, whatever the other dimensions say.
    if shape.contains(&0) {
        return Ok(0);
    }
    shape
        .iter()
        .try_fold(1_u64, |product, &dim| product.checked_mul(dim))
        .ok_or_else(|| Error::Overflow {
            shape: shape.to_vec(),
        })
}

/// Sizes of one quantized tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Elements before quantization.
    pub elements: u64,
    /// Bytes of packed codes.
    pub packed_bytes: u64,
    /// Blocks, so also scales.
    pub blocks: u64,
    /// Blocks of scales in double quantization.
    pub nested_blocks: u64,
}

impl Layout {
    /// Sizes for `elements` elements in blocks of `block_size`, with codes of `code_bits`
    /// (2, 4 or 8) bits. Cannot overflow: every size is at most `elements`.
    #[must_use]
    pub const fn new(elements: u64, block_size: BlockSize, code_bits: u32) -> Self {
        let codes_per_byte = (8 / code_bits) as u64;
        let blocks = elements.div_ceil(block_size.get() as u64);
        Self {
            elements,
            packed_bytes: elements.div_ceil(codes_per_byte),
            blocks,
            nested_blocks: blocks.div_ceil(NESTED_BLOCK_SIZE.get() as u64),
        }
    }
}

/// Checks the length of a caller's buffer against the layout.
///
/// # Errors
/// [`Error::Length`] where they differ.
pub fn check_length(what: &'static str, expected: u64, got: usize) -> Result<()> {
    if expected == got as u64 {
        Ok(())
    } else {
        Err(Error::Length {
            what,
            expected,
            got: got as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_are_the_powers_of_two_of_the_format() {
        let valid: Vec<u64> = (0..10_000).filter(|&s| BlockSize::new(s).is_ok()).collect();
        assert_eq!(valid, [32, 64, 128, 256, 512, 1024, 2048, 4096]);
    }

    #[test]
    fn counts_are_checked() {
        assert_eq!(element_count(&[]).ok(), Some(1));
        assert_eq!(element_count(&[3, 5]).ok(), Some(15));
        assert_eq!(element_count(&[u64::MAX, 0, u64::MAX]).ok(), Some(0));
        assert!(matches!(
            element_count(&[u64::MAX, 2]),
            Err(Error::Overflow { .. })
        ));
    }

    #[test]
    fn sizes_round_up() {
        let layout = Layout::new(129, BlockSize::DEFAULT, 4);
        assert_eq!(
            (layout.packed_bytes, layout.blocks, layout.nested_blocks),
            (65, 3, 1)
        );
        let empty = Layout::new(0, BlockSize::DEFAULT, 4);
        assert_eq!(
            (empty.packed_bytes, empty.blocks, empty.nested_blocks),
            (0, 0, 0)
        );
        let two_bit = Layout::new(5, BlockSize::DEFAULT, 2);
        assert_eq!(two_bit.packed_bytes, 2);
        let byte = Layout::new(u64::MAX, BlockSize::DEFAULT, 8);
        assert_eq!(byte.packed_bytes, u64::MAX);
    }
}
