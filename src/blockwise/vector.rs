//! What the SIMD algorithms need from an instruction set.
#![allow(unsafe_code)]

use super::cells::CellWords;
use super::search::Search;
use crate::Element;

/// `array.map(|x| body)` for two elements, written out. A closure does not have the features of
/// the function around it: where it is not inlined, its intrinsics become calls.
macro_rules! map_2 {
    ($array:expr, |$x:pat_param| $body:expr) => {{
        let [a, b] = $array;
        [
            {
                let $x = a;
                $body
            },
            {
                let $x = b;
                $body
            },
        ]
    }};
}
pub(crate) use map_2;

/// The values of 256 codes.
#[repr(align(64))]
pub(crate) struct ByteMap {
    pub(crate) values: [f32; 256],
    /// The first, second, third and fourth bytes of the values, as x86 has them in memory.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(crate) bytes: [[u8; 256]; 4],
}

impl ByteMap {
    pub(crate) fn new(values: &[f32; 256]) -> Self {
        Self {
            values: *values,
            bytes: std::array::from_fn(|byte| values.map(|value| value.to_le_bytes()[byte])),
        }
    }
}

/// Sixteen single-precision numbers, in as many registers as they take.
///
/// Numbers come in groups of 32: one vector of those at even places, one of those at odd places.
/// So the two codes of a byte meet in the same lane, and a `bf16` pair splits without a shuffle.
///
/// # Safety
/// For every function: the processor must have the features of the implementation, and a pointer
/// must be good for as many elements as the function says, of any alignment unless it says more.
pub(crate) trait Vector: Copy {
    /// Elements of a group.
    const GROUP: usize = 32;

    /// Sixteen nodes of a search tree, or codes.
    type Index: Copy;
    /// The bits of the largest magnitudes so far, of 16 or 32 bits each.
    type Magnitudes: Copy;
    /// The sixteen values of a block's codes, already rounded to the element type.
    type Table: Copy;

    /// The same number in every lane.
    unsafe fn splat(number: f32) -> Self;
    /// Reads a group: `[even, odd]`.
    unsafe fn load<T: Element>(source: *const T) -> [Self; 2];
    /// Writes a group, rounded to nearest even as [`Element::from_f32`] does.
    unsafe fn store<T: Element>(group: [Self; 2], target: *mut T);
    /// Lane by lane, rounded once.
    unsafe fn multiply(self, factor: Self) -> Self;
    /// Lane by lane, rounded once.
    unsafe fn add(self, other: Self) -> Self;
    /// Lane by lane, rounded once.
    unsafe fn subtract(self, other: Self) -> Self;
    /// Lane by lane, rounded once.
    unsafe fn divide(self, divisor: Self) -> Self;
    /// Lane by lane, rounded once.
    unsafe fn square_root(self) -> Self;

    /// Zero in every lane.
    unsafe fn no_magnitudes() -> Self::Magnitudes;
    /// The larger ones of these and those of a group, compared as integers: magnitudes of finite
    /// numbers order the same way, infinities and NaNs come out above them.
    unsafe fn larger<T: Element>(so_far: Self::Magnitudes, group: *const T) -> Self::Magnitudes;
    /// The same for numbers in registers.
    unsafe fn larger_of(so_far: Self::Magnitudes, numbers: Self) -> Self::Magnitudes;
    /// The bits of the largest magnitude, of `T`'s width.
    unsafe fn largest<T: Element>(magnitudes: Self::Magnitudes) -> u32;

    /// Node 1 in every lane.
    unsafe fn root() -> Self::Index;
    /// One level down the tree: `2 * node + (self > tree[node])`. All nodes are on the level that
    /// starts at `LEVEL`, a power of two up to 128.
    unsafe fn descend<const LEVEL: usize>(self, search: &Search, node: Self::Index) -> Self::Index;

    /// Node `16 + rank` of every lane. The numbers are from -1 to 1, give or take a rounding, and
    /// the codes are of 4 bits.
    #[inline(always)]
    unsafe fn nibble_node(self, search: &Search) -> Self::Index {
        // SAFETY: the caller's promises are the same.
        unsafe { descend_4(self, search) }
    }

    /// Node `256 + rank` of every lane by the cells of the signed map, or of the unsigned one. The
    /// numbers are from -1 to 1, give or take a rounding; for the unsigned map those below 0 are
    /// taken for 0.
    unsafe fn cell_node<const SIGNED: bool>(self, cells: CellWords) -> Self::Index;
    /// The node, but at least 257 where the number is above 0.
    unsafe fn keep_from_zero(node: Self::Index, number: Self) -> Self::Index;

    /// `16 + codes[node - 16]`, where nodes and codes are below 32 and 16.
    unsafe fn recode(node: Self::Index, codes: &[u8; 256]) -> Self::Index;
    /// Packs `16 + code` of a group into 16 bytes, the even one in the high nibble.
    unsafe fn pack_nibbles(group: [Self::Index; 2], target: *mut u8);
    /// Packs `256 + rank` of a group into 32 bytes.
    unsafe fn pack_bytes(group: [Self::Index; 2], target: *mut u8);

    /// 32 bytes as numbers 0 to 255.
    unsafe fn unpack_bytes(source: *const u8) -> [Self::Index; 2];
    /// `values[index]`.
    unsafe fn gather(values: &[f32; 256], index: Self::Index) -> Self;

    /// The values of 64 codes in memory: two groups.
    #[inline(always)]
    unsafe fn values_of(map: &ByteMap, codes: *const u8) -> [[Self; 2]; 2] {
        // SAFETY: the caller's promises are the same; 64 codes are two groups.
        unsafe {
            map_2!([0, 32], |first| {
                map_2!(Self::unpack_bytes(codes.add(first)), |codes| {
                    Self::gather(&map.values, codes)
                })
            })
        }
    }
    /// The same, on a processor that has AVX-512 VBMI too, if it is of that kind.
    #[inline(always)]
    unsafe fn values_by_bytes(map: &ByteMap, codes: *const u8) -> [[Self; 2]; 2] {
        // SAFETY: the caller's promises are the same.
        unsafe { Self::values_of(map, codes) }
    }

    /// `values[code] * scale` for the first 16 codes, each rounded once to single precision and
    /// once to `T`.
    unsafe fn table<T: Element>(values: &[f32; 256], scale: f32) -> Self::Table;
    /// Looks up the 32 codes of 16 bytes. With `STREAM` the cache is passed by; `target` is then
    /// aligned to 64 bytes.
    unsafe fn decode<T: Element, const STREAM: bool>(
        table: Self::Table,
        packed: *const u8,
        target: *mut T,
    );
    /// Asks for a line of memory. Any address will do.
    #[inline(always)]
    unsafe fn prefetch(_address: *const u8) {}
    /// Makes streamed writes visible to whoever synchronises with this thread.
    unsafe fn fence();
}

/// Node `16 + rank` of every lane, by the tree.
///
/// # Safety
/// As for all functions of [`Vector`].
#[inline(always)]
pub(super) unsafe fn descend_4<V: Vector>(numbers: V, search: &Search) -> V::Index {
    // SAFETY: the caller answers for the features of `V`.
    unsafe {
        let node = V::root();
        let node = numbers.descend::<1>(search, node);
        let node = numbers.descend::<2>(search, node);
        let node = numbers.descend::<4>(search, node);
        numbers.descend::<8>(search, node)
    }
}
