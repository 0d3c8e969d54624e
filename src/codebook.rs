//! The tables: NF4, FP4, INT4, the 8-bit dynamic maps, and any map of 2 to 8 bits a user brings.
//! This is the only place in the Rust code where they are written.
//!
//! A codebook maps codes to values in [-1, 1]. A normalised number `x` is given the code of the
//! nearest value by one rule everywhere: with the distinct values sorted, the rank is the number
//! of midpoints strictly below `x`. A midpoint is `(a + b) / 2` in single precision. So a tie
//! takes the lower value; a user's map may ask for the upper one.

use std::sync::LazyLock;

use crate::error::CodebookProblem;
use crate::{Error, Result};

/// NF4: the information-theoretically optimal 4-bit code for normally distributed weights
/// (paper, section 3 and appendix E), as the bits of its single-precision values.
const NF4_BITS: [u32; 16] = [
    0xbf80_0000,
    0xbf32_39b1,
    0xbf06_6b30,
    0xbeca_32a0,
    0xbe91_a24d,
    0xbe3d_353f,
    0xbdba_7871,
    0x0000_0000,
    0x3da2_faff,
    0x3e24_cae3,
    0x3e7c_04dd,
    0x3ead_033a,
    0x3ee1_a4b8,
    0x3f10_07ab,
    0x3f39_13b3,
    0x3f80_0000,
];

/// FP4 (E2M1) magnitudes for codes 0 to 7, in twelfths; bit 3 of a code is the sign.
const FP4_TWELFTHS: [f32; 8] = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];

/// Decades of the dynamic maps: their smallest values are of the order of `10^-6`.
const DYNAMIC_DECADES: u32 = 7;

/// Which of two equally near values a number takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Ties {
    /// The lower one: the rule of every built-in codebook.
    #[default]
    Lower,
    /// The upper one.
    Upper,
}

/// A map from codes to values in [-1, 1], and the rule that finds the code of a number.
#[derive(Debug, Clone, PartialEq)]
pub struct Codebook {
    name: String,
    ties: Ties,
    code_bits: u32,
    entries: usize,
    /// By code. A code that the map does not define is NaN, so that damaged data can never pass
    /// as numbers.
    values: Box<[f32; 256]>,
    /// Midpoints between neighbouring distinct values, ascending.
    midpoints: Vec<f32>,
    /// The code of each distinct value, by rank; the lowest code where several share a value.
    code_of_rank: Vec<u8>,
}

static NF4: LazyLock<Codebook> =
    LazyLock::new(|| Codebook::built_in("nf4", NF4_BITS.iter().map(|&bits| f32::from_bits(bits))));

static FP4: LazyLock<Codebook> = LazyLock::new(|| {
    let positive = FP4_TWELFTHS.iter().map(|twelfths| twelfths / 12.0);
    Codebook::built_in("fp4", positive.clone().chain(positive.map(|value| -value)))
});

/// 15 equal steps from -1 to 1; the 16th code repeats 1 and is never produced.
static INT4: LazyLock<Codebook> = LazyLock::new(|| {
    Codebook::built_in("int4", (-7_i8..=8).map(|step| f32::from(step.min(7)) / 7.0))
});

static DYNAMIC_SIGNED: LazyLock<Codebook> =
    LazyLock::new(|| Codebook::built_in("dynamic-signed", dynamic_map(true).into_iter()));

static DYNAMIC_UNSIGNED: LazyLock<Codebook> =
    LazyLock::new(|| Codebook::built_in("dynamic-unsigned", dynamic_map(false).into_iter()));

