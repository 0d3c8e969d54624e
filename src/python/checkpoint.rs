//! Reading, writing and verifying checkpoint folders for Python.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::errors::to_python;
use super::quantize::Codebook;
use super::tensor::Tensor;
use super::threads::detached_watched;
use crate::checkpoint::config::{Config, Quantization};
use crate::checkpoint::input::InputFile;
use crate::checkpoint::names::Part;
use crate::checkpoint::plan::{Extent, PlannedTensor};
use crate::checkpoint::quantized::planned_parts;
use crate::checkpoint::{
    FileDtype, Folder, Header, Manifest, QuantState, QuantizedWeight, TensorInfo, Writer,
    verify as core,
};
use crate::element::Dtype;
use crate::error::OptionProblem;
use crate::{BlockSize, Error};

/// A stored tensor as a dict.
#[derive(IntoPyObject)]
pub(super) struct TensorEntry {
    name: String,
    dtype: &'static str,
    shape: Vec<u64>,
    bytes: u64,
    file: String,
    checksum: Option<String>,
    reason: Option<String>,
}

/// What the header of one safetensors file says: the strings of its metadata, and of each tensor
/// name, dtype, shape, position of the first byte and bytes.
type HeaderContents = (
    BTreeMap<String, String>,
    Vec<(String, &'static str, Vec<u64>, u64, u64)>,
);

/// Reads the header of one safetensors file and checks it against the file's size.
#[pyfunction]
pub(super) fn read_header(py: Python<'_>, path: PathBuf) -> PyResult<HeaderContents> {
    let read = || {
        let file = InputFile::open(&path)?;
        Header::read(&file).map_err(|error| error.in_file(&path))
    };
    let header = py.detach(read).map_err(|error| to_python(&error))?;
    let describe = |tensor: TensorInfo| {
        let dtype = tensor.dtype.name();
        (
            tensor.name,
            dtype,
            tensor.shape,
            tensor.offset,
            tensor.bytes,
        )
    };
    let tensors = header.tensors.into_iter().map(describe).collect();
    Ok((header.metadata, tensors))
}

/// A quantized weight as a dict.
#[derive(IntoPyObject)]
pub(super) struct QuantizedEntry {
    name: String,
    codebook: Codebook,
    block_size: u64,
    dtype: &'static str,
    shape: Vec<u64>,
    double_quant: bool,
    nested_offset: Option<f32>,
    parts: BTreeMap<&'static str, String>,
    reason: Option<String>,
}

/// A part of a quantized weight as a dict.
#[derive(IntoPyObject)]
pub(super) struct PartEntry {
    part: &'static str,
    name: String,
    dtype: &'static str,
    shape: Vec<u64>,
}

/// `core::Report` as a dict.
#[derive(IntoPyObject)]
pub(super) struct VerifyReport {
    shards: usize,
    tensors: usize,
    quantized: usize,
    bytes: u64,
    files: usize,
    checksums: bool,
}

/// A checkpoint folder, its structure checked; tensors are read on demand.
#[pyclass(frozen, module = "fourbit._core")]
pub(super) struct CheckpointReader {
    folder: Folder,
    manifest: Option<Manifest>,
    quantized: Vec<QuantizedWeight>,
}

impl CheckpointReader {
    /// Why the converter quantized or kept each tensor of its source, as it recorded it: nothing
    /// for the folders of others, and for models that were saved.
    fn reasons(&self) -> HashMap<&str, &str> {
        let records = self.manifest.iter().flat_map(|manifest| &manifest.tensors);
        records
            .map(|record| (record.name.as_str(), record.reason.as_str()))
            .collect()
    }
}

#[pymethods]
impl CheckpointReader {
    /// Opens a folder: ours, bitsandbytes', or a plain one.
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        py.detach(|| core::open(&path))
            .map(|(folder, manifest, quantized)| Self {
                folder,
                manifest,
                quantized,
            })
            .map_err(|error| to_python(&error))
    }

    /// Every stored tensor, in the order of files and data.
    fn tensors(&self) -> PyResult<Vec<TensorEntry>> {
        let reasons = self.reasons();
        self.folder
            .tensors()
            .map(|(shard, tensor)| {
                let checksum = core::recorded(shard, tensor).map_err(|error| to_python(&error))?;
                Ok(TensorEntry {
                    name: tensor.name.clone(),
                    dtype: tensor.dtype.name(),
                    shape: tensor.shape.clone(),
                    bytes: tensor.bytes,
                    file: shard.name.clone(),
                    checksum: checksum.map(|checksum| checksum.to_string()),
                    reason: reasons.get(tensor.name.as_str()).map(ToString::to_string),
                })
            })
            .collect()
    }

    /// Every quantized weight, by name.
    fn quantized(&self) -> Vec<QuantizedEntry> {
        let reasons = self.reasons();
        self.quantized
            .iter()
            .map(|weight| {
                let mut parts: BTreeMap<_, _> = weight
                    .parts
                    .iter()
                    .map(|(part, name)| (part_name(*part), name.clone()))
                    .collect();
                parts.insert("packed", weight.name.clone());
                parts.insert("quant_state", weight.quant_state.clone());
                QuantizedEntry {
                    name: weight.name.clone(),
                    codebook: Codebook(weight.codebook.clone().into_owned()),
                    block_size: weight.state.block_size.get() as u64,
                    dtype: weight.state.dtype.torch_name(),
                    shape: weight.state.shape.clone(),
                    double_quant: weight.state.nested_offset.is_some(),
                    nested_offset: weight.state.nested_offset,
                    parts,
                    reason: reasons.get(weight.name.as_str()).map(ToString::to_string),
                }
            })
            .collect()
    }

    /// Fills `output` (uint8, as many elements as the tensor has bytes) with a tensor's bytes,
    /// and compares them with their checksum unless `verify` is False.
    #[pyo3(signature = (name, output, *, verify=true))]
    fn read_into(
        &self,
        py: Python<'_>,
        name: &str,
        mut output: Tensor<'_>,
        verify: bool,
    ) -> PyResult<()> {
        let output = output.slice_mut::<u8>()?;
        py.detach(|| {
            self.folder.read(name, output)?;
            let (shard, tensor) = self.folder.tensor(name)?;
            if verify {
                core::check_tensor(shard, tensor, output)?;
            }
            Ok(())
        })
        .map_err(|error: Error| to_python(&error))
    }

    /// The strings in the headers, by file.
    #[getter]
    fn metadata(&self) -> BTreeMap<String, BTreeMap<String, String>> {
        self.folder
            .shards()
            .iter()
            .map(|shard| (shard.name.clone(), shard.header.metadata.clone()))
            .collect()
    }

    /// Version of our additions to the format; None where the folder is not ours.
    #[getter]
    fn format_version(&self) -> Option<u32> {
        self.manifest
            .as_ref()
            .map(|manifest| manifest.format_version)
    }
}

