//! CUDA: the kernels of `cuda/`, embedded as source, compiled for the card at hand when they are
//! first used, and launched on the caller's stream.
//!
//! | module | what it does |
//! |---|---|
//! | [`source`] | the whole translation unit of a kernel, specialised for a dtype and a codebook |
//! | [`adamw`] | what the optimizer's kernel is told of the parameters |
//! | [`kernel`] | what is known of a kernel, and arguments checked against it |
//! | [`kernels`] | the register: each kernel's file, parameters, options and launch geometry |
//! | [`matvec`] | the part of it that is products of a few rows |
//! | [`products`] | the part of it that is products on tensor cores, and how their sums are cut |
//! | `library` | shared libraries, opened when they are first needed |
//! | [`nvrtc`] | NVIDIA's run-time compiler |
//! | [`cache`] | compiled kernels on disk |
//! | [`driver`] | the CUDA driver: its cards, their contexts, loading and launching |
//! | `allocation` | allocating memory of the driver, counting it, freeing it |
//! | [`memory`] | memory that moves between a card and the host, and memory that is page-locked |
//! | [`launch`] | compiled kernels, loaded into torch's context and launched |
//!
//! The first six are there in every build; the others need the feature `cuda`, which links
//! nothing: the driver and the compiler are opened at run time, and where they are missing, that
//! is an error of the call that needs them.

pub mod adamw;
#[cfg(feature = "cuda")]
mod allocation;
#[cfg(feature = "cuda")]
pub mod cache;
#[cfg(feature = "cuda")]
pub mod driver;
pub mod kernel;
pub mod kernels;
#[cfg(feature = "cuda")]
pub mod launch;
#[cfg(feature = "cuda")]
mod library;
pub mod matvec;
#[cfg(feature = "cuda")]
pub mod memory;
#[cfg(feature = "cuda")]
pub mod nvrtc;
pub mod products;
pub mod source;

/// What can go wrong with kernels and cards.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuProblem {
    /// No kernel or kernel file of that name.
    #[error("no {what} is named {name:?}; there are {known:?}")]
    UnknownKernel {
        /// "kernel" or "kernel file".
        what: &'static str,
        /// The name asked for.
        name: String,
        /// Those that exist.
        known: Vec<&'static str>,
    },

    /// Arguments that are not those a kernel takes.
    #[error("kernel {kernel}: {problem}")]
    Arguments {
        /// The kernel.
        kernel: &'static str,
        /// What is wrong with them.
        problem: ArgumentProblem,
    },

    /// A kernel that has no version for a card or a dtype.
    #[error("kernel file {file}: {reason}")]
    Unsupported {
        /// The kernel file.
        file: &'static str,
        /// Why there is none.
        reason: UnsupportedReason,
    },

    /// The run-time compiler cannot be opened.
    #[error(
        "NVRTC, which compiles the CUDA kernels, cannot be used: {path} ({reason}); install a CUDA \
         build of torch, which brings it, or set FOURBIT_NVRTC to the path of libnvrtc; \
         `fourbit doctor` says more"
    )]
    NvrtcMissing {
        /// The library's file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A library that lacks a function: it is too old.
    #[error("{library} has no function {function}; it is too old, install a newer one")]
    MissingFunction {
        /// The library's file.
        library: String,
        /// What it lacks.
        function: &'static str,
    },

    /// A kernel that does not compile: a fault of ours, or of the compiler.
    #[error("kernel file {file} does not compile for {target} with NVRTC {version}: {log}")]
    Compile {
        /// The kernel file.
        file: String,
        /// The card's architecture.
        target: String,
        /// The compiler's version.
        version: String,
        /// What the compiler says.
        log: String,
    },

    /// There is no driver.
    #[error(
        "there is no CUDA driver on this machine ({reason}); install NVIDIA's driver, or keep the \
         tensors on the CPU"
    )]
    DriverMissing {
        /// What the system says.
        reason: String,
    },

    /// A function of the driver failed.
    #[error("{}{function} failed: {name} ({code}): {text}", match kernel {
        Some(kernel) => format!("kernel {kernel}: "),
        None => String::new(),
    })]
    Driver {
        /// The kernel at hand, if there is one.
        kernel: Option<String>,
        /// The driver's function.
        function: &'static str,
        /// The driver's code of the error.
        code: u32,
        /// The driver's name of it.
        name: String,
        /// The driver's sentence.
        text: String,
    },

    /// Memory that the driver does not give.
    #[error(
        "{bytes} bytes of {kind} memory cannot be had for GPU {device}: {reason}; keep the \
         optimizer's state in fewer bits, use another pager, or free memory"
    )]
    Memory {
        /// "managed" or "page-locked".
        kind: &'static str,
        /// How many bytes were asked for.
        bytes: usize,
        /// The card's number, as torch counts.
        device: u32,
        /// What the driver says.
        reason: Box<GpuProblem>,
    },

    /// Memory of no bytes.
    #[error("0 bytes of {kind} memory were asked for; ask for at least 1")]
    EmptyMemory {
        /// "managed" or "page-locked".
        kind: &'static str,
    },

    /// A part of memory that reaches beyond it.
    #[error("{bytes} bytes from byte {offset} on are not within the {size} bytes of the memory")]
    MemoryRange {
        /// Where the part starts.
        offset: usize,
        /// How long it is.
        bytes: usize,
        /// Bytes of the whole memory.
        size: usize,
    },
}

/// What can be wrong with the arguments of a kernel.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ArgumentProblem {
    /// Too few or too many.
    #[error("{got} arguments where it takes {expected}")]
    Count {
        /// How many it takes.
        expected: usize,
        /// How many came.
        got: usize,
    },
    /// A number that the parameter's type cannot hold, or that makes no sense for it.
    #[error("argument {parameter} is {got}, and it must be {expected}")]
    Value {
        /// The parameter's name.
        parameter: &'static str,
        /// What it may be, in words.
        expected: &'static str,
        /// The argument.
        got: String,
    },
    /// More blocks than a launch can have.
    #[error("{blocks} blocks are needed, and a launch has at most {most}; use smaller tensors")]
    Grid {
        /// How many are needed.
        blocks: u64,
        /// How many there can be.
        most: u64,
    },
}

/// Why there is no version of a kernel.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum UnsupportedReason {
    /// The card is too old for it.
    #[error("it needs a card of compute capability {}.{} and this one has {}.{}",
        needed / 10, needed % 10, got / 10, got % 10)]
    Capability {
        /// The least, as 10 major + minor.
        needed: u32,
        /// The card's.
        got: u32,
    },
    /// It is not written for the dtype.
    #[error("there is none for {dtype}")]
    Dtype {
        /// Torch's name.
        dtype: &'static str,
    },
    /// It is not written for codes of so many bits.
    #[error("there is none for codes of {code_bits} bits")]
    CodeBits {
        /// Bits of a code.
        code_bits: u32,
    },
}
