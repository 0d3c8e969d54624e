//! What is known of a kernel file and of a kernel, and arguments checked against it.

use super::source::Specialisation;
use super::{ArgumentProblem, GpuProblem, UnsupportedReason};
use crate::element::Dtype;

/// The oldest architecture: torch's own packages leave out older ones.
pub const OLDEST: u32 = 75;

/// The first architecture with asynchronous copies, more than 64 KiB of shared memory, and tensor
/// cores for bf16.
pub const AMPERE: u32 = 80;

/// Bytes of shared memory of a multiprocessor, of which a block may have all but
/// [`reserved`] (CUDA Programming Guide, "Compute Capabilities", "Technical Specifications").
pub(super) const fn shared_bytes(capability: u32) -> u32 {
    (match capability {
        0..80 => 64,
        80 | 87 => 164,
        90..120 => 228,
        _ => 100,
    }) << 10
}

/// Bytes of it that the system takes for each block.
pub(super) const fn reserved(capability: u32) -> u32 {
    if capability < AMPERE { 0 } else { 1 << 10 }
}

/// Bytes of shared memory that a block can have.
pub(super) const fn block_bytes(capability: u32) -> u32 {
    shared_bytes(capability) - reserved(capability)
}

/// A file of `cuda/`.
#[derive(Debug)]
pub struct File {
    /// Its name, without ".cu".
    pub name: &'static str,
    /// Its contents.
    pub text: &'static str,
    /// Whether its results are promised to the last bit: then no operations are fused.
    pub exact: bool,
    /// The dtypes that it can be compiled for, and the oldest architecture of each, as
    /// 10 major + minor.
    pub dtypes: &'static [(Dtype, u32)],
    /// The widths of codes that it can be compiled for.
    pub code_bits: &'static [u32],
    /// What it holds.
    pub kernels: &'static [Kernel],
}

/// How a kernel is launched with these arguments; None where there is nothing to do.
pub type GeometryOf =
    fn(&Arguments, &Specialisation, &Card) -> Result<Option<Geometry>, ArgumentProblem>;

/// A function that can be launched.
#[derive(Debug)]
pub struct Kernel {
    /// The function's name.
    pub name: &'static str,
    /// The oldest architecture that it is compiled for, as 10 major + minor.
    pub oldest: u32,
    /// What it takes, in order.
    pub parameters: &'static [Parameter],
    /// How it is launched.
    pub geometry: GeometryOf,
}

/// One parameter of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameter {
    /// Its name in the kernel.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
}

/// The types of parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An address in the card's memory.
    Pointer,
    /// The same, and it may be null.
    OptionalPointer,
    /// A signed 64-bit number: counts, which are never negative.
    Count,
    /// An unsigned 32-bit number.
    U32,
    /// A single-precision number.
    F32,
}

/// An argument as a caller gives it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    /// Addresses and whole numbers.
    Integer(i128),
    /// Others.
    Float(f64),
}

/// Arguments that were checked, as the words that the driver reads them from.
#[derive(Debug, Clone)]
pub struct Arguments {
    kernel: &'static Kernel,
    words: Vec<u64>,
}

/// What a launch needs to know of a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Card {
    /// Compute capability, as 10 major + minor.
    pub capability: u32,
    /// Multiprocessors.
    pub processors: u32,
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of shared memory beyond what the kernel declares.
    pub dynamic_bytes: u32,
}

