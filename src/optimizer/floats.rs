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

    /// Takes the first ones off, all there are at most.
    pub(super) fn take_front(&mut self, count: usize) -> Self {
        match self {
            Self::F32(slice) => Self::F32(front(slice, count)),
            Self::F16(slice) => Self::F16(front(slice, count)),
            Self::Bf16(slice) => Self::Bf16(front(slice, count)),
        }
    }

    /// Pieces of `size`, the last of which may be shorter.
    pub(super) fn pieces(mut self, size: usize) -> impl Iterator<Item = Self> + 'a {
        std::iter::from_fn(move || (!self.is_empty()).then(|| self.take_front(size)))
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

    /// Takes the first ones off, all there are at most.
    pub(super) fn take_front(&mut self, count: usize) -> Self {
        match self {
            Self::F32(slice) => Self::F32(front_mut(slice, count)),
            Self::F16(slice) => Self::F16(front_mut(slice, count)),
            Self::Bf16(slice) => Self::Bf16(front_mut(slice, count)),
        }
    }

    /// Pieces of `size`, the last of which may be shorter.
    pub(super) fn pieces(mut self, size: usize) -> impl Iterator<Item = Self> + 'a {
        std::iter::from_fn(move || (!self.is_empty()).then(|| self.take_front(size)))
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

/// Takes the first elements off a slice, all there are at most.
pub(super) fn front<'a, T>(slice: &mut &'a [T], count: usize) -> &'a [T] {
    let (front, rest) = slice.split_at(count.min(slice.len()));
    *slice = rest;
    front
}

/// [`front`] of a slice to be written.
pub(super) fn front_mut<'a, T>(slice: &mut &'a mut [T], count: usize) -> &'a mut [T] {
    let all = std::mem::take(slice);
    let (front, rest) = all.split_at_mut(count.min(all.len()));
    *slice = rest;
    front
}