/// A checkpoint being written: tensors one at a time, in the order of `groups`.
#[pyclass(module = "fourbit._core")]
pub(super) struct CheckpointWriter(Option<Writer>);

#[pymethods]
impl CheckpointWriter {
    /// `groups` hold (name, safetensors dtype, shape) of the tensors to be written; those of one
    /// group stay in one file. `files` are other files to be written, name and bytes.
    #[new]
    #[pyo3(signature = (path, groups, *, max_shard_bytes, files))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        groups: Vec<Vec<(String, String, Vec<u64>)>>,
        max_shard_bytes: u64,
        files: Vec<(String, Vec<u8>)>,
    ) -> PyResult<Self> {
        let plan = |(name, dtype, shape): (String, String, Vec<u64>)| {
            let found = FileDtype::by_name(&dtype).ok_or(Error::Option {
                option: "dtype",
                value: dtype,
                problem: OptionProblem::Dtype,
            });
            found.map(|dtype| PlannedTensor::new(name, dtype, shape))
        };
        let groups = groups
            .into_iter()
            .map(|group| group.into_iter().map(plan).collect())
            .collect::<crate::Result<Vec<Vec<_>>>>()
            .map_err(|error| to_python(&error))?;
        py.detach(|| Writer::create(&path, groups, max_shard_bytes, files))
            .map(|writer| Self(Some(writer)))
            .map_err(|error| to_python(&error))
    }

    /// Writes the bytes of the next tensor (uint8).
    fn write(&mut self, py: Python<'_>, name: &str, tensor: Tensor<'_>) -> PyResult<()> {
        let writer = self.0.as_mut().ok_or_else(closed)?;
        let bytes = tensor.slice::<u8>()?;
        py.detach(|| writer.write(name, bytes))
            .map_err(|error| to_python(&error))
    }

    /// Writes all that remains, the index last. Before this, nothing is there that loads.
    fn finish(&mut self, py: Python<'_>) -> PyResult<()> {
        let writer = self.0.take().ok_or_else(closed)?;
        py.detach(|| writer.finish())
            .map_err(|error| to_python(&error))
    }

    /// Removes what was written, unless it was finished.
    fn discard(&mut self, py: Python<'_>) {
        let writer = self.0.take();
        py.detach(|| drop(writer));
    }
}

