//! Blocks of 8-bit state, decoded, updated and encoded in one go: the SIMD twin of what
//! `task` does step by step on the scalar backend, with the same bytes.
//!
//! # Floor
//! Memory, a single-precision element: 12 bytes of parameter and gradient, 2 of codes read and 2
//! written; 4 more where the gradient of a large parameter is read before. Processor, 16 elements
//! on AVX-512 (Golden Cove): a square root and a division occupy the divider for 22 cycles (6.3 ns
//! measured at 3.4 GHz), two gathered look-ups of cells the loads for 11 (1.6 ns each), and some
//! 65 instructions of two ports each of those for 33: 9.7 ns. Measured: 15 ns, one thread, 16.8
//! million elements. Memory at 47 GB/s, what torch's fused step reaches on two such processors, is
//! 7.1 ms for that many, 20 bytes each; the step takes 11 to 12, 2.2 to 2.5 of them to look at
//! gradients.
#![allow(unsafe_code)]

use super::STATE_BLOCK_SIZE;
use super::arithmetic::Constants;
use super::task::Blocks;
#[cfg(target_arch = "aarch64")]
use crate::blockwise::Neon;
#[cfg(target_arch = "x86_64")]
use crate::blockwise::{Avx2, Avx512};
use crate::blockwise::{
    ByteMap, CellWords, Cells, Kind, Vector, each_vector, encode_block, map_2, normaliser,
};
use crate::{Backend, Codebook, Element};

/// Elements of a block.
const BLOCK: usize = STATE_BLOCK_SIZE.get();
/// Elements at a time: two groups.
const STRIDE: usize = 64;
const STRIDES: usize = BLOCK / STRIDE;
/// Elements ahead of those at work that are asked for: the hardware alone does not look far enough.
const AHEAD: usize = 512;

/// A backend other than the scalar one, and the maps with the ways to search them.
pub(super) struct Simd {
    backend: Backend,
    /// Of a processor with AVX-512, whether it has VBMI too.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    by_bytes: bool,
    maps: Maps,
}

struct Maps {
    signed: Map,
    unsigned: Map,
}

struct Map {
    codebook: &'static Codebook,
    values: ByteMap,
    cells: &'static Cells,
}

impl Map {
    fn new(codebook: &'static Codebook) -> Option<Self> {
        Some(Self {
            codebook,
            values: ByteMap::new(codebook.values()),
            cells: Cells::of(codebook)?,
        })
    }
}

