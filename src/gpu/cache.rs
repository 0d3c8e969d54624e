//! Compiled kernels on disk.
//!
//! An entry is a file named by a hash of everything that its contents follow from. It opens with
//! that hash and a checksum of what comes after, so that a file that was cut, changed or put in
//! another's place is seen and compiled again. Entries appear by renaming a finished file:
//! processes may use one folder at the same time. Entries of other versions are left alone; the
//! folder may be deleted at any time.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::{Error, Result};

/// The variable that names the folder.
pub const FOLDER_VARIABLE: &str = "FOURBIT_CACHE_DIR";

/// How entries open; the last byte is the version of this layout.
const MAGIC: &[u8; 16] = b"fourbit cubin \0\x01";
const HEADER: usize = MAGIC.len() + 16 + 16;

/// What a compiled kernel follows from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key<'a> {
    /// The kernel file's name; the entry's name opens with it, for people.
    pub file: &'a str,
    /// The whole translation unit.
    pub source: &'a str,
    /// The architecture.
    pub target: &'a str,
    /// The compiler's options.
    pub options: &'a [&'a str],
    /// The compiler's version.
    pub compiler: (u32, u32),
}

impl Key<'_> {
    fn hash(&self) -> u128 {
        let mut hash = Xxh3::new();
        let (major, minor) = self.compiler;
        let compiler = format!("{major}.{minor}");
        let parts = [self.file, self.source, self.target, &compiler];
        for part in parts.into_iter().chain(self.options.iter().copied()) {
            // With its length, so that no two lists of parts run together into one.
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        hash.digest128()
    }
}

/// A folder of compiled kernels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The cache in this folder, which need not exist yet.
    #[must_use]
    pub const fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The folder that [`FOLDER_VARIABLE`] names, or `fourbit` in the platform's folder for such
    /// files. None where there is neither.
    #[must_use]
    pub fn default_folder() -> Option<PathBuf> {
        match std::env::var_os(FOLDER_VARIABLE).filter(|folder| !folder.is_empty()) {
            Some(folder) => Some(PathBuf::from(folder)),
            None => dirs::cache_dir().map(|folder| folder.join("fourbit")),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The file of an entry, there or not.
    #[must_use]
    pub fn path(&self, key: &Key<'_>) -> PathBuf {
        let name = format!("{}-{}-{:032x}.cubin", key.file, key.target, key.hash());
        self.folder.join(name)
    }

    /// A compiled kernel, where there is one that is whole.
    #[must_use]
    pub fn get(&self, key: &Key<'_>) -> Option<Vec<u8>> {
        let mut bytes = fs::read(self.path(key)).ok()?;
        let (header, cubin) = bytes.split_at_checked(HEADER)?;
        if header != header_of(key, cubin) {
            return None;
        }
        bytes.drain(..HEADER);
        Some(bytes)
    }

    /// Keeps a compiled kernel, in place of what there may be under its name.
    ///
    /// # Errors
    /// [`Error::Io`], within the file, where the folder cannot be made or written.
    pub fn put(&self, key: &Key<'_>, cubin: &[u8]) -> Result<()> {
        let path = self.path(key);
        self.write(&path, &header_of(key, cubin), cubin)
            .map_err(|error| Error::from(error).in_file(path))
    }

    fn write(&self, path: &Path, header: &[u8], cubin: &[u8]) -> std::io::Result<()> {
        make_private_folder(&self.folder)?;
        let mut file = NamedTempFile::new_in(&self.folder)?;
        file.write_all(header)?;
        file.write_all(cubin)?;
        file.persist(path)?;
        Ok(())
    }

    /// How many entries there are and their bytes; none where there is no folder.
    ///
    /// # Errors
    /// [`Error::Io`], within the folder, where it cannot be read.
    pub fn contents(&self) -> Result<(u64, u64)> {
        self.count()
            .map_err(|error| Error::from(error).in_file(&self.folder))
    }

    fn count(&self) -> std::io::Result<(u64, u64)> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok((0, 0)),
            entries => entries?,
        };
        let (mut count, mut bytes) = (0, 0);
        for entry in entries {
            let entry = entry?;
            if entry.path().extension().is_some_and(|e| e == "cubin") {
                count += 1;
                bytes += entry.metadata()?.len();
            }
        }
        Ok((count, bytes))
    }
}

fn header_of(key: &Key<'_>, cubin: &[u8]) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend(key.hash().to_le_bytes());
    header.extend(xxh3_128(cubin).to_le_bytes());
    header
}

/// What is read from it runs on the card: nobody else may write there.
fn make_private_folder(folder: &Path) -> std::io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key<'_> = Key {
        file: "quantize",
        source: "kernel",
        target: "sm_80",
        options: &["--a", "--b"],
        compiler: (13, 2),
    };

    #[test]
    fn entries_are_kept_and_damaged_ones_are_not_taken() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = Cache::new(folder.path().join("new").join("deep"));
        assert_eq!(cache.get(&KEY), None);
        assert_eq!(cache.contents().expect("readable"), (0, 0));
        cache.put(&KEY, b"machine code").expect("written");
        assert_eq!(cache.get(&KEY).as_deref(), Some(&b"machine code"[..]));
        assert_eq!(cache.contents().expect("readable"), (1, HEADER as u64 + 12));

        let path = cache.path(&KEY);
        let whole = fs::read(&path).expect("an entry");
        for index in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[index] ^= 1;
            fs::write(&path, &damaged).expect("written");
            assert_eq!(cache.get(&KEY), None, "byte {index} changed");
            fs::write(&path, &whole[..index]).expect("written");
            assert_eq!(cache.get(&KEY), None, "cut at {index}");
        }
        cache.put(&KEY, b"again").expect("written over");
        assert_eq!(cache.get(&KEY).as_deref(), Some(&b"again"[..]));
    }

    #[test]
    fn everything_that_matters_is_in_the_key() {
        let others = [
            Key {
                file: "other",
                ..KEY
            },
            Key {
                source: "kernel2",
                ..KEY
            },
            Key {
                target: "sm_90",
                ..KEY
            },
            Key {
                options: &["--a"],
                ..KEY
            },
            Key {
                options: &["--a--b"],
                ..KEY
            },
            Key {
                compiler: (13, 3),
                ..KEY
            },
        ];
        for (index, other) in others.iter().enumerate() {
            assert_ne!(other.hash(), KEY.hash(), "key {index}");
        }
    }

    #[test]
    fn an_entry_under_anothers_name_is_not_taken() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = Cache::new(folder.path().to_path_buf());
        let other = Key {
            source: "another",
            ..KEY
        };
        cache.put(&other, b"machine code").expect("written");
        fs::rename(cache.path(&other), cache.path(&KEY)).expect("renamed");
        assert_eq!(cache.get(&KEY), None);
    }
}
