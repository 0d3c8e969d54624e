//! The tile registers of AMX: eight matrices of 16 rows of 64 bytes, and one instruction that
//! multiplies two of them.
//!
//! Rust's own functions for them are not stable; hence assembly, one block for a whole loop, so
//! that no block relies on what another left in a tile. `TDPBF16PS` adds `A B` to `C`, single
//! precision of up to 16 x 16: `A` holds a row of 32 numbers of `bf16` for each row of `C`, `B` 16
//! rows of pairs: row `p` has the numbers `2 p` and `2 p + 1` of every column of `C`, side by side.
//!
//! It takes 16 cycles, in which a core multiplies 8,192 pairs of numbers; with `vdpbf16ps` or in
//! single precision that takes 256 cycles or more. Four sums at a time hide how long one takes.
#![allow(unsafe_code)]

use std::arch::asm;
use std::marker::PhantomData;

/// Rows of a tile.
pub(super) const ROWS: usize = 16;
/// Numbers of `bf16` in a row of a tile: what one instruction contracts.
pub(super) const DEPTH: usize = 32;
/// Bytes of a tile, and of its rows.
pub(super) const TILE: usize = ROWS * ROW;
pub(super) const ROW: usize = 64;

/// How many rows tiles have, and how many bytes their rows.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The thread's tiles in some configuration, until dropped.
///
/// Tiles 0 to 3 are for sums, the others for what is multiplied. Products come as loops over depth:
/// all tiles that one reads stand one after the other, aligned to 64 bytes.
pub(super) struct Tiles {
    /// Rows of `A`, or columns of `B`, of the side that has few.
    few: usize,
    _not_send: PhantomData<*const ()>,
}

impl Tiles {
    /// For [`Tiles::two_by_two`].
    ///
    /// # Safety
    /// The backend has tiles.
    pub(super) unsafe fn whole() -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self::configure(ROWS, [(ROWS, ROW); 8]) }
    }

    /// For [`Tiles::two_by_few`], with `B` of 1 to 16 columns.
    ///
    /// # Safety
    /// The backend has tiles.
    pub(super) unsafe fn few_columns(columns: usize) -> Self {
        let (few, whole) = ((ROWS, 4 * columns), (ROWS, ROW));
        // SAFETY: the caller's promise.
        unsafe { Self::configure(columns, [few, few, few, few, few, few, whole, whole]) }
    }

    /// For [`Tiles::few_by_two`], with `A` of 1 to 16 rows.
    ///
    /// # Safety
    /// The backend has tiles.
    pub(super) unsafe fn few_rows(rows: usize) -> Self {
        let (few, whole) = ((rows, ROW), (ROWS, ROW));
        // SAFETY: the caller's promise.
        unsafe { Self::configure(rows, [few, few, few, few, few, few, whole, whole]) }
    }

    unsafe fn configure(few: usize, shapes: [(usize, usize); 8]) -> Self {
        assert!((1..=ROWS).contains(&few));
        let mut configuration = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        for (tile, (rows, bytes)) in shapes.into_iter().enumerate() {
            configuration.rows[tile] = rows as u8;
            configuration.row_bytes[tile] = bytes as u16;
        }
        // SAFETY: the caller says that there are tiles; the sizes are within theirs.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack));
        }
        Self {
            few,
            _not_send: PhantomData,
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: there is a configuration, so there are tiles.
        unsafe { asm!("tilerelease", options(nostack)) };
    }
}

