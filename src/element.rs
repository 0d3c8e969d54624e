//! The floating-point types that tensors are made of: `f32`, `f16`, `bf16`.

use half::{bf16, f16};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A floating-point type of a tensor's elements.
///
/// Conversion to `f32` is exact for all three; conversion from `f32` rounds to nearest, ties to
/// even.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// The type, as a value.
    const DTYPE: Dtype;
    /// Exact.
    fn to_f32(self) -> f32;
    /// Rounded to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// The numbers themselves where they are `bf16`, for code that knows only these.
    #[doc(hidden)]
    fn as_bf16(_numbers: &[Self]) -> Option<&[bf16]> {
        None
    }
    /// As [`Element::as_bf16`].
    #[doc(hidden)]
    fn as_bf16_mut(_numbers: &mut [Self]) -> Option<&mut [bf16]> {
        None
    }
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn as_bf16(numbers: &[Self]) -> Option<&[bf16]> {
        Some(numbers)
    }
    fn as_bf16_mut(numbers: &mut [Self]) -> Option<&mut [bf16]> {
        Some(numbers)
    }
}

/// [`Element`] as a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an `f32`.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The name torch uses: `float32`, `float16`, `bfloat16`.
    #[must_use]
    pub const fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }
}
