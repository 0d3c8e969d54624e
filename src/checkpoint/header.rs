//! The header of a safetensors file, parsed strictly: every file is taken as hostile.
//!
//! Stricter than the reference reader in these ways, and never laxer: no key may stand twice, at
//! any level; tensor entries hold `dtype`, `shape` and `data_offsets` and nothing else, as an
//! object; tensor names are not empty, not longer than [`MAX_NAME_BYTES`] and hold no control
//! characters; a shape has at most
//! [`MAX_DIMENSIONS`] dimensions, a file at most [`MAX_TENSORS`] tensors and its metadata at most
//! [`MAX_METADATA`] strings; the non-zero dimensions of a shape may not overflow even where
//! another is zero; the header starts with `{`.

use std::collections::BTreeMap;

use serde::de::Deserializer as _;
use xxhash_rust::xxh3::Xxh3;

use super::checksum::Checksum;
use super::header_json::{HeaderVisitor, RawTensor};
use super::{CheckpointProblem, FileDtype};
use crate::{Error, Result};

/// Bytes of the header's length, before the header.
pub(crate) const LENGTH_BYTES: u64 = 8;
/// The longest header, as in the reference reader.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// The most tensors of one file.
pub const MAX_TENSORS: usize = 1 << 18;
/// The longest name of a tensor.
pub const MAX_NAME_BYTES: usize = 4096;
/// The most strings of a file's metadata: ours hold one for every tensor, and a few more.
pub const MAX_METADATA: usize = MAX_TENSORS + 64;
/// The most dimensions of a tensor, as in torch.
pub const MAX_DIMENSIONS: usize = 64;
/// The one key of a header that is no tensor.
pub(crate) const METADATA: &str = "__metadata__";

/// Bytes at positions: a file, or memory in tests.
pub trait ReadAt {
    /// How many bytes there are.
    fn length(&self) -> u64;

    /// Fills `buffer` with the bytes from `offset` on.
    ///
    /// # Errors
    /// Where there are not that many, or the operating system refuses.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()>;
}

impl ReadAt for [u8] {
    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let from = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..)?.get(..buffer.len()))
            .ok_or(CheckpointProblem::EndedEarly)?;
        buffer.copy_from_slice(from);
        Ok(())
    }
}

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: FileDtype,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Position of its first byte in the file.
    pub offset: u64,
    /// Its bytes.
    pub bytes: u64,
}

/// The header of a safetensors file whose data fits it exactly.
#[derive(Debug, Clone)]
pub struct Header {
    /// The tensors in the order of their data, then by name.
    pub tensors: Vec<TensorInfo>,
    /// The strings under `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// Position of the first data byte.
    pub data_start: u64,
    /// Checksum of the first `data_start` bytes of the file.
    pub checksum: Checksum,
}

impl Header {
    /// Reads and checks the header of a whole file.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] says what is wrong with it.
    pub fn read(source: &(impl ReadAt + ?Sized)) -> Result<Self> {
        let file_bytes = source.length();
        let mut start = [0; LENGTH_BYTES as usize];
        if file_bytes < LENGTH_BYTES {
            return Err(CheckpointProblem::TooShort { bytes: file_bytes }.into());
        }
        source.read_exact_at(&mut start, 0)?;
        let claimed = u64::from_le_bytes(start);
        if claimed > MAX_HEADER_BYTES {
            return Err(match other_format(start) {
                Some(looks_like) => CheckpointProblem::NotSafetensors { looks_like },
                None => CheckpointProblem::HeaderTooLong {
                    claimed,
                    limit: MAX_HEADER_BYTES,
                },
            }
            .into());
        }
        let data_start = LENGTH_BYTES + claimed;
        let cut_off = || CheckpointProblem::HeaderCutOff {
            claimed,
            bytes: file_bytes,
        };
        if data_start > file_bytes {
            return Err(cut_off().into());
        }
        let mut text = vec![0; usize::try_from(claimed).map_err(|_| cut_off())?];
        source.read_exact_at(&mut text, LENGTH_BYTES)?;
        let mut hasher = Xxh3::new();
        hasher.update(&start);
        hasher.update(&text);
        let (tensors, metadata) = parse(&text, data_start)?;
        let expected = tensors
            .last()
            .map_or(data_start, |last| last.offset + last.bytes);
        if expected != file_bytes {
            return Err(CheckpointProblem::FileBytes {
                expected,
                got: file_bytes,
            }
            .into());
        }
        Ok(Self {
            tensors,
            metadata,
            data_start,
            checksum: Checksum::of(&hasher),
        })
    }
}

