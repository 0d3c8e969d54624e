//! Slices of any [`Element`] type as values.

use half::{bf16, f16};

use crate::{Backend, blockwise};

/// Numbers to read.
#[derive(Debug, Clone, Copy)]
pub enum Floats<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
    /// The upper half of an `f32`.
    Bf16(&'a [bf16]),
}

/// Numbers to read and write.
#[derive(Debug)]
pub enum FloatsMut<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Half precision.
    F16(&'a mut [f16]),
    /// The upper half of an `f32`.
    Bf16(&'a mut [bf16]),
}

/// Runs the body on the slice within, whatever its type.
macro_rules! with_slice {
    ($floats:expr, $slice:pat => $body:expr) => {
        match $floats {
            Self::F32($slice) => $body,
            Self::F16($slice) => $body,
            Self::Bf16($slice) => $body,
        }
    };
}

/// Cuts a slice into pieces of the same kind.
macro_rules! chunks {
    ($floats:expr, $size:expr, $chunks:ident) => {
        match $floats {
            Self::F32(slice) => {
                Box::new(slice.$chunks($size).map(Self::F32)) as Box<dyn Iterator<Item = Self> + 'a>
            }
            Self::F16(slice) => Box::new(slice.$chunks($size).map(Self::F16)),
            Self::Bf16(slice) => Box::new(slice.$chunks($size).map(Self::Bf16)),
        }
    };
}

impl<'a> Floats<'a> {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        with_slice!(self, slice => slice.len())
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Pieces of `size`, the last of which may be shorter.
    pub(super) fn chunks(self, size: usize) -> impl Iterator<Item = Self> + 'a {
        chunks!(self, size, chunks)
    }

    /// Widens all into `target`, which is of the same length.
    pub(super) fn read(&self, backend: Backend, target: &mut [f32]) {
        match self {
            Self::F32(slice) => target.copy_from_slice(slice),
            Self::F16(slice) => blockwise::convert(backend, slice, target),
            Self::Bf16(slice) => blockwise::convert(backend, slice, target),
        }
    }
}

impl<'a> FloatsMut<'a> {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        with_slice!(self, slice => slice.len())
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Pieces of `size`, the last of which may be shorter.
    pub(super) fn chunks_mut(self, size: usize) -> impl Iterator<Item = Self> + 'a {
        chunks!(self, size, chunks_mut)
    }

    /// Widens all into `target`, which is of the same length.
    pub(super) fn read(&self, backend: Backend, target: &mut [f32]) {
        match self {
            Self::F32(slice) => Floats::F32(slice),
            Self::F16(slice) => Floats::F16(slice),
            Self::Bf16(slice) => Floats::Bf16(slice),
        }
        .read(backend, target);
    }

    /// Rounds `source`, which is of the same length, into all.
    pub(super) fn write(&mut self, backend: Backend, source: &[f32]) {
        match self {
            Self::F32(slice) => slice.copy_from_slice(source),
            Self::F16(slice) => blockwise::convert(backend, source, slice),
            Self::Bf16(slice) => blockwise::convert(backend, source, slice),
        }
    }
}
