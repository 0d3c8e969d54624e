//! The small files beside the weights: tokenizer, generation config, chat template, licence.

use std::fs;
use std::path::{Path, PathBuf};

use crate::checkpoint::header::ReadAt as _;
use crate::checkpoint::input::InputFile;
use crate::checkpoint::{Checksum, names};
use crate::{Error, Result};

/// Endings of the files that are copied.
const ENDINGS: [&str; 7] = [
    ".json",
    ".jinja",
    ".model",
    ".txt",
    ".tiktoken",
    ".vocab",
    ".py",
];
/// Beginnings of file names that are copied whatever their ending.
const LICENCES: [&str; 3] = ["LICENSE", "LICENCE", "NOTICE"];
/// The largest file that is copied; tokenizers take up to some 30 MB.
const MAX_BYTES: u64 = 100_000_000;

/// A file to be copied unchanged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SmallFile {
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) checksum: Checksum,
}

/// A file or folder of the source that has no copy in the result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkippedFile {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: &'static str,
}

/// Finds what to copy from a source folder, by name. `weights` are the files that are converted.
///
/// # Errors
/// [`Error::Io`], naming the file.
pub(super) fn find(
    source: &Path,
    weights: &[String],
) -> Result<(Vec<SmallFile>, Vec<SkippedFile>)> {
    let mut entries: Vec<String> = Vec::new();
    for entry in fs::read_dir(source).map_err(|error| Error::from(error).in_file(source))? {
        let entry = entry.map_err(|error| Error::from(error).in_file(source))?;
        entries.push(entry.file_name().to_string_lossy().into_owned());
    }
    entries.sort_unstable();
    let (mut files, mut skipped) = (Vec::new(), Vec::new());
    for name in entries {
        if weights.contains(&name) || name == names::CONFIG || name == names::INDEX {
            continue;
        }
        match why_skipped(source, &name) {
            Some(reason) => skipped.push(SkippedFile { name, reason }),
            None => {
                let path = source.join(&name);
                let text = read(&path)?;
                files.push(SmallFile {
                    name,
                    bytes: text.len() as u64,
                    checksum: Checksum::of_bytes(&text),
                });
            }
        }
    }
    Ok((files, skipped))
}

/// The names of the small files of a folder that a copy of the model needs: tokenizer, generation
/// config, chat template, licence. Not `config.json`, and no weights.
///
/// # Errors
/// [`Error::Io`], naming the file.
pub fn small_files(folder: &Path) -> Result<Vec<String>> {
    let (files, _) = find(folder, &[])?;
    Ok(files.into_iter().map(|file| file.name).collect())
}

fn why_skipped(source: &Path, name: &str) -> Option<&'static str> {
    if !names::is_file_name(name) {
        return Some("hidden, or no plain file name");
    }
    if fs::metadata(source.join(name)).is_ok_and(|metadata| metadata.is_dir()) {
        return Some("a folder");
    }
    if name.ends_with(".index.json") || name == names::MANIFEST || name == names::PARTIAL {
        return Some("the record of other weights");
    }
    let wanted = ENDINGS.iter().any(|ending| name.ends_with(ending))
        || LICENCES.iter().any(|licence| name.starts_with(licence));
    if !wanted {
        return Some("not a file that loading the model needs");
    }
    match InputFile::open(&source.join(name)) {
        Err(_) => Some("not a regular file that can be read"),
        Ok(file) if file.length() > MAX_BYTES => Some("too large"),
        Ok(_) => None,
    }
}

/// The bytes of a file that [`find`] found.
pub(super) fn read(path: &PathBuf) -> Result<Vec<u8>> {
    let file = InputFile::open(path)?;
    let mut bytes = vec![0; usize::try_from(file.length().min(MAX_BYTES)).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0)
        .map_err(|error| error.in_file(path))?;
    Ok(bytes)
}
