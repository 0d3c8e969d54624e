//! Writes a checkpoint from tensors that a caller holds, one at a time, in the order of a plan.

use std::path::Path;

use super::checksum::Checksum;
use super::destination::{Destination, Marker, check_space};
use super::manifest::Manifest;
use super::output::{ShardOutput, commit, sync_folder, write_file};
use super::plan::{PlannedTensor, ShardPlan, plan};
use super::{FORMAT_VERSION, names};
use crate::error::{DestinationProblem, OptionProblem};
use crate::{Error, Result};

/// A checkpoint being written.
///
/// Nothing that loads is there before [`Writer::finish`]. Dropped before that, it leaves nothing.
pub struct Writer {
    destination: Destination,
    shards: Vec<ShardPlan>,
    groups: Vec<Vec<PlannedTensor>>,
    files: Vec<(String, Vec<u8>)>,
    manifest: Manifest,
    /// Shard, group and tensor that come next.
    next: (usize, usize, usize),
    output: Option<ShardOutput>,
    total_size: u64,
    finished: bool,
}

impl Writer {
    /// Plans a checkpoint of the given tensors, and takes the folder. Tensors of one group stay
    /// in one shard. `files` are small files, such as `config.json`, written before the index.
    ///
    /// The folder may hold other files, but no weights and none of `files`. What an interrupted
    /// writer left is replaced.
    ///
    /// # Errors
    /// Before anything is written: [`Error::Destination`], [`Error::NoSpace`],
    /// [`Error::Option`]; [`Error::Overflow`] for impossible shapes; [`Error::Io`].
    pub fn create(
        path: &Path,
        mut groups: Vec<Vec<PlannedTensor>>,
        max_shard_bytes: u64,
        files: Vec<(String, Vec<u8>)>,
    ) -> Result<Self> {
        groups.retain(|group| !group.is_empty());
        check_names(&groups, &files)?;
        let shards = plan(&groups, max_shard_bytes)?;
        check_free(path, &files)?;
        let files_bytes = shards.iter().map(ShardPlan::most_file_bytes);
        check_space(path, files_bytes.fold(0, u64::saturating_add))?;
        let marker = Marker {
            format_version: FORMAT_VERSION,
            plan: None,
            source: Vec::new(),
        };
        let description: String = shards.iter().map(ShardPlan::describe).collect();
        Ok(Self {
            destination: Destination::take(path, &marker)?,
            shards,
            groups,
            files,
            manifest: Manifest::new(Checksum::of_bytes(description.as_bytes())),
            next: (0, 0, 0),
            output: None,
            total_size: 0,
            finished: false,
        })
    }

    fn expected(&self) -> Option<&PlannedTensor> {
        let (_, group, tensor) = self.next;
        self.groups.get(group)?.get(tensor)
    }

    /// Writes the next tensor of the plan.
    ///
    /// # Errors
    /// [`Error::WriteOrder`] where another one is next; [`Error::Checkpoint`] where its size is
    /// not the planned one; [`Error::Io`].
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let expected = self.expected();
        if expected.is_none_or(|expected| expected.name != name) {
            return Err(Error::WriteOrder {
                expected: expected.map(|tensor| tensor.name.clone()),
                got: Some(name.to_owned()),
            });
        }
        let (shard, group, tensor) = self.next;
        if self.output.is_none()
            && let Some(plan) = self.shards.get(shard)
        {
            self.output = Some(ShardOutput::create(self.destination.path(), plan)?);
        }
        if let Some(output) = &mut self.output {
            output.write(output.place(name)?, bytes)?;
        }
        self.next = (shard, group, tensor + 1);
        self.advance()
    }

    /// Goes to the next tensor, past the ends of groups and shards.
    fn advance(&mut self) -> Result<()> {
        loop {
            let (shard, group, tensor) = self.next;
            let group_ends = self.groups.get(group).is_none_or(|g| tensor >= g.len());
            if !group_ends || group >= self.groups.len() {
                return Ok(());
            }
            self.next = (shard, group + 1, 0);
            if self
                .shards
                .get(shard)
                .is_some_and(|s| s.groups.end == group + 1)
            {
                self.end_shard()?;
                self.next = (shard + 1, group + 1, 0);
            }
        }
    }

    fn end_shard(&mut self) -> Result<()> {
        let Some(output) = self.output.take() else {
            return Ok(());
        };
        let plan = self.manifest.plan;
        let (record, data_bytes) =
            output.finish(|shard, checksums| shard.metadata(plan, None, checksums))?;
        self.manifest.shards.push(record);
        self.total_size += data_bytes;
        sync_folder(self.destination.path())
    }

    /// Writes the small files, the record, and last the index.
    ///
    /// # Errors
    /// [`Error::WriteOrder`] where tensors of the plan are missing; [`Error::Io`].
    pub fn finish(mut self) -> Result<()> {
        if let Some(expected) = self.expected() {
            return Err(Error::WriteOrder {
                expected: Some(expected.name.clone()),
                got: None,
            });
        }
        let path = self.destination.path().to_path_buf();
        let mut manifest = self.manifest.clone();
        let write = |manifest: &mut Manifest| {
            for (name, bytes) in &self.files {
                manifest.files.push(write_file(&path, name, bytes)?);
            }
            commit(&path, manifest, &self.shards, self.total_size)
        };
        if let Err(error) = write(&mut manifest) {
            for record in &manifest.files {
                // Best effort: these files load nothing by themselves.
                let _ = std::fs::remove_file(path.join(&record.file));
            }
            return Err(error);
        }
        self.finished = true;
        self.destination.finish()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.output = None;
        if !self.finished {
            self.destination.discard();
        }
    }
}

fn check_names(groups: &[Vec<PlannedTensor>], files: &[(String, Vec<u8>)]) -> Result<()> {
    let mut names = std::collections::HashSet::new();
    for tensor in groups.iter().flatten() {
        super::header::check_name(&tensor.name)?;
        if !names.insert(&tensor.name) {
            let name = tensor.name.clone();
            return Err(super::CheckpointProblem::DuplicateTensor { name }.into());
        }
    }
    for (name, _) in files {
        let reserved = [names::INDEX, names::MANIFEST, names::PARTIAL].contains(&name.as_str());
        if reserved || !names::is_file_name(name) || name.ends_with(".safetensors") {
            return Err(Error::Option {
                option: "files",
                value: name.clone(),
                problem: OptionProblem::FileName,
            });
        }
    }
    Ok(())
}

/// The folder holds no weights, and none of the files that will be written.
fn check_free(path: &Path, files: &[(String, Vec<u8>)]) -> Result<()> {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
            return Err(Error::from(DestinationProblem::NotAFolder).in_file(path));
        }
        Err(error) => return Err(Error::from(error).in_file(path)),
    };
    let mut entry_names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| Error::from(error).in_file(path))?;
        entry_names.push(entry.file_name().to_string_lossy().into_owned());
    }
    if entry_names.iter().any(|name| name == names::PARTIAL) {
        // An interrupted writer's; whose it is, and whether it lives, its lock says.
        return Ok(());
    }
    entry_names.sort_unstable();
    let taken = entry_names.into_iter().find(|name| {
        name.ends_with(".safetensors")
            || name.ends_with(".index.json")
            || name == names::MANIFEST
            || files.iter().any(|(file, _)| file == name)
    });
    match taken {
        None => Ok(()),
        Some(example) => Err(Error::from(DestinationProblem::NotEmpty { example }).in_file(path)),
    }
}
