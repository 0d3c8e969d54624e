//! Kernel files compiled, loaded into torch's context and launched.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use super::cache::{Cache, Key};
use super::driver::{Context, Function, driver};
use super::kernel::{Card, File, Kernel, Value};
use super::nvrtc::{Compiled, Compiler};
use super::source::{Specialisation, translation_unit};
use super::{GpuProblem, UnsupportedReason};
use crate::{Error, Result};

/// Dynamic shared memory that every kernel may have unasked.
const DYNAMIC_BYTES_UNASKED: u32 = 48 << 10;

/// The name of an architecture, such as `sm_80`.
#[must_use]
pub fn target(capability: u32) -> String {
    format!("sm_{capability}")
}

/// Compiles a kernel file, whatever the cache holds.
///
/// # Errors
/// [`GpuProblem::Unsupported`], [`GpuProblem::Compile`].
pub fn compile(
    compiler: &Compiler,
    file: &File,
    specialisation: &Specialisation,
    capability: u32,
) -> Result<Compiled, GpuProblem> {
    specialisation.check(file, capability)?;
    let source = translation_unit(file, specialisation);
    compiler.compile(file.name, &source, &target(capability), file.options())
}

/// A kernel file's machine code, and what stands in the way of keeping it.
#[derive(Debug)]
pub struct Built {
    /// The machine code.
    pub cubin: Vec<u8>,
    /// Whether it came from the cache.
    pub cached: bool,
    /// Why it could not be put there.
    pub not_kept: Option<Error>,
}

/// A kernel file's machine code, from the cache or, where it has none that is whole, compiled and
/// put there.
///
/// # Errors
/// As [`compile`].
pub fn build(
    compiler: &Compiler,
    cache: Option<&Cache>,
    file: &File,
    specialisation: &Specialisation,
    capability: u32,
) -> Result<Built, GpuProblem> {
    specialisation.check(file, capability)?;
    let (source, target) = (translation_unit(file, specialisation), target(capability));
    let key = Key {
        file: file.name,
        source: &source,
        target: &target,
        options: file.options(),
        compiler: compiler.version(),
    };
    if let Some(cubin) = cache.and_then(|cache| cache.get(&key)) {
        return Ok(Built {
            cubin,
            cached: true,
            not_kept: None,
        });
    }
    let compiled = compiler.compile(file.name, &source, &target, file.options())?;
    let not_kept = cache.and_then(|cache| cache.put(&key, &compiled.cubin).err());
    Ok(Built {
        cubin: compiled.cubin,
        cached: false,
        not_kept,
    })
}

/// A kernel file, specialised and loaded on a card; for the process's life.
#[derive(Debug)]
pub struct Program {
    file: &'static File,
    specialisation: Specialisation,
    context: Context,
    functions: Vec<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    kernel: &'static Kernel,
    function: Function,
    /// The dynamic shared memory that it was last allowed.
    dynamic_bytes: Mutex<u32>,
}

impl Program {
    /// Builds and loads a file for the card of that number. The error beside the program says why
    /// the cache could not keep it.
    ///
    /// # Errors
    /// As [`build`]; [`GpuProblem::Driver`] and what else [`driver`] says.
    pub fn load(
        compiler: &Compiler,
        cache: Option<&Cache>,
        file: &'static File,
        specialisation: Specialisation,
        device: u32,
    ) -> Result<(Self, Option<Error>), GpuProblem> {
        let context = driver()?.context(device)?;
        let built = build(
            compiler,
            cache,
            file,
            &specialisation,
            context.card.capability,
        )?;
        // A file's kernels may need different cards.
        let kernels = file
            .kernels
            .iter()
            .filter(|kernel| kernel.oldest <= context.card.capability);
        let names = kernels
            .clone()
            .map(|kernel| CString::new(kernel.name).unwrap_or_default())
            .collect::<Vec<_>>();
        let names = names.iter().map(CString::as_c_str).collect::<Vec<_>>();
        let functions = context
            .load(&built.cubin, &names)
            .map_err(|error| error.in_kernel(file.name))?;
        let functions = kernels
            .zip(functions)
            .map(|(kernel, function)| Loaded {
                kernel,
                function,
                dynamic_bytes: Mutex::new(DYNAMIC_BYTES_UNASKED),
            })
            .collect();
        let program = Self {
            file,
            specialisation,
            context,
            functions,
        };
        Ok((program, built.not_kept))
    }

    /// Puts a launch of one of the file's kernels into a stream. With nothing to do, nothing is
    /// launched.
    ///
    /// # Errors
    /// [`GpuProblem::UnknownKernel`], [`GpuProblem::Arguments`], [`GpuProblem::Driver`].
    ///
    /// # Safety
    /// `values` and `stream` are as [`Context::launch`] needs them.
    pub unsafe fn launch(
        &self,
        kernel: &str,
        stream: usize,
        values: &[Value],
    ) -> Result<(), GpuProblem> {
        let kernel = self.file.kernel(kernel)?;
        let arguments = kernel.arguments(values)?;
        let Some(geometry) =
            kernel.geometry(&arguments, &self.specialisation, &self.context.card)?
        else {
            return Ok(());
        };
        let Some(loaded) = self
            .functions
            .iter()
            .find(|one| ptr::eq(one.kernel, kernel))
        else {
            return Err(GpuProblem::Unsupported {
                file: self.file.name,
                reason: UnsupportedReason::Capability {
                    needed: kernel.oldest,
                    got: self.context.card.capability,
                },
            });
        };
        self.allow(loaded, geometry.dynamic_bytes)
            .map_err(|error| error.in_kernel(kernel.name))?;
        // SAFETY: the function was loaded into this context and takes these parameters, by the
        // register; the rest is this function's own contract.
        unsafe {
            self.context
                .launch(loaded.function, geometry, stream, arguments.words())
        }
        .map_err(|error| error.in_kernel(kernel.name))
    }

    /// The card it is loaded on.
    #[must_use]
    pub const fn card(&self) -> &Card {
        &self.context.card
    }

    fn allow(&self, loaded: &Loaded, dynamic_bytes: u32) -> Result<(), GpuProblem> {
        let mut allowed = loaded
            .dynamic_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if dynamic_bytes > *allowed {
            self.context
                .allow_dynamic_bytes(loaded.function, dynamic_bytes)?;
            *allowed = dynamic_bytes;
        }
        Ok(())
    }
}

impl GpuProblem {
    /// The same problem, with the kernel that it happened in.
    fn in_kernel(self, name: &str) -> Self {
        match self {
            Self::Driver {
                function,
                code,
                name: code_name,
                text,
                ..
            } => Self::Driver {
                kernel: Some(name.to_owned()),
                function,
                code,
                name: code_name,
                text,
            },
            other => other,
        }
    }
}
