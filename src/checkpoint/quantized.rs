//! The quantized weights of a folder, ours and bitsandbytes', put together from their parts.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};

use super::folder::{Folder, Shard};
use super::header::TensorInfo;
use super::names::{self, Part};
use super::plan::PlannedTensor;
use super::quant_state::QuantState;
use super::{CheckpointProblem, FileDtype};
use crate::layout::{Layout, element_count};
use crate::{Codebook, Error, Result};

/// The longest quant state that is read.
const MAX_QUANT_STATE_BYTES: u64 = 1 << 16;
/// How far a stored table may be from ours. Tables are computed in single precision by other
/// programs, with one rounding more or less.
const TABLE_TOLERANCE: f32 = 1e-6;

/// A quantized weight of a folder, checked against its layout.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedWeight {
    /// Name of the weight; its packed codes are the tensor of this name.
    pub name: String,
    /// How it is quantized.
    pub state: QuantState,
    /// Its sizes.
    pub layout: Layout,
    /// Its codebook.
    pub codebook: Cow<'static, Codebook>,
    /// The names of the tensors that belong to it, and what they are. The quant state, already
    /// read, is not among them.
    pub parts: BTreeMap<Part, String>,
    /// Name of the quant state.
    pub quant_state: String,
}

/// The tensors that a quantized weight consists of: packed codes, scales, tables, quant state.
///
/// # Errors
/// [`Error::Option`] for a codebook whose name cannot be a part of a tensor name;
/// [`Error::Overflow`] for an impossible shape.
pub fn planned_parts(
    weight: &str,
    state: &QuantState,
    codebook: &Codebook,
) -> Result<Vec<PlannedTensor>> {
    let elements = element_count(&state.shape)?;
    let layout = Layout::new(elements, state.block_size, codebook.code_bits());
    let part = |part: Part, dtype, length| PlannedTensor::new(part.of(weight), dtype, vec![length]);
    let double = state.nested_offset.is_some();
    let absmax_dtype = if double {
        FileDtype::U8
    } else {
        FileDtype::F32
    };
    let mut parts = vec![
        PlannedTensor::new(weight, FileDtype::U8, vec![layout.packed_bytes, 1]),
        part(Part::Absmax, absmax_dtype, layout.blocks),
        part(
            Part::QuantMap,
            FileDtype::F32,
            codebook.table().len() as u64,
        ),
    ];
    if double {
        let map = Codebook::dynamic_signed().table().len() as u64;
        parts.push(part(
            Part::NestedAbsmax,
            FileDtype::F32,
            layout.nested_blocks,
        ));
        parts.push(part(Part::NestedQuantMap, FileDtype::F32, map));
    }
    let name = names::quant_state(weight, codebook.name())?;
    parts.push(PlannedTensor::text(name, state.longest_json()));
    Ok(parts)
}

/// Finds all quantized weights of a folder, by name, and checks that each is complete. Reads
/// their quant states and tables, a few hundred bytes each.
///
/// # Errors
/// Name the file and tensor: [`CheckpointProblem::MissingCompanion`],
/// [`CheckpointProblem::StrayCompanion`], [`CheckpointProblem::Companion`],
/// [`CheckpointProblem::Table`], [`CheckpointProblem::QuantState`].
pub fn quantized(folder: &Folder) -> Result<Vec<QuantizedWeight>> {
    let mut weights = BTreeMap::new();
    for (shard, tensor) in folder.tensors() {
        if let Some((weight, codebook)) = names::parse_quant_state(&tensor.name) {
            let found = read_weight(folder, shard, tensor, weight, codebook)?;
            if weights.insert(weight.to_owned(), found).is_some() {
                let problem = CheckpointProblem::StrayCompanion;
                return Err(locate(problem.into(), shard, tensor));
            }
        }
    }
    let known: HashSet<&String> = weights
        .values()
        .flat_map(|weight| weight.parts.values().chain([&weight.quant_state]))
        .collect();
    for (shard, tensor) in folder.tensors() {
        if known.contains(&tensor.name) {
            continue;
        }
        let of_quantized = tensor
            .name
            .rmatch_indices('.')
            .filter_map(|(dot, _)| tensor.name.get(..dot))
            .any(|prefix| weights.contains_key(prefix));
        if of_quantized || names::looks_like_part(&tensor.name) {
            return Err(locate(
                CheckpointProblem::StrayCompanion.into(),
                shard,
                tensor,
            ));
        }
    }
    Ok(weights.into_values().collect())
}

fn locate(error: Error, shard: &Shard, tensor: &TensorInfo) -> Error {
    error.in_tensor(&tensor.name).in_file(shard.file.path())
}

