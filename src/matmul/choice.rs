//! From a backend to its code: the only place that calls functions of a target feature.
#![allow(unsafe_code)]

use std::ops::Range;

use super::operand::Order;
use super::tile::Tile;
use crate::blockwise::Kind;
use crate::element::Dtype;
use crate::{Backend, Element};

#[cfg(target_arch = "x86_64")]
use super::fixed::FixedRows;
#[cfg(target_arch = "aarch64")]
use super::neon;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
#[cfg(target_arch = "x86_64")]
use crate::Codebook;

/// What multiplies.
///
/// But for [`Self::SCALAR`], values are made by [`Self::choose`] alone, which asks the processor
/// for what is not part of a backend: that is what makes calls into SIMD code sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kernel(Set);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Set {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx2Brain,
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(target_arch = "aarch64")]
    NeonBrain,
}

/// Calls a function of the kernel's module; `$scalar` where there is none.
macro_rules! call {
    ($kernel:expr, $function:ident($($argument:expr),*), $scalar:expr) => {
        // SAFETY: a `Kernel` exists only where the processor has its features.
        #[allow(unused_unsafe)]
        unsafe {
            match $kernel.0 {
                Set::Scalar => $scalar,
                #[cfg(target_arch = "x86_64")]
                Set::Avx512 => avx512::$function($($argument),*),
                #[cfg(target_arch = "x86_64")]
                Set::Avx2 => avx2::single::$function($($argument),*),
                #[cfg(target_arch = "x86_64")]
                Set::Avx2Brain => avx2::brain::$function($($argument),*),
                #[cfg(target_arch = "aarch64")]
                Set::Neon => neon::single::$function($($argument),*),
                #[cfg(target_arch = "aarch64")]
                Set::NeonBrain => neon::brain::$function($($argument),*),
            }
        }
    };
}

impl Kernel {
    /// The best of a backend for operands of a type.
    pub(super) fn choose<T: Element>(backend: Backend) -> Self {
        let brain = T::DTYPE == Dtype::Bf16;
        let _ = brain;
        Self(match backend.kind() {
            Kind::Scalar => Set::Scalar,
            // bf16 has no kernel of its own: with values in single precision the step is as short,
            // and where it was measured (Sapphire Rapids) the processor multiplies half as many
            // numbers a cycle in bf16 pairs as in single precision.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => Set::Avx512,
            // Not part of the backend; processors with AVX2 and without FMA are exotic.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 if !is_x86_feature_detected!("fma") => Set::Scalar,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 if brain => Set::Avx2Brain,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => Set::Avx2,
            #[cfg(target_arch = "aarch64")]
            Kind::Neon if brain => Set::NeonBrain,
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => Set::Neon,
        })
    }

    pub(super) fn is_scalar(self) -> bool {
        self.0 == Set::Scalar
    }

    /// Rows of `x` that [`Self::forward`] takes.
    pub(super) const fn most_rows(self) -> usize {
        match self.0 {
            Set::Scalar => 16,
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => avx512::MOST_ROWS,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => avx2::single::MOST_ROWS,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2Brain => avx2::brain::MOST_ROWS,
            #[cfg(target_arch = "aarch64")]
            Set::Neon => neon::single::MOST_ROWS,
            #[cfg(target_arch = "aarch64")]
            Set::NeonBrain => neon::brain::MOST_ROWS,
        }
    }

    /// Columns of a step; none for the scalar kernel.
    pub(super) fn step(self) -> usize {
        self.order().len()
    }

    /// The order of a step's columns; nothing for the scalar kernel.
    pub(super) fn order(self) -> Order {
        match self.0 {
            Set::Scalar => Vec::new(),
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => order_of::<avx512::Avx512>(),
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => order_of::<avx2::Single>(),
            #[cfg(target_arch = "x86_64")]
            Set::Avx2Brain => order_of::<avx2::Brain>(),
            #[cfg(target_arch = "aarch64")]
            Set::Neon => order_of::<neon::Single>(),
            #[cfg(target_arch = "aarch64")]
            Set::NeonBrain => order_of::<neon::Brain>(),
        }
    }

    /// [`super::loops::forward`]
    pub(super) fn forward(self, tile: Tile<'_>, rows: usize, x: &[f32], sums: &mut [f32]) {
        call!(self, forward(tile, rows, x, sums), unreachable!());
    }

    /// `x`, [rows, columns], in fixed point, where that is there and is faster.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn fixed<T: Element>(
        self,
        codebook: &Codebook,
        x: &[f32],
        rows: usize,
    ) -> Option<FixedRows> {
        let significant_bits = match T::DTYPE {
            Dtype::F32 => return None,
            Dtype::F16 => 11,
            Dtype::Bf16 => 8,
        };
        let roundoff = 0.5_f32.powi(significant_bits + 1);
        (self.0 == Set::Avx512)
            .then(|| FixedRows::new(codebook, x, rows, roundoff))
            .flatten()
    }

    /// [`super::loops::transposed`]
    pub(super) fn transposed(
        self,
        tile: Tile<'_>,
        rows: usize,
        y: &[f32],
        stride: usize,
        sums: &mut [f32],
    ) {
        call!(
            self,
            transposed(tile, rows, y, stride, sums),
            unreachable!()
        );
    }

    /// Asks for some memory, soon to be read.
    pub(super) fn ask(self, memory: Range<*const u8>) {
        call!(self, ask(memory), ());
    }

    /// [`super::loops::arrange`]
    pub(super) fn arrange(self, numbers: &[f32], row: usize, rows: usize, x: &mut [f32]) {
        call!(self, arrange(numbers, row, rows, x), unreachable!());
    }

    /// [`super::loops::dots`]
    pub(super) fn dots(self, row: &[f32], x: &[f32], sums: &mut [f32]) {
        call!(self, dots(row, x, sums), unreachable!());
    }

    /// [`super::loops::spread`]
    pub(super) fn spread(self, row: &[f32], factors: impl Iterator<Item = f32>, sums: &mut [f32]) {
        call!(self, spread(row, factors, sums), unreachable!());
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn order_of<K: super::kernel::Kernel>() -> Order {
    (0..K::STEP).map(|place| K::column(place) as u8).collect()
}
