//! The converter for Python.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use pyo3::prelude::*;

use super::errors::to_python;
use super::quantize::Codebook;
use super::threads::INTERVAL;
use crate::checkpoint::manifest::{Action, TensorRecord};
use crate::{BlockSize, convert as core};

/// `core::Report` as a dict.
#[derive(IntoPyObject)]
pub(super) struct Report {
    tensors: Vec<TensorReport>,
    copied: Vec<String>,
    skipped: Vec<(String, &'static str)>,
    bytes_before: u64,
    bytes_after: u64,
    shards: usize,
    shards_kept: usize,
    already_complete: bool,
    seconds: f64,
}

/// `TensorRecord` as a dict.
#[derive(IntoPyObject)]
pub(super) struct TensorReport {
    name: String,
    action: &'static str,
    reason: String,
    dtype: String,
    shape: Vec<u64>,
    bytes_before: u64,
    bytes_after: u64,
}

impl From<TensorRecord> for TensorReport {
    fn from(record: TensorRecord) -> Self {
        Self {
            name: record.name,
            action: match record.action {
                Action::Quantized => "quantized",
                Action::Kept => "kept",
            },
            reason: record.reason,
            dtype: record.dtype,
            shape: record.shape,
            bytes_before: record.bytes_before,
            bytes_after: record.bytes_after,
        }
    }
}

/// Converts a checkpoint folder. `progress` is called with (bytes done, bytes in all, tensor).
#[pyfunction]
#[pyo3(signature = (source, destination, *, codebook, block_size, double_quant, only, skip,
                    max_shard_bytes, chunk_bytes, threads, progress=None))]
pub(super) fn convert(
    py: Python<'_>,
    source: PathBuf,
    destination: PathBuf,
    codebook: &Codebook,
    block_size: u64,
    double_quant: bool,
    only: Vec<String>,
    skip: Vec<String>,
    max_shard_bytes: u64,
    chunk_bytes: u64,
    threads: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<Report> {
    let options = core::Options {
        codebook: codebook.0.clone(),
        block_size: BlockSize::new(block_size).map_err(|error| to_python(&error))?,
        double_quant,
        only,
        skip,
        max_shard_bytes,
        chunk_bytes,
        threads,
    };
    let mut raised = None;
    let report = py.detach(|| {
        let mut last: Option<Instant> = None;
        core::convert(&source, &destination, &options, &mut |now| {
            let early = last.is_some_and(|last| last.elapsed() < INTERVAL);
            if early && now.done < now.total {
                return ControlFlow::Continue(());
            }
            last = Some(Instant::now());
            let told = Python::attach(|py| {
                py.check_signals()?;
                match &progress {
                    Some(progress) => progress
                        .call1(py, (now.done, now.total, now.tensor))
                        .map(|_| ()),
                    None => Ok(()),
                }
            });
            match told {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    raised = Some(error);
                    ControlFlow::Break(())
                }
            }
        })
    });
    if let Some(error) = raised {
        return Err(error);
    }
    let report = report.map_err(|error| to_python(&error))?;
    Ok(Report {
        tensors: report.tensors.into_iter().map(TensorReport::from).collect(),
        copied: report.copied,
        skipped: (report.skipped.into_iter())
            .map(|file| (file.name, file.reason))
            .collect(),
        bytes_before: report.bytes_before,
        bytes_after: report.bytes_after,
        shards: report.shards,
        shards_kept: report.shards_kept,
        already_complete: report.already_complete,
        seconds: report.seconds,
    })
}

/// Why a module is kept in 16 bits for its name alone (an output head, a router …), or None.
#[pyfunction]
pub(super) fn kept_module(name: &str) -> Option<&'static str> {
    core::rules::kept_module(name).map(core::rules::Reason::text)
}

/// Which linear layers `only` and `skip` match, as the converter matches their weights.
#[pyfunction]
pub(super) fn matched_modules(
    only: Vec<String>,
    skip: Vec<String>,
    modules: Vec<String>,
) -> PyResult<(Vec<bool>, Vec<bool>)> {
    core::rules::matched_modules(&only, &skip, &modules).map_err(|error| to_python(&error))
}

/// The names of the small files of a folder that a copy of its model needs, without `config.json`.
#[pyfunction]
pub(super) fn small_files(py: Python<'_>, folder: PathBuf) -> PyResult<Vec<String>> {
    py.detach(|| core::small_files(&folder))
        .map_err(|error| to_python(&error))
}
