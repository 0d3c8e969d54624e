//! File names, metadata keys and tensor names of the format: the only place where they are
//! written in Rust.

use crate::error::OptionProblem;
use crate::{Error, Result};

/// The version of what we add to the layout. Readers refuse a later one.
pub const FORMAT_VERSION: u32 = 1;

/// The weights of a checkpoint in one file.
pub const SINGLE: &str = "model.safetensors";
/// Which shard holds which tensor; written last, so its presence says that all is there.
pub const INDEX: &str = "model.safetensors.index.json";
/// What a checkpoint of ours records about itself.
pub const MANIFEST: &str = "fourbit.json";
/// Marks a folder that is being written; its writer holds a lock on it.
pub const PARTIAL: &str = "fourbit.partial.json";
/// The model's configuration.
pub const CONFIG: &str = "config.json";

/// The metadata key under which loaders look for the framework.
pub(crate) const META_FRAMEWORK: (&str, &str) = ("format", "pt");
/// [`FORMAT_VERSION`].
pub(crate) const META_VERSION: &str = "fourbit.format_version";
/// Checksum of everything that decides the bytes: source headers, options, layout.
pub(crate) const META_PLAN: &str = "fourbit.plan";
/// Checksum of the source headers.
pub(crate) const META_SOURCE: &str = "fourbit.source";
/// Checksum of the source data of one shard.
pub(crate) const META_SOURCE_DATA: &str = "fourbit.source_data";
/// Before a tensor's name: its checksum.
pub(crate) const META_CHECKSUM: &str = "fourbit.xxh3.";

/// The name of shard `index` (from 0) of `count`.
#[must_use]
pub fn shard(index: usize, count: usize) -> String {
    format!("model-{:05}-of-{count:05}.safetensors", index + 1)
}

/// The inverse of [`shard`]: index (from 1) and count.
#[must_use]
pub fn parse_shard(name: &str) -> Option<(usize, usize)> {
    let (index, count) = name
        .strip_prefix("model-")?
        .strip_suffix(".safetensors")?
        .split_once("-of-")?;
    let number = |digits: &str| {
        let good = digits.len() >= 5 && digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse().ok().filter(|_| good)
    };
    Some((number(index)?, number(count)?))
}

/// The name under which a file is written before it is complete.
#[must_use]
pub(crate) fn temporary(name: &str) -> String {
    format!(".{name}.fourbit-tmp")
}

/// Whether a name is one that [`temporary`] gives.
#[must_use]
pub(crate) fn is_temporary(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".fourbit-tmp")
}

/// Whether a name stays in the folder it is used in, on every platform.
#[must_use]
pub fn is_file_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && !name
            .chars()
            .any(|c| c.is_control() || matches!(c, '/' | '\\' | ':'))
}

/// The parts of a quantized weight, as the endings of their tensors' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// Scales: F32, or U8 codes with double quantization.
    Absmax,
    /// The codebook.
    QuantMap,
    /// Scales of the scales.
    NestedAbsmax,
    /// The map of the scales' codes.
    NestedQuantMap,
}

impl Part {
    /// Every part.
    pub const ALL: [Self; 4] = [
        Self::Absmax,
        Self::QuantMap,
        Self::NestedAbsmax,
        Self::NestedQuantMap,
    ];

    /// Its ending.
    #[must_use]
    pub const fn ending(self) -> &'static str {
        match self {
            Self::Absmax => ".absmax",
            Self::QuantMap => ".quant_map",
            Self::NestedAbsmax => ".nested_absmax",
            Self::NestedQuantMap => ".nested_quant_map",
        }
    }

    /// The tensor's name, for the weight of that name.
    #[must_use]
    pub fn of(self, weight: &str) -> String {
        format!("{weight}{}", self.ending())
    }
}

/// Between a weight's name and the family of its codebook.
const QUANT_STATE: &str = ".quant_state.";
/// The codebooks that bitsandbytes knows, and the family it names them under.
const BITSANDBYTES: (&str, [&str; 2]) = ("bitsandbytes__", ["nf4", "fp4"]);
/// The family of all other codebooks.
const FOURBIT: &str = "fourbit__";

/// Whether bitsandbytes can read weights of this codebook.
#[must_use]
pub fn is_bitsandbytes(codebook: &str) -> bool {
    BITSANDBYTES.1.contains(&codebook)
}

/// The name of the quant state of a weight with a codebook.
///
/// # Errors
/// [`Error::Option`] where the codebook's name cannot be a part of a tensor name.
pub fn quant_state(weight: &str, codebook: &str) -> Result<String> {
    if !is_codebook_name(codebook) {
        return Err(Error::Option {
            option: "codebook",
            value: codebook.to_owned(),
            problem: OptionProblem::Name,
        });
    }
    let family = if is_bitsandbytes(codebook) {
        BITSANDBYTES.0
    } else {
        FOURBIT
    };
    Ok(format!("{weight}{QUANT_STATE}{family}{codebook}"))
}

/// The inverse of [`quant_state`]: weight and codebook.
#[must_use]
pub fn parse_quant_state(name: &str) -> Option<(&str, &str)> {
    let (weight, rest) = name.rsplit_once(QUANT_STATE)?;
    let codebook = match rest.strip_prefix(BITSANDBYTES.0) {
        Some(codebook) => Some(codebook).filter(|name| is_bitsandbytes(name)),
        None => rest
            .strip_prefix(FOURBIT)
            .filter(|name| is_codebook_name(name) && !is_bitsandbytes(name)),
    }?;
    (!weight.is_empty()).then_some((weight, codebook))
}

/// Whether a name looks like one of the tensors that accompany a quantized weight. (A plain
/// tensor does not end in these, so one without its weight means that something is missing.)
#[must_use]
pub fn looks_like_part(name: &str) -> bool {
    name.contains(QUANT_STATE) || Part::ALL.iter().any(|part| name.ends_with(part.ending()))
}

fn is_codebook_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_stay_in_the_folder() {
        for good in ["model.safetensors", "a b.safetensors", "x"] {
            assert!(is_file_name(good), "{good}");
        }
        for bad in [
            "", ".", "..", "../x", "/x", "a/b", "a\\b", "C:x", "a\0b", "a\nb", ".x",
        ] {
            assert!(!is_file_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn quant_states_name_weight_and_codebook() {
        for codebook in ["nf4", "fp4", "int4", "my-map_2"] {
            let name = quant_state("a.weight", codebook).expect("a good name");
            assert_eq!(parse_quant_state(&name), Some(("a.weight", codebook)));
        }
        assert!(quant_state("a", "x.y").is_err());
        for bad in [
            "a.quant_state.bitsandbytes__int8",
            "a.quant_state.fourbit__nf4",
            "a.quant_state.other__nf4",
            ".quant_state.bitsandbytes__nf4",
            "a.quant_state",
        ] {
            assert_eq!(parse_quant_state(bad), None, "{bad}");
        }
    }

    #[test]
    fn shards_are_recognised() {
        assert_eq!(shard(0, 2), "model-00001-of-00002.safetensors");
        assert_eq!(
            parse_shard(&shard(123_456, 200_000)),
            Some((123_457, 200_000))
        );
        assert_eq!(parse_shard("model-1-of-2.safetensors"), None);
        assert!(is_temporary(&temporary("x")) && !is_temporary("x"));
    }
}
