//! The folder that is written: who may write to it, and what an interrupted run left there.
//!
//! While a folder is being written it holds [`names::PARTIAL`], on which the writer has a lock
//! that the operating system lifts should the writer die. The index is renamed into place last;
//! then the marker goes. So an unfinished folder has the marker and, but for the last instant,
//! no index, and no loader takes it for a model.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::checksum::Checksum;
use super::input::Stamp;
use super::output::sync_folder;
use super::{CheckpointProblem, names};
use crate::error::DestinationProblem;
use crate::{Error, Result};

/// What the marker says about the run that writes the folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Marker {
    pub(crate) format_version: u32,
    /// Checksum of everything that decides the bytes; None where a run cannot be continued.
    pub(crate) plan: Option<Checksum>,
    /// Lengths and times of the source's files, so that a changed source is noticed.
    pub(crate) source: Vec<Stamp>,
}

/// What stands at a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nothing, or an empty folder.
    Free,
    /// The marker of a run that is under way or was interrupted.
    Partial,
    /// Index and record of a finished run.
    Complete,
    /// Something else; the name of one of its files.
    Other(String),
}

/// Looks at a destination without writing.
pub(crate) fn look(path: &Path) -> Result<Found> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Free),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
            return Err(Error::from(DestinationProblem::NotAFolder).in_file(path));
        }
        Err(error) => return Err(Error::from(error).in_file(path)),
    };
    let mut example: Option<String> = None;
    let (mut partial, mut index, mut manifest) = (false, false, false);
    for entry in entries {
        let entry = entry.map_err(|error| Error::from(error).in_file(path))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        partial |= name == names::PARTIAL;
        index |= name == names::INDEX;
        manifest |= name == names::MANIFEST;
        if example.as_ref().is_none_or(|other| name < *other) {
            example = Some(name);
        }
    }
    Ok(match example {
        None => Found::Free,
        Some(_) if partial => Found::Partial,
        Some(_) if index && manifest => Found::Complete,
        Some(example) => Found::Other(example),
    })
}

/// A folder that this process alone writes to.
#[derive(Debug)]
pub(crate) struct Destination {
    path: PathBuf,
    marker: File,
    /// The folder was made by this run.
    made: bool,
    /// Files of an interrupted run of the same plan may be kept.
    resumed: bool,
}

impl Destination {
    /// Makes the folder if need be, takes its lock and writes the marker.
    ///
    /// # Errors
    /// Name the folder: [`DestinationProblem::Locked`],
    /// [`DestinationProblem::OtherUnfinished`]; [`Error::Io`] where it cannot be written.
    pub(crate) fn take(path: &Path, marker: &Marker) -> Result<Self> {
        let take = || {
            let made = !path.exists();
            make_folder(path)?;
            let file = lock(&path.join(names::PARTIAL))?;
            let mut destination = Self {
                path: path.to_path_buf(),
                marker: file,
                made,
                resumed: false,
            };
            destination.continue_or_start(marker)?;
            Ok(destination)
        };
        take().map_err(|error: Error| error.in_file(path))
    }

    fn continue_or_start(&mut self, marker: &Marker) -> Result<()> {
        let mut text = String::new();
        // What is no text is not of our writing, and is treated as an interrupted first write.
        let readable = self.marker.read_to_string(&mut text).is_ok();
        let earlier = serde_json::from_str::<Marker>(&text)
            .ok()
            .filter(|_| readable);
        let finished = fs::symlink_metadata(self.path.join(names::INDEX)).is_ok();
        match earlier {
            Some(earlier) if earlier == *marker && marker.plan.is_some() => {
                self.resumed = true;
                return Ok(());
            }
            Some(earlier) if earlier.plan != marker.plan => {
                return Err(DestinationProblem::OtherUnfinished.into());
            }
            // Interrupted in the last instant, when all else was done: nothing to be deleted.
            Some(_) if finished => {
                fs::remove_file(self.path.join(names::PARTIAL))?;
                return Err(DestinationProblem::OtherConversion.into());
            }
            // The same conversion, but the source was written to since; or one that cannot be
            // continued: what it left is of no use.
            Some(_) => self.clear()?,
            // Interrupted before the marker was complete, so before anything else was written;
            // or the marker is new.
            None => {
                let mut others = self.entries()?.into_iter();
                let other = others.find(|name| name != names::PARTIAL && is_ours(name));
                if let Some(example) = other {
                    if text.is_empty() {
                        // Another run has just finished here.
                        fs::remove_file(self.path.join(names::PARTIAL))?;
                    }
                    return Err(DestinationProblem::NotEmpty { example }.into());
                }
            }
        }
        self.marker.set_len(0)?;
        self.marker.rewind()?;
        let text = serde_json::to_string(marker).map_err(std::io::Error::from)?;
        self.marker.write_all(text.as_bytes())?;
        self.marker.sync_all()?;
        sync_folder(&self.path)
    }

