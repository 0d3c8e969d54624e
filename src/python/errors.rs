//! The one place where [`crate::Error`] becomes a Python exception.

use pyo3::create_exception;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

use crate::Error;

create_exception!(
    fourbit,
    NonFiniteError,
    PyValueError,
    "A weight to be quantized is NaN or infinite; the message names the element."
);
create_exception!(
    fourbit,
    CheckpointError,
    PyValueError,
    "A checkpoint folder or file is damaged, incomplete or of an unknown format."
);

/// The Python exception of an error: a class that callers already catch, the whole sentence.
pub(super) fn to_python(error: &Error) -> PyErr {
    let message = error.to_string();
    match error.root() {
        Error::NonFinite { .. } => NonFiniteError::new_err(message),
        Error::Io(source) => os_error(source, message),
        _ => PyValueError::new_err(message),
    }
}

/// `FileNotFoundError`, `PermissionError` and so on: Python picks the subclass by `errno`.
fn os_error(source: &std::io::Error, message: String) -> PyErr {
    match source.raw_os_error() {
        Some(errno) => PyOSError::new_err((errno, message)),
        None => PyOSError::new_err(message),
    }
}
