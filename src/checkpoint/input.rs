//! Opening and reading files that may be hostile: regular files only, positional reads, no
//! memory maps (a mapped file that is overwritten or cut off meanwhile would kill the process).

use std::fs::{self, File, Metadata, OpenOptions};
use std::path::{Path, PathBuf};

use super::header::ReadAt;
use super::{CheckpointProblem, MAX_HEADER_BYTES};
use crate::{Error, Result};

/// A regular file, open for reading.
#[derive(Debug)]
pub struct InputFile {
    path: PathBuf,
    file: File,
    stamp: Stamp,
}

/// What tells whether a file was written to or replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stamp {
    /// Bytes.
    pub bytes: u64,
    /// Seconds and nanoseconds since 1970 of the last write, where the system tells.
    pub modified: Option<(u64, u32)>,
    /// The file's number on its disk, where the system has them: another file of the same name
    /// has another.
    pub inode: Option<u64>,
}

impl Stamp {
    fn new(metadata: &Metadata) -> Self {
        let modified = metadata.modified().ok().and_then(|time| {
            let since = time.duration_since(std::time::UNIX_EPOCH).ok()?;
            Some((since.as_secs(), since.subsec_nanos()))
        });
        Self {
            bytes: metadata.len(),
            modified,
            #[cfg(unix)]
            inode: Some(std::os::unix::fs::MetadataExt::ino(metadata)),
            #[cfg(not(unix))]
            inode: None,
        }
    }
}

impl InputFile {
    /// Opens a regular file, or a symbolic link as the Hugging Face cache makes them. Pipes and
    /// devices are never opened.
    ///
    /// # Errors
    /// Names the file: [`Error::Io`], [`CheckpointProblem::NotAFile`] or
    /// [`CheckpointProblem::Link`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_inner(path).map_err(|error| error.in_file(path))
    }

    fn open_inner(path: &Path) -> Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        if metadata.is_symlink() {
            check_link(&fs::read_link(path)?)?;
        } else if !metadata.is_file() {
            return Err(CheckpointProblem::NotAFile.into());
        }
        let file = open_without_waiting(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(CheckpointProblem::NotAFile.into());
        }
        Ok(Self {
            path: path.to_path_buf(),
            stamp: Stamp::new(&metadata),
            file,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its stamp when it was opened.
    #[must_use]
    pub fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// That it was not written to since it was opened.
    ///
    /// # Errors
    /// [`CheckpointProblem::SourceChanged`] where it was.
    pub fn check_unchanged(&self) -> Result<()> {
        let now = self
            .file
            .metadata()
            .map_err(Error::from)
            .map(|m| Stamp::new(&m));
        match now {
            Ok(now) if now == self.stamp => Ok(()),
            Ok(_) => Err(Error::from(CheckpointProblem::SourceChanged).in_file(&self.path)),
            Err(error) => Err(error.in_file(&self.path)),
        }
    }

    /// The whole file, where it is as short as an index or a config may be.
    ///
    /// # Errors
    /// [`CheckpointProblem::HeaderTooLong`] where it is longer than [`MAX_HEADER_BYTES`].
    pub fn read_text(&self) -> Result<String> {
        let read = || {
            let bytes = self.length();
            let length = usize::try_from(bytes)
                .ok()
                .filter(|_| bytes <= MAX_HEADER_BYTES)
                .ok_or(CheckpointProblem::HeaderTooLong {
                    claimed: bytes,
                    limit: MAX_HEADER_BYTES,
                })?;
            let mut buffer = vec![0; length];
            self.read_exact_at(&mut buffer, 0)?;
            String::from_utf8(buffer).map_err(|error| {
                Error::from(CheckpointProblem::Json {
                    what: "text",
                    reason: error.utf8_error().to_string(),
                })
            })
        };
        read().map_err(|error| error.in_file(&self.path))
    }
}

impl ReadAt for InputFile {
    fn length(&self) -> u64 {
        self.stamp.bytes
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        positional::read_exact_at(&self.file, buffer, offset).map_err(|error| {
            if error.kind() == std::io::ErrorKind::UnexpectedEof {
                CheckpointProblem::EndedEarly.into()
            } else {
                error.into()
            }
        })
    }
}

/// The snapshot folders of the Hugging Face cache link to `../../blobs/<hash>`.
fn check_link(target: &Path) -> Result<()> {
    let text = target.to_string_lossy();
    let good = text
        .strip_prefix("../../blobs/")
        .is_some_and(|hash| !hash.is_empty() && hash.bytes().all(|b| b.is_ascii_hexdigit()));
    if good {
        return Ok(());
    }
    Err(CheckpointProblem::Link {
        target: text.into_owned(),
    }
    .into())
}

/// Opens without waiting, should the file have become a pipe since it was looked at.
fn open_without_waiting(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt as _;
        options.custom_flags(libc::O_NONBLOCK);
    }
    options.open(path)
}

/// Reads and writes at positions, which std names differently by platform.
pub(crate) mod positional {
    use std::fs::File;
    use std::io;

    #[cfg(unix)]
    pub(crate) fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
    }

    #[cfg(unix)]
    pub(crate) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
    }

    #[cfg(windows)]
    pub(crate) fn read_exact_at(
        file: &File,
        mut buffer: &mut [u8],
        mut offset: u64,
    ) -> io::Result<()> {
        while !buffer.is_empty() {
            let count = std::os::windows::fs::FileExt::seek_read(file, buffer, offset)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buffer = buffer.split_at_mut(count).1;
            offset += count as u64;
        }
        Ok(())
    }

    #[cfg(windows)]
    pub(crate) fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            let count = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            bytes = bytes.split_at(count).1;
            offset += count as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_links_of_the_cache_are_followed() {
        assert!(check_link(Path::new("../../blobs/0a1b2c")).is_ok());
        for target in [
            "../../blobs/",
            "../../blobs/../x",
            "/etc/passwd",
            "../blobs/0a",
            "model.safetensors",
            "../../blobs/0a/1b",
        ] {
            assert!(check_link(Path::new(target)).is_err(), "{target}");
        }
    }
}