impl Codebook {
    /// NF4, the default.
    #[must_use]
    pub fn nf4() -> &'static Self {
        &NF4
    }

    /// FP4 (E2M1). Of its two zeros only code 0 is ever produced.
    #[must_use]
    pub fn fp4() -> &'static Self {
        &FP4
    }

    /// INT4: sevenths from -1 to 1.
    #[must_use]
    pub fn int4() -> &'static Self {
        &INT4
    }

    /// The signed 8-bit dynamic map (arXiv 2110.02861): double quantization, first moments.
    #[must_use]
    pub fn dynamic_signed() -> &'static Self {
        &DYNAMIC_SIGNED
    }

    /// The unsigned 8-bit dynamic map (arXiv 2110.02861): second moments.
    #[must_use]
    pub fn dynamic_unsigned() -> &'static Self {
        &DYNAMIC_UNSIGNED
    }

    /// A built-in codebook by its name: `nf4`, `fp4` or `int4`.
    ///
    /// # Errors
    /// [`Error::Codebook`] for any other name.
    pub fn by_name(name: &str) -> Result<&'static Self> {
        match name {
            "nf4" => Ok(Self::nf4()),
            "fp4" => Ok(Self::fp4()),
            "int4" => Ok(Self::int4()),
            _ => Err(problem(name, CodebookProblem::UnknownName)),
        }
    }

    /// A user's map of index to value. Codes take 2, 4 or 8 bits in memory, the fewest that hold
    /// the largest index. Indices may leave gaps and values may stand in any order.
    ///
    /// # Errors
    /// [`Error::Codebook`] unless there are 2 to 256 entries with distinct indices below 256,
    /// values in [-1, 1], and at least two distinct values; and for the name of a built-in
    /// codebook, by which files are read.
    pub fn from_map(name: &str, map: &[(u64, f32)], ties: Ties) -> Result<Self> {
        if Self::by_name(name).is_ok() {
            return Err(problem(name, CodebookProblem::BuiltInName));
        }
        if map.len() < 2 || map.len() > 256 {
            return Err(problem(name, CodebookProblem::EntryCount(map.len())));
        }
        let mut entries = Vec::with_capacity(map.len());
        for &(index, value) in map {
            let code =
                u8::try_from(index).map_err(|_| problem(name, CodebookProblem::Index(index)))?;
            if !(-1.0..=1.0).contains(&value) {
                return Err(problem(name, CodebookProblem::Value { index, value }));
            }
            if entries.iter().any(|&(other, _)| other == code) {
                return Err(problem(name, CodebookProblem::DuplicateIndex(index)));
            }
            entries.push((code, value));
        }
        let codebook = Self::build(name, entries, ties);
        if codebook.midpoints.is_empty() {
            return Err(problem(name, CodebookProblem::SingleValue));
        }
        Ok(codebook)
    }

    /// A table whose values are in code order and known to be good.
    fn built_in(name: &str, values: impl Iterator<Item = f32>) -> Self {
        Self::build(name, (0..=255).zip(values).collect(), Ties::Lower)
    }

    fn build(name: &str, mut entries: Vec<(u8, f32)>, ties: Ties) -> Self {
        let mut values = Box::new([f32::NAN; 256]);
        for &(code, value) in &entries {
            values[usize::from(code)] = value;
        }
        let count = entries.len();
        let code_bits = match entries.iter().map(|entry| entry.0).max() {
            None | Some(0..=3) => 2,
            Some(4..=15) => 4,
            Some(16..) => 8,
        };
        // Values are no NaN, so the order is total up to the two zeros, which are one value.
        entries.sort_by(|a, b| (a.1 + 0.0).total_cmp(&(b.1 + 0.0)).then(a.0.cmp(&b.0)));
        entries.dedup_by(|next, kept| next.1 == kept.1);
        Self {
            name: name.to_owned(),
            ties,
            code_bits,
            entries: count,
            values,
            midpoints: entries
                .windows(2)
                .map(|pair| (pair[0].1 + pair[1].1) / 2.0)
                .collect(),
            code_of_rank: entries.iter().map(|entry| entry.0).collect(),
        }
    }

    /// Its name: `nf4`, `fp4`, `int4`, or the one its user gave.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bits of one packed code: 2, 4 or 8.
    #[must_use]
    pub const fn code_bits(&self) -> u32 {
        self.code_bits
    }

    /// Which of two equally near values a number takes.
    #[must_use]
    pub const fn ties(&self) -> Ties {
        self.ties
    }

    /// How many codes the map defines.
    #[must_use]
    pub const fn entries(&self) -> usize {
        self.entries
    }

    /// The value of every code; NaN for those that the map does not define.
    #[must_use]
    pub fn values(&self) -> &[f32; 256] {
        &self.values
    }

    /// The values by code up to the last code defined, as files store them; NaN for a code that
    /// the map does not define.
    #[must_use]
    pub fn table(&self) -> &[f32] {
        let last = self.values.iter().rposition(|value| !value.is_nan());
        &self.values[..last.map_or(0, |last| last + 1)]
    }

    /// Midpoints between neighbouring distinct values, ascending.
    #[must_use]
    pub fn midpoints(&self) -> &[f32] {
        &self.midpoints
    }

    /// The code of each distinct value, by rank.
    #[must_use]
    pub fn code_of_rank(&self) -> &[u8] {
        &self.code_of_rank
    }

    /// The code of the value nearest to `normalised`: the rule, in one line.
    #[inline]
    #[must_use]
    pub fn encode(&self, normalised: f32) -> u8 {
        let rank = match self.ties {
            Ties::Lower => self
                .midpoints
                .partition_point(|&midpoint| midpoint < normalised),
            Ties::Upper => self
                .midpoints
                .partition_point(|&midpoint| midpoint <= normalised),
        };
        self.code_of_rank[rank]
    }
}

