//! `config.json`: what is read from it, and the one thing that is added to it.
//!
//! The text is spliced, not written anew, so that every number and the order of its keys stay
//! as they are.

use std::ops::Range;

use serde::Serialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use super::quant_state::ties_name;
use super::{CheckpointProblem, names};
use crate::element::Dtype;
use crate::{BlockSize, Codebook, Result};

/// What says in a config that the weights are quantized.
const QUANTIZATION: &str = "quantization_config";

/// A model's configuration.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Config {
    text: String,
    /// Where in the text a `quantization_config` stands that says nothing.
    null: Option<Range<usize>>,
    /// `model_type`, in which naming differs.
    pub model_type: Option<String>,
    /// Whether the output head is the embedding.
    pub tied: bool,
    /// How its weights are quantized, if they are.
    pub quantized_by: Option<String>,
}

/// How the weights of a folder are quantized: what stands in its config.
#[derive(Debug, Clone, Copy)]
pub struct Quantization<'a> {
    /// The codebook.
    pub codebook: &'a Codebook,
    /// Elements that share a scale.
    pub block_size: BlockSize,
    /// Whether the scales are quantized too.
    pub double_quant: bool,
    /// The type of the weights before.
    pub dtype: Dtype,
    /// Full names of the linear modules that are not quantized.
    pub skipped: &'a [String],
    /// Whether weights of experts are quantized, which only we can load.
    pub experts: bool,
}

impl Config {
    /// Reads the text of a config.
    ///
    /// # Errors
    /// [`CheckpointProblem::Json`] where it is no JSON object or a top-level key stands twice.
    pub fn parse(text: String) -> Result<Self> {
        let invalid = |error: serde_json::Error| CheckpointProblem::Json {
            what: "config",
            reason: error.to_string(),
        };
        let mut json = serde_json::Deserializer::from_str(&text);
        let facts = json
            .deserialize_map(FactsVisitor(&text))
            .and_then(|facts| json.end().map(|()| facts))
            .map_err(invalid)?;
        Ok(Self { text, ..facts })
    }

    /// The text with a `quantization_config` added at its end, or put in the place of one that is
    /// null.
    #[must_use]
    pub fn with_quantization(&self, quantization: &Quantization<'_>) -> String {
        let value = quantization.to_json().replace('\n', "\n  ");
        if let Some(null) = &self.null
            && let (Some(before), Some(after)) =
                (self.text.get(..null.start), self.text.get(null.end..))
        {
            return format!("{before}{value}{after}");
        }
        // It was parsed as an object, so it ends in a brace.
        let body = self.text.trim_end();
        let body = body.strip_suffix('}').unwrap_or(body).trim_end();
        let comma = if body.ends_with('{') { "" } else { "," };
        format!("{body}{comma}\n  \"{QUANTIZATION}\": {value}\n}}\n")
    }
}

/// What readers of bitsandbytes' checkpoints expect.
#[derive(Serialize)]
struct BitsandbytesFields<'a> {
    quant_method: &'static str,
    load_in_4bit: bool,
    bnb_4bit_quant_type: &'a str,
    bnb_4bit_use_double_quant: bool,
    bnb_4bit_compute_dtype: &'static str,
    bnb_4bit_quant_storage: &'static str,
    llm_int8_skip_modules: &'a [String],
    /// Says that we wrote it; other readers pass over it.
    fourbit_format_version: u32,
}

/// The same for folders that only we read.
#[derive(Serialize)]
struct FourbitFields<'a> {
    quant_method: &'static str,
    codebook: &'a str,
    ties: &'static str,
    block_size: usize,
    double_quant: bool,
    compute_dtype: &'static str,
    skip_modules: &'a [String],
    fourbit_format_version: u32,
}

impl Quantization<'_> {
    fn to_json(self) -> String {
        let compute_dtype = self.dtype.torch_name();
        let text = if names::is_bitsandbytes(self.codebook.name()) && !self.experts {
            serde_json::to_string_pretty(&BitsandbytesFields {
                quant_method: "bitsandbytes",
                load_in_4bit: true,
                bnb_4bit_quant_type: self.codebook.name(),
                bnb_4bit_use_double_quant: self.double_quant,
                bnb_4bit_compute_dtype: compute_dtype,
                bnb_4bit_quant_storage: "uint8",
                llm_int8_skip_modules: self.skipped,
                fourbit_format_version: names::FORMAT_VERSION,
            })
        } else {
            serde_json::to_string_pretty(&FourbitFields {
                quant_method: "fourbit",
                codebook: self.codebook.name(),
                ties: ties_name(self.codebook.ties()),
                block_size: self.block_size.get(),
                double_quant: self.double_quant,
                compute_dtype,
                skip_modules: self.skipped,
                fourbit_format_version: names::FORMAT_VERSION,
            })
        };
        // Plain values: it cannot fail.
        text.unwrap_or_default()
    }
}

