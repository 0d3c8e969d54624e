//! `fourbit.json`: what a checkpoint of ours records about itself.
//!
//! Its last field is the checksum of all bytes before that checksum, so damage to the record
//! itself is found too.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::checksum::Checksum;
use super::input::InputFile;
use super::{CheckpointProblem, Folder, names};
use crate::{Error, Result};

/// What `format` says.
const FORMAT: &str = "fourbit";
/// Between the record and its checksum, and after the checksum.
const BEFORE_CHECKSUM: &str = ",\n  \"checksum\": \"";
const AFTER_CHECKSUM: &str = "\"\n}\n";

/// The record of a checkpoint.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    /// [`names::FORMAT_VERSION`] of its writer.
    pub format_version: u32,
    /// Version of the writer.
    pub fourbit_version: String,
    /// Checksum of everything that decides the bytes of the shards.
    pub plan: Checksum,
    /// The checkpoint it was converted from, without paths; None for a saved model.
    pub source: Option<SourceRecord>,
    /// How it was converted.
    pub options: Option<OptionsRecord>,
    /// What became of every tensor of the source.
    pub tensors: Vec<TensorRecord>,
    /// The files of weights.
    pub shards: Vec<ShardRecord>,
    /// All other files.
    pub files: Vec<FileRecord>,
    #[serde(default)]
    checksum: Option<Checksum>,
}

/// The identity of a source checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceRecord {
    /// Checksum of the list of shards.
    pub identity: Checksum,
    /// Its files of weights, by name.
    pub shards: Vec<SourceShard>,
}

/// Size and header of a source file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceShard {
    /// Its bytes.
    pub bytes: u64,
    /// Checksum of its header.
    pub header: Checksum,
}

/// The options of a conversion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptionsRecord {
    /// Name of the codebook.
    pub codebook: String,
    /// Its entries: code and value.
    pub entries: Vec<(u64, f32)>,
    /// `lower` or `upper`.
    pub ties: String,
    /// Elements that share a scale.
    pub block_size: u64,
    /// Whether the scales are quantized too.
    pub double_quant: bool,
    /// Patterns of what alone is quantized.
    pub only: Vec<String>,
    /// Patterns of what is not.
    pub skip: Vec<String>,
    /// Bytes of a shard, at most.
    pub max_shard_bytes: u64,
}

/// What became of one tensor of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorRecord {
    /// Its name.
    pub name: String,
    /// `quantized` or `kept`.
    pub action: Action,
    /// Why, in a few words.
    pub reason: String,
    /// Its type in the source.
    pub dtype: String,
    /// Its shape in the source.
    pub shape: Vec<u64>,
    /// Its bytes in the source.
    pub bytes_before: u64,
    /// Its bytes in the result, with all that belongs to it.
    pub bytes_after: u64,
}

/// What became of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It is in few bits now.
    Quantized,
    /// It was copied as it was.
    Kept,
}

/// A file of weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardRecord {
    /// Its name.
    pub file: String,
    /// Its bytes.
    pub bytes: u64,
    /// Checksum of its header, which holds those of its tensors.
    pub header: Checksum,
}

/// A file that holds no weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Its name.
    pub file: String,
    /// Its bytes.
    pub bytes: u64,
    /// Their checksum.
    pub checksum: Checksum,
}

impl FileRecord {
    /// Of a file with these bytes.
    #[must_use]
    pub fn of(name: &str, bytes: &[u8]) -> Self {
        Self {
            file: name.to_owned(),
            bytes: bytes.len() as u64,
            checksum: Checksum::of_bytes(bytes),
        }
    }
}

impl Manifest {
    /// A record without contents yet.
    pub(crate) fn new(plan: Checksum) -> Self {
        Self {
            format: FORMAT.to_owned(),
            format_version: names::FORMAT_VERSION,
            fourbit_version: env!("CARGO_PKG_VERSION").to_owned(),
            plan,
            source: None,
            options: None,
            tensors: Vec::new(),
            shards: Vec::new(),
            files: Vec::new(),
            checksum: None,
        }
    }

    /// The text of the file: a line for every entry of a list.
    ///
    /// # Errors
    /// [`CheckpointProblem::Json`], which cannot happen for records made here.
    pub(crate) fn to_text(&self) -> Result<String> {
        let fields = [
            format!("  \"format\": {}", json(&self.format)?),
            format!("  \"format_version\": {}", self.format_version),
            format!("  \"fourbit_version\": {}", json(&self.fourbit_version)?),
            format!("  \"plan\": {}", json(&self.plan)?),
            format!("  \"source\": {}", json(&self.source)?),
            format!("  \"options\": {}", json(&self.options)?),
            format!("  \"tensors\": {}", json_lines(&self.tensors)?),
            format!("  \"shards\": {}", json_lines(&self.shards)?),
            format!("  \"files\": {}", json_lines(&self.files)?),
        ];
        let body = format!("{{\n{}{BEFORE_CHECKSUM}", fields.join(",\n"));
        let checksum = Checksum::of_bytes(body.as_bytes());
        Ok(format!("{body}{checksum}{AFTER_CHECKSUM}"))
    }

