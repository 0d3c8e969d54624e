//! Torch tensors as Rust slices, without copies and without linking torch.
#![allow(unsafe_code)]

use std::borrow::Cow;

use half::{bf16, f16};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::element::Dtype;

/// A contiguous CPU tensor whose memory a call borrows.
///
/// It owns a reference to the Python object, so the storage lives as long as this value does.
/// As with torch's own operators, Python code must not resize or write the tensor from another
/// thread while the call runs.
pub(super) struct Tensor<'py> {
    address: usize,
    elements: usize,
    dtype: Element,
    _owner: Bound<'py, PyAny>,
}

impl<'a, 'py> FromPyObject<'a, 'py> for Tensor<'py> {
    type Error = PyErr;

    // A layer of a small model computes in some tens of microseconds and passes seven tensors: five
    // look-ups by interned names, and no string.
    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let py = object.py();
        if !object.getattr(intern!(py, "is_cpu"))?.extract::<bool>()? {
            let device = object.getattr("device")?.getattr("type")?;
            return Err(PyValueError::new_err(format!(
                "the tensor is on device {device}, and this operation needs it on the CPU"
            )));
        }
        let is_contiguous = object.call_method0(intern!(py, "is_contiguous"))?;
        if !is_contiguous.extract::<bool>()? {
            return Err(PyValueError::new_err(
                "the tensor is not contiguous; call .contiguous()",
            ));
        }
        Ok(Self {
            address: object
                .call_method0(intern!(py, "data_ptr"))?
                .extract::<usize>()?,
            elements: object
                .call_method0(intern!(py, "numel"))?
                .extract::<usize>()?,
            dtype: Element::of(&object.getattr(intern!(py, "dtype"))?)?,
            _owner: object.to_owned(),
        })
    }
}

/// What a tensor's elements are.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Element {
    Byte,
    Float(Dtype),
    /// Nothing that is computed with here; its name.
    Other(String),
}

/// Torch's dtype objects, of which there is one each, with what they stand for.
static KNOWN: PyOnceLock<[(Py<PyAny>, Element); 4]> = PyOnceLock::new();

impl Element {
    /// Of a tensor's `dtype`.
    fn of(dtype: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = dtype.py();
        let known = KNOWN.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let named = |element: Self| -> PyResult<_> {
                Ok((torch.getattr(element.name())?.unbind(), element))
            };
            Ok::<_, PyErr>([
                named(Self::Byte)?,
                named(Self::Float(Dtype::F32))?,
                named(Self::Float(Dtype::F16))?,
                named(Self::Float(Dtype::Bf16))?,
            ])
        })?;
        if let Some((_, element)) = known.iter().find(|(object, _)| object.is(dtype)) {
            return Ok(element.clone());
        }
        let name = dtype.str()?.to_cow()?.into_owned();
        Ok(Self::Other(
            name.strip_prefix("torch.").unwrap_or(&name).to_owned(),
        ))
    }

    /// `float32` of `torch.float32`.
    fn name(&self) -> &str {
        match self {
            Self::Byte => "uint8",
            Self::Float(dtype) => dtype.torch_name(),
            Self::Other(name) => name,
        }
    }
}

impl Tensor<'_> {
    /// The floating-point type of the elements.
    pub(super) fn float_dtype(&self) -> PyResult<Dtype> {
        match &self.dtype {
            Element::Float(dtype) => Ok(*dtype),
            other => Err(PyTypeError::new_err(format!(
                "a tensor of dtype {} where float32, float16 or bfloat16 is needed",
                other.name()
            ))),
        }
    }

    /// Where the elements lie in memory.
    pub(super) fn bytes(&self) -> PyResult<std::ops::Range<usize>> {
        let size = match self.dtype {
            Element::Byte => 1,
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

    /// The float32 numbers whose bytes these uint8 elements are, to be read; a copy where they are
    /// not aligned, as tensors in a mapped file need not be.
    pub(super) fn floats(&self) -> PyResult<Cow<'_, [f32]>> {
        let bytes = self.slice::<u8>()?;
        if !bytes.len().is_multiple_of(size_of::<f32>()) {
            let message = "the bytes of float32 numbers are not a multiple of four";
            return Err(PyValueError::new_err(message));
        }
        Ok(match bytemuck::try_cast_slice(bytes) {
            Ok(floats) => Cow::Borrowed(floats),
            Err(_) => Cow::Owned(
                bytes
                    .chunks_exact(size_of::<f32>())
                    .map(bytemuck::pod_read_unaligned)
                    .collect(),
            ),
        })
    }

    fn checked_address<T: Plain>(&self) -> PyResult<usize> {
        if self.dtype != T::ELEMENT {
            return Err(PyTypeError::new_err(format!(
                "a tensor of dtype {} where {} is needed",
                self.dtype.name(),
                T::ELEMENT.name()
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

/// Types of which every bit pattern is a value, with what torch has for them.
pub(super) trait Plain: Copy + Send + Sync + 'static {
    const ELEMENT: Element;
}

impl Plain for u8 {
    const ELEMENT: Element = Element::Byte;
}
impl Plain for f32 {
    const ELEMENT: Element = Element::Float(Dtype::F32);
}
impl Plain for f16 {
    const ELEMENT: Element = Element::Float(Dtype::F16);
}
impl Plain for bf16 {
    const ELEMENT: Element = Element::Float(Dtype::Bf16);
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