/// Reads the top level of a config, given its text.
struct FactsVisitor<'a>(&'a str);

impl<'de> Visitor<'de> for FactsVisitor<'_> {
    type Value = Config;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Config, A::Error> {
        let mut facts = Config::default();
        let mut seen = std::collections::HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "model_type" => {
                    facts.model_type = map.next_value::<Value>()?.as_str().map(str::to_owned);
                }
                "tie_word_embeddings" => {
                    facts.tied = map.next_value::<Value>()?.as_bool().unwrap_or(false);
                }
                QUANTIZATION | "compression_config" => {
                    let raw = map.next_value::<&RawValue>()?.get();
                    let value: Value = serde_json::from_str(raw).map_err(A::Error::custom)?;
                    if !value.is_null() {
                        let method = value.get("quant_method").and_then(Value::as_str);
                        facts.quantized_by = Some(method.unwrap_or("unknown method").to_owned());
                    } else if key == QUANTIZATION {
                        // The value is a part of the text.
                        let start = (raw.as_ptr() as usize).wrapping_sub(self.0.as_ptr() as usize);
                        facts.null = Some(start..start + raw.len());
                    }
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
            if let Some(key) = seen.replace(key) {
                return Err(A::Error::custom(format_args!(
                    "the key {key:?} stands twice"
                )));
            }
        }
        Ok(facts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quantization(codebook: &Codebook) -> Quantization<'_> {
        Quantization {
            codebook,
            block_size: BlockSize::DEFAULT,
            double_quant: true,
            dtype: Dtype::Bf16,
            skipped: &[],
            experts: false,
        }
    }

    #[test]
    fn all_else_stays_as_it_is() {
        let text = "{\n  \"eps\": 1e-05,\n  \"b\": 1.0,\n  \"a\": [1]\n}\n";
        let config = Config::parse(text.to_owned()).expect("a good config");
        let spliced = config.with_quantization(&quantization(Codebook::nf4()));
        assert!(spliced.starts_with("{\n  \"eps\": 1e-05,\n  \"b\": 1.0,\n  \"a\": [1],\n"));
        let read = Config::parse(spliced).expect("still a config");
        assert_eq!(read.quantized_by.as_deref(), Some("bitsandbytes"));
    }

    #[test]
    fn a_null_is_replaced() {
        let text = "{\"a\": 1e-05, \"quantization_config\": null, \"b\": 1}";
        let config = Config::parse(text.to_owned()).expect("a good config");
        let spliced = config.with_quantization(&quantization(Codebook::nf4()));
        assert!(spliced.starts_with("{\"a\": 1e-05, \"quantization_config\": {"));
        assert!(spliced.ends_with("}, \"b\": 1}"));
        assert!(
            Config::parse(spliced)
                .expect("no key twice")
                .quantized_by
                .is_some()
        );
    }

    #[test]
    fn an_empty_object_gets_no_comma() {
        for codebook in [Codebook::fp4(), Codebook::int4()] {
            let config = Config::parse(" { } ".to_owned()).expect("an object");
            let spliced = config.with_quantization(&quantization(codebook));
            assert!(Config::parse(spliced).is_ok());
        }
    }

    #[test]
    fn facts_are_read_and_damage_is_refused() {
        let text = r#"{"model_type": "gpt2", "tie_word_embeddings": true}"#;
        let config = Config::parse(text.to_owned()).expect("a good config");
        assert_eq!(config.model_type.as_deref(), Some("gpt2"));
        assert!(config.tied && config.quantized_by.is_none());
        for bad in [
            "",
            "[]",
            "{",
            "{\"a\": 1, \"a\": 2}",
            "{} {}",
            "{\"a\": nan}",
        ] {
            assert!(Config::parse(bad.to_owned()).is_err(), "{bad}");
        }
    }
}
