//! Kernel files compiled, loaded into torch's context and launched.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::ptr;

use super::cache::{Cache, Key};
use super::driver::{Context, Function, driver};
use super::kernel::{Card, File, Kernel, Value};
use super::nvrtc::{Compiled, Compiler};
use super::source::{Specialisation, translation_unit};
use super::{GpuProblem, UnsupportedReason};
use crate::{Error, Result};

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
    let target = compiler.target(capability);
    compiler.compile(file.name, &source, target, file.options())
}

/// A compiled kernel file, and what stands in the way of keeping it.
#[derive(Debug)]
pub struct Built {
    /// What the driver loads.
    pub image: Vec<u8>,
    /// Whether it came from the cache.
    pub cached: bool,
    /// Why it could not be put there.
    pub not_kept: Option<Error>,
}

/// A compiled kernel file, from the cache or, where it has none that is whole, compiled and put
/// there.
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
    let source = translation_unit(file, specialisation);
    let target = compiler.target(capability);
    let name = target.to_string();
    let key = Key {
        file: file.name,
        source: &source,
        target: &name,
        options: file.options(),
        compiler: compiler.version(),
    };
    if let Some(image) = cache.and_then(|cache| cache.get(&key)) {
        return Ok(Built {
            image,
            cached: true,
            not_kept: None,
        });
    }
    let compiled = compiler.compile(file.name, &source, target, file.options())?;
    let not_kept = cache.and_then(|cache| cache.put(&key, &compiled.image).err());
    Ok(Built {
        image: compiled.image,
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
            .load(&built.image, &names)
            .map_err(|error| error.in_kernel(file.name))?;
        let functions = kernels
            .zip(functions)
            .map(|(kernel, function)| Loaded { kernel, function })
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
