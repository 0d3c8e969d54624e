//! A codebook made ready for the SIMD search of the nearest value.

use super::cells::Cells;
use crate::Codebook;
use crate::codebook::Ties;

/// The midpoints as a binary search tree in heap order, and what its leaves stand for.
///
/// Node 1 is the root, `2n` and `2n + 1` are the children of `n`. A number that is greater than
/// a node's midpoint goes to `2n + 1`. After `depth` levels the node is `2^depth` + rank.
#[repr(align(64))]
pub(crate) struct Search {
    /// Node 0 does not exist; ranks that the codebook does not have lie behind infinity.
    pub(super) tree: [f32; 256],
    /// The code of each rank.
    pub(super) codes: [u8; 256],
    /// A shorter way to ranks below 16, where the midpoints lie far enough apart.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(super) bins: Option<Bins>,
    /// A shorter way to all ranks of the dynamic maps.
    #[cfg_attr(
        not(any(target_arch = "x86_64", target_arch = "aarch64")),
        allow(dead_code)
    )]
    pub(crate) cells: Option<&'static Cells>,
    /// Codes are not simply ranks.
    pub(super) recode: bool,
    /// Simply 1. Where the compiler knows the number, it takes three AVX-512 instructions for
    /// adding it in some lanes, in place of one.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(super) one: i32,
}

impl Search {
    /// Levels of the tree for packed 4-bit codes.
    pub(super) const NIBBLE_DEPTH: u32 = 4;
    /// Levels of the tree for all others.
    pub(super) const BYTE_DEPTH: u32 = 8;

    pub(super) fn new(codebook: &Codebook) -> Self {
        let depth = if codebook.code_bits() == 4 {
            Self::NIBBLE_DEPTH
        } else {
            Self::BYTE_DEPTH
        };
        let mut tree = [f32::INFINITY; 256];
        for level in 0..depth {
            // The middle of the first subtree of this level, and the way to the next.
            let (first, step) = ((1 << (depth - 1 - level)) - 1, 1 << (depth - level));
            let midpoints = codebook.midpoints().iter().skip(first).step_by(step);
            for (node, &midpoint) in tree[1 << level..].iter_mut().zip(midpoints) {
                *node = strict(codebook, midpoint);
            }
        }
        let mut codes = [0; 256];
        codes[..codebook.code_of_rank().len()].copy_from_slice(codebook.code_of_rank());
        let midpoints: Vec<f32> = (codebook.midpoints().iter())
            .map(|&midpoint| strict(codebook, midpoint))
            .collect();
        let last_rank = u8::try_from(codebook.midpoints().len()).unwrap_or(u8::MAX);
        Self {
            tree,
            codes,
            bins: Bins::new(&midpoints),
            cells: Cells::of(codebook),
            one: 1,
            recode: !codebook.code_of_rank().iter().copied().eq(0..=last_rank),
        }
    }
}

/// The number that must be strictly below `x` for `x` to lie above the midpoint.
fn strict(codebook: &Codebook, midpoint: f32) -> f32 {
    match codebook.ties() {
        Ties::Lower => midpoint,
        // `midpoint <= x` is `previous number < x`.
        Ties::Upper => midpoint.next_down(),
    }
}

/// [-1, 1] cut into 32 bins of which each holds at most one midpoint.
///
/// A number's bin is the floor of `SLOPE * x + 16`, computed without error. It grows with the
/// number, so midpoints in lower bins are below the number and those in higher bins above it: its
/// rank is how many are in lower bins, and one more if it is greater than the one in its own.
#[repr(align(64))]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(super) struct Bins {
    /// The midpoint in each bin; infinity for none.
    pub(super) midpoints: [f32; 32],
    /// 16 + the number of midpoints in lower bins.
    pub(super) nodes: [i32; 32],
}

impl Bins {
    /// A little below 16, so that 1 and the numbers that rounding puts next to it are in bin 31.
    pub(super) const SLOPE: f32 = 15.9375;

    /// None where two midpoints share a bin, or there are more than 15.
    fn new(midpoints: &[f32]) -> Option<Self> {
        let mut bins = Self {
            midpoints: [f32::INFINITY; 32],
            nodes: [16; 32],
        };
        if midpoints.len() > 15 {
            return None;
        }
        for &midpoint in midpoints {
            let bin = Self::bin(midpoint);
            if bins.midpoints[bin] != f32::INFINITY {
                return None;
            }
            bins.midpoints[bin] = midpoint;
            for node in &mut bins.nodes[bin + 1..] {
                *node += 1;
            }
        }
        Some(bins)
    }

    /// Products and sums of so few bits are exact in double precision.
    fn bin(number: f32) -> usize {
        (f64::from(number) * f64::from(Self::SLOPE) + 16.0).floor() as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tree one number at a time.
    fn encode(search: &Search, depth: u32, number: f32) -> u8 {
        let mut node = 1;
        for _ in 0..depth {
            node = 2 * node + usize::from(number > search.tree[node]);
        }
        search.codes[node - (1 << depth)]
    }

    #[test]
    fn built_in_codebooks_have_bins() {
        for codebook in [Codebook::nf4(), Codebook::fp4(), Codebook::int4()] {
            assert!(Search::new(codebook).bins.is_some(), "{}", codebook.name());
        }
        assert!(Search::new(Codebook::dynamic_signed()).bins.is_none());
    }

    #[test]
    fn the_tree_finds_the_codes_of_the_specification() {
        let map = [(0, -1.0), (1, -0.25), (5, 0.0), (9, 0.5), (12, 1.0)];
        for (codebook, depth) in [
            (Codebook::nf4().clone(), 4),
            (Codebook::fp4().clone(), 4),
            (Codebook::int4().clone(), 4),
            (Codebook::dynamic_signed().clone(), 8),
            (Codebook::dynamic_unsigned().clone(), 8),
            (
                Codebook::from_map("upper", &map, Ties::Upper).expect("a good map"),
                4,
            ),
            (
                Codebook::from_map("two bits", &map[..2], Ties::Upper).expect("a good map"),
                8,
            ),
        ] {
            let search = Search::new(&codebook);
            let around = |&x: &f32| [x.next_down(), x, x.next_up()];
            let near = codebook.midpoints().iter().flat_map(around);
            for number in near.chain([-1.0, 1.0, 0.0, -0.0, 2.0, -2.0]) {
                let expected = codebook.encode(number);
                if let (Some(bins), -1.0..=1.0) = (&search.bins, number) {
                    let bin = Bins::bin(number);
                    let node = bins.nodes[bin] + i32::from(number > bins.midpoints[bin]);
                    assert_eq!(search.codes[node as usize - 16], expected, "{number}");
                }
                assert_eq!(
                    encode(&search, depth, number),
                    expected,
                    "{codebook:?} {number}"
                );
            }
        }
    }
}
