//! Torch tensors as Rust slices, without copies and without linking torch.
#![allow(unsafe_code)]

use half::{bf16, f16};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::element::Dtype;

/// A contiguous CPU tensor whose memory a call borrows.
///
/// It owns a reference to the Python object, so the storage lives as long as this value does.
/// As with torch's own operators, Python code must not resize or write the tensor from another
/// thread while the call runs.
pub(super) struct Tensor<'py> {
    address: usize,
    elements: usize,
    dtype: String,
    _owner: Bound<'py, PyAny>,
}

impl<'a, 'py> FromPyObject<'a, 'py> for Tensor<'py> {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let device = object.getattr("device")?.getattr("type")?;
        if device.extract::<&str>()? != "cpu" {
            return Err(PyValueError::new_err(format!(
                "the tensor is on device {device}, and this operation needs it on the CPU"
            )));
        }
        if !object.call_method0("is_contiguous")?.extract::<bool>()? {
            return Err(PyValueError::new_err(
                "the tensor is not contiguous; call .contiguous()",
            ));
        }
        let dtype = object.getattr("dtype")?.str()?;
        Ok(Self {
            address: object.call_method0("data_ptr")?.extract()?,
            elements: object.call_method0("numel")?.extract()?,
            dtype: dtype_name(&dtype)?,
            _owner: object.to_owned(),
        })
    }
}

/// `float32` of `torch.float32`.
fn dtype_name(dtype: &Bound<'_, PyString>) -> PyResult<String> {
    let name = dtype.to_cow()?;
    Ok(name.strip_prefix("torch.").unwrap_or(&name).to_owned())
}

impl Tensor<'_> {
    /// The floating-point type of the elements.
    pub(super) fn float_dtype(&self) -> PyResult<Dtype> {
        [Dtype::F32, Dtype::F16, Dtype::Bf16]
            .into_iter()
            .find(|dtype| dtype.torch_name() == self.dtype)
            .ok_or_else(|| {
                PyTypeError::new_err(format!(
                    "a tensor of dtype {} where float32, float16 or bfloat16 is needed",
                    self.dtype
                ))
            })
    }

    /// Where the elements lie in memory.
    pub(super) fn bytes(&self) -> PyResult<std::ops::Range<usize>> {
        let size = match self.dtype.as_str() {
            "uint8" => 1,
            _ => self.float_dtype()?.size(),
        };
        Ok(self.address
            ..self
                .address
                .saturating_add(self.elements.saturating_mul(size)))
    }

    /// The elements, to be read.
    pub(super) fn slice<T: Plain>(&self) -> PyResult<&[T]> {
        let address = self.checked_address::<T>()?;
        // SAFETY: torch guarantees that `data_ptr()` of a contiguous CPU tensor is the start of
        // `numel()` initialised elements of its dtype; the dtype was checked to be `T`, the
        // address to be aligned and not null. `_owner` keeps the storage alive for `self`'s
        // lifetime. The private Python layer, the only caller, does not write the tensor
        // meanwhile.
        Ok(unsafe { std::slice::from_raw_parts(address as *const T, self.elements) })
    }

    /// The elements, to be written.
    pub(super) fn slice_mut<T: Plain>(&mut self) -> PyResult<&mut [T]> {
        let address = self.checked_address::<T>()?;
        // SAFETY: as in `slice`; and the private Python layer, the only caller, passes as outputs
        // tensors that it has just made or that the operator mutates by its schema, never the same
        // memory twice in one call.
        Ok(unsafe { std::slice::from_raw_parts_mut(address as *mut T, self.elements) })
    }

    fn checked_address<T: Plain>(&self) -> PyResult<usize> {
        if self.dtype != T::TORCH_NAME {
            return Err(PyTypeError::new_err(format!(
                "a tensor of dtype {} where {} is needed",
                self.dtype,
                T::TORCH_NAME
            )));
        }
        if self.elements == 0 {
            // Torch gives empty tensors a null address, which no slice may have.
            return Ok(std::mem::align_of::<T>());
        }
        if self.address == 0 || !self.address.is_multiple_of(std::mem::align_of::<T>()) {
            return Err(PyValueError::new_err(
                "the tensor's memory is null or misaligned",
            ));
        }
        Ok(self.address)
    }
}

/// Types of which every bit pattern is a value, with torch's name for them.
pub(super) trait Plain: Copy + Send + Sync + 'static {
    const TORCH_NAME: &'static str;
}

impl Plain for u8 {
    const TORCH_NAME: &'static str = "uint8";
}
impl Plain for f32 {
    const TORCH_NAME: &'static str = Dtype::F32.torch_name();
}
impl Plain for f16 {
    const TORCH_NAME: &'static str = Dtype::F16.torch_name();
}
impl Plain for bf16 {
    const TORCH_NAME: &'static str = Dtype::Bf16.torch_name();
}

/// Runs `$body` with the type alias `$T` set to the Rust type of a [`Dtype`].
macro_rules! with_float {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            crate::element::Dtype::F32 => {
                type $T = f32;
                $body
            }
            crate::element::Dtype::F16 => {
                type $T = half::f16;
                $body
            }
            crate::element::Dtype::Bf16 => {
                type $T = half::bf16;
                $body
            }
        }
    };
}
pub(super) use with_float;
