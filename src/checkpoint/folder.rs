//! A checkpoint folder: `model.safetensors`, or shards and their index, cross-checked.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use super::header::{Header, ReadAt as _, TensorInfo};
use super::index::Index;
use super::input::InputFile;
use super::{CheckpointProblem, names};
use crate::{Error, Result};

/// Weights that other tools pickle: never read, but named when nothing else is there.
const PICKLE_ENDINGS: [&str; 4] = [".bin", ".pt", ".pth", ".ckpt"];

/// One file of weights, open, its header read.
#[derive(Debug)]
pub struct Shard {
    /// Its file name.
    pub name: String,
    /// The file.
    pub file: InputFile,
    /// Its header.
    pub header: Header,
}

impl Shard {
    fn open(folder: &Path, name: &str) -> Result<Self> {
        let file = InputFile::open(&folder.join(name))?;
        let header = Header::read(&file).map_err(|error| error.in_file(file.path()))?;
        Ok(Self {
            name: name.to_owned(),
            file,
            header,
        })
    }
}

/// A checkpoint folder whose files agree with each other.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    shards: Vec<Shard>,
    /// Shard and tensor, by name.
    places: HashMap<String, (usize, usize)>,
    indexed: bool,
}

impl Folder {
    /// Opens the weights of a folder and checks every header, and the index where there is one.
    /// No tensor data is read.
    ///
    /// # Errors
    /// Name the file and tensor: [`Error::Io`] for a missing folder or file,
    /// [`Error::Checkpoint`] for one that is damaged, incomplete or hostile.
    pub fn open(path: &Path) -> Result<Self> {
        if !fs::metadata(path)
            .map_err(|error| Error::from(error).in_file(path))?
            .is_dir()
        {
            return Err(Error::from(CheckpointProblem::NotAFolder).in_file(path));
        }
        let exists = |name| fs::symlink_metadata(path.join(name)).is_ok();
        match (exists(names::SINGLE), exists(names::INDEX)) {
            (true, true) => Err(Error::from(CheckpointProblem::Ambiguous).in_file(path)),
            (true, false) => Self::collect(path, vec![Shard::open(path, names::SINGLE)?], false),
            (false, true) => Self::open_index(path),
            (false, false) => Err(Error::from(absence(path)).in_file(path)),
        }
    }

    fn open_index(path: &Path) -> Result<Self> {
        let index_file = InputFile::open(&path.join(names::INDEX))?;
        let text = index_file.read_text()?;
        let index = Index::parse(&text).map_err(|error| error.in_file(index_file.path()))?;
        let shard_names: BTreeSet<&String> = index.weight_map.values().collect();
        check_complete(&shard_names).map_err(|error| error.in_file(index_file.path()))?;
        let shards = shard_names
            .into_iter()
            .map(|name| Shard::open(path, name))
            .collect::<Result<Vec<_>>>()?;
        let folder = Self::collect(path, shards, true)?;
        folder
            .check_index(&index.weight_map)
            .map_err(|error| error.in_file(index_file.path()))?;
        Ok(folder)
    }

    fn collect(path: &Path, shards: Vec<Shard>, indexed: bool) -> Result<Self> {
        let mut places = HashMap::new();
        for (shard_index, shard) in shards.iter().enumerate() {
            for (tensor_index, tensor) in shard.header.tensors.iter().enumerate() {
                let place = (shard_index, tensor_index);
                if places.insert(tensor.name.clone(), place).is_some() {
                    let name = tensor.name.clone();
                    let error = Error::from(CheckpointProblem::DuplicateTensor { name });
                    return Err(error.in_file(shard.file.path()));
                }
            }
        }
        Ok(Self {
            path: path.to_path_buf(),
            shards,
            places,
            indexed,
        })
    }

    /// Every tensor stands in exactly the shard that the index says.
    fn check_index(&self, weight_map: &BTreeMap<String, String>) -> Result<()> {
        for (shard, tensor) in self.tensors() {
            let indexed = weight_map.get(&tensor.name);
            if indexed != Some(&shard.name) {
                let problem = CheckpointProblem::NotIndexed {
                    shard: shard.name.clone(),
                    indexed: indexed.cloned(),
                };
                return Err(Error::from(problem).in_tensor(&tensor.name));
            }
        }
        for (name, shard) in weight_map {
            if !self.places.contains_key(name) {
                let problem = CheckpointProblem::NotInShard {
                    shard: shard.clone(),
                };
                return Err(Error::from(problem).in_tensor(name));
            }
        }
        Ok(())
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its files of weights, by name.
    #[must_use]
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Whether it has an index.
    #[must_use]
    pub fn is_indexed(&self) -> bool {
        self.indexed
    }

    /// All tensors, by shard and then in the order of their data.
    pub fn tensors(&self) -> impl Iterator<Item = (&Shard, &TensorInfo)> + Clone {
        self.shards.iter().flat_map(|shard| {
            shard
                .header
                .tensors
                .iter()
                .map(move |tensor| (shard, tensor))
        })
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// [`CheckpointProblem::NoSuchTensor`] where there is none.
    pub fn tensor(&self, name: &str) -> Result<(&Shard, &TensorInfo)> {
        self.places
            .get(name)
            .and_then(|&(shard, tensor)| {
                let shard = self.shards.get(shard)?;
                Some((shard, shard.header.tensors.get(tensor)?))
            })
            .ok_or_else(|| {
                Error::from(CheckpointProblem::NoSuchTensor)
                    .in_tensor(name)
                    .in_file(&self.path)
            })
    }

    /// Reads all bytes of a tensor.
    ///
    /// # Errors
    /// As [`Folder::tensor`]; [`CheckpointProblem::TensorBytes`] unless `buffer` has the
    /// tensor's size; [`Error::Io`].
    pub fn read(&self, name: &str, buffer: &mut [u8]) -> Result<()> {
        let (shard, tensor) = self.tensor(name)?;
        let mut read = || {
            if buffer.len() as u64 != tensor.bytes {
                return Err(Error::from(CheckpointProblem::TensorBytes {
                    expected: tensor.bytes,
                    got: buffer.len() as u64,
                }));
            }
            shard.file.read_exact_at(buffer, tensor.offset)
        };
        read().map_err(|error| error.in_tensor(name).in_file(shard.file.path()))
    }
}

/// Shards whose names count them are all named: an index that lost entries may have lost all of
/// a shard's.
fn check_complete(shard_names: &BTreeSet<&String>) -> Result<()> {
    let numbers: BTreeSet<(usize, usize)> = shard_names
        .iter()
        .filter_map(|name| names::parse_shard(name))
        .collect();
    for &(_, count) in &numbers {
        let missing = (1..=count).find(|&index| !numbers.contains(&(index, count)));
        if let Some(index) = missing {
            let shard = names::shard(index - 1, count);
            return Err(CheckpointProblem::ShardNotIndexed { shard }.into());
        }
    }
    Ok(())
}

/// Why a folder has no weights.
fn absence(path: &Path) -> CheckpointProblem {
    if fs::symlink_metadata(path.join(names::PARTIAL)).is_ok() {
        return CheckpointProblem::Unfinished;
    }
    let pickles = fs::read_dir(path).is_ok_and(|entries| {
        entries.flatten().any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            PICKLE_ENDINGS.iter().any(|ending| name.ends_with(ending))
        })
    });
    CheckpointProblem::NoWeights { pickles }
}
