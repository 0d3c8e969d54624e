//! Files that appear complete or not at all: written under another name in the same folder,
//! synced, renamed.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use super::checksum::Checksum;
use super::header::LENGTH_BYTES;
use super::index::Index;
use super::input::positional::write_all_at;
use super::manifest::{FileRecord, Manifest, ShardRecord};
use super::plan::{Extent, ShardPlan};
use super::{CheckpointProblem, names};
use crate::{Error, Result};

/// A file under its temporary name; dropped before [`Temporary::commit`], it is deleted.
#[derive(Debug)]
struct Temporary {
    file: File,
    path: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl Temporary {
    /// Makes a file that is not there yet. One that an interrupted run left is deleted first;
    /// the caller holds the folder's lock, so nobody else writes to it.
    fn create(folder: &Path, name: &str) -> Result<Self> {
        let path = folder.join(names::temporary(name));
        let create = || {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            OpenOptions::new().write(true).create_new(true).open(&path)
        };
        Ok(Self {
            file: create().map_err(|error| Error::from(error).in_file(&path))?,
            target: folder.join(name),
            path,
            committed: false,
        })
    }

    /// Makes the file durable under its own name. The folder is for the caller to sync.
    fn commit(mut self) -> Result<()> {
        let commit = || {
            self.file.sync_all()?;
            fs::rename(&self.path, &self.target)
        };
        commit().map_err(|error| Error::from(error).in_file(&self.target))?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.committed {
            // Best effort: the next run deletes what is left.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Writes a whole small file.
pub(crate) fn write_file(folder: &Path, name: &str, bytes: &[u8]) -> Result<FileRecord> {
    let mut temporary = Temporary::create(folder, name)?;
    temporary
        .file
        .write_all(bytes)
        .map_err(|error| Error::from(error).in_file(&temporary.target))?;
    temporary.commit()?;
    Ok(FileRecord::of(name, bytes))
}

/// Makes the names in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    // Other systems cannot open folders, and need not.
    if cfg!(unix) {
        let sync = || File::open(folder)?.sync_all();
        sync().map_err(|error| Error::from(error).in_file(folder))?;
    }
    Ok(())
}

/// Writes record and index of a folder whose shards and other files are there: the index, whose
/// presence says that all is there, last.
pub(crate) fn commit(
    path: &Path,
    manifest: &mut Manifest,
    shards: &[ShardPlan],
    total_size: u64,
) -> Result<()> {
    let weight_map = (shards.iter())
        .flat_map(|plan| {
            let tensors = plan.tensors.iter();
            tensors.map(|(tensor, _)| (tensor.name.clone(), plan.name.clone()))
        })
        .collect();
    let index = Index { weight_map }.to_json(total_size);
    manifest
        .files
        .push(FileRecord::of(names::INDEX, index.as_bytes()));
    write_file(path, names::MANIFEST, manifest.to_text()?.as_bytes())?;
    sync_folder(path)?;
    write_file(path, names::INDEX, index.as_bytes())?;
    sync_folder(path)
}

/// A shard that is being written. Tensors may be written in any order and in turns, each from
/// its start to its end.
pub(crate) struct ShardOutput {
    temporary: Temporary,
    plan: ShardPlan,
    tensors: Vec<TensorOutput>,
    places: HashMap<String, usize>,
    data_start: u64,
}

/// How far a tensor is written.
struct TensorOutput {
    start: u64,
    written: u64,
    progress: Progress,
}

enum Progress {
    Hashing(Box<Xxh3>),
    /// Texts wait until the lengths of all of them are known.
    Text(Vec<u8>),
    Complete(Checksum),
}

impl ShardOutput {
    pub(crate) fn create(folder: &Path, plan: &ShardPlan) -> Result<Self> {
        let data_start = LENGTH_BYTES + plan.header_bytes();
        let mut start = data_start;
        let mut tensors = Vec::with_capacity(plan.tensors.len());
        for (tensor, bytes) in &plan.tensors {
            tensors.push(TensorOutput {
                start,
                written: 0,
                progress: match tensor.extent {
                    Extent::TextUpTo(_) => Progress::Text(Vec::new()),
                    Extent::Shape(_) if *bytes == 0 => Progress::Complete(Checksum::of_bytes(&[])),
                    Extent::Shape(_) => Progress::Hashing(Box::new(Xxh3::new())),
                },
            });
            let end = start.checked_add(*bytes);
            start = end.ok_or_else(|| {
                Error::Overflow {
                    shape: vec![*bytes],
                }
                .in_tensor(&tensor.name)
            })?;
        }
        Ok(Self {
            temporary: Temporary::create(folder, &plan.name)?,
            places: (plan.tensors.iter().enumerate())
                .map(|(place, (tensor, _))| (tensor.name.clone(), place))
                .collect(),
            plan: plan.clone(),
            tensors,
            data_start,
        })
    }

    /// The index of the tensor of that name in the plan.
    pub(crate) fn place(&self, name: &str) -> Result<usize> {
        let place = self.places.get(name).copied();
        place.ok_or_else(|| Error::from(CheckpointProblem::NoSuchTensor).in_tensor(name))
    }

    /// Writes the next bytes of the tensor at `index` of the plan.
    pub(crate) fn write(&mut self, index: usize, bytes: &[u8]) -> Result<()> {
        let planned = self.plan.tensors.get(index);
        let Some((tensor, (planned, most))) = self.tensors.get_mut(index).zip(planned) else {
            return Err(CheckpointProblem::NoSuchTensor.into());
        };
        let length = bytes.len() as u64;
        if most - tensor.written < length {
            let problem = CheckpointProblem::TensorBytes {
                expected: *most,
                got: tensor.written.saturating_add(length),
            };
            return Err(Error::from(problem).in_tensor(&planned.name));
        }
        match &mut tensor.progress {
            Progress::Text(text) => text.extend_from_slice(bytes),
            Progress::Hashing(hasher) => {
                let position = tensor.start + tensor.written;
                write_all_at(&self.temporary.file, bytes, position)
                    .map_err(|error| Error::from(error).in_file(&self.temporary.target))?;
                hasher.update(bytes);
                if tensor.written + length == *most {
                    tensor.progress = Progress::Complete(Checksum::of(hasher));
                }
            }
            Progress::Complete(_) => {}
        }
        tensor.written += length;
        Ok(())
    }

    /// Writes the texts and the header, and gives the file its name. The folder is for the caller
    /// to sync.
    ///
    /// `metadata` makes what stands in the header's `__metadata__` from the checksums.
    pub(crate) fn finish(
        mut self,
        metadata: impl FnOnce(&ShardPlan, &[Checksum]) -> BTreeMap<String, String>,
    ) -> Result<(ShardRecord, u64)> {
        let target = self.temporary.target.clone();
        let data_start = self.data_start;
        self.finish_data()
            .and_then(|(checksums, lengths)| {
                let metadata = metadata(&self.plan, &checksums);
                let header = self.plan.header(&lengths, &metadata)?;
                let data_bytes: u64 = lengths.iter().sum();
                write_all_at(&self.temporary.file, &header, 0)?;
                self.temporary.file.set_len(data_start + data_bytes)?;
                let record = ShardRecord {
                    file: self.plan.name.clone(),
                    bytes: data_start + data_bytes,
                    header: Checksum::of_bytes(&header),
                };
                self.temporary.commit()?;
                Ok((record, data_bytes))
            })
            .map_err(|error| error.in_file(target))
    }

    /// Writes the texts. Returns the checksums and lengths of all tensors.
    fn finish_data(&mut self) -> Result<(Vec<Checksum>, Vec<u64>)> {
        let mut checksums = Vec::with_capacity(self.tensors.len());
        let mut lengths = Vec::with_capacity(self.tensors.len());
        let mut end = self.data_start;
        for (tensor, (planned, most)) in self.tensors.iter().zip(&self.plan.tensors) {
            checksums.push(match &tensor.progress {
                Progress::Complete(checksum) => *checksum,
                Progress::Text(text) => {
                    write_all_at(&self.temporary.file, text, end)?;
                    Checksum::of_bytes(text)
                }
                Progress::Hashing(_) => {
                    let problem = CheckpointProblem::TensorBytes {
                        expected: *most,
                        got: tensor.written,
                    };
                    return Err(Error::from(problem).in_tensor(&planned.name));
                }
            });
            lengths.push(tensor.written);
            end += tensor.written;
        }
        Ok((checksums, lengths))
    }
}
