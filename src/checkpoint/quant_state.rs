//! The JSON text stored with every quantized weight.
//!
//! Keys, order and spelling are those of bitsandbytes, so that its readers take ours:
//! `{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 128]}`, and with
//! double quantization then `"nested_blocksize": 256, "nested_dtype": "float32",
//! "nested_offset": 0.08696746826171875`. Keys may be read in any order. Codebooks that
//! bitsandbytes does not know have one more key, `ties`.

use serde::{Deserialize, Serialize};

use super::{CheckpointProblem, names};
use crate::codebook::Ties;
use crate::element::Dtype;
use crate::layout::NESTED_BLOCK_SIZE;
use crate::{BlockSize, Codebook, Result};

/// The longest decimal text of a single-precision number, as [`python_float`] writes it: a sign,
/// 17 digits, a point, and an exponent of two digits.
const LONGEST_FLOAT: usize = 23;
/// The type of scales and offset.
const NESTED_DTYPE: Dtype = Dtype::F32;

/// How one weight is quantized.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantState {
    /// Name of the codebook.
    pub codebook: String,
    /// Which of two equally near values a number took.
    pub ties: Ties,
    /// Elements that share a scale.
    pub block_size: BlockSize,
    /// Type of the weight before.
    pub dtype: Dtype,
    /// Shape of the weight before.
    pub shape: Vec<u64>,
    /// With double quantization, the mean of the scales.
    pub nested_offset: Option<f32>,
}

/// The text's schema.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    quant_type: String,
    blocksize: u64,
    dtype: String,
    shape: Vec<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ties: Option<String>,
    #[serde(default)]
    nested_blocksize: Option<u64>,
    #[serde(default)]
    nested_dtype: Option<String>,
    #[serde(default)]
    nested_offset: Option<f64>,
}

impl QuantState {
    /// The text.
    #[must_use]
    pub fn to_json(&self) -> String {
        self.json_with(
            &self
                .nested_offset
                .map(|offset| python_float(f64::from(offset))),
        )
    }

    /// The most bytes that the text can take, whatever the offset.
    #[must_use]
    pub fn longest_json(&self) -> u64 {
        let longest = self.nested_offset.map(|_| "0".repeat(LONGEST_FLOAT));
        self.json_with(&longest).len() as u64
    }

    fn json_with(&self, nested_offset: &Option<String>) -> String {
        let quote = |text: &str| serde_json::Value::from(text).to_string();
        let shape: Vec<String> = self.shape.iter().map(u64::to_string).collect();
        let mut text = format!(
            "{{\"quant_type\": {}, \"blocksize\": {}, \"dtype\": {}, \"shape\": [{}]",
            quote(&self.codebook),
            self.block_size.get(),
            quote(self.dtype.torch_name()),
            shape.join(", "),
        );
        if !names::is_bitsandbytes(&self.codebook) {
            text += &format!(", \"ties\": {}", quote(ties_name(self.ties)));
        }
        if let Some(offset) = nested_offset {
            text += &format!(
                ", \"nested_blocksize\": {}, \"nested_dtype\": {}, \"nested_offset\": {offset}",
                NESTED_BLOCK_SIZE.get(),
                quote(NESTED_DTYPE.torch_name()),
            );
        }
        text + "}"
    }

    /// Reads the text of a weight whose quant state is named after `codebook`.
    ///
    /// # Errors
    /// [`CheckpointProblem::Json`] for malformed text, [`CheckpointProblem::QuantState`] for
    /// values that are not known here.
    pub fn parse(text: &[u8], codebook: &str) -> Result<Self> {
        let raw: Raw = serde_json::from_slice(text).map_err(|error| CheckpointProblem::Json {
            what: "quant state",
            reason: error.to_string(),
        })?;
        let unknown = |field, got: String, supported| CheckpointProblem::QuantState {
            field,
            got,
            supported,
        };
        if raw.quant_type != codebook {
            let supported = "the codebook of its name";
            return Err(unknown("quant_type", raw.quant_type, supported).into());
        }
        let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16]
            .into_iter()
            .find(|dtype| dtype.torch_name() == raw.dtype)
            .ok_or_else(|| unknown("dtype", raw.dtype.clone(), "float32, float16 or bfloat16"))?;
        let ties = match (raw.ties.as_deref(), names::is_bitsandbytes(codebook)) {
            (None, true) => Ties::Lower,
            (Some(name), false) => [Ties::Lower, Ties::Upper]
                .into_iter()
                .find(|&ties| ties_name(ties) == name)
                .ok_or_else(|| unknown("ties", name.to_owned(), "lower or upper"))?,
            (got, _) => return Err(unknown("ties", format!("{got:?}"), "lower or upper").into()),
        };
        let nested = (raw.nested_blocksize, raw.nested_dtype, raw.nested_offset);
        let nested_offset = match nested {
            (None, None, None) => None,
            (Some(size), Some(dtype), Some(offset)) => {
                if size != NESTED_BLOCK_SIZE.get() as u64 {
                    return Err(unknown("nested_blocksize", size.to_string(), "256").into());
                }
                if dtype != NESTED_DTYPE.torch_name() {
                    return Err(unknown("nested_dtype", dtype, "float32").into());
                }
                // The offset was a single-precision number, so nothing is lost.
                #[allow(clippy::cast_possible_truncation)]
                let single = offset as f32;
                if !single.is_finite() {
                    let got = offset.to_string();
                    return Err(unknown("nested_offset", got, "a finite number").into());
                }
                Some(single)
            }
            _ => {
                let got = "incomplete".to_owned();
                return Err(unknown("double quantization", got, "all or none of it").into());
            }
        };
        Ok(Self {
            codebook: raw.quant_type,
            ties,
            block_size: BlockSize::new(raw.blocksize)?,
            dtype,
            shape: raw.shape,
            nested_offset,
        })
    }

    /// The codebook, where it is a built-in one.
    #[must_use]
    pub fn built_in(&self) -> Option<&'static Codebook> {
        Codebook::by_name(&self.codebook).ok()
    }
}

