//! Checksums: XXH3 with 128 bits, written as 32 hexadecimal digits.
//!
//! They find damage, not malice: they are no signature.

use std::fmt;
use std::io::Read;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use super::CheckpointProblem;
use crate::{Error, Result};

/// A 128-bit XXH3 checksum.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Checksum(u128);

impl Checksum {
    /// Of what the hasher has seen.
    pub(crate) fn of(hasher: &Xxh3) -> Self {
        Self(hasher.digest128())
    }

    /// Of these bytes.
    #[must_use]
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self(xxh3_128(bytes))
    }

    /// Of all that a reader gives, and how many bytes that was.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read.
    pub fn of_reader(mut reader: impl Read) -> Result<(Self, u64)> {
        let mut hasher = Xxh3::new();
        let mut buffer = vec![0; 1 << 16];
        let mut total = 0;
        loop {
            let count = match reader.read(&mut buffer) {
                Ok(0) => return Ok((Self::of(&hasher), total)),
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            hasher.update(buffer.get(..count).unwrap_or_default());
            total += count as u64;
        }
    }

    /// The checksum written as these digits.
    ///
    /// # Errors
    /// [`CheckpointProblem::NoChecksum`] unless they are 32 lower-case hexadecimal digits.
    pub fn parse(digits: &str) -> Result<Self> {
        let good = digits.len() == 32
            && digits
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        u128::from_str_radix(digits, 16)
            .ok()
            .filter(|_| good)
            .map(Self)
            .ok_or_else(|| CheckpointProblem::NoChecksum.into())
    }

    /// Compares what was computed with `self`, what was recorded.
    ///
    /// # Errors
    /// [`CheckpointProblem::Checksum`] where they differ.
    pub fn check(self, computed: Self) -> Result<()> {
        if self == computed {
            return Ok(());
        }
        Err(Error::from(CheckpointProblem::Checksum {
            expected: self.to_string(),
            got: computed.to_string(),
        }))
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:032x}", self.0)
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl Serialize for Checksum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Checksum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let digits = String::deserialize(deserializer)?;
        Self::parse(&digits).map_err(serde::de::Error::custom)
    }
}
