//! Blocks of 8-bit state, decoded, updated and encoded in one go: the SIMD twin of what
//! `task` does step by step on the scalar backend, with the same bytes.
#![allow(unsafe_code)]

use super::STATE_BLOCK_SIZE;
use super::arithmetic::Constants;
use super::task::Blocks;
#[cfg(target_arch = "aarch64")]
use crate::blockwise::Neon;
#[cfg(target_arch = "x86_64")]
use crate::blockwise::{Avx2, Avx512};
use crate::blockwise::{Cells, Kind, Vector, encode_block, map_2, normaliser};
use crate::{Backend, Codebook, Element};

/// Elements of a block.
const BLOCK: usize = STATE_BLOCK_SIZE.get();
/// Groups of a block.
const GROUPS: usize = BLOCK / 32;
/// Blocks that are updated before the first is encoded, so that no block waits for its scale.
const BATCH: usize = 4;
/// Elements ahead of those at work that are asked for: the hardware alone does not look far enough.
const AHEAD: usize = 512;

/// A backend other than the scalar one, and the maps with the ways to search them.
pub(super) struct Simd {
    backend: Backend,
    maps: Maps,
}

struct Maps {
    signed: (&'static Codebook, &'static Cells),
    unsigned: (&'static Codebook, &'static Cells),
}

impl Simd {
    /// None for the scalar backend.
    pub(super) fn new(backend: Backend) -> Option<Self> {
        let with_cells = |map| Some((map, Cells::of(map)?));
        (backend != Backend::SCALAR).then_some(Self {
            backend,
            maps: Maps {
                signed: with_cells(Codebook::dynamic_signed())?,
                unsigned: with_cells(Codebook::dynamic_unsigned())?,
            },
        })
    }

    pub(super) fn backend(&self) -> Backend {
        self.backend
    }

    /// Updates whole blocks. All slices are of the same blocks.
    pub(super) fn update<T: Element>(
        &self,
        constants: &Constants,
        values: &mut [T],
        gradient: &[T],
        state: Blocks<'_>,
    ) {
        let maps = &self.maps;
        // SAFETY: a `Backend` exists only where the processor has its features.
        unsafe {
            match self.backend.kind() {
                // `new` makes none of it.
                Kind::Scalar => {}
                #[cfg(target_arch = "x86_64")]
                Kind::Avx2 => avx2(maps, constants, values, gradient, state),
                #[cfg(target_arch = "x86_64")]
                Kind::Avx512 => avx512(maps, constants, values, gradient, state),
                #[cfg(target_arch = "aarch64")]
                Kind::Neon => neon(maps, constants, values, gradient, state),
            }
        }
    }
}

macro_rules! version {
    ($name:ident, $vector:ident, $features:literal) => {
        #[target_feature(enable = $features)]
        fn $name<T: Element>(
            maps: &Maps,
            constants: &Constants,
            values: &mut [T],
            gradient: &[T],
            state: Blocks<'_>,
        ) {
            // SAFETY: this function has the features of the vector type.
            unsafe { update_blocks::<$vector, T>(maps, constants, values, gradient, state) }
        }
    };
}
#[cfg(target_arch = "x86_64")]
version!(
    avx512,
    Avx512,
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c"
);
#[cfg(target_arch = "x86_64")]
version!(avx2, Avx2, "avx2,f16c");
#[cfg(target_arch = "aarch64")]
version!(neon, Neon, "neon");

/// Both moments of a batch, in registers' order.
type Moments<V> = [[[V; 2]; GROUPS]; BATCH];

