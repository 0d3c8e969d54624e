//! Checks a whole folder, byte for byte where it has our checksums.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use super::checksum::Checksum;
use super::folder::{Folder, Shard};
use super::header::{ReadAt as _, TensorInfo};
use super::input::InputFile;
use super::manifest::{FileRecord, Manifest};
use super::quantized::{QuantizedWeight, quantized};
use super::{CheckpointProblem, names};
use crate::{Error, Result};

/// Bytes that are read at a time.
const PIECE_BYTES: usize = 1 << 20;

/// Is told the bytes that are done and all of them.
pub type Progress<'a> = dyn Fn(u64, u64) -> ControlFlow<()> + Sync + 'a;

/// How far the work is, and who wants to know.
struct Watch<'a> {
    done: AtomicU64,
    total: u64,
    progress: &'a Progress<'a>,
}

impl Watch<'_> {
    fn add(&self, bytes: u64) -> Result<()> {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        match (self.progress)(done, self.total) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Interrupted),
        }
    }
}

/// What a folder's record says there is to be read.
fn recorded_bytes(manifest: &Manifest) -> u64 {
    let shards = manifest.shards.iter().map(|record| record.bytes);
    let files = manifest.files.iter().map(|record| record.bytes);
    shards.chain(files).fold(0, u64::saturating_add)
}

/// What [`verify`] found, all of it good.
#[derive(Debug, Clone)]
pub struct Report {
    /// Files of weights.
    pub shards: usize,
    /// Tensors.
    pub tensors: usize,
    /// Quantized weights.
    pub quantized: usize,
    /// Bytes of the weights' files.
    pub bytes: u64,
    /// Other files that were compared with the record.
    pub files: usize,
    /// Whether every byte was compared with a checksum. False for checkpoints of other writers,
    /// which have none: only their structure was checked.
    pub checksums: bool,
}

/// Checks a folder: headers, index, quantized weights; and where it is ours, every byte of it
/// against the checksums of its writer. Runs on the current rayon pool.
///
/// # Errors
/// Name the file and tensor: [`Error::Checkpoint`] says what is wrong, [`Error::Io`] that
/// something cannot be read.
pub fn verify(path: &Path) -> Result<Report> {
    verify_watched(path, &|_, _| ControlFlow::Continue(()))
}

/// [`verify`] with someone watching: `progress` is called with the bytes that are compared and
/// all of them, by any of the threads and after every piece; it stops the work by returning
/// `Break`.
///
/// # Errors
/// As [`verify`], and [`Error::Interrupted`].
pub fn verify_watched(path: &Path, progress: &Progress<'_>) -> Result<Report> {
    let manifest = Manifest::of_folder(path)?;
    let watch = Watch {
        done: AtomicU64::new(0),
        total: manifest.as_ref().map_or(0, recorded_bytes),
        progress,
    };
    if let Some(manifest) = &manifest {
        // The index first: damage to it would else be reported as that of a tensor.
        check_files(path, manifest, &watch)?;
    }
    let folder = Folder::open(path)?;
    match &manifest {
        Some(manifest) => check_ours(&folder, manifest, &watch)?,
        None => refuse_unrecorded(&folder)?,
    }
    let weights = quantized(&folder)?;
    Ok(Report {
        shards: folder.shards().len(),
        tensors: folder.tensors().count(),
        quantized: weights.len(),
        bytes: folder.shards().iter().map(|s| s.file.stamp().bytes).sum(),
        files: manifest.as_ref().map_or(0, |manifest| manifest.files.len()),
        checksums: manifest.is_some(),
    })
}

/// A folder opened for loading: its structure checked, and its record where it has one. Tensor
/// data is checked as it is read, with [`check_tensor`].
///
/// # Errors
/// As [`verify`].
pub fn open(path: &Path) -> Result<(Folder, Option<Manifest>, Vec<QuantizedWeight>)> {
    let manifest = Manifest::of_folder(path)?;
    let folder = Folder::open(path)?;
    match &manifest {
        Some(manifest) => manifest.check_shards(&folder)?,
        None => refuse_unrecorded(&folder)?,
    }
    let weights = quantized(&folder)?;
    Ok((folder, manifest, weights))
}

/// The checksum that a tensor was written with, if its writer gave it one.
///
/// # Errors
/// [`CheckpointProblem::NoChecksum`] where it is malformed.
pub fn recorded(shard: &Shard, tensor: &TensorInfo) -> Result<Option<Checksum>> {
    let key = format!("{}{}", names::META_CHECKSUM, tensor.name);
    let digits = shard.header.metadata.get(&key);
    digits
        .map(|digits| Checksum::parse(digits))
        .transpose()
        .map_err(|error| error.in_tensor(&tensor.name).in_file(shard.file.path()))
}

