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
use crate::codebook::Ties;

/// What `rank` is counted from in a word: ranks come out as the nodes of a search tree do.
const FIRST_NODE: u32 = 256;

/// A codebook by cells. Numbers to look up are from -2 to 2, both left out, or at least 0 where
/// there are no [`negative`](Self::negative) cells.
pub(crate) struct Cells {
    /// Cells of negative numbers, then of the others, in the order of the numbers.
    words: Vec<u32>,
    /// How many of them are of negative numbers.
    pub(crate) negative: usize,
    /// How many bits of a number are not part of its cell.
    pub(crate) low_bits: u32,
}

static SIGNED: LazyLock<Option<Cells>> =
    LazyLock::new(|| Cells::new(Codebook::dynamic_signed(), 17));

static UNSIGNED: LazyLock<Option<Cells>> =
    LazyLock::new(|| Cells::new(Codebook::dynamic_unsigned(), 16));

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

    /// None where two midpoints share a cell, and for codebooks whose ties take the upper value.
    fn new(codebook: &Codebook, low_bits: u32) -> Option<Self> {
        let midpoints = codebook.midpoints();
        if codebook.ties() == Ties::Upper || !midpoints.iter().all(|x| x.abs() < 1.0) {
            return None;
        }
        // Up to the cell before that of 2.
        let positive = (2.0_f32.to_bits() >> low_bits) as usize;
        let negative = if midpoints[0] < 0.0 { positive } else { 0 };
        let mut words = Vec::with_capacity(negative + positive);
        let mut rest = midpoints
            .iter()
            .map(|&midpoint| ordered(midpoint))
            .peekable();
        let mut node = FIRST_NODE;
        let mask = (1 << low_bits) - 1;
        for cell in -(negative as i32)..positive as i32 {
            let mut word = node << low_bits;
            if let Some(midpoint) = rest.next_if(|midpoint| midpoint >> low_bits == cell) {
                word += mask - (midpoint.cast_unsigned() & mask);
                node += 1;
            }
            words.push(word);
        }
        rest.next().is_none().then_some(Self {
            words,
            negative,
            low_bits,
        })
    }

    /// The word of cell 0, before which those of negative numbers are.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(crate) fn middle(&self) -> *const u32 {
        self.words[self.negative..].as_ptr()
    }

    /// 256 and the rank of a number.
    #[cfg(any(target_arch = "aarch64", test))]
    pub(crate) fn node(&self, number: f32) -> u32 {
        let number = if self.negative == 0 {
            number.max(0.0)
        } else {
            number
        };
        let ordered = ordered(number);
        let cell = (ordered >> self.low_bits) as isize + self.negative as isize;
        let low = ordered.cast_unsigned() & ((1 << self.low_bits) - 1);
        (self.words[cell.cast_unsigned()] + low) >> self.low_bits
    }
}

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
            let around = |x: f32| [x.next_down(), x, x.next_up()];
            let edges = (0..=1.0_f32.to_bits() >> cells.low_bits)
                .map(|cell| f32::from_bits(cell << cells.low_bits))
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
        // Too coarse for the map.
        assert!(Cells::new(Codebook::dynamic_unsigned(), 18).is_none());
        let upper = Codebook::from_map("upper", &[(0, -1.0), (1, 1.0)], Ties::Upper);
        assert!(Cells::new(&upper.expect("a good map"), 16).is_none());
    }
}
