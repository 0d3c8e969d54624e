//! What `cuda/adamw.cu` is told of the parameters, as it lies in the card's memory.

use crate::element::Dtype;
use crate::optimizer::{AdamW, STATE_BLOCK_SIZE};
use crate::{Error, Result};

/// Bytes of one `Segment` of the kernel.
pub const SEGMENT_BYTES: usize = 112;

/// One parameter of a step, or a part of one: it begins at a multiple of 256 elements and, unless
/// it is the last, ends at one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Segment {
    /// Addresses of the part's values, gradients, moments, and the scales of both; the last two are
    /// 0 for 32-bit state.
    pub addresses: [u64; 6],
    /// Its elements, at least one.
    pub elements: u64,
    /// The parameter's type, and its gradient's.
    pub dtypes: [Dtype; 2],
    /// Bits of its state: 8 or 32.
    pub state_bits: u8,
    /// Which step of this parameter it is, counted from 1.
    pub step: u64,
    /// Which of the step's parameters it is, or is a part of: a gradient that is not finite in any
    /// part leaves out all of them.
    pub parameter: u32,
}

impl Segment {
    /// Appends the segment to `bytes`, and returns the tiles before the next one.
    ///
    /// # Errors
    /// [`Error::Hyperparameter`] for a setting or a step outside its range, [`Error::Overflow`] for
    /// more tiles than 63 bits can count.
    pub fn write(&self, settings: &AdamW, first_tile: u64, bytes: &mut Vec<u8>) -> Result<u64> {
        let constants = settings.constants(self.step)?;
        let tiles = self.elements.div_ceil(STATE_BLOCK_SIZE.get() as u64);
        let next = first_tile.checked_add(tiles);
        let Some(next) = next.filter(|tiles| i64::try_from(*tiles).is_ok()) else {
            let shape = vec![first_tile, tiles];
            return Err(Error::Overflow { shape });
        };
        for word in self
            .addresses
            .into_iter()
            .chain([self.elements, first_tile])
        {
            bytes.extend(word.to_le_bytes());
        }
        for constant in constants {
            bytes.extend(constant.to_le_bytes());
        }
        bytes.extend(self.parameter.to_le_bytes());
        bytes.extend(self.dtypes.map(type_number));
        bytes.push(self.state_bits);
        // The rest of the last sixteen bytes, which the kernel does not read.
        bytes.extend([0; 5]);
        Ok(next)
    }
}

/// As the kernel's `Type`.
const fn type_number(dtype: Dtype) -> u8 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Bf16 => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_has_the_kernels_layout() {
        let settings = AdamW {
            lr: 0.5,
            beta1: 0.5,
            beta2: 0.75,
            eps: 0.25,
            weight_decay: 0.5,
            maximize: true,
        };
        let segment = Segment {
            addresses: [1, 2, 3, 4, 5, 6],
            elements: 257,
            dtypes: [Dtype::Bf16, Dtype::F32],
            state_bits: 8,
            step: 1,
            parameter: 0x0102_0304,
        };
        let mut bytes = Vec::new();
        let next = segment
            .write(&settings, 10, &mut bytes)
            .expect("good settings");
        assert_eq!((next, bytes.len()), (12, SEGMENT_BYTES));
        assert_eq!(
            bytes[40..56],
            [6, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(bytes[56..64], 10_u64.to_le_bytes());
        let constants = [0.75, 0.5, 0.5, 0.75, 0.25, -1.0, 1.0, 2.0, 0.25_f32];
        let expected: Vec<u8> = constants.iter().flat_map(|c| c.to_le_bytes()).collect();
        assert_eq!(bytes[64..100], expected);
        assert_eq!(bytes[100..107], [4, 3, 2, 1, 2, 0, 8]);
        assert!(
            Segment { step: 0, ..segment }
                .write(&settings, 0, &mut bytes)
                .is_err()
        );
        assert!(segment.write(&settings, u64::MAX / 2, &mut bytes).is_err());
    }
}
