//! Allocating memory of the driver, counting what there is, and freeing it when nothing uses it.
//!
//! These functions of the driver are a table of their own: a driver that lacks one of them can still
//! launch kernels.
#![allow(unsafe_code)]

use std::ffi::{c_uint, c_void};
use std::process;
use std::ptr;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys::{
    CU_MEMHOSTALLOC_PORTABLE, CUdevice, CUdeviceptr, CUmem_advise, CUmemAttach_flags, CUstream,
};

use super::GpuProblem;
use super::driver::{Context, NAME, driver};
use super::library::functions;

functions! {
    /// The functions (CUDA Driver API). All are in every driver of CUDA 8 and later.
    ///
    /// `cuMemAdvise` and `cuMemPrefetchAsync` have had two signatures. Under the names as they stand
    /// here, drivers export those of CUDA 8, which take a `CUdevice`: what is exported under a name
    /// never changes, and `cuda.h` of CUDA 13.2 still declares them so among what drivers export
    /// (below `__CUDA_API_VERSION_INTERNAL`). Those of CUDA 12.2, which take a `CUmemLocation`, are
    /// exported with `_v2` behind the name; a C program for CUDA 13 that says the plain names calls
    /// them by a macro.
    Functions {
        cuMemAllocManaged(*mut CUdeviceptr, usize, c_uint);
        cuMemFree_v2(CUdeviceptr);
        cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
        cuMemFreeHost(*mut c_void);
        cuMemAdvise(CUdeviceptr, usize, CUmem_advise, CUdevice);
        cuMemPrefetchAsync(CUdeviceptr, usize, CUdevice, CUstream);
        cuMemGetInfo_v2(*mut usize, *mut usize);
        cuCtxSynchronize();
    }
}

pub(super) fn functions() -> Result<&'static Functions, GpuProblem> {
    static FUNCTIONS: OnceLock<Result<Functions, GpuProblem>> = OnceLock::new();
    FUNCTIONS
        .get_or_init(|| Functions::of(driver()?.library(), NAME))
        .as_ref()
        .map_err(Clone::clone)
}

/// A kind of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It moves between the card and the host; both reach it by the same address.
    Managed,
    /// It stays in the host, and the system neither moves nor swaps it.
    PageLocked,
}

impl Kind {
    /// Its name in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Managed => "managed",
            Self::PageLocked => "page-locked",
        }
    }
}

/// Memory of one kind that is allocated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// How many pieces.
    pub allocations: u64,
    /// How many bytes they are together.
    pub bytes: u64,
}

impl Usage {
    const NONE: Self = Self {
        allocations: 0,
        bytes: 0,
    };
}

/// Memory that this process has allocated and not freed, on all cards.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InUse {
    /// Managed memory.
    pub managed: Usage,
    /// Page-locked memory.
    pub page_locked: Usage,
}

impl InUse {
    /// Both kinds together.
    #[must_use]
    pub const fn total(&self) -> Usage {
        Usage {
            allocations: self.managed.allocations + self.page_locked.allocations,
            bytes: self.managed.bytes + self.page_locked.bytes,
        }
    }

    fn of(&mut self, kind: Kind) -> &mut Usage {
        match kind {
            Kind::Managed => &mut self.managed,
            Kind::PageLocked => &mut self.page_locked,
        }
    }

    fn add(&mut self, kind: Kind, bytes: usize) {
        let usage = self.of(kind);
        usage.allocations += 1;
        usage.bytes += bytes as u64;
    }

    fn remove(&mut self, kind: Kind, bytes: usize) {
        let usage = self.of(kind);
        usage.allocations -= 1;
        usage.bytes -= bytes as u64;
    }
}

/// The memory that this process has allocated and not freed. What could not be freed counts.
#[must_use]
pub fn in_use() -> InUse {
    ledger().in_use
}

/// What there is, and what of it is only still to be freed.
#[derive(Debug)]
struct Ledger {
    in_use: InUse,
    waiting: Vec<Block>,
}

static LEDGER: Mutex<Ledger> = Mutex::new(Ledger {
    in_use: InUse {
        managed: Usage::NONE,
        page_locked: Usage::NONE,
    },
    waiting: Vec::new(),
});

/// A poisoned one is whole: nothing stops halfway while it is held.
fn ledger() -> MutexGuard<'static, Ledger> {
    LEDGER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A piece of memory; to drop it is to free it. Its bytes are not set to anything.
#[derive(Debug)]
pub(super) struct Allocation(Block);

impl Allocation {
    /// Allocates so many bytes for a card.
    ///
    /// # Errors
    /// [`GpuProblem::EmptyMemory`] for 0 bytes; [`GpuProblem::Memory`] where the driver does not
    /// give them; [`GpuProblem::Driver`] for a card that is not there, and what else [`driver`]
    /// says.
    pub(super) fn new(device: u32, kind: Kind, bytes: usize) -> Result<Self, GpuProblem> {
        if bytes == 0 {
            return Err(GpuProblem::EmptyMemory { kind: kind.name() });
        }
        let functions = functions()?;
        let context = driver()?.context(device)?;
        free_waiting();
        let work = || {
            let block = Block::allocate(functions, context, kind, bytes)?;
            ledger().in_use.add(kind, bytes);
            // From here on, whatever fails drops it.
            let allocation = Self(block);
            if kind == Kind::Managed {
                block.advise(functions)?;
            }
            Ok(allocation)
        };
        context
            .current(|| context.relaxed(work))
            .map_err(|reason| GpuProblem::Memory {
                kind: kind.name(),
                bytes,
                device,
                reason: Box::new(reason),
            })
    }