fn read_weight(
    folder: &Folder,
    shard: &Shard,
    tensor: &TensorInfo,
    weight: &str,
    codebook: &str,
) -> Result<QuantizedWeight> {
    let state = read_state(folder, tensor, codebook).map_err(|e| locate(e, shard, tensor))?;
    let double = state.nested_offset.is_some();
    let mut parts = BTreeMap::new();
    for part in Part::ALL {
        let nested = matches!(part, Part::NestedAbsmax | Part::NestedQuantMap);
        if !nested || double {
            parts.insert(part, part.of(weight));
        }
    }
    for companion in parts.values().map(String::as_str).chain([weight]) {
        if folder.tensor(companion).is_err() {
            let companion = companion.to_owned();
            let problem = CheckpointProblem::MissingCompanion { companion };
            return Err(Error::from(problem)
                .in_tensor(weight)
                .in_file(shard.file.path()));
        }
    }
    let table = read_floats(folder, &Part::QuantMap.of(weight))?;
    let codebook = match state.built_in() {
        Some(built_in) => {
            check_table(folder, &Part::QuantMap.of(weight), &table, built_in)?;
            Cow::Borrowed(built_in)
        }
        None => Cow::Owned(custom_codebook(&state, &table).map_err(|error| {
            let name = Part::QuantMap.of(weight);
            error.in_tensor(name).in_file(shard.file.path())
        })?),
    };
    if double {
        let name = Part::NestedQuantMap.of(weight);
        let table = read_floats(folder, &name)?;
        check_table(folder, &name, &table, Codebook::dynamic_signed())?;
    }
    let elements = element_count(&state.shape).map_err(|error| locate(error, shard, tensor))?;
    let layout = Layout::new(elements, state.block_size, codebook.code_bits());
    check_size(folder, weight, None, layout.packed_bytes, 1)?;
    let absmax = Part::Absmax.of(weight);
    if double {
        check_size(folder, &absmax, Some(FileDtype::U8), layout.blocks, 1)?;
        let nested = Part::NestedAbsmax.of(weight);
        check_size(
            folder,
            &nested,
            Some(FileDtype::F32),
            layout.nested_blocks,
            4,
        )?;
    } else {
        check_size(folder, &absmax, Some(FileDtype::F32), layout.blocks, 4)?;
    }
    Ok(QuantizedWeight {
        name: weight.to_owned(),
        state,
        layout,
        codebook,
        parts,
        quant_state: tensor.name.clone(),
    })
}

fn read_state(folder: &Folder, tensor: &TensorInfo, codebook: &str) -> Result<QuantState> {
    if tensor.dtype != FileDtype::U8 || tensor.bytes > MAX_QUANT_STATE_BYTES {
        return Err(CheckpointProblem::Companion {
            dtype: tensor.dtype,
            bytes: tensor.bytes,
            expected: format!("U8 and at most {MAX_QUANT_STATE_BYTES} bytes"),
        }
        .into());
    }
    let mut text = vec![0; usize::try_from(tensor.bytes).unwrap_or(0)];
    folder.read(&tensor.name, &mut text)?;
    QuantState::parse(&text, codebook)
}

/// The codebook of a weight whose table is its only definition.
///
/// # Errors
/// [`Error::Codebook`] where the table is none.
fn custom_codebook(state: &QuantState, table: &[f32]) -> Result<Codebook> {
    // A code that the map does not define is stored as NaN.
    let entries: Vec<(u64, f32)> = (0..)
        .zip(table.iter().copied())
        .filter(|(_, value)| !value.is_nan())
        .collect();
    Codebook::from_map(&state.codebook, &entries, state.ties)
}

fn read_floats(folder: &Folder, name: &str) -> Result<Vec<f32>> {
    let (shard, tensor) = folder.tensor(name)?;
    if tensor.dtype != FileDtype::F32 || tensor.bytes > 1024 {
        let problem = CheckpointProblem::Companion {
            dtype: tensor.dtype,
            bytes: tensor.bytes,
            expected: "F32 and at most 256 values".to_owned(),
        };
        return Err(locate(problem.into(), shard, tensor));
    }
    let mut bytes = vec![0; usize::try_from(tensor.bytes).unwrap_or(0)];
    folder.read(name, &mut bytes)?;
    let floats = bytes.as_chunks::<4>().0;
    Ok(floats
        .iter()
        .map(|&bytes| f32::from_le_bytes(bytes))
        .collect())
}

fn check_table(folder: &Folder, name: &str, table: &[f32], codebook: &Codebook) -> Result<()> {
    let (shard, tensor) = folder.tensor(name)?;
    let expected = codebook.table();
    if table.len() != expected.len() {
        let problem = CheckpointProblem::Companion {
            dtype: tensor.dtype,
            bytes: tensor.bytes,
            expected: format!("F32 and {} values", expected.len()),
        };
        return Err(locate(problem.into(), shard, tensor));
    }
    for (index, (&got, &expected)) in table.iter().zip(expected).enumerate() {
        let near = (got - expected).abs() <= TABLE_TOLERANCE * expected.abs().max(1e-3);
        if !near {
            let problem = CheckpointProblem::Table {
                codebook: codebook.name().to_owned(),
                index,
                got,
                expected,
            };
            return Err(locate(problem.into(), shard, tensor));
        }
    }
    Ok(())
}

fn check_size(
    folder: &Folder,
    name: &str,
    dtype: Option<FileDtype>,
    elements: u64,
    element_bytes: u64,
) -> Result<()> {
    let (shard, tensor) = folder.tensor(name)?;
    let expected = elements.saturating_mul(element_bytes);
    let good = dtype.is_none_or(|dtype| dtype == tensor.dtype) && tensor.bytes == expected;
    if good {
        return Ok(());
    }
    let problem = CheckpointProblem::Companion {
        dtype: tensor.dtype,
        bytes: tensor.bytes,
        expected: match dtype {
            Some(dtype) => format!("{dtype} and {expected} bytes"),
            None => format!("{expected} bytes"),
        },
    };
    Err(locate(problem.into(), shard, tensor))
}
