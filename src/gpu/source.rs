//! The whole translation unit of a kernel: definitions that specialise it, what all kernels share,
//! and the kernel file itself.
//!
//! The definitions are the only form in which kernels know the tables of [`crate::codebook`]:
//!
//! | definition | meaning |
//! |---|---|
//! | `ELEMENT` | `bf16`, `f16` or `f32`: the elements of tensors that are not quantized |
//! | `BLOCK_SIZE` | elements that share a scale |
//! | `CODE_BITS` | bits of a packed code: 2, 4 or 8 |
//! | `DOUBLE_QUANT` | 1 where the scales are 8-bit codes themselves |
//! | `TIES_UPPER` | 1 where a number halfway between two values takes the upper one |
//! | `CODEBOOK_VALUES` | value of each of the `2^CODE_BITS` codes; NaN for one that is undefined |
//! | `CODEBOOK_MIDPOINTS` | midpoints between neighbouring distinct values, ascending |
//! | `CODEBOOK_CODES` | the code of each distinct value, by rank |
//! | `CODEBOOK_RANKS` | how many distinct values there are, one more than midpoints |
//! | `NESTED_VALUES`, `NESTED_MIDPOINTS` | the signed dynamic map; codes are ranks |
//! | `UNSIGNED_VALUES`, `UNSIGNED_MIDPOINTS` | the unsigned dynamic map; codes are ranks |
//! | `COUNTER_SLOTS`, `SLOT_COUNTERS` | [`super::products::COUNTER_SLOTS`] |
//!
//! Lists stand in braces, floats as hexadecimal literals, which are exact.

use std::fmt::Write;

use super::GpuProblem;
use super::kernel::File;
use super::products::{COUNTER_SLOTS, SLOT_COUNTERS};
use crate::codebook::Ties;
use crate::element::Dtype;
use crate::{BlockSize, Codebook};

/// The headers, each after those that it includes itself. The first stands before every kernel, and
/// another before those that include it.
const HEADERS: [(&str, &str); 3] = [
    ("common.cuh", include_str!("../../cuda/common.cuh")),
    ("vector.cuh", include_str!("../../cuda/vector.cuh")),
    ("product.cuh", include_str!("../../cuda/product.cuh")),
];

/// What a kernel is compiled for.
#[derive(Debug, Clone, PartialEq)]
pub struct Specialisation {
    /// Elements of tensors that are not quantized.
    pub dtype: Dtype,
    /// Elements that share a scale.
    pub block_size: BlockSize,
    /// Codes and values.
    pub codebook: Codebook,
    /// Whether the scales are 8-bit codes themselves.
    pub double_quant: bool,
}

/// The whole source of a kernel file, ready to be compiled without any other file.
#[must_use]
pub fn translation_unit(file: &File, specialisation: &Specialisation) -> String {
    let mut text = specialisation.definitions();
    let own = format!("{}.cu", file.name);
    let headers = HEADERS.into_iter().filter(|(name, _)| {
        *name == HEADERS[0].0 || file.text.contains(&format!("#include \"{name}\""))
    });
    for (name, contents) in headers.chain([(own.as_str(), file.text)]) {
        // Compilers then name the file and its own line.
        text.push_str("#line 1 \"cuda/");
        text.push_str(name);
        text.push_str("\"\n");
        for line in contents.lines() {
            if line != "#pragma once" && !line.starts_with("#include \"") {
                text.push_str(line);
            }
            text.push('\n');
        }
    }
    text
}

impl Specialisation {
    /// Checks that a file can be compiled for it, on an architecture given as 10 major + minor.
    ///
    /// # Errors
    /// [`GpuProblem::Unsupported`] where it cannot.
    pub fn check(&self, file: &File, capability: u32) -> Result<(), GpuProblem> {
        file.check(self.dtype, capability, self.codebook.code_bits())
    }