fn closed() -> PyErr {
    PyValueError::new_err("the writer was finished or discarded")
}

/// The tensors that a quantized weight is stored as, and the bytes of its quant state.
/// `nested_offset` is None without double quantization.
#[pyfunction]
#[pyo3(signature = (weight, *, codebook, block_size, dtype, shape, nested_offset=None))]
pub(super) fn quantized_layout<'py>(
    py: Python<'py>,
    weight: &str,
    codebook: &Codebook,
    block_size: u64,
    dtype: &str,
    shape: Vec<u64>,
    nested_offset: Option<f32>,
) -> PyResult<(Vec<PartEntry>, Bound<'py, PyBytes>)> {
    let layout = || {
        let state = QuantState {
            codebook: codebook.0.name().to_owned(),
            ties: codebook.0.ties(),
            block_size: BlockSize::new(block_size)?,
            dtype: torch_dtype(dtype)?,
            shape,
            nested_offset,
        };
        let text = state.to_json().into_bytes();
        let parts = planned_parts(weight, &state, &codebook.0)?;
        let entries = parts.into_iter().map(|tensor| PartEntry {
            part: (Part::ALL.iter())
                .find(|part| part.of(weight) == tensor.name)
                .map_or(
                    if tensor.name == weight {
                        "packed"
                    } else {
                        "quant_state"
                    },
                    |part| part_name(*part),
                ),
            dtype: tensor.dtype.name(),
            shape: match tensor.extent {
                Extent::Shape(shape) => shape,
                Extent::TextUpTo(_) => vec![text.len() as u64],
            },
            name: tensor.name,
        });
        Ok((entries.collect(), text))
    };
    layout()
        .map(|(entries, text): (Vec<PartEntry>, Vec<u8>)| (entries, PyBytes::new(py, &text)))
        .map_err(|error: Error| to_python(&error))
}

/// The text of a config with a `quantization_config` added, all else as it is.
#[pyfunction]
#[pyo3(signature = (config, *, codebook, block_size, double_quant, dtype, skipped, experts=false))]
pub(super) fn add_quantization_config(
    config: String,
    codebook: &Codebook,
    block_size: u64,
    double_quant: bool,
    dtype: &str,
    skipped: Vec<String>,
    experts: bool,
) -> PyResult<String> {
    let add = || {
        let config = Config::parse(config)?;
        if let Some(method) = config.quantized_by {
            return Err(crate::checkpoint::CheckpointProblem::AlreadyQuantized { method }.into());
        }
        Ok(config.with_quantization(&Quantization {
            codebook: &codebook.0,
            block_size: BlockSize::new(block_size)?,
            double_quant,
            dtype: torch_dtype(dtype)?,
            skipped: &skipped,
            experts,
        }))
    };
    add().map_err(|error: Error| to_python(&error))
}

/// Checks a folder, every byte where it is ours. `progress` is called with (bytes done, bytes in
/// all) now and then.
#[pyfunction]
#[pyo3(signature = (path, *, threads, progress=None))]
pub(super) fn verify(
    py: Python<'_>,
    path: PathBuf,
    threads: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<VerifyReport> {
    let report = detached_watched(py, threads, progress.as_ref(), |watch| {
        core::verify_watched(&path, &|done, total| watch.note(done, total))
    })?;
    Ok(VerifyReport {
        shards: report.shards,
        tensors: report.tensors,
        quantized: report.quantized,
        bytes: report.bytes,
        files: report.files,
        checksums: report.checksums,
    })
}

fn torch_dtype(name: &str) -> crate::Result<Dtype> {
    [Dtype::F32, Dtype::F16, Dtype::Bf16]
        .into_iter()
        .find(|dtype| dtype.torch_name() == name)
        .ok_or_else(|| Error::Option {
            option: "dtype",
            value: name.to_owned(),
            problem: OptionProblem::Dtype,
        })
}

/// The name of a part: its ending without the dot.
fn part_name(part: Part) -> &'static str {
    part.ending().trim_start_matches('.')
}
