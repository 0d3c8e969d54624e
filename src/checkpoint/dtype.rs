//! Element types as safetensors headers name them.

use std::fmt;

use crate::element::Dtype;
use crate::layout::element_count;
use crate::{Error, Result};

/// The element type of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileDtype(u8);

/// Every element type: its name in the header, its bits, whether it is a floating-point type.
const TABLE: [(&str, u8, bool); 22] = [
    ("BOOL", 8, false),
    ("F4", 4, true),
    ("F6_E2M3", 6, true),
    ("F6_E3M2", 6, true),
    ("U8", 8, false),
    ("I8", 8, false),
    ("F8_E5M2", 8, true),
    ("F8_E4M3", 8, true),
    ("F8_E8M0", 8, true),
    ("F8_E4M3FNUZ", 8, true),
    ("F8_E5M2FNUZ", 8, true),
    ("I16", 16, false),
    ("U16", 16, false),
    ("F16", 16, true),
    ("BF16", 16, true),
    ("I32", 32, false),
    ("U32", 32, false),
    ("F32", 32, true),
    ("C64", 64, false),
    ("F64", 64, true),
    ("I64", 64, false),
    ("U64", 64, false),
];

impl FileDtype {
    /// Unsigned bytes: packed codes, and whatever else has no type of its own.
    pub const U8: Self = Self(4);
    /// IEEE 754 half precision.
    pub const F16: Self = Self(13);
    /// The upper half of an `F32`.
    pub const BF16: Self = Self(14);
    /// IEEE 754 single precision.
    pub const F32: Self = Self(17);

    /// The type of that name; None for a name no safetensors file may hold.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        (0_u8..)
            .zip(TABLE)
            .find_map(|(index, row)| (row.0 == name).then_some(Self(index)))
    }

    fn row(self) -> (&'static str, u8, bool) {
        TABLE.get(usize::from(self.0)).copied().unwrap_or(TABLE[0])
    }

    /// Its name in a header.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// Bits of one element.
    #[must_use]
    pub fn bits(self) -> u64 {
        u64::from(self.row().1)
    }

    /// Whether its elements are real numbers with a fraction.
    #[must_use]
    pub fn is_float(self) -> bool {
        self.row().2
    }

    /// The type as one that can be quantized, if it is one.
    #[must_use]
    pub fn element(self) -> Option<Dtype> {
        match self {
            Self::F32 => Some(Dtype::F32),
            Self::F16 => Some(Dtype::F16),
            Self::BF16 => Some(Dtype::Bf16),
            _ => None,
        }
    }

    /// The bytes of a tensor of this type; None where they are no whole number.
    ///
    /// # Errors
    /// [`Error::Overflow`] where 64 bits cannot count its elements or bits, even where another
    /// dimension is 0.
    pub fn tensor_bytes(self, shape: &[u64]) -> Result<Option<u64>> {
        let overflow = || Error::Overflow {
            shape: shape.to_vec(),
        };
        let nonzero: Vec<u64> = shape.iter().copied().filter(|&dim| dim != 0).collect();
        element_count(&nonzero).map_err(|_| overflow())?;
        let bits = element_count(shape)?
            .checked_mul(self.bits())
            .ok_or_else(overflow)?;
        Ok(bits.is_multiple_of(8).then_some(bits / 8))
    }
}

impl From<Dtype> for FileDtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::BF16,
        }
    }
}

impl fmt::Display for FileDtype {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_named_constants_are_the_rows_they_say() {
        for (dtype, name) in [
            (FileDtype::U8, "U8"),
            (FileDtype::F16, "F16"),
            (FileDtype::BF16, "BF16"),
            (FileDtype::F32, "F32"),
        ] {
            assert_eq!(dtype.name(), name);
            assert_eq!(FileDtype::by_name(name), Some(dtype));
        }
        assert_eq!(FileDtype::by_name("Q4"), None);
    }

    #[test]
    fn sizes_are_whole_bytes_or_none() {
        let f4 = FileDtype::by_name("F4").expect("in the table");
        assert_eq!(f4.tensor_bytes(&[3, 2]).ok(), Some(Some(3)));
        assert_eq!(f4.tensor_bytes(&[3]).ok(), Some(None));
        assert!(FileDtype::F32.tensor_bytes(&[1 << 40, 1 << 40, 0]).is_err());
        assert!(FileDtype::F32.tensor_bytes(&[u64::MAX / 2]).is_err());
    }
}
