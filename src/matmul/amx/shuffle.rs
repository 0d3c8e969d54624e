//! Numbers into the order that tiles want, and out of it.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::bf16;

use super::decode::{STEP, VECTORS, column_in_four};

/// 128 numbers of a row, or fewer with zeros behind them.
///
/// # Safety
/// The processor has AVX-512 BW.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn load(numbers: &[bf16]) -> [__m512i; VECTORS] {
    let mut loaded = [_mm512_setzero_si512(); VECTORS];
    for (part, loaded) in numbers.chunks(STEP / VECTORS).zip(&mut loaded) {
        // SAFETY: a part has one to 32 numbers, and no more are read.
        *loaded = unsafe {
            _mm512_maskz_loadu_epi16(u32::MAX >> (32 - part.len()), part.as_ptr().cast())
        };
    }
    loaded
}

/// 128 numbers in their own order to the order of [`super::decode`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn to_decoded_order(numbers: [__m512i; VECTORS]) -> [__m512i; VECTORS] {
    const fn lanes(column: usize) -> [u16; 32] {
        // Of two registers, 64 numbers: every fourth.
        let mut lanes = [0; 32];
        let mut lane = 0;
        while lane < 16 {
            lanes[lane] = (4 * lane + column) as u16;
            lane += 1;
        }
        lanes
    }
    const LANES: [[u16; 32]; VECTORS] = [
        lanes(column_in_four(0)),
        lanes(column_in_four(1)),
        lanes(column_in_four(2)),
        lanes(column_in_four(3)),
    ];
    let [a, b, c, d] = numbers;
    LANES.map(|lanes| {
        // SAFETY: there are 64 bytes.
        let lanes = unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) };
        let low = _mm512_permutex2var_epi16(a, lanes, b);
        let high = _mm512_permutex2var_epi16(c, lanes, d);
        _mm512_inserti64x4::<1>(low, _mm512_castsi512_si256(high))
    })
}

/// The inverse of [`to_decoded_order`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn from_decoded_order(decoded: [__m512i; VECTORS]) -> [__m512i; VECTORS] {
    // The vectors that hold columns 0, 1, 2 and 3 of four.
    let [b, a, d, c] = decoded;
    const { assert!(column_in_four(0) == 1 && column_in_four(3) == 2) };
    // Within each quarter of a register: two columns side by side, then four.
    let (first, second) = (_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
    let (third, fourth) = (_mm512_unpacklo_epi16(c, d), _mm512_unpackhi_epi16(c, d));
    let quarters = [
        _mm512_unpacklo_epi32(first, third),
        _mm512_unpackhi_epi32(first, third),
        _mm512_unpacklo_epi32(second, fourth),
        _mm512_unpackhi_epi32(second, fourth),
    ];
    transpose_quarters(quarters)
}

/// Quarter `i` of register `j` becomes quarter `j` of register `i`.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose_quarters([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let (first, second) = (
        _mm512_shuffle_i32x4::<0x44>(a, b),
        _mm512_shuffle_i32x4::<0xee>(a, b),
    );
    let (third, fourth) = (
        _mm512_shuffle_i32x4::<0x44>(c, d),
        _mm512_shuffle_i32x4::<0xee>(c, d),
    );
    [
        _mm512_shuffle_i32x4::<0x88>(first, third),
        _mm512_shuffle_i32x4::<0xdd>(first, third),
        _mm512_shuffle_i32x4::<0x88>(second, fourth),
        _mm512_shuffle_i32x4::<0xdd>(second, fourth),
    ]
}

/// Lane `i` of register `j` becomes lane `j` of register `i`, lanes being of 32 bits.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut mixed = rows;
    // Four by four lanes within quarters.
    for four in 0..4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|row| rows[4 * four + row]);
        let (first, second) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (third, fourth) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        mixed[4 * four] = _mm512_unpacklo_epi64(first, third);
        mixed[4 * four + 1] = _mm512_unpackhi_epi64(first, third);
        mixed[4 * four + 2] = _mm512_unpacklo_epi64(second, fourth);
        mixed[4 * four + 3] = _mm512_unpackhi_epi64(second, fourth);
    }
    // Register `4 * four + lane` has in quarter `q` lane `4 * q + lane` of four rows.
    let mut turned = mixed;
    for lane in 0..4 {
        let quarters = [0, 1, 2, 3].map(|four| mixed[4 * four + lane]);
        let quarters = transpose_quarters(quarters);
        for (quarter, register) in quarters.into_iter().enumerate() {
            turned[4 * quarter + lane] = register;
        }
    }
    turned
}

/// Numbers of two rows of the weight as pairs, in the lower and in the upper half of each quarter's
/// lanes: what `B` wants of 16 columns each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn pair(first: __m512i, second: __m512i) -> [__m512i; 2] {
    [
        _mm512_unpacklo_epi16(first, second),
        _mm512_unpackhi_epi16(first, second),
    ]
}

/// Sums of the columns of a [`pair`], rounded, in the order of the vector that was paired.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn unpaired([low, high]: [__m512; 2]) -> __m512i {
    // SAFETY: both are 64 bytes of any bits.
    let halves =
        unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) };
    // Four numbers of one, four of the other, and so on.
    _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), halves)
}