/// Compares the bytes of a tensor with its recorded checksum, if it has one.
///
/// # Errors
/// [`CheckpointProblem::Checksum`], naming file and tensor.
pub fn check_tensor(shard: &Shard, tensor: &TensorInfo, bytes: &[u8]) -> Result<()> {
    match recorded(shard, tensor)? {
        None => Ok(()),
        Some(expected) => expected
            .check(Checksum::of_bytes(bytes))
            .map_err(|error| error.in_tensor(&tensor.name).in_file(shard.file.path())),
    }
}

fn check_files(path: &Path, manifest: &Manifest, watch: &Watch<'_>) -> Result<()> {
    manifest.files.par_iter().try_for_each(|record| {
        let file = path.join(&record.file);
        check_file(&file, record, watch).map_err(|error| match error {
            located @ Error::File { .. } => located,
            other => other.in_file(&file),
        })
    })?;
    if !manifest
        .files
        .iter()
        .any(|record| record.file == names::INDEX)
    {
        let what = "the index is not recorded".to_owned();
        return Err(Error::from(CheckpointProblem::Manifest { what }).in_file(path));
    }
    Ok(())
}

fn check_file(path: &Path, record: &FileRecord, watch: &Watch<'_>) -> Result<()> {
    if !names::is_file_name(&record.file) {
        let what = format!("{:?} is not a plain file name", record.file);
        return Err(CheckpointProblem::Manifest { what }.into());
    }
    let file = InputFile::open(path)?;
    let got = file.stamp().bytes;
    if got != record.bytes {
        let expected = record.bytes;
        return Err(CheckpointProblem::FileBytes { expected, got }.into());
    }
    record.checksum.check(checksum(&file, 0, got, watch)?)
}

/// Every shard is as recorded, every byte of data under a checksum, and no shard of another
/// checkpoint lies about.
fn check_ours(folder: &Folder, manifest: &Manifest, watch: &Watch<'_>) -> Result<()> {
    manifest.check_shards(folder)?;
    for shard in folder.shards() {
        watch.add(shard.header.data_start)?;
    }
    let entries =
        fs::read_dir(folder.path()).map_err(|error| Error::from(error).in_file(folder.path()))?;
    for entry in entries {
        let entry = entry.map_err(|error| Error::from(error).in_file(folder.path()))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if names::parse_shard(&name).is_some()
            && !folder.shards().iter().any(|shard| shard.name == name)
        {
            return Err(Error::from(CheckpointProblem::StrayShard).in_file(entry.path()));
        }
    }
    let tensors: Vec<(&Shard, &TensorInfo)> = folder.tensors().collect();
    tensors.par_iter().try_for_each(|(shard, tensor)| {
        let locate = |error: Error| error.in_tensor(&tensor.name).in_file(shard.file.path());
        let expected =
            recorded(shard, tensor)?.ok_or_else(|| locate(CheckpointProblem::NoChecksum.into()))?;
        let computed = checksum(&shard.file, tensor.offset, tensor.bytes, watch).map_err(locate)?;
        expected.check(computed).map_err(locate)
    })
}

fn checksum(file: &InputFile, start: u64, bytes: u64, watch: &Watch<'_>) -> Result<Checksum> {
    let mut hasher = Xxh3::new();
    let mut buffer = vec![0; PIECE_BYTES.min(usize::try_from(bytes).unwrap_or(PIECE_BYTES))];
    let mut position = 0;
    while position < bytes {
        let left = usize::try_from(bytes - position).unwrap_or(usize::MAX);
        let count = left.min(buffer.len());
        let piece = buffer.get_mut(..count).unwrap_or_default();
        file.read_exact_at(piece, start + position)?;
        hasher.update(piece);
        position += count as u64;
        watch.add(count as u64)?;
    }
    Ok(Checksum::of(&hasher))
}

/// A checkpoint of ours has a record; without it, its shards betray that it was lost.
fn refuse_unrecorded(folder: &Folder) -> Result<()> {
    let ours = folder
        .shards()
        .iter()
        .any(|shard| shard.header.metadata.contains_key(names::META_VERSION));
    if !ours {
        return Ok(());
    }
    let what = "it is missing".to_owned();
    Err(Error::from(CheckpointProblem::Manifest { what }).in_file(folder.path()))
}
