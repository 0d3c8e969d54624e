//! The one error type of the crate.
//!
//! Variants hold values (what was expected, what came, where), never formatted sentences, so
//! that a caller can act on them. Context is added from the inside out with
//! [`Error::in_tensor`] and [`Error::in_file`].

use std::path::{Path, PathBuf};

use crate::checkpoint::CheckpointProblem;
use crate::gpu::GpuProblem;

/// What every fallible function of the crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The input of a quantization holds NaN or an infinity.
    #[error("element {index} is {value}, and only finite numbers can be quantized")]
    NonFinite {
        /// Flat row-major index of the first such element.
        index: u64,
        /// The element itself.
        value: f32,
    },

    /// A block scale so near the largest number that 8 bits round it to infinity.
    #[error("a weight is too large for its scale to be quantized; use double_quant=False")]
    ScaleOverflow,

    /// A block size outside the format.
    #[error("block size {got} is not one of 32, 64, 128, 256, 512, 1024, 2048, 4096")]
    BlockSize {
        /// The block size asked for.
        got: u64,
    },

    /// A codebook that cannot be used.
    #[error("codebook {name:?}: {problem}")]
    Codebook {
        /// Name of the codebook.
        name: String,
        /// What is wrong with it.
        problem: CodebookProblem,
    },

    /// A buffer that does not have the size its contents need.
    #[error("{what} has {got} elements where the layout needs {expected}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// Its size by the layout.
        expected: u64,
        /// Its size in fact.
        got: u64,
    },

    /// Sizes whose product does not fit in 64 bits.
    #[error("a shape of {shape:?} has more elements than 64 bits can count")]
    Overflow {
        /// The shape at hand.
        shape: Vec<u64>,
    },

    /// A SIMD backend that is unknown or that this processor cannot run.
    #[error("SIMD backend {name:?} cannot run here; available: {available:?}")]
    Backend {
        /// The backend asked for.
        name: String,
        /// Those that can be used.
        available: Vec<&'static str>,
    },

    /// A checkpoint file or folder that is damaged, incomplete or of an unknown format.
    #[error("{0}")]
    Checkpoint(#[from] CheckpointProblem),

    /// A folder that must not be written to.
    #[error("{0}")]
    Destination(#[from] DestinationProblem),

    /// Too little room on the disk, found before anything was written.
    #[error("{needed} bytes are needed on its disk and {available} are free; make room")]
    NoSpace {
        /// What the result takes.
        needed: u64,
        /// What is there.
        available: u64,
    },

    /// A pattern or another option that cannot be used.
    #[error("option {option} = {value:?}: {problem}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        problem: OptionProblem,
    },

    /// The caller asked to stop.
    #[error("stopped; run the same conversion again, and it continues where it was")]
    Interrupted,

    /// Tensors given to a writer in another order or number than planned.
    #[error("{} where {} is next in the plan", match got {
        Some(got) => format!("tensor {got:?} was written"),
        None => "the writer was finished".to_owned(),
    }, match expected {
        Some(expected) => format!("{expected:?}"),
        None => "nothing".to_owned(),
    })]
    WriteOrder {
        /// The next one of the plan, if any.
        expected: Option<String>,
        /// What came; None where the writer was finished early.
        got: Option<String>,
    },

    /// A setting of the optimizer outside its range.
    #[error("{name} is {got}, and it must be {expected}")]
    Hyperparameter {
        /// Which setting.
        name: &'static str,
        /// What it may be, in words.
        expected: &'static str,
        /// Its value.
        got: f64,
    },

    /// Another error, in a named tensor.
    #[error("tensor {name:?}: {source}")]
    Tensor {
        /// The tensor's name.
        name: String,
        /// What happened there.
        source: Box<Error>,
    },

    /// Another error, in a file.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What happened there.
        source: Box<Error>,
    },

    /// Something about CUDA kernels or the card.
    #[error("{0}")]
    Gpu(#[from] GpuProblem),

    /// The operating system refused a read, a write or another file operation.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// What can be wrong with a codebook.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CodebookProblem {
    /// The name is not a built-in one.
    #[error("unknown name; use \"nf4\", \"fp4\", \"int4\" or a map of index to value")]
    UnknownName,
    /// A user's map under the name of a built-in one.
    #[error("it is the name of a built-in codebook; choose another")]
    BuiltInName,
    /// Fewer than two or more than 256 entries.
    #[error("it has {0} entries where 2 to 256 are possible")]
    EntryCount(usize),
    /// An index that 8 bits cannot hold.
    #[error("index {0} does not fit in 8 bits")]
    Index(u64),
    /// A value outside [-1, 1], or not a number.
    #[error("value {value} at index {index} is not a number from -1 to 1")]
    Value {
        /// Where.
        index: u64,
        /// What.
        value: f32,
    },
    /// An index that stands twice.
    #[error("index {0} stands twice")]
    DuplicateIndex(u64),
    /// All values are the same.
    #[error("it holds a single distinct value")]
    SingleValue,
}

/// Why a folder must not be written to.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DestinationProblem {
    /// It holds files that are not ours.
    #[error("the folder is not empty (it holds {example:?}); give a new or empty one")]
    NotEmpty {
        /// One of its files.
        example: String,
    },
    /// It holds a finished conversion of something else.
    #[error("the folder holds a finished conversion of another model or with other options")]
    OtherConversion,
    /// It holds an unfinished conversion of something else.
    #[error(
        "the folder holds an unfinished conversion of another model or with other options; delete \
         the folder, or run that conversion again"
    )]
    OtherUnfinished,
    /// It is the source.
    #[error("source and destination are the same folder")]
    SameAsSource,
    /// Another process is writing to it.
    #[error("another process is writing to the folder")]
    Locked,
    /// It exists and is no folder.
    #[error("it exists and is not a folder")]
    NotAFolder,
}

/// What can be wrong with an option.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionProblem {
    /// A glob that cannot be parsed.
    #[error("it is not a glob: {0}")]
    Glob(String),
    /// A glob without effect: most likely a typing error.
    #[error("it matches no tensor of the model")]
    MatchesNothing,
    /// A number outside its range.
    #[error("it must be at least {least}")]
    TooSmall {
        /// The bound.
        least: u64,
    },
    /// A number outside its range.
    #[error("it must be at most {most}")]
    TooLarge {
        /// The bound.
        most: u64,
    },
    /// A name that cannot be a part of a tensor name.
    #[error("it must be 1 to 64 letters, digits, hyphens or underscores")]
    Name,
    /// A dtype that is not in the safetensors format.
    #[error("it is no safetensors dtype")]
    Dtype,
    /// A file name that leaves the folder or is reserved.
    #[error("it must be a plain file name that the checkpoint itself does not use")]
    FileName,
    /// A thread pool that could not be made.
    #[error("the threads cannot be started: {0}")]
    Threads(String),
}

impl Error {
    /// The same error, with the name of the tensor it happened in.
    #[must_use]
    pub fn in_tensor(self, name: impl Into<String>) -> Self {
        Self::Tensor {
            name: name.into(),
            source: Box::new(self),
        }
    }

    /// The same error, with the file it happened in.
    #[must_use]
    pub fn in_file(self, path: impl AsRef<Path>) -> Self {
        Self::File {
            path: path.as_ref().to_path_buf(),
            source: Box::new(self),
        }
    }

    /// The error itself, without the tensor and file context around it.
    #[must_use]
    pub fn root(&self) -> &Self {
        match self {
            Self::Tensor { source, .. } | Self::File { source, .. } => source.root(),
            other => other,
        }
    }
}
