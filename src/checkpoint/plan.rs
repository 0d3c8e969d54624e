//! Which tensor stands where in the shards that are written: decided before any data is read.
//!
//! Tensors stay in the given order but for alignment: within a shard those with the widest
//! elements come first, so that every tensor is aligned to its elements. Texts whose length is
//! known only after the data (quant states) come last, and the header is padded to a length that
//! is known beforehand, so data can be written before the header.

use std::collections::BTreeMap;
use std::ops::Range;

use super::checksum::Checksum;
use super::header::{LENGTH_BYTES, MAX_HEADER_BYTES, METADATA};
use super::{CheckpointProblem, FileDtype, names};
use crate::{Error, Result};

/// The most tensors of a shard that is written; some loaders slow down with more.
const MAX_SHARD_TENSORS: usize = 100_000;
/// What header lengths are multiples of, so that data is aligned.
const HEADER_ALIGNMENT: u64 = 8;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: FileDtype,
    /// How long it is.
    pub extent: Extent,
}

/// The extent of a tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extent {
    /// A tensor of this shape.
    Shape(Vec<u64>),
    /// A text of at most this many bytes, in one dimension.
    TextUpTo(u64),
}

impl PlannedTensor {
    /// A tensor of a known shape.
    pub fn new(name: impl Into<String>, dtype: FileDtype, shape: Vec<u64>) -> Self {
        Self {
            name: name.into(),
            dtype,
            extent: Extent::Shape(shape),
        }
    }

    /// A text.
    pub fn text(name: impl Into<String>, longest: u64) -> Self {
        Self {
            name: name.into(),
            dtype: FileDtype::U8,
            extent: Extent::TextUpTo(longest),
        }
    }

    /// Its bytes, at most.
    ///
    /// # Errors
    /// [`Error::Overflow`] or [`CheckpointProblem::PartialByte`] for impossible shapes.
    pub fn most_bytes(&self) -> Result<u64> {
        match &self.extent {
            Extent::TextUpTo(longest) => Ok(*longest),
            Extent::Shape(shape) => {
                let bytes = self.dtype.tensor_bytes(shape);
                let bytes = bytes.map_err(|error| error.in_tensor(&self.name))?;
                bytes.ok_or_else(|| {
                    Error::from(CheckpointProblem::PartialByte {
                        dtype: self.dtype,
                        shape: shape.clone(),
                    })
                    .in_tensor(&self.name)
                })
            }
        }
    }

    fn is_text(&self) -> bool {
        matches!(self.extent, Extent::TextUpTo(_))
    }

    /// Whether so many bytes are right for it.
    fn admits(&self, bytes: u64, most: u64) -> bool {
        if self.is_text() {
            bytes <= most
        } else {
            bytes == most
        }
    }
}

/// One shard to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardPlan {
    /// Its file name.
    pub name: String,
    /// The groups of tensors in it.
    pub groups: Range<usize>,
    /// Its tensors in the order of their data, with their most bytes.
    pub(crate) tensors: Vec<(PlannedTensor, u64)>,
}

/// Spreads groups of tensors over shards of at most `max_shard_bytes` of data. A group is never
/// split, so one that is larger has a shard of its own.
///
/// # Errors
/// As [`PlannedTensor::most_bytes`]; [`CheckpointProblem::HeaderTooLong`] where readers would
/// refuse a shard for its header.
pub fn plan(groups: &[Vec<PlannedTensor>], max_shard_bytes: u64) -> Result<Vec<ShardPlan>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let (mut start, mut bytes, mut tensors) = (0, 0_u64, 0);
    for (index, group) in groups.iter().enumerate() {
        let group_bytes = group.iter().try_fold(0_u64, |sum, tensor| {
            tensor.most_bytes().map(|bytes| sum.saturating_add(bytes))
        })?;
        let full = bytes.saturating_add(group_bytes) > max_shard_bytes
            || tensors + group.len() > MAX_SHARD_TENSORS;
        if index > start && full {
            ranges.push(start..index);
            (start, bytes, tensors) = (index, 0, 0);
        }
        bytes = bytes.saturating_add(group_bytes);
        tensors += group.len();
    }
    if start < groups.len() {
        ranges.push(start..groups.len());
    }
    let count = ranges.len();
    let shards: Vec<ShardPlan> = ranges
        .into_iter()
        .enumerate()
        .map(|(index, range)| {
            let mut tensors = groups
                .get(range.clone())
                .unwrap_or_default()
                .iter()
                .flatten()
                .map(|tensor| Ok((tensor.clone(), tensor.most_bytes()?)))
                .collect::<Result<Vec<_>>>()?;
            tensors.sort_by_key(|(tensor, _)| {
                (tensor.is_text(), std::cmp::Reverse(tensor.dtype.bits()))
            });
            Ok(ShardPlan {
                name: names::shard(index, count),
                groups: range,
                tensors,
            })
        })
        .collect::<Result<_>>()?;
    for shard in &shards {
        let claimed = shard.header_bytes();
        if claimed > MAX_HEADER_BYTES {
            let limit = MAX_HEADER_BYTES;
            let problem = CheckpointProblem::HeaderTooLong { claimed, limit };
            return Err(Error::from(problem).in_file(&shard.name));
        }
    }
    Ok(shards)
}