    fn definitions(&self) -> String {
        let book = &self.codebook;
        let codes = 1_usize << book.code_bits();
        let element = match self.dtype {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
        };
        let signed = Codebook::dynamic_signed();
        let unsigned = Codebook::dynamic_unsigned();
        let ranked: Vec<String> = book.code_of_rank().iter().map(u8::to_string).collect();
        let definitions = [
            ("ELEMENT", element.to_owned()),
            ("BLOCK_SIZE", self.block_size.get().to_string()),
            ("CODE_BITS", book.code_bits().to_string()),
            ("DOUBLE_QUANT", u8::from(self.double_quant).to_string()),
            (
                "TIES_UPPER",
                u8::from(book.ties() == Ties::Upper).to_string(),
            ),
            ("CODEBOOK_VALUES", list(&book.values()[..codes])),
            ("CODEBOOK_MIDPOINTS", list(book.midpoints())),
            ("CODEBOOK_CODES", format!("{{{}}}", ranked.join(", "))),
            ("CODEBOOK_RANKS", ranked.len().to_string()),
            ("NESTED_VALUES", list(signed.values())),
            ("NESTED_MIDPOINTS", list(signed.midpoints())),
            ("UNSIGNED_VALUES", list(unsigned.values())),
            ("UNSIGNED_MIDPOINTS", list(unsigned.midpoints())),
            ("COUNTER_SLOTS", COUNTER_SLOTS.to_string()),
            ("SLOT_COUNTERS", SLOT_COUNTERS.to_string()),
        ];
        let mut text = String::new();
        for (name, value) in definitions {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "#define {name} {value}");
        }
        text
    }
}

/// Numbers as a brace list.
fn list(numbers: &[f32]) -> String {
    let literals: Vec<String> = numbers.iter().map(|&number| literal(number)).collect();
    format!("{{{}}}", literals.join(", "))
}

/// A number as a C++ literal of exactly that value.
fn literal(number: f32) -> String {
    if number.is_nan() {
        // A constant expression for NVRTC, which has no `__builtin_nanf`, and for C++ compilers.
        return "__builtin_bit_cast(float, 0x7fc00000)".to_owned();
    }
    let bits = number.to_bits();
    let sign = if number.is_sign_negative() { "-" } else { "" };
    // The value is `mantissa * 2^exponent`; subnormals have the exponent of the smallest normal.
    let (field, fraction) = (bits >> 23 & 0xff, bits & 0x7f_ffff);
    let mantissa = if field == 0 {
        fraction
    } else {
        fraction | 0x80_0000
    };
    let exponent = field.max(1).cast_signed() - 150;
    format!("{sign}{mantissa:#x}p{exponent}f")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_are_exact() {
        assert_eq!(literal(1.0), "0x800000p-23f");
        assert_eq!(literal(-0.5), "-0x800000p-24f");
        assert_eq!(literal(0.0), "0x0p-149f");
        assert_eq!(literal(f32::from_bits(1)), "0x1p-149f");
        for bits in (0..0x7f80_0000_u32).step_by(99_991) {
            let number = f32::from_bits(bits);
            let text = literal(number);
            let (mantissa, exponent) = text
                .strip_prefix("0x")
                .and_then(|text| text.strip_suffix('f'))
                .and_then(|text| text.split_once('p'))
                .expect("a hexadecimal literal");
            let mantissa = u32::from_str_radix(mantissa, 16).expect("a mantissa");
            let exponent: i32 = exponent.parse().expect("an exponent");
            let value = f64::from(mantissa) * 2.0_f64.powi(exponent);
            assert_eq!(value, f64::from(number), "{text}");
        }
    }

    #[test]
    fn codes_of_the_dynamic_maps_are_ranks() {
        for map in [Codebook::dynamic_signed(), Codebook::dynamic_unsigned()] {
            assert!(map.code_of_rank().iter().copied().eq(0..=255));
        }
    }
}
