//! Memory for a card, each piece freed when the value that stands for it is dropped: managed
//! memory, which moves between the card and the host, and page-locked memory of the host, which
//! the card copies to and from beside its kernels.
#![allow(unsafe_code)]

use cudarc::driver::sys::{CUdevice, CUdevice_attribute, CUstream};

use super::GpuProblem;
use super::allocation::{Allocation, functions};
use super::driver::driver;

pub use super::allocation::{InUse, Kind, Usage, in_use};

/// What `cuda.h` calls `CU_DEVICE_CPU`: the host, where a card's handle could stand.
const HOST: CUdevice = -1;

/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: u32 = 2;

/// Whether the driver moves managed memory of that card page by page, while the host and other
/// cards may use it: not on Windows, under WSL or on cards before Pascal.
///
/// # Errors
/// [`GpuProblem::Driver`], and what else [`driver`] says.
pub fn can_page(device: u32) -> Result<bool, GpuProblem> {
    use CUdevice_attribute as Attribute;
    let driver = driver()?;
    let handle = driver.handle(device)?;
    let managed = Attribute::CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY;
    let concurrent = Attribute::CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS;
    Ok(driver.attribute(managed, handle)? != 0 && driver.attribute(concurrent, handle)? != 0)
}

/// The bytes of a card that are free, and all that it has, by the driver. Makes the card's context
/// where the process has none.
///
/// # Errors
/// [`GpuProblem::Driver`], and what else [`driver`] says.
pub fn free_memory(device: u32) -> Result<(u64, u64), GpuProblem> {
    let functions = functions()?;
    let context = driver()?.context(device)?;
    let (mut free, mut total) = (0, 0);
    context.current(|| {
        // SAFETY: two numbers to write to.
        let code = unsafe { (functions.cuMemGetInfo_v2)(&raw mut free, &raw mut total) };
        context.driver.check("cuMemGetInfo", code)
    })?;
    Ok((free as u64, total as u64))
}

/// Managed memory. It prefers to be on its card, and its card reaches it wherever it is: where the
/// card has no room, kernels work on it across the bus. Its bytes are not set to anything at first.
#[derive(Debug)]
pub struct Managed(Allocation);

/// Where managed memory is moved to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The card that it was allocated for.
    Card,
    /// The host.
    Host,
}

impl Managed {
    /// Allocates so many bytes for a card.
    ///
    /// # Errors
    /// [`GpuProblem::EmptyMemory`] for 0 bytes; [`GpuProblem::Memory`] where the driver does not
    /// give them; [`GpuProblem::Driver`] for a card that is not there, and what else [`driver`]
    /// says.
    pub fn new(device: u32, bytes: usize) -> Result<Self, GpuProblem> {
        Allocation::new(device, Kind::Managed, bytes).map(Self)
    }

    /// Where it is, for the card and for the host.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.0.address()
    }

    /// Its bytes.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// Puts into a stream that a part is moved to the card or to the host. The driver moves whole
    /// pages of its own, so what lies beside either end may move along.
    ///
    /// Returns false where the card has no room for it: it stays where it is, and the card uses it
    /// from there. With no bytes there is nothing to do, which is true.
    ///
    /// # Errors
    /// [`GpuProblem::MemoryRange`]; [`GpuProblem::Driver`] for this call, or for earlier work that
    /// failed on the card.
    ///
    /// # Safety
    /// `stream` is a live stream of the card's primary context, or 0.
    pub unsafe fn prefetch(
        &self,
        offset: usize,
        bytes: usize,
        to: Place,
        stream: usize,
    ) -> Result<bool, GpuProblem> {
        let start = start_of(self.address(), offset, bytes, self.bytes())?;
        if bytes == 0 {
            return Ok(true);
        }
        let functions = functions()?;
        let context = self.0.context();
        let target = match to {
            Place::Card => context.device,
            Place::Host => HOST,
        };
        context.current(|| {
            // SAFETY: the range is one of managed memory that is alive, as was just checked; the
            // stream is so by this function's own contract.
            let code =
                unsafe { (functions.cuMemPrefetchAsync)(start, bytes, target, stream as CUstream) };
            if code == OUT_OF_MEMORY {
                return Ok(false);
            }
            context.driver.check("cuMemPrefetchAsync", code)?;
            Ok(true)
        })
    }
}

/// The address of a part of memory, or why there is none.
fn start_of(address: u64, offset: usize, bytes: usize, size: usize) -> Result<u64, GpuProblem> {
    match offset.checked_add(bytes) {
        Some(end) if end <= size => Ok(address + offset as u64),
        _ => Err(GpuProblem::MemoryRange {
            offset,
            bytes,
            size,
        }),
    }
}

/// Page-locked memory of the host, page-locked for all cards. Its bytes are not set to anything at
/// first.
#[derive(Debug)]
pub struct PageLocked(Allocation);

impl PageLocked {
    /// Allocates so many bytes; before they are freed, that card is waited for.
    ///
    /// # Errors
    /// As [`Managed::new`].
    pub fn new(device: u32, bytes: usize) -> Result<Self, GpuProblem> {
        Allocation::new(device, Kind::PageLocked, bytes).map(Self)
    }

    /// Where it is, for the host.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.0.address()
    }

    /// Its bytes.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_part_lies_within_the_memory(
            offset in prop_oneof![0_usize..80, any::<usize>()],
            bytes in prop_oneof![0_usize..80, any::<usize>()],
            size in 1_usize..80,
        ) {
            let inside = offset as u128 + bytes as u128 <= size as u128;
            match start_of(4096, offset, bytes, size) {
                Ok(start) => {
                    prop_assert!(inside);
                    prop_assert_eq!(start, 4096 + offset as u64);
                }
                Err(problem) => {
                    prop_assert!(!inside);
                    prop_assert_eq!(problem, GpuProblem::MemoryRange { offset, bytes, size });
                }
            }
        }
    }

    #[test]
    fn no_bytes_are_refused_whether_there_is_a_driver_or_not() {
        assert_eq!(
            Managed::new(0, 0).map(|_| ()),
            Err(GpuProblem::EmptyMemory { kind: "managed" })
        );
        assert_eq!(
            PageLocked::new(0, 0).map(|_| ()),
            Err(GpuProblem::EmptyMemory {
                kind: "page-locked"
            })
        );
    }

    #[test]
    fn a_failed_allocation_says_what_was_asked_for_and_what_to_do() {
        let reason = GpuProblem::Driver {
            kernel: None,
            function: "cuMemAllocManaged",
            code: OUT_OF_MEMORY,
            name: "CUDA_ERROR_OUT_OF_MEMORY".to_owned(),
            text: "out of memory".to_owned(),
        };
        let problem = GpuProblem::Memory {
            kind: Kind::Managed.name(),
            bytes: 16 << 20,
            device: 1,
            reason: Box::new(reason),
        };
        assert_eq!(
            problem.to_string(),
            "16777216 bytes of managed memory cannot be had for GPU 1: cuMemAllocManaged failed: \
             CUDA_ERROR_OUT_OF_MEMORY (2): out of memory; keep the optimizer's state in fewer bits, \
             use another pager, or free memory"
        );
    }
}