    /// Reads the text, and checks its checksum and version.
    ///
    /// # Errors
    /// [`CheckpointProblem::NoChecksum`], [`CheckpointProblem::Checksum`],
    /// [`CheckpointProblem::Json`], [`CheckpointProblem::Version`].
    pub fn parse(text: &str) -> Result<Self> {
        let (body, digits) = text
            .strip_suffix(AFTER_CHECKSUM)
            .and_then(|rest| rest.split_at_checked(rest.len().checked_sub(32)?))
            .filter(|(body, _)| body.ends_with(BEFORE_CHECKSUM))
            .ok_or(CheckpointProblem::NoChecksum)?;
        Checksum::parse(digits)?.check(Checksum::of_bytes(body.as_bytes()))?;
        // The version first: a later one may have other fields.
        #[derive(Deserialize)]
        struct Version {
            format: String,
            format_version: u64,
        }
        let invalid = |error: serde_json::Error| CheckpointProblem::Json {
            what: "record",
            reason: error.to_string(),
        };
        let version: Version = serde_json::from_str(text).map_err(invalid)?;
        let known =
            version.format == FORMAT && version.format_version == u64::from(names::FORMAT_VERSION);
        if !known {
            return Err(CheckpointProblem::Version {
                got: format!("{} {}", version.format, version.format_version),
                supported: names::FORMAT_VERSION,
            }
            .into());
        }
        Ok(serde_json::from_str(text).map_err(invalid)?)
    }

    /// That the weights of a folder are those recorded: their names, sizes and headers.
    ///
    /// # Errors
    /// [`CheckpointProblem::Manifest`], [`CheckpointProblem::FileBytes`] or
    /// [`CheckpointProblem::Checksum`], naming the file.
    pub fn check_shards(&self, folder: &Folder) -> Result<()> {
        let names = |what: String| Error::from(CheckpointProblem::Manifest { what });
        if self.shards.len() != folder.shards().len() {
            let (recorded, there) = (self.shards.len(), folder.shards().len());
            let what = format!("{recorded} files of weights were written, {there} are there");
            return Err(names(what).in_file(folder.path()));
        }
        for (record, shard) in self.shards.iter().zip(folder.shards()) {
            let check = || {
                if record.file != shard.name {
                    return Err(names(format!("{:?} is not there", record.file)));
                }
                let got = shard.file.stamp().bytes;
                if record.bytes != got {
                    let expected = record.bytes;
                    return Err(CheckpointProblem::FileBytes { expected, got }.into());
                }
                record.header.check(shard.header.checksum)
            };
            check().map_err(|error| error.in_file(shard.file.path()))?;
        }
        Ok(())
    }

    /// The record of a folder, if it has one.
    ///
    /// # Errors
    /// As [`Manifest::parse`], naming the file; [`Error::Io`].
    pub fn of_folder(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(names::MANIFEST);
        let text = match InputFile::open(&path) {
            Ok(file) => file.read_text()?,
            Err(error) if is_missing(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        Self::parse(&text)
            .map(Some)
            .map_err(|error| error.in_file(path))
    }
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| {
        let reason = error.to_string();
        Error::from(CheckpointProblem::Json {
            what: "record",
            reason,
        })
    })
}

/// A list with an entry a line.
fn json_lines(entries: &[impl Serialize]) -> Result<String> {
    let lines = entries
        .iter()
        .map(|entry| Ok(format!("\n    {}", json(entry)?)));
    let lines = lines.collect::<Result<Vec<String>>>()?;
    let end = if lines.is_empty() { "" } else { "\n  " };
    Ok(format!("[{}{end}]", lines.join(",")))
}

/// Whether a file is not there.
pub(crate) fn is_missing(error: &Error) -> bool {
    matches!(error.root(), Error::Io(source) if source.kind() == std::io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let checksum = Checksum::of_bytes(b"x");
        let mut manifest = Manifest::new(checksum);
        manifest.files.push(FileRecord {
            file: "config.json".to_owned(),
            bytes: 1,
            checksum,
        });
        manifest.options = Some(OptionsRecord {
            codebook: "mine".to_owned(),
            entries: vec![(0, -1.0), (1, 0.1)],
            ties: "lower".to_owned(),
            block_size: 64,
            double_quant: true,
            only: vec![],
            skip: vec!["*.q".to_owned()],
            max_shard_bytes: 1,
        });
        manifest
    }

    #[test]
    fn a_record_reads_back() {
        let text = manifest().to_text().expect("plain values");
        let read = Manifest::parse(&text).expect("our own text");
        assert_eq!(
            Manifest {
                checksum: None,
                ..read
            },
            manifest()
        );
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let text = manifest().to_text().expect("plain values").into_bytes();
        for position in 0..text.len() * 8 {
            let mut flipped = text.clone();
            flipped[position / 8] ^= 1 << (position % 8);
            let accepted = String::from_utf8(flipped).is_ok_and(|t| Manifest::parse(&t).is_ok());
            assert!(!accepted, "bit {position}");
        }
    }

    #[test]
    fn later_versions_are_refused() {
        let mut later = manifest();
        later.format_version += 1;
        let text = later.to_text().expect("plain values");
        let error = Manifest::parse(&text).expect_err("a later version");
        assert!(matches!(
            error.root(),
            Error::Checkpoint(CheckpointProblem::Version { .. })
        ));
    }
}
