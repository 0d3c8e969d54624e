//! Shared libraries that are opened at run time, and tables of their functions.
//!
//! Functions are looked up by us and return plain integers: the bindings of `cudarc`, whose types
//! are used, panic where an old library lacks a function, take the first library of a name that
//! the system finds, and hold results in enums that a newer library's codes do not fit in.
#![allow(unsafe_code)]

use std::error::Error;
use std::ffi::OsStr;

use libloading::Library;

/// Opens a library and runs what it does on being opened. The error is what the system says.
pub(super) fn open(path: impl AsRef<OsStr>) -> Result<Library, String> {
    // SAFETY: the callers open NVIDIA's driver and NVIDIA's compiler alone, by names or paths that
    // the user's own environment gives; what these run when opened may be run at any time, on any
    // thread. They are never closed.
    unsafe { Library::new(path.as_ref()) }.map_err(|error| match error.source() {
        Some(reason) => reason.to_string(),
        None => error.to_string(),
    })
}

/// Declares a table of functions that return an `u32`, zero for success.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident { $($name:ident($($argument:ty),* $(,)?);)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        #[allow(non_snake_case)] // as NVIDIA names them
        pub(super) struct $table {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> u32,)*
        }

        impl $table {
            /// Looks all of them up in a library that stays open.
            pub(super) fn of(
                library: &libloading::Library,
                path: &str,
            ) -> Result<Self, $crate::gpu::GpuProblem> {
                Ok(Self {
                    $($name: {
                        // SAFETY: the signature is the one that NVIDIA documents for the name, of
                        // which it never changes one; the callers keep the library open for ever.
                        unsafe {
                            library.get::<unsafe extern "C" fn($($argument),*) -> u32>(
                                concat!(stringify!($name), "\0").as_bytes(),
                            )
                        }
                        .map(|function| *function)
                        .map_err(|_| $crate::gpu::GpuProblem::MissingFunction {
                            library: path.to_owned(),
                            function: stringify!($name),
                        })?
                    },)*
                })
            }
        }
    };
}
pub(super) use functions;
