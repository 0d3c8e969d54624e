//! The 8-bit dynamic maps made ready for a search in one look-up.
//!
//! # How
//! The bits of a number, those of a negative one with all but the sign inverted, are an integer
//! that grows with the number. Its high bits are the number's cell: a sign, an exponent and the
//! first 6 or 7 bits of a mantissa. The values of a dynamic map lie so far apart, as a part of
//! themselves, that no cell holds two midpoints. So the rank of a number is the count of midpoints
//! in lower cells, and one more if its low bits are above those of the midpoint in its own cell.
//!
//! Both stand in one word a cell: the count in the high bits, and in the low ones what the low bits
//! of a number must be added to for a carry into the count, exactly where they are above the
//! midpoint's. Rank = (word of the cell + low bits of the number) >> low bits. Nothing is rounded.
//!
//! The words are 64 KiB a map, of which numbers of the upper six octaves, as nearly all numbers
//! of a block are, touch 2 to 6 KiB.

use std::sync::LazyLock;

use crate::Codebook;

/// What `rank` is counted from in a word: ranks come out as the nodes of a search tree do.
const FIRST_NODE: u32 = 256;

/// A dynamic map by cells. Numbers to look up are from -2 to 2, both left out, or at least 0 for
/// the unsigned map.
pub(crate) struct Cells {
    /// Cells of negative numbers, for the signed map, then of the others, in the numbers' order.
    words: Vec<u32>,
    /// How many of them are of negative numbers.
    negative: usize,
}

static SIGNED: LazyLock<Option<Cells>> =
    LazyLock::new(|| Cells::new(Codebook::dynamic_signed(), true, low_bits(true)));

static UNSIGNED: LazyLock<Option<Cells>> =
    LazyLock::new(|| Cells::new(Codebook::dynamic_unsigned(), false, low_bits(false)));

/// How many bits of a number are not part of its cell: as many as leave every midpoint of the
/// signed or the unsigned map a cell of its own.
pub(crate) const fn low_bits(signed: bool) -> u32 {
    if signed { 17 } else { 16 }
}

impl Cells {
    /// Those of a built-in dynamic map; `None` for any other codebook.
    pub(crate) fn of(codebook: &Codebook) -> Option<&'static Self> {
        if codebook == Codebook::dynamic_signed() {
            SIGNED.as_ref()
        } else if codebook == Codebook::dynamic_unsigned() {
            UNSIGNED.as_ref()
        } else {
            None
        }
    }

    /// None where two midpoints share a cell, or one has none.
    fn new(codebook: &Codebook, signed: bool, low_bits: u32) -> Option<Self> {
        // Up to the cell before that of 2.
        let positive = (2.0_f32.to_bits() >> low_bits).cast_signed();
        let negative = if signed { positive } else { 0 };
        let mask = (1 << low_bits) - 1;
        let midpoints = codebook.midpoints().iter();
        let mut midpoints = midpoints.map(|&midpoint| ordered(midpoint)).peekable();
        let mut node = FIRST_NODE;
        let words = (-negative..positive)
            .map(|cell| {
                let mut word = node << low_bits;
                let of_cell = |&midpoint: &i32| midpoint >> low_bits == cell;
                if let Some(midpoint) = midpoints.next_if(of_cell) {
                    word += mask - (midpoint.cast_unsigned() & mask);
                    node += 1;
                }
                word
            })
            .collect();
        midpoints.next().is_none().then_some(Self {
            words,
            negative: negative as usize,
        })
    }

    /// Whether it is of the signed map.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(crate) fn is_signed(&self) -> bool {
        self.negative > 0
    }

    /// The word of cell 0, before which those of negative numbers are.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(crate) fn middle(&self) -> CellWords {
        CellWords(self.words[self.negative..].as_ptr())
    }

    /// 256 and the rank of a number.
    #[cfg(test)]
    fn node(&self, number: f32) -> u32 {
        let ordered = ordered(if self.is_signed() {
            number
        } else {
            number.max(0.0)
        });
        let low_bits = low_bits(self.is_signed());
        let cell = (ordered >> low_bits) as isize + self.negative as isize;
        let low = ordered.cast_unsigned() & ((1 << low_bits) - 1);
        (self.words[cell.cast_unsigned()] + low) >> low_bits
    }
}

/// Where the word of cell 0 is: what a loop keeps in a register.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[derive(Clone, Copy)]
pub(crate) struct CellWords(pub(crate) *const u32);

/// An integer that grows with the number: its bits, those of a negative one with all but the sign
/// inverted.
fn ordered(number: f32) -> i32 {
    let bits = number.to_bits().cast_signed();
    bits ^ (bits >> 31 & i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A rank changes at midpoints alone, since cells and low bits grow with the number; so these
    /// numbers are all that could tell a wrong rank.
    #[test]
    fn ranks_are_those_of_the_specification_around_every_midpoint_and_every_edge_of_a_cell() {
        for codebook in [Codebook::dynamic_signed(), Codebook::dynamic_unsigned()] {
            let cells = Cells::of(codebook).expect("every midpoint has a cell of its own");
            let bits = low_bits(cells.is_signed());
            let around = |x: f32| [x.next_down(), x, x.next_up()];
            let edges = (0..=1.0_f32.to_bits() >> bits)
                .map(|cell| f32::from_bits(cell << bits))
                .flat_map(|edge| [edge, -edge]);
            let midpoints = codebook.midpoints().iter().copied();
            let values = codebook.values().iter().copied();
            for number in edges.chain(midpoints).chain(values).flat_map(around) {
                let rank = cells.node(number) - FIRST_NODE;
                assert_eq!(
                    codebook.code_of_rank()[rank as usize],
                    codebook.encode(number),
                    "{} {number:e}",
                    codebook.name()
                );
            }
        }
    }

    #[test]
    fn other_codebooks_have_none() {
        for codebook in [Codebook::nf4(), Codebook::fp4()] {
            assert!(Cells::of(codebook).is_none());
        }
        // Too coarse for the map; of the other sign.
        assert!(Cells::new(Codebook::dynamic_unsigned(), false, 17).is_none());
        assert!(Cells::new(Codebook::dynamic_signed(), false, 17).is_none());
    }
}