/// What a file's first bytes say it is, where it is a common mistake.
fn other_format(start: [u8; 8]) -> Option<&'static str> {
    match start {
        [b'P', b'K', 3, 4, ..] => Some("a zip archive (a torch pickle file?)"),
        [0x80, 2..=5, ..] => Some("a pickle file"),
        [b'v', b'e', b'r', b's', b'i', b'o', b'n', b' '] => {
            Some("a Git LFS pointer, not the file it points to")
        }
        [b'G', b'G', b'U', b'F', ..] => Some("a GGUF file"),
        [0x89, b'H', b'D', b'F', ..] => Some("an HDF5 file"),
        [b'<', ..] => Some("an HTML page"),
        [b'{', ..] => Some("a JSON file"),
        _ => None,
    }
}

type Contents = (Vec<TensorInfo>, BTreeMap<String, String>);

/// Parses the header's JSON and checks the layout it describes.
fn parse(text: &[u8], data_start: u64) -> Result<Contents> {
    let invalid = |reason: String| CheckpointProblem::Json {
        what: "header",
        reason,
    };
    if text.first() != Some(&b'{') {
        return Err(invalid("it does not start with {".to_owned()).into());
    }
    let text = std::str::from_utf8(text).map_err(|error| invalid(error.to_string()))?;
    let mut json = serde_json::Deserializer::from_str(text);
    let mut raw = json
        .deserialize_map(HeaderVisitor)
        .and_then(|raw| json.end().map(|()| raw))
        .map_err(|error| invalid(error.to_string()))?;
    refuse_duplicates(&raw.tensors)?;
    raw.tensors
        .sort_by(|a, b| (a.offsets, &a.name).cmp(&(b.offsets, &b.name)));
    let mut tensors = Vec::with_capacity(raw.tensors.len());
    let mut expected = 0;
    for entry in raw.tensors {
        let end = entry.offsets.1;
        tensors.push(entry.check(expected, data_start)?);
        expected = end;
    }
    Ok((tensors, raw.metadata))
}

fn refuse_duplicates(entries: &[RawTensor]) -> Result<()> {
    let mut names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    names.sort_unstable();
    for (name, next) in names.iter().zip(names.iter().skip(1)) {
        if name == next {
            return Err(CheckpointProblem::DuplicateTensor {
                name: (*name).to_owned(),
            }
            .into());
        }
    }
    Ok(())
}

impl RawTensor {
    fn check(self, expected_start: u64, data_start: u64) -> Result<TensorInfo> {
        check_name(&self.name)?;
        let (name, shape, (start, end)) = (self.name, self.shape, self.offsets);
        let inner = || {
            let dtype = FileDtype::by_name(&self.dtype).ok_or(CheckpointProblem::UnknownDtype {
                dtype: self.dtype.clone(),
            })?;
            if start != expected_start || end < start {
                return Err(Error::from(CheckpointProblem::Offsets {
                    start,
                    end,
                    expected: expected_start,
                }));
            }
            let expected =
                dtype
                    .tensor_bytes(&shape)?
                    .ok_or_else(|| CheckpointProblem::PartialByte {
                        dtype,
                        shape: shape.clone(),
                    })?;
            let bytes = end - start;
            if bytes != expected {
                return Err(CheckpointProblem::TensorBytes {
                    expected,
                    got: bytes,
                }
                .into());
            }
            let offset = data_start
                .checked_add(start)
                .filter(|offset| offset.checked_add(bytes).is_some());
            let offset = offset.ok_or_else(|| Error::Overflow {
                shape: shape.clone(),
            })?;
            Ok((dtype, offset, bytes))
        };
        match inner() {
            Ok((dtype, offset, bytes)) => Ok(TensorInfo {
                name,
                dtype,
                shape,
                offset,
                bytes,
            }),
            Err(error) => Err(error.in_tensor(name)),
        }
    }
}

/// A tensor's name, where it can be shown and stored: not empty, not longer than
/// [`MAX_NAME_BYTES`], no control characters.
///
/// # Errors
/// [`CheckpointProblem::TensorName`].
pub(crate) fn check_name(name: &str) -> Result<()> {
    let length = 1..=MAX_NAME_BYTES;
    if length.contains(&name.len()) && !name.chars().any(char::is_control) {
        return Ok(());
    }
    // Enough to recognise it by.
    let name = name.chars().take(100).collect();
    Err(CheckpointProblem::TensorName { name }.into())
}