    /// The context of its card.
    pub(super) const fn context(&self) -> &Context {
        &self.0.context
    }

    /// Where it is.
    pub(super) const fn address(&self) -> CUdeviceptr {
        self.0.address
    }

    /// How long it is.
    pub(super) const fn bytes(&self) -> usize {
        self.0.bytes
    }
}

impl Drop for Allocation {
    /// Waits for the card, which may still use the memory, and frees it. Where the card cannot be
    /// waited for, as while a graph is captured, it is freed when the next piece is allocated or
    /// dropped.
    fn drop(&mut self) {
        free_waiting();
        self.0.free_and_note();
    }
}

/// Frees what could not be freed when it was dropped.
fn free_waiting() {
    let waiting = std::mem::take(&mut ledger().waiting);
    waiting.into_iter().for_each(Block::free_and_note);
}

/// What came of freeing a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Freed {
    Yes,
    /// The card could not be waited for, so it may still be at work on the memory.
    NotYet,
    /// The driver failed to. Whether the memory is gone is unknown, so it is not tried again: the
    /// address may be somebody else's by then.
    Unknown,
}

/// A piece of memory that has to be freed once.
#[derive(Debug, Clone, Copy)]
struct Block {
    context: Context,
    kind: Kind,
    address: CUdeviceptr,
    bytes: usize,
    /// The process that allocated it.
    process: u32,
}

impl Block {
    /// In the context, which is current.
    fn allocate(
        functions: &Functions,
        context: Context,
        kind: Kind,
        bytes: usize,
    ) -> Result<Self, GpuProblem> {
        let address = match kind {
            Kind::Managed => {
                let global = CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL as c_uint;
                let mut address = 0;
                // SAFETY: an address to write to.
                let code =
                    unsafe { (functions.cuMemAllocManaged)(&raw mut address, bytes, global) };
                context.driver.check("cuMemAllocManaged", code)?;
                address
            }
            Kind::PageLocked => {
                let mut address = ptr::null_mut();
                // SAFETY: an address to write to.
                let code = unsafe {
                    (functions.cuMemHostAlloc)(&raw mut address, bytes, CU_MEMHOSTALLOC_PORTABLE)
                };
                context.driver.check("cuMemHostAlloc", code)?;
                address as CUdeviceptr
            }
        };
        Ok(Self {
            context,
            kind,
            address,
            bytes,
            process: process::id(),
        })
    }

    /// Tells the driver to keep managed memory on its card while there is room, and to have the card
    /// reach it wherever it is, so that a page that is away is used from afar and not moved at each
    /// touch.
    fn advise(&self, functions: &Functions) -> Result<(), GpuProblem> {
        [
            CUmem_advise::CU_MEM_ADVISE_SET_PREFERRED_LOCATION,
            CUmem_advise::CU_MEM_ADVISE_SET_ACCESSED_BY,
        ]
        .into_iter()
        .try_for_each(|advice| {
            let device = self.context.device;
            // SAFETY: the range is all of managed memory that is alive; the handle is a card's.
            let code = unsafe { (functions.cuMemAdvise)(self.address, self.bytes, advice, device) };
            self.context.driver.check("cuMemAdvise", code)
        })
    }

    fn free_and_note(self) {
        // A forked child has its parent's values, and cannot use its parent's driver.
        if self.process != process::id() {
            return;
        }
        match self.free() {
            Freed::Yes => ledger().in_use.remove(self.kind, self.bytes),
            Freed::NotYet => ledger().waiting.push(self),
            Freed::Unknown => {}
        }
    }

    /// Waits for the card, then frees the memory. Only after [`Freed::NotYet`] may it be called
    /// again.
    fn free(&self) -> Freed {
        let mut freed = Freed::NotYet;
        let Ok(functions) = functions() else {
            return freed;
        };
        let context = &self.context;
        let work = || {
            // SAFETY: takes nothing.
            let code = unsafe { (functions.cuCtxSynchronize)() };
            context.driver.check("cuCtxSynchronize", code)?;
            let code = match self.kind {
                // SAFETY: `cuMemAllocManaged` gave the address, the card is done with it, and by
                // this function's own contract it is given back once.
                Kind::Managed => unsafe { (functions.cuMemFree_v2)(self.address) },
                // SAFETY: as above, by `cuMemHostAlloc`.
                Kind::PageLocked => unsafe {
                    (functions.cuMemFreeHost)(self.address as *mut c_void)
                },
            };
            freed = if code == 0 {
                Freed::Yes
            } else {
                Freed::Unknown
            };
            Ok(())
        };
        // What fails besides is told to nobody: values are dropped where nobody could be told.
        let _ = context.current(|| context.relaxed(work));
        freed
    }
}