/// The dynamic 8-bit map: in decade `i` of seven, `2^i` (signed) or `2^(i+1)` (unsigned) equal
/// steps from 0.1 to 1, their centres times `10^(i-6)`; then 0 and 1.
///
/// The arithmetic is the single-precision one that made the tables of existing checkpoints:
/// steps counted from the nearer end, with one rounding each.
fn dynamic_map(signed: bool) -> Vec<f32> {
    let mut map = vec![0.0, 1.0];
    for decade in 0..DYNAMIC_DECADES {
        let steps = 1_u16 << (decade + u32::from(!signed));
        let (start, end) = (0.1_f32, 1.0_f32);
        let step = (end - start) / f32::from(steps);
        let boundary = |index: u16| {
            if index < steps.div_ceil(2) {
                step.mul_add(f32::from(index), start)
            } else {
                (-step).mul_add(f32::from(steps - index), end)
            }
        };
        // `powi` is not exact for negative exponents; a parsed literal is.
        let scale = [1e-6_f32, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0][decade as usize];
        for index in 0..steps {
            let centre = (boundary(index) + boundary(index + 1)) / 2.0;
            map.push(scale * centre);
            if signed {
                map.push(-scale * centre);
            }
        }
    }
    map.sort_by(f32::total_cmp);
    map
}

fn problem(name: &str, problem: CodebookProblem) -> Error {
    Error::Codebook {
        name: name.to_owned(),
        problem,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_tables_have_the_expected_shape() {
        for (codebook, entries, bits) in [
            (Codebook::nf4(), 16, 4),
            (Codebook::fp4(), 16, 4),
            (Codebook::int4(), 16, 4),
            (Codebook::dynamic_signed(), 256, 8),
            (Codebook::dynamic_unsigned(), 256, 8),
        ] {
            assert_eq!((codebook.entries(), codebook.code_bits()), (entries, bits));
            assert!(
                codebook
                    .midpoints()
                    .windows(2)
                    .all(|pair| pair[0] < pair[1])
            );
            assert!(
                codebook.values()[..entries]
                    .iter()
                    .all(|v| (-1.0..=1.0).contains(v))
            );
        }
        assert_eq!(
            Codebook::dynamic_signed().values()[127].to_bits(),
            0.0_f32.to_bits()
        );
        assert_eq!(Codebook::fp4().code_of_rank().len(), 15);
        assert_eq!(Codebook::int4().code_of_rank().len(), 15);
    }

    #[test]
    fn every_value_encodes_to_itself() {
        for codebook in [Codebook::nf4(), Codebook::fp4(), Codebook::int4()] {
            for &value in &codebook.values()[..codebook.entries()] {
                let code = codebook.encode(value);
                assert_eq!(
                    codebook.values()[usize::from(code)],
                    value,
                    "{}",
                    codebook.name()
                );
            }
        }
    }

    #[test]
    fn a_tie_takes_the_lower_value_unless_asked() {
        for (rank, &midpoint) in Codebook::nf4().midpoints().iter().enumerate() {
            assert_eq!(usize::from(Codebook::nf4().encode(midpoint)), rank);
            assert_eq!(
                usize::from(Codebook::nf4().encode(midpoint.next_up())),
                rank + 1
            );
        }
        let map = [(0, -1.0), (1, 0.0), (2, 1.0)];
        let upper = Codebook::from_map("mine", &map, Ties::Upper).expect("a good map");
        assert_eq!((upper.encode(0.5), upper.encode(-0.5)), (2, 1));
    }

    #[test]
    fn bad_maps_are_refused() {
        let refused = |map: &[(u64, f32)]| match Codebook::from_map("bad", map, Ties::Lower) {
            Err(Error::Codebook { problem, .. }) => problem,
            other => panic!("accepted: {other:?}"),
        };
        assert_eq!(refused(&[(0, 1.0)]), CodebookProblem::EntryCount(1));
        assert_eq!(
            refused(&[(0, 1.0), (256, 0.0)]),
            CodebookProblem::Index(256)
        );
        assert_eq!(
            refused(&[(0, 1.0), (0, 0.0)]),
            CodebookProblem::DuplicateIndex(0)
        );
        assert_eq!(
            refused(&[(0, 0.0), (1, -0.0)]),
            CodebookProblem::SingleValue
        );
        assert_eq!(
            refused(&[(0, 0.0), (1, 1.5)]),
            CodebookProblem::Value {
                index: 1,
                value: 1.5
            }
        );
        assert!(matches!(
            refused(&[(0, 0.0), (1, f32::NAN)]),
            CodebookProblem::Value { index: 1, .. }
        ));
        assert!(Codebook::by_name("nf5").is_err());
        let taken = Codebook::from_map("nf4", &[(0, -1.0), (1, 1.0)], Ties::Lower);
        assert!(matches!(
            taken,
            Err(Error::Codebook {
                problem: CodebookProblem::BuiltInName,
                ..
            })
        ));
    }
}