impl ShardPlan {
    /// The bytes of the whole file, at most.
    #[must_use]
    pub fn most_file_bytes(&self) -> u64 {
        let tensors = self.tensors.iter();
        let before = LENGTH_BYTES + self.header_bytes();
        tensors.fold(before, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }

    /// The bytes of the header, padding included: the same whatever the data is.
    pub(crate) fn header_bytes(&self) -> u64 {
        let blank = Checksum::of_bytes(&[]);
        let checksums = vec![blank; self.tensors.len()];
        let most: Vec<u64> = self.tensors.iter().map(|(_, bytes)| *bytes).collect();
        let text = self.header_text(
            &most,
            &self.metadata(blank, Some((blank, blank)), &checksums),
        );
        (text.len() as u64).next_multiple_of(HEADER_ALIGNMENT)
    }

    /// The header as it stands in the file, its length first.
    ///
    /// # Errors
    /// [`CheckpointProblem::TensorBytes`] where a tensor has another size than planned.
    pub(crate) fn header(
        &self,
        bytes: &[u64],
        metadata: &BTreeMap<String, String>,
    ) -> Result<Vec<u8>> {
        for ((tensor, most), &got) in self.tensors.iter().zip(bytes) {
            if !tensor.admits(got, *most) {
                let expected = *most;
                let problem = CheckpointProblem::TensorBytes { expected, got };
                return Err(Error::from(problem).in_tensor(&tensor.name));
            }
        }
        let length = self.header_bytes();
        let mut header = length.to_le_bytes().to_vec();
        header.extend_from_slice(self.header_text(bytes, metadata).as_bytes());
        let padded = usize::try_from(LENGTH_BYTES + length).unwrap_or(header.len());
        header.resize(padded, b' ');
        Ok(header)
    }

    /// What stands under `__metadata__`. `source` are the checksums of the source's headers and
    /// of this shard's source data; a checkpoint that was not converted has none.
    pub(crate) fn metadata(
        &self,
        plan: Checksum,
        source: Option<(Checksum, Checksum)>,
        checksums: &[Checksum],
    ) -> BTreeMap<String, String> {
        let (framework, torch) = names::META_FRAMEWORK;
        let mut metadata = BTreeMap::from([
            (framework.to_owned(), torch.to_owned()),
            (
                names::META_VERSION.to_owned(),
                names::FORMAT_VERSION.to_string(),
            ),
            (names::META_PLAN.to_owned(), plan.to_string()),
        ]);
        if let Some((headers, data)) = source {
            metadata.insert(names::META_SOURCE.to_owned(), headers.to_string());
            metadata.insert(names::META_SOURCE_DATA.to_owned(), data.to_string());
        }
        for ((tensor, _), checksum) in self.tensors.iter().zip(checksums) {
            let key = format!("{}{}", names::META_CHECKSUM, tensor.name);
            metadata.insert(key, checksum.to_string());
        }
        metadata
    }

    fn header_text(&self, bytes: &[u64], metadata: &BTreeMap<String, String>) -> String {
        let quote = |text: &str| serde_json::Value::from(text).to_string();
        let entries: Vec<String> = metadata
            .iter()
            .map(|(key, value)| format!("{}:{}", quote(key), quote(value)))
            .collect();
        let mut text = format!("{{{}:{{{}}}", quote(METADATA), entries.join(","));
        let mut start = 0_u64;
        for ((tensor, _), bytes) in self.tensors.iter().zip(bytes) {
            let end = start.saturating_add(*bytes);
            let shape = match &tensor.extent {
                Extent::Shape(shape) => shape.iter().map(u64::to_string).collect::<Vec<_>>(),
                Extent::TextUpTo(_) => vec![bytes.to_string()],
            };
            text += &format!(
                ",{}:{{\"dtype\":{},\"shape\":[{}],\"data_offsets\":[{start},{end}]}}",
                quote(&tensor.name),
                quote(tensor.dtype.name()),
                shape.join(","),
            );
            start = end;
        }
        text + "}"
    }

    /// Everything about the shard that decides its bytes, as text.
    pub(crate) fn describe(&self) -> String {
        let most: Vec<u64> = self.tensors.iter().map(|(_, bytes)| *bytes).collect();
        format!(
            "{}\n{}\n",
            self.name,
            self.header_text(&most, &BTreeMap::new())
        )
    }
}