    /// Deletes the weights, index and record that are there; the index first, so that nothing
    /// incomplete ever loads.
    fn clear(&self) -> Result<()> {
        let mut ours: Vec<String> = self.entries()?;
        ours.retain(|name| name != names::PARTIAL && is_ours(name));
        ours.sort_by_key(|name| name != names::INDEX);
        for name in ours {
            fs::remove_file(self.path.join(&name))?;
            sync_folder(&self.path)?;
        }
        Ok(())
    }

    fn entries(&self) -> Result<Vec<String>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            entries.push(entry?.file_name().to_string_lossy().into_owned());
        }
        Ok(entries)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether an interrupted run of the same plan is continued.
    pub(crate) fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// Removes the marker: all is written.
    pub(crate) fn finish(&self) -> Result<()> {
        let path = self.path.join(names::PARTIAL);
        let finish = || {
            fs::remove_file(&path)?;
            sync_folder(&self.path)
        };
        finish().map_err(|error: Error| error.in_file(&path))
    }

    /// After a writer that cannot be continued: removes all that it wrote.
    pub(crate) fn discard(&self) {
        // Best effort: what stays is not loadable, and the next run clears it.
        if self.clear().is_ok() {
            self.abandon();
        }
    }

    /// After a failure: where nothing is worth keeping, leaves no trace.
    pub(crate) fn abandon(&self) {
        let keep = self.entries().map_or(true, |entries| {
            entries
                .iter()
                .any(|name| name != names::PARTIAL && is_ours(name))
        });
        if !keep {
            // Best effort: what stays is a marker, which the next run takes over.
            let _ = fs::remove_file(self.path.join(names::PARTIAL));
            if self.made {
                let _ = fs::remove_dir(&self.path);
            }
        }
    }
}

/// Whether a name is one that only this crate writes.
fn is_ours(name: &str) -> bool {
    names::parse_shard(name).is_some()
        || names::is_temporary(name)
        || [names::INDEX, names::MANIFEST, names::PARTIAL].contains(&name)
}

/// Makes a folder and those it lies in, and their names durable.
fn make_folder(path: &Path) -> Result<()> {
    let missing: Vec<PathBuf> = std::path::absolute(path)?
        .ancestors()
        .take_while(|ancestor| !ancestor.exists())
        .map(Path::to_path_buf)
        .collect();
    fs::create_dir_all(path)?;
    missing
        .iter()
        .filter_map(|made| made.parent())
        .try_for_each(sync_folder)
}

/// Opens the marker and locks it. Should its former owner have removed it in between, tries
/// again with a new one.
fn lock(path: &Path) -> Result<File> {
    loop {
        if fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
            return Err(CheckpointProblem::NotAFile.into());
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DestinationProblem::Locked.into()),
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        let locked = same_file::Handle::from_file(file.try_clone()?)?;
        match same_file::Handle::from_path(path) {
            Ok(there) if there == locked => return Ok(file),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// That so many bytes fit on the disk of a folder that may not exist yet.
///
/// # Errors
/// [`Error::NoSpace`], naming the folder.
pub(crate) fn check_space(path: &Path, needed: u64) -> Result<()> {
    let existing = std::path::absolute(path)
        .map_err(|error| Error::from(error).in_file(path))?
        .ancestors()
        .find(|ancestor| ancestor.exists())
        .map(Path::to_path_buf);
    let Some(existing) = existing else {
        return Ok(());
    };
    let available =
        fs4::available_space(&existing).map_err(|error| Error::from(error).in_file(&existing))?;
    if available < needed {
        return Err(Error::NoSpace { needed, available }.in_file(path));
    }
    Ok(())
}