impl File {
    /// The kernel of that name.
    ///
    /// # Errors
    /// [`GpuProblem::UnknownKernel`] where there is none.
    pub fn kernel(&self, name: &str) -> Result<&'static Kernel, GpuProblem> {
        self.kernels
            .iter()
            .find(|kernel| kernel.name == name)
            .ok_or_else(|| self.unknown_kernel(name))
    }

    fn unknown_kernel(&self, name: &str) -> GpuProblem {
        GpuProblem::UnknownKernel {
            what: "kernel",
            name: name.to_owned(),
            known: self.kernels.iter().map(|kernel| kernel.name).collect(),
        }
    }

    /// The compiler's options, without the architecture.
    #[must_use]
    pub const fn options(&self) -> &'static [&'static str] {
        // Division and square roots are precise, and subnormals kept, unless asked otherwise.
        // The last option adds registers and spills to the log.
        if self.exact {
            &["--std=c++17", "--fmad=false", "--ptxas-options=-v"]
        } else {
            &["--std=c++17", "--ptxas-options=-v"]
        }
    }

    /// Checks that the file can be compiled for this dtype, architecture and width of codes.
    ///
    /// # Errors
    /// [`GpuProblem::Unsupported`] where it cannot.
    pub fn check(&self, dtype: Dtype, capability: u32, code_bits: u32) -> Result<(), GpuProblem> {
        let problem = |reason| GpuProblem::Unsupported {
            file: self.name,
            reason,
        };
        let Some((_, oldest)) = self.dtypes.iter().find(|(known, _)| *known == dtype) else {
            let dtype = dtype.torch_name();
            return Err(problem(UnsupportedReason::Dtype { dtype }));
        };
        let needed = OLDEST.max(*oldest);
        if capability < needed {
            let got = capability;
            return Err(problem(UnsupportedReason::Capability { needed, got }));
        }
        if !self.code_bits.contains(&code_bits) {
            return Err(problem(UnsupportedReason::CodeBits { code_bits }));
        }
        Ok(())
    }
}

impl Kernel {
    /// Checks arguments against the parameters.
    ///
    /// # Errors
    /// [`GpuProblem::Arguments`] for another number of them, and for values that the parameters
    /// cannot take.
    pub fn arguments(&'static self, values: &[Value]) -> Result<Arguments, GpuProblem> {
        let problem = |problem| GpuProblem::Arguments {
            kernel: self.name,
            problem,
        };
        if values.len() != self.parameters.len() {
            return Err(problem(ArgumentProblem::Count {
                expected: self.parameters.len(),
                got: values.len(),
            }));
        }
        let words = self
            .parameters
            .iter()
            .zip(values)
            .map(|(parameter, &value)| parameter.word(value).map_err(problem))
            .collect::<Result<_, _>>()?;
        Ok(Arguments {
            kernel: self,
            words,
        })
    }

    /// How it is launched with these arguments; None where there is nothing to do.
    ///
    /// # Errors
    /// [`GpuProblem::Arguments`] for sizes that it cannot be launched for.
    pub fn geometry(
        &'static self,
        arguments: &Arguments,
        specialisation: &Specialisation,
        card: &Card,
    ) -> Result<Option<Geometry>, GpuProblem> {
        (self.geometry)(arguments, specialisation, card).map_err(|problem| GpuProblem::Arguments {
            kernel: self.name,
            problem,
        })
    }
}

impl Parameter {
    /// The argument as the driver reads it: from the first bytes of a word.
    fn word(self, value: Value) -> Result<u64, ArgumentProblem> {
        let problem = |expected| ArgumentProblem::Value {
            parameter: self.name,
            expected,
            got: match value {
                Value::Integer(number) => number.to_string(),
                Value::Float(number) => number.to_string(),
            },
        };
        match (self.kind, value) {
            (Kind::Pointer, Value::Integer(address)) => match u64::try_from(address) {
                Ok(address) if address > 0 => Ok(address),
                _ => Err(problem("an address that is not null")),
            },
            (Kind::OptionalPointer, Value::Integer(address)) => {
                u64::try_from(address).map_err(|_| problem("an address"))
            }
            (Kind::Count, Value::Integer(count)) => match i64::try_from(count) {
                Ok(count) if count >= 0 => Ok(count.cast_unsigned()),
                _ => Err(problem("from 0 to 2^63 - 1")),
            },
            (Kind::U32, Value::Integer(number)) => u32::try_from(number)
                .map(u64::from)
                .map_err(|_| problem("from 0 to 2^32 - 1")),
            // Rounding is what the parameter's type means.
            #[allow(clippy::cast_possible_truncation)]
            (Kind::F32, Value::Float(number)) => Ok(u64::from((number as f32).to_bits())),
            (Kind::F32, Value::Integer(_)) => Err(problem("a floating-point number")),
            (_, Value::Float(_)) => Err(problem("a whole number")),
        }
    }
}

impl Arguments {
    /// One word for each parameter, little-endian in memory as the card is.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The argument of that name; 0 for a name that is not a parameter.
    #[must_use]
    pub fn get(&self, name: &str) -> u64 {
        let position = self.kernel.parameters.iter().position(|p| p.name == name);
        position
            .and_then(|index| self.words.get(index))
            .copied()
            .unwrap_or(0)
    }
}
