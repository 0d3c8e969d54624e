//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::header::check_name;
use super::header_json::Strings;
use super::{CheckpointProblem, names};
use crate::Result;

/// The most tensors of a checkpoint; the largest models have some hundred thousand.
pub const MAX_ENTRIES: usize = 1 << 20;

/// Tensor names and the shards they are in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// Shard by tensor.
    pub weight_map: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Raw {
    #[serde(deserialize_with = "strings")]
    weight_map: BTreeMap<String, String>,
    #[serde(default, rename = "metadata")]
    _metadata: Option<IgnoredAny>,
}

fn strings<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    serde::de::DeserializeSeed::deserialize(Strings { most: MAX_ENTRIES }, deserializer)
}

impl Index {
    /// Reads the text of an index.
    ///
    /// # Errors
    /// [`CheckpointProblem::Json`] where it is malformed or a key of it stands twice,
    /// [`CheckpointProblem::ShardName`] where a shard's name is not a plain `.safetensors` file
    /// name, [`CheckpointProblem::TensorName`] for names with control characters.
    pub fn parse(text: &str) -> Result<Self> {
        let raw: Raw = serde_json::from_str(text).map_err(|error| CheckpointProblem::Json {
            what: "index",
            reason: error.to_string(),
        })?;
        for (tensor, shard) in &raw.weight_map {
            check_name(tensor)?;
            if !names::is_file_name(shard) || !shard.ends_with(".safetensors") {
                return Err(CheckpointProblem::ShardName {
                    shard: shard.clone(),
                }
                .into());
            }
        }
        Ok(Self {
            weight_map: raw.weight_map,
        })
    }

    /// The text that [`Index::parse`] reads, as other tools write it.
    #[must_use]
    pub fn to_json(&self, total_size: u64) -> String {
        let quote = |text: &str| serde_json::Value::from(text).to_string();
        let entries: Vec<String> = self
            .weight_map
            .iter()
            .map(|(tensor, shard)| format!("    {}: {}", quote(tensor), quote(shard)))
            .collect();
        format!(
            "{{\n  \"metadata\": {{\n    \"total_size\": {total_size}\n  }},\n  \
             \"weight_map\": {{\n{}\n  }}\n}}\n",
            entries.join(",\n")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_reads_back() {
        let weight_map = [
            ("a\"b", "model-00001-of-00001.safetensors"),
            ("c", "x.safetensors"),
        ]
        .map(|(tensor, shard)| (tensor.to_owned(), shard.to_owned()))
        .into();
        let index = Index { weight_map };
        assert_eq!(Index::parse(&index.to_json(7)).ok(), Some(index));
    }

    #[test]
    fn hostile_indexes_are_refused() {
        for text in [
            "",
            "[]",
            "{}",
            r#"{"weight_map": []}"#,
            r#"{"weight_map": {"a": 1}}"#,
            r#"{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}"#,
            r#"{"weight_map": {}, "weight_map": {}}"#,
            r#"{"weight_map": {"a": "../x.safetensors"}}"#,
            r#"{"weight_map": {"a": "/x.safetensors"}}"#,
            r#"{"weight_map": {"a": "y\\x.safetensors"}}"#,
            r#"{"weight_map": {"a": "x\u0000.safetensors"}}"#,
            r#"{"weight_map": {"a": "x.bin"}}"#,
            r#"{"weight_map": {"a": ".safetensors"}}"#,
            r#"{"weight_map": {"": "x.safetensors"}}"#,
            r#"{"weight_map": {"a\u0007": "x.safetensors"}}"#,
            r#"{"weight_map": {"a": "x.safetensors"}} x"#,
        ] {
            assert!(Index::parse(text).is_err(), "{text}");
        }
    }
}