/// `lower` or `upper`.
#[must_use]
pub(crate) const fn ties_name(ties: Ties) -> &'static str {
    match ties {
        Ties::Lower => "lower",
        Ties::Upper => "upper",
    }
}

/// A finite number as Python's `json.dumps` writes it: the shortest digits that read back as the
/// same double, in positional notation from 1e-4 to below 1e16.
fn python_float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value == 0.0 || (-4..16).contains(&exponent) {
        // `Debug` keeps ".0" on whole numbers, as Python does.
        let plain = format!("{value}");
        return if plain.contains('.') {
            plain
        } else {
            plain + ".0"
        };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(nested_offset: Option<f32>) -> QuantState {
        QuantState {
            codebook: "nf4".to_owned(),
            ties: Ties::Lower,
            block_size: BlockSize::DEFAULT,
            dtype: Dtype::Bf16,
            shape: vec![64, 128],
            nested_offset,
        }
    }

    #[test]
    fn the_text_is_that_of_bitsandbytes() {
        assert_eq!(
            state(Some(f32::from_bits(0x3db2_1c00))).to_json(),
            "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"bfloat16\", \
             \"shape\": [64, 128], \"nested_blocksize\": 256, \"nested_dtype\": \"float32\", \
             \"nested_offset\": 0.08696746826171875}"
        );
        assert!(state(None).to_json().ends_with("\"shape\": [64, 128]}"));
    }

    #[test]
    fn numbers_are_written_as_python_writes_them() {
        for (value, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.0001, "0.0001"),
            (1e-5, "1e-05"),
            (0.000_012_3, "1.23e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (f64::from(f32::MAX), "3.4028234663852886e+38"),
            (f64::from(f32::from_bits(1)), "1.401298464324817e-45"),
            (f64::from(0.1_f32), "0.10000000149011612"),
        ] {
            assert_eq!(python_float(value), text);
        }
    }

    #[test]
    fn no_text_is_longer_than_its_bound() {
        let mut bits = 1_u32;
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let offset = f32::from_bits(bits & 0x7fff_ffff);
            if offset.is_finite() {
                let state = state(Some(offset));
                let text = state.to_json();
                assert!(text.len() as u64 <= state.longest_json(), "{text}");
                let read = QuantState::parse(text.as_bytes(), "nf4").expect("our own text");
                assert_eq!(read, state);
            }
        }
    }

    #[test]
    fn other_states_are_refused() {
        let text = state(Some(0.5)).to_json();
        for (from, to) in [
            ("nf4", "fp4"),
            ("\"blocksize\": 64", "\"blocksize\": 63"),
            ("bfloat16", "float8"),
            ("256", "128"),
            ("float32", "float16"),
            ("0.5", "1e39"),
            ("0.5", "NaN"),
            ("0.5", "0.5, \"nested_offset\": 0.5"),
            ("0.5", "0.5, \"x\": 1"),
            (", \"nested_offset\": 0.5", ""),
            ("[64, 128]", "[64, -128]"),
            ("}", ", \"ties\": \"lower\"}"),
        ] {
            let broken = text.replacen(from, to, 1);
            assert_ne!(broken, text);
            assert!(
                QuantState::parse(broken.as_bytes(), "nf4").is_err(),
                "{broken}"
            );
        }
    }
}