impl Simd {
    /// None for the scalar backend.
    pub(super) fn new(backend: Backend) -> Option<Self> {
        if backend == Backend::SCALAR {
            return None;
        }
        Some(Self {
            backend,
            by_bytes: backend.has_byte_lookups(),
            maps: Maps {
                signed: Map::new(Codebook::dynamic_signed())?,
                unsigned: Map::new(Codebook::dynamic_unsigned())?,
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
        // SAFETY: a `Backend` exists only where the processor has its features, and the processor
        // was asked for VBMI.
        unsafe {
            match self.backend.kind() {
                // `new` makes none of it.
                Kind::Scalar => {}
                #[cfg(target_arch = "x86_64")]
                Kind::Avx2 => avx2(maps, constants, values, gradient, state),
                #[cfg(target_arch = "x86_64")]
                Kind::Avx512 if self.by_bytes => {
                    avx512_vbmi(maps, constants, values, gradient, state);
                }
                #[cfg(target_arch = "x86_64")]
                Kind::Avx512 => avx512(maps, constants, values, gradient, state),
                #[cfg(target_arch = "aarch64")]
                Kind::Neon => neon(maps, constants, values, gradient, state),
            }
        }
    }
}

macro_rules! version {
    ($name:ident, $vector:ident, $features:literal, by_bytes: $by_bytes:literal) => {
        #[target_feature(enable = $features)]
        fn $name<T: Element>(
            maps: &Maps,
            constants: &Constants,
            values: &mut [T],
            gradient: &[T],
            state: Blocks<'_>,
        ) {
            // SAFETY: this function has the features of the vector type.
            unsafe {
                update_blocks::<$vector, T, $by_bytes>(maps, constants, values, gradient, state);
            }
        }
    };
}
each_vector!(version);

/// Moments of a block, in registers' order.
type Moments<V> = [[[V; 2]; 2]; STRIDES];

/// A block that was updated and is encoded while the next one is updated: the ones wait for
/// divisions and the others for look-ups.
struct Updated<'a, V> {
    m_codes: &'a mut [u8],
    v_codes: &'a mut [u8],
    /// The reciprocals of the scales; none where a scale is so small or large that the block is
    /// encoded by the scalar code.
    inverses: Option<[V; 2]>,
    scales: [f32; 2],
}

/// # Safety
/// The processor must have the features of `V`, and AVX-512 VBMI with `BY_BYTES`.
#[inline(always)]
unsafe fn update_blocks<V: Vector, T: Element, const BY_BYTES: bool>(
    maps: &Maps,
    constants: &Constants,
    values: &mut [T],
    gradient: &[T],
    state: Blocks<'_>,
) {
    // SAFETY: the caller answers for the features; `chunks_exact` for the lengths of what the
    // pointers point to; any address may be prefetched.
    unsafe {
        let zero = [[[V::splat(0.0); 2]; 2]; STRIDES];
        // Of the block at work and of the one before.
        let (mut first, mut second): ([Moments<V>; 2], [Moments<V>; 2]) = ([zero; 2], [zero; 2]);
        let (mut now, mut earlier) = (&mut first, &mut second);
        let mut before: Option<Updated<'_, V>> = None;
        let splats = Splats::<V>::new(constants);
        let (signed, unsigned) = (maps.signed.cells.middle(), maps.unsigned.cells.middle());
        let blocks = (values
            .chunks_exact_mut(BLOCK)
            .zip(gradient.chunks_exact(BLOCK)))
        .zip(
            state
                .m
                .chunks_exact_mut(BLOCK)
                .zip(state.v.chunks_exact_mut(BLOCK)),
        )
        .zip(state.m_absmax.iter_mut().zip(state.v_absmax));
        for (((p, g), (m_codes, v_codes)), (m_absmax, v_absmax)) in blocks {
            let ([m_now, v_now], [m_before, v_before]) = (&mut *now, &*earlier);
            let scales = [V::splat(*m_absmax), V::splat(*v_absmax)];
            let (mut m_largest, mut v_largest) = (V::no_magnitudes(), V::no_magnitudes());
            for stride in 0..STRIDES {
                let at = STRIDE * stride;
                let (p, g) = (p.as_mut_ptr().add(at), g.as_ptr().add(at));
                let (m, v) = (m_codes.as_ptr().add(at), v_codes.as_ptr().add(at));
                for line in 0..size_of::<T>() {
                    let ahead = AHEAD + STRIDE / size_of::<T>() * line;
                    V::prefetch(p.wrapping_add(ahead).cast());
                    V::prefetch(g.wrapping_add(ahead).cast());
                }
                V::prefetch(m.wrapping_add(AHEAD));
                V::prefetch(v.wrapping_add(AHEAD));
                let (m, v) = if BY_BYTES {
                    (
                        V::values_by_bytes(&maps.signed.values, m),
                        V::values_by_bytes(&maps.unsigned.values, v),
                    )
                } else {
                    (
                        V::values_of(&maps.signed.values, m),
                        V::values_of(&maps.unsigned.values, v),
                    )
                };
                for group in 0..2 {
                    let (p, g) = (p.add(32 * group), V::load(g.add(32 * group)));
                    let old = V::load(p.cast_const());
                    let updated = map_2!([0, 1], |half| splats.update(
                        old[half],
                        g[half],
                        m[group][half].multiply(scales[0]),
                        v[group][half].multiply(scales[1])
                    ));
                    V::store(map_2!(updated, |[p, _, _]| p), p);
                    let m = map_2!(updated, |[_, m, _]| m);
                    let v = map_2!(updated, |[_, _, v]| v);
                    m_largest = V::larger_of(V::larger_of(m_largest, m[0]), m[1]);
                    v_largest = V::larger_of(V::larger_of(v_largest, v[0]), v[1]);
                    (m_now[stride][group], v_now[stride][group]) = (m, v);
                }
                if let Some(before) = &mut before
                    && let Some(inverses) = before.inverses
                {
                    let (m, v) = (&m_before[stride], &v_before[stride]);
                    let codes = &mut before.m_codes[at..at + STRIDE];
                    encode::<V, true>(m, inverses[0], signed, codes);
                    let codes = &mut before.v_codes[at..at + STRIDE];
                    encode::<V, false>(v, inverses[1], unsigned, codes);
                }
            }
            *m_absmax = f32::from_bits(V::largest::<f32>(m_largest));
            *v_absmax = f32::from_bits(V::largest::<f32>(v_largest));
            before = Some(Updated::new(m_codes, v_codes, [*m_absmax, *v_absmax]));
            if let Some(before) = &mut before
                && before.inverses.is_none()
            {
                before.encode_by_scalar(maps, m_now, v_now);
            }
            std::mem::swap(&mut now, &mut earlier);
        }
        if let Some(before) = &mut before
            && let Some(inverses) = before.inverses
        {
            let [m, v] = earlier;
            let codes = before.m_codes.chunks_exact_mut(STRIDE);
            for (m, codes) in m.iter().zip(codes) {
                encode::<V, true>(m, inverses[0], signed, codes);
            }
            let codes = before.v_codes.chunks_exact_mut(STRIDE);
            for (v, codes) in v.iter().zip(codes) {
                encode::<V, false>(v, inverses[1], unsigned, codes);
            }
        }
    }
}

impl<'a, V: Vector> Updated<'a, V> {
    /// # Safety
    /// As for all functions of [`Vector`].
    #[inline(always)]
    unsafe fn new(m_codes: &'a mut [u8], v_codes: &'a mut [u8], scales: [f32; 2]) -> Self {
        let [(m_lift, m_inverse), (v_lift, v_inverse)] =
            [normaliser(scales[0]), normaliser(scales[1])];
        // Not finite is what no gradient makes of a state that was checked.
        let plain = m_lift * v_lift == 1.0 && (scales[0] + scales[1]).is_finite();
        Self {
            m_codes,
            v_codes,
            // SAFETY: the caller's promises are the same.
            inverses: plain.then_some(unsafe { [V::splat(m_inverse), V::splat(v_inverse)] }),
            scales,
        }
    }

    /// # Safety
    /// As for all functions of [`Vector`].
    #[inline(never)]
    unsafe fn encode_by_scalar(&mut self, maps: &Maps, m: &Moments<V>, v: &Moments<V>) {
        let (mut m_numbers, mut v_numbers) = ([0.0; BLOCK], [0.0; BLOCK]);
        for (moments, numbers) in [(m, &mut m_numbers), (v, &mut v_numbers)] {
            let groups = moments.iter().flatten();
            for (group, target) in groups.zip(numbers.chunks_exact_mut(32)) {
                // SAFETY: the caller answers for the features, `chunks_exact_mut` for the room.
                unsafe { V::store(*group, target.as_mut_ptr()) };
            }
        }
        encode_block(
            &m_numbers,
            self.scales[0],
            maps.signed.codebook,
            self.m_codes,
        );
        encode_block(
            &v_numbers,
            self.scales[1],
            maps.unsigned.codebook,
            self.v_codes,
        );
        super::arithmetic::keep_from_zero(Backend::SCALAR, &v_numbers, self.v_codes);
    }
}

/// Encodes two groups of first moments, or of second ones: none that is above 0 by the code of 0.
///
/// # Safety
/// The processor must have the features of `V`.
#[inline(always)]
unsafe fn encode<V: Vector, const SIGNED: bool>(
    groups: &[[V; 2]; 2],
    inverse: V,
    cells: CellWords,
    codes: &mut [u8],
) {
    for (group, codes) in groups.iter().zip(codes.chunks_exact_mut(32)) {
        // SAFETY: the caller's promises are the same; `chunks_exact_mut` answers for the room.
        unsafe {
            let nodes = map_2!(*group, |half| {
                let node = half.multiply(inverse).cell_node::<SIGNED>(cells);
                if SIGNED {
                    node
                } else {
                    V::keep_from_zero(node, half)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimizer::AdamW;

    /// Gradients and parameters of all sizes, blocks whose scales are lifted among them.
    fn numbers(seed: u32, scale: f32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        (0..4 * BLOCK)
            .map(|at| {
                let block_scale = [1.0, 1e-20, 1e-38, 0.0][at / BLOCK];
                (next() - 0.5) * 10_f32.powf(-7.0 * next()) * scale * block_scale
            })
            .collect()
    }

    #[test]
    fn look_ups_by_bytes_and_by_numbers_give_the_same() {
        let settings = AdamW {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            maximize: true,
        };
        for backend in Backend::available() {
            let Some(mut simd) = Simd::new(backend) else {
                continue;
            };
            let mut results = Vec::new();
            for by_bytes in [simd.by_bytes, false] {
                simd.by_bytes = by_bytes;
                let mut p = numbers(1, 1.0);
                let (mut m, mut v) = (vec![127; 4 * BLOCK], vec![0; 4 * BLOCK]);
                let (mut m_absmax, mut v_absmax) = (vec![0.0; 4], vec![0.0; 4]);
                for step in 1..5 {
                    let state = Blocks {
                        m: &mut m,
                        m_absmax: &mut m_absmax,
                        v: &mut v,
                        v_absmax: &mut v_absmax,
                    };
                    let gradient = numbers(step, 1e3);
                    let constants = Constants::new(&settings, u64::from(step));
                    simd.update(&constants, &mut p, &gradient, state);
                }
                results.push((p, m, v, m_absmax, v_absmax));
            }
            assert!(results[0] == results[1], "{}", backend.name());
        }
    }
}