/// # Safety
/// The processor must have the features of `V`.
#[inline(always)]
unsafe fn update_blocks<V: Vector, T: Element>(
    maps: &Maps,
    constants: &Constants,
    values: &mut [T],
    gradient: &[T],
    mut state: Blocks<'_>,
) {
    // SAFETY: the caller answers for the features of `V`; `chunks_exact` for the lengths of what
    // the pointers point to; any address may be prefetched.
    unsafe {
        let zero = [[[V::splat(0.0); 2]; GROUPS]; BATCH];
        let (mut m_batch, mut v_batch): (Moments<V>, Moments<V>) = (zero, zero);
        let splats = Splats::<V>::new(constants);
        let batches = values
            .chunks_mut(BATCH * BLOCK)
            .zip(gradient.chunks(BATCH * BLOCK));
        for (values, gradient) in batches {
            let state = state.take_front(values.len());
            let blocks = (values
                .chunks_exact_mut(BLOCK)
                .zip(gradient.chunks_exact(BLOCK)))
            .zip(state.m.chunks_exact(BLOCK).zip(state.v.chunks_exact(BLOCK)))
            .zip(state.m_absmax.iter_mut().zip(&mut *state.v_absmax))
            .zip(m_batch.iter_mut().zip(&mut v_batch));
            for ((((p, g), (m, v)), (m_absmax, v_absmax)), (m_block, v_block)) in blocks {
                let scales = [V::splat(*m_absmax), V::splat(*v_absmax)];
                let (mut m_largest, mut v_largest) = (V::no_magnitudes(), V::no_magnitudes());
                for group in 0..GROUPS {
                    let at = 32 * group;
                    let (p, g) = (p.as_mut_ptr().add(at), g.as_ptr().add(at));
                    let (m, v) = (m.as_ptr().add(at), v.as_ptr().add(at));
                    for line in 0..size_of::<T>() / 2 {
                        let ahead = AHEAD + 32 / (size_of::<T>() / 2) * line;
                        V::prefetch(p.wrapping_add(ahead).cast());
                        V::prefetch(g.wrapping_add(ahead).cast());
                    }
                    if group.is_multiple_of(2) {
                        V::prefetch(m.wrapping_add(AHEAD));
                        V::prefetch(v.wrapping_add(AHEAD));
                    }
                    let m = map_2!(V::unpack_bytes(m), |codes| {
                        V::gather(maps.signed.0.values(), codes).multiply(scales[0])
                    });
                    let v = map_2!(V::unpack_bytes(v), |codes| {
                        V::gather(maps.unsigned.0.values(), codes).multiply(scales[1])
                    });
                    let (old, g) = (V::load(p.cast_const()), V::load(g));
                    let updated = map_2!([0, 1], |half| splats
                        .update(old[half], g[half], m[half], v[half]));
                    V::store(map_2!(updated, |[p, _, _]| p), p);
                    let m = map_2!(updated, |[_, m, _]| m);
                    let v = map_2!(updated, |[_, _, v]| v);
                    m_largest = V::larger_of(V::larger_of(m_largest, m[0]), m[1]);
                    v_largest = V::larger_of(V::larger_of(v_largest, v[0]), v[1]);
                    (m_block[group], v_block[group]) = (m, v);
                }
                *m_absmax = f32::from_bits(V::largest::<f32>(m_largest));
                *v_absmax = f32::from_bits(V::largest::<f32>(v_largest));
            }
            let blocks = (state
                .m
                .chunks_exact_mut(BLOCK)
                .zip(state.m_absmax)
                .zip(&m_batch))
            .zip(
                state
                    .v
                    .chunks_exact_mut(BLOCK)
                    .zip(state.v_absmax)
                    .zip(&v_batch),
            );
            for (((m_codes, m_absmax), m), ((v_codes, v_absmax), v)) in blocks {
                encode::<V, false>(m, *m_absmax, maps.signed, m_codes);
                encode::<V, true>(v, *v_absmax, maps.unsigned, v_codes);
            }
        }
    }
}

/// Encodes a block; with `KEEP`, no number above 0 by the code of 0.
///
/// # Safety
/// The processor must have the features of `V`; `codes` is a block's.
#[inline(always)]
unsafe fn encode<V: Vector, const KEEP: bool>(
    block: &[[V; 2]; GROUPS],
    scale: f32,
    (map, cells): (&Codebook, &Cells),
    codes: &mut [u8],
) {
    // SAFETY: the caller's promises are the same; `chunks_exact` answers for the lengths.
    unsafe {
        let (lift, inverse) = normaliser(scale);
        if lift != 1.0 || !scale.is_finite() {
            let mut numbers = [0.0; BLOCK];
            for (group, target) in block.iter().zip(numbers.chunks_exact_mut(32)) {
                V::store(*group, target.as_mut_ptr());
            }
            encode_block(&numbers, scale, map, codes);
            if KEEP {
                super::arithmetic::keep_from_zero(Backend::SCALAR, &numbers, codes);
            }
            return;
        }
        let inverse = V::splat(inverse);
        for (group, codes) in block.iter().zip(codes.chunks_exact_mut(32)) {
            let nodes = map_2!(*group, |half| {
                let node = half.multiply(inverse).cell_node(cells);
                if KEEP {
                    V::keep_from_zero(node, half)
                } else {
                    node
                }
            });
            V::pack_bytes(nodes, codes.as_mut_ptr());
        }
    }
}

/// The constants in all lanes.
struct Splats<V> {
    keep: V,
    beta1: V,
    /// Of the gradient's direction.
    one_minus_beta1: V,
    beta2: V,
    one_minus_beta2: V,
    stride: V,
    second_correction: V,
    eps: V,
}

impl<V: Vector> Splats<V> {
    /// # Safety
    /// As for all functions of [`Vector`].
    #[inline(always)]
    unsafe fn new(constants: &Constants) -> Self {
        let [
            keep,
            beta1,
            rest1,
            beta2,
            rest2,
            direction,
            stride,
            second_correction,
            eps,
        ] = constants.in_order();
        // SAFETY: the caller's promises are the same.
        unsafe {
            Self {
                keep: V::splat(keep),
                beta1: V::splat(beta1),
                // A sign goes through products without rounding.
                one_minus_beta1: V::splat(direction * rest1),
                beta2: V::splat(beta2),
                one_minus_beta2: V::splat(rest2),
                stride: V::splat(stride),
                second_correction: V::splat(second_correction),
                eps: V::splat(eps),
            }
        }
    }

    /// As `arithmetic::update`, operation by operation: `[p, m, v]`.
    ///
    /// # Safety
    /// As for all functions of [`Vector`].
    #[inline(always)]
    unsafe fn update(&self, p: V, g: V, m: V, v: V) -> [V; 3] {
        // SAFETY: the caller's promises are the same.
        unsafe {
            let m = (self.beta1.multiply(m)).add(self.one_minus_beta1.multiply(g));
            let v = (self.beta2.multiply(v)).add(self.one_minus_beta2.multiply(g.multiply(g)));
            let denominator = v
                .square_root()
                .multiply(self.second_correction)
                .add(self.eps);
            let step = self.stride.multiply(m.divide(denominator));
            [p.multiply(self.keep).subtract(step), m, v]
        }
    }
}