/// A loop over `depth` that adds to the four tiles at `sums`, or sets them.
macro_rules! products {
    ($sums:ident, $from_zero:ident, $depth:expr, [$($step:literal,)*], $($operands:tt)*) => {
        asm!(
            "test {zero:e}, {zero:e}",
            "jnz 2f",
            "tileloadd tmm0, [{sums} + {row}*1]",
            "tileloadd tmm1, [{sums} + {row}*1 + 1024]",
            "tileloadd tmm2, [{sums} + {row}*1 + 2048]",
            "tileloadd tmm3, [{sums} + {row}*1 + 3072]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            $($step,)*
            "dec {depth}",
            "jnz 3b",
            "tilestored [{sums} + {row}*1], tmm0",
            "tilestored [{sums} + {row}*1 + 1024], tmm1",
            "tilestored [{sums} + {row}*1 + 2048], tmm2",
            "tilestored [{sums} + {row}*1 + 3072], tmm3",
            depth = inout(reg) $depth => _,
            sums = in(reg) $sums,
            row = in(reg) ROW,
            zero = in(reg) u32::from($from_zero),
            $($operands)*
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

impl Tiles {
    /// Products of two tiles of `A` with two of `B`: sums [a, b].
    ///
    /// # Safety
    /// The configuration is [`Tiles::whole`]; `a` and `b` point to `2 * depth` tiles, [depth, 2],
    /// `sums` to four, which are only written where `from_zero`; `depth` is not 0.
    pub(super) unsafe fn two_by_two(
        &self,
        a: *const u8,
        b: *const u8,
        sums: *mut f32,
        depth: usize,
        from_zero: bool,
    ) {
        // SAFETY: the caller's promises.
        unsafe {
            products!(sums, from_zero, depth, [
                "tileloadd tmm4, [{a} + {row}*1]",
                "tileloadd tmm6, [{b} + {row}*1]",
                "prefetcht0 [{b} + 2048]",
                "prefetcht0 [{b} + 2112]",
                "prefetcht0 [{b} + 2176]",
                "prefetcht0 [{b} + 2240]",
                "prefetcht0 [{b} + 2304]",
                "prefetcht0 [{b} + 2368]",
                "prefetcht0 [{b} + 2432]",
                "prefetcht0 [{b} + 2496]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {row}*1 + 1024]",
                "prefetcht0 [{b} + 2560]",
                "prefetcht0 [{b} + 2624]",
                "prefetcht0 [{b} + 2688]",
                "prefetcht0 [{b} + 2752]",
                "prefetcht0 [{b} + 2816]",
                "prefetcht0 [{b} + 2880]",
                "prefetcht0 [{b} + 2944]",
                "prefetcht0 [{b} + 3008]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a} + {row}*1 + 1024]",
                "prefetcht0 [{b} + 3072]",
                "prefetcht0 [{b} + 3136]",
                "prefetcht0 [{b} + 3200]",
                "prefetcht0 [{b} + 3264]",
                "prefetcht0 [{b} + 3328]",
                "prefetcht0 [{b} + 3392]",
                "prefetcht0 [{b} + 3456]",
                "prefetcht0 [{b} + 3520]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "prefetcht0 [{b} + 3584]",
                "prefetcht0 [{b} + 3648]",
                "prefetcht0 [{b} + 3712]",
                "prefetcht0 [{b} + 3776]",
                "prefetcht0 [{b} + 3840]",
                "prefetcht0 [{b} + 3904]",
                "prefetcht0 [{b} + 3968]",
                "prefetcht0 [{b} + 4032]",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "prefetcht0 [{next} + 0]",
                "prefetcht0 [{next} + 64]",
                "prefetcht0 [{next} + 128]",
                "prefetcht0 [{next} + 192]",
                "add {next}, 256",
                "add {a}, 2048",
                "add {b}, 2048",
            ], next = inout(reg) sums.wrapping_byte_add(4 * TILE) => _,
                a = inout(reg) a => _, b = inout(reg) b => _,);
        }
    }

    /// Products of two tiles of `A` with one narrow one of `B`: sums [parity of depth, a], in
    /// tiles of their own so that one need not wait for the other. Meanwhile memory is asked for
    /// four lines for each of the depth, from `ahead` on, which may be any address.
    ///
    /// # Safety
    /// The configuration is [`Tiles::few_columns`]; `a` points to `2 * depth` tiles, [depth, 2],
    /// `b` to `depth` of `64 * columns` bytes, `sums` to four of 1,024 bytes, with rows of 64, which
    /// are only written where `from_zero`; `depth` is even and not 0.
    pub(super) unsafe fn two_by_few(
        &self,
        a: *const u8,
        b: *const u8,
        sums: *mut f32,
        depth: usize,
        from_zero: bool,
        ahead: *const u8,
    ) {
        // SAFETY: the caller's promises.
        unsafe {
            products!(sums, from_zero, depth / 2, [
                "tileloadd tmm4, [{b} + {few}*1]",
                "tileloadd tmm6, [{a} + {row}*1]",
                "prefetcht1 [{ahead}]",
                "prefetcht1 [{ahead} + 64]",
                "tdpbf16ps tmm0, tmm6, tmm4",
                "tileloadd tmm7, [{a} + {row}*1 + 1024]",
                "prefetcht1 [{ahead} + 128]",
                "prefetcht1 [{ahead} + 192]",
                "tdpbf16ps tmm1, tmm7, tmm4",
                "add {b}, {step}",
                "tileloadd tmm5, [{b} + {few}*1]",
                "tileloadd tmm6, [{a} + {row}*1 + 2048]",
                "prefetcht1 [{ahead} + 256]",
                "prefetcht1 [{ahead} + 320]",
                "tdpbf16ps tmm2, tmm6, tmm5",
                "tileloadd tmm7, [{a} + {row}*1 + 3072]",
                "prefetcht1 [{ahead} + 384]",
                "prefetcht1 [{ahead} + 448]",
                "tdpbf16ps tmm3, tmm7, tmm5",
                "add {a}, 4096",
                "add {b}, {step}",
                "add {ahead}, 512",
            ], a = inout(reg) a => _, b = inout(reg) b => _, ahead = inout(reg) ahead => _,
                few = in(reg) 4 * self.few, step = in(reg) ROW * self.few,);
        }
    }

    /// Products of one flat tile of `A` with two of `B`: sums [parity of depth, b].
    ///
    /// # Safety
    /// The configuration is [`Tiles::few_rows`]; `a` points to `depth` tiles of `64 * rows` bytes,
    /// `b` to `2 * depth` tiles, [depth, 2], `sums` to four of 1,024 bytes, which are only written
    /// where `from_zero`; `depth` is even and not 0.
    pub(super) unsafe fn few_by_two(
        &self,
        a: *const u8,
        b: *const u8,
        sums: *mut f32,
        depth: usize,
        from_zero: bool,
    ) {
        // SAFETY: the caller's promises.
        unsafe {
            products!(sums, from_zero, depth / 2, [
                "tileloadd tmm4, [{a} + {row}*1]",
                "tileloadd tmm6, [{b} + {row}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {row}*1 + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a}, {step}",
                "tileloadd tmm5, [{a} + {row}*1]",
                "tileloadd tmm6, [{b} + {row}*1 + 2048]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tileloadd tmm7, [{b} + {row}*1 + 3072]",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, {step}",
                "add {b}, 4096",
            ], a = inout(reg) a => _, b = inout(reg) b => _,
                step = in(reg) ROW * self.few,);
        }
    }
}
