//! Memory for a card, for Python: what torch and numpy make tensors and arrays over.
#![allow(unsafe_code)]

use std::mem;

use pyo3::exceptions::{PyAttributeError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::errors::to_python;
use crate::gpu::GpuProblem;
use crate::gpu::memory::{self, Kind, Managed, PageLocked, Place};

/// A piece of memory for a card, freed when nothing refers to it any more. Whatever is made over it
/// by `__cuda_array_interface__` or `__array_interface__` does. Its bytes are not set to anything.
#[pyclass(frozen, module = "fourbit._core")]
pub(super) struct CardMemory {
    kind: Kind,
    address: u64,
    bytes: usize,
    held: Held,
}

enum Held {
    Managed(Managed),
    /// Never touched: only to be dropped.
    PageLocked {
        _memory: PageLocked,
    },
    /// While it is being dropped.
    Nothing,
}

impl Drop for CardMemory {
    /// Waits for the card without the GIL: a stream may hold work of the host that needs it.
    fn drop(&mut self) {
        let held = mem::replace(&mut self.held, Held::Nothing);
        // Without an interpreter to let go of, the closure, and what it holds, is dropped.
        let _ = Python::try_attach(|py| py.detach(|| drop(held)));
    }
}

#[pymethods]
impl CardMemory {
    /// Managed memory, which moves between the card of that number and the host. It prefers to be on
    /// the card, and the card reaches it wherever it is.
    #[staticmethod]
    fn managed(py: Python<'_>, device: u32, size: usize) -> PyResult<Self> {
        let memory = detached(py, || Managed::new(device, size))?;
        Ok(Self {
            kind: Kind::Managed,
            address: memory.address(),
            bytes: memory.bytes(),
            held: Held::Managed(memory),
        })
    }

    /// Page-locked memory of the host, for copies to and from cards; freeing it waits for the card
    /// of that number.
    #[staticmethod]
    fn page_locked(py: Python<'_>, device: u32, size: usize) -> PyResult<Self> {
        let memory = detached(py, || PageLocked::new(device, size))?;
        Ok(Self {
            kind: Kind::PageLocked,
            address: memory.address(),
            bytes: memory.bytes(),
            held: Held::PageLocked { _memory: memory },
        })
    }

    /// Its bytes.
    #[getter]
    fn size(&self) -> usize {
        self.bytes
    }

    /// Its address: of managed memory for the card and the host, of page-locked memory for the host.
    #[getter]
    fn address(&self) -> u64 {
        self.address
    }

    /// "managed" or "page-locked".
    #[getter]
    fn kind(&self) -> &'static str {
        self.kind.name()
    }

    /// Puts into a stream of the memory's card, given as torch's `cuda_stream`, that `size` bytes
    /// from `offset` on are moved to the card or to the host. Returns False where the card has no
    /// room, so that they stay where they are and are used from there.
    #[pyo3(signature = (offset, size, *, to_card, stream))]
    fn prefetch(
        &self,
        py: Python<'_>,
        offset: usize,
        size: usize,
        to_card: bool,
        stream: usize,
    ) -> PyResult<bool> {
        let Held::Managed(memory) = &self.held else {
            return Err(PyTypeError::new_err(format!(
                "{} memory is never moved; only managed memory can be prefetched",
                self.kind.name()
            )));
        };
        let place = if to_card { Place::Card } else { Place::Host };
        // SAFETY: the private Python layer, the only caller, passes the handle of a torch stream of
        // the memory's card, and torch's context is the card's primary one.
        detached(py, || unsafe {
            memory.prefetch(offset, size, place, stream)
        })
    }

    /// Of managed memory alone: all its bytes, version 3 of numba's "CUDA Array Interface".
    #[getter(__cuda_array_interface__)]
    fn cuda_array_interface<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = self.interface(py, Kind::Managed, "__cuda_array_interface__")?;
        // Nobody else has queued work on it.
        interface.set_item("stream", py.None())?;
        Ok(interface)
    }

    /// Of page-locked memory alone: all its bytes, version 3 of numpy's "array interface protocol".
    #[getter(__array_interface__)]
    fn array_interface<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.interface(py, Kind::PageLocked, "__array_interface__")
    }
}

impl CardMemory {
    /// What both protocols say of it; an `AttributeError` by that name for the other kind.
    fn interface<'py>(
        &self,
        py: Python<'py>,
        of: Kind,
        name: &str,
    ) -> PyResult<Bound<'py, PyDict>> {
        if self.kind != of {
            let kind = self.kind.name();
            return Err(PyAttributeError::new_err(format!(
                "{kind} memory has no {name}"
            )));
        }
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("typestr", "|u1")?;
        interface.set_item("shape", (self.bytes,))?;
        interface.set_item("data", (self.address, false))?; // false: it may be written to
        interface.set_item("strides", py.None())?;
        Ok(interface)
    }
}

/// Whether managed memory of the card of that number is moved page by page, as it is used.
#[pyfunction]
pub(super) fn card_can_page(py: Python<'_>, device: u32) -> PyResult<bool> {
    detached(py, || memory::can_page(device))
}

/// The bytes of the card of that number that are free, and all that it has.
#[pyfunction]
pub(super) fn card_free_memory(py: Python<'_>, device: u32) -> PyResult<(u64, u64)> {
    detached(py, || memory::free_memory(device))
}

/// How many pieces of `CardMemory` this process has that are not freed, and their bytes. What the
/// driver failed to free counts.
#[pyfunction]
pub(super) fn card_memory_in_use(py: Python<'_>) -> (u64, u64) {
    let total = py.detach(memory::in_use).total();
    (total.allocations, total.bytes)
}

fn detached<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T, GpuProblem> + Send,
) -> PyResult<T> {
    py.detach(work)
        .map_err(|problem| to_python(&problem.into()))
}
