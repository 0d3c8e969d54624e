//! The CUDA driver: opened when it is first needed, its cards, their contexts, and the few functions
//! that launching takes.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::ManuallyDrop;
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_attribute, CUfunction, CUfunction_attribute, CUmodule, CUstream,
    CUstreamCaptureMode,
};
use libloading::Library;

use super::GpuProblem;
use super::kernel::{Card, Geometry};
use super::library::{functions, open};

/// The driver's library, by the name that torch opens it by.
pub(super) const NAME: &str = if cfg!(windows) {
    "nvcuda.dll"
} else {
    "libcuda.so.1"
};

functions! {
    /// The functions (CUDA Driver API). All are in every driver of CUDA 11 and later.
    Functions {
        cuInit(c_uint);
        cuDriverGetVersion(*mut c_int);
        cuGetErrorName(u32, *mut *const c_char);
        cuGetErrorString(u32, *mut *const c_char);
        cuDeviceGetCount(*mut c_int);
        cuDeviceGet(*mut CUdevice, c_int);
        cuDeviceGetName(*mut c_char, c_int, CUdevice);
        cuDeviceTotalMem_v2(*mut usize, CUdevice);
        cuDeviceGetAttribute(*mut c_int, CUdevice_attribute, CUdevice);
        cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
        cuCtxGetCurrent(*mut CUcontext);
        cuCtxPushCurrent_v2(CUcontext);
        cuCtxPopCurrent_v2(*mut CUcontext);
        cuThreadExchangeStreamCaptureMode(*mut CUstreamCaptureMode);
        cuModuleLoadData(*mut CUmodule, *const c_void);
        cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
        cuFuncGetAttribute(*mut c_int, CUfunction_attribute, CUfunction);
        cuFuncSetAttribute(CUfunction, CUfunction_attribute, c_int);
        cuLaunchKernel(
            CUfunction,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            CUstream,
            *mut *mut c_void,
            *mut *mut c_void,
        );
    }
}

/// The driver, initialised.
#[derive(Debug)]
pub struct Driver {
    functions: Functions,
    /// Never closed: torch uses it too.
    library: ManuallyDrop<Library>,
}

/// A card, as the driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its number, as torch counts.
    pub ordinal: u32,
    /// Its name.
    pub name: String,
    /// Bytes of memory.
    pub memory: u64,
    /// What a launch needs to know.
    pub card: Card,
}

/// The primary context of a card, which is the one that torch uses; kept for the process's life.
#[derive(Debug, Clone, Copy)]
pub struct Context {
    pub(super) driver: &'static Driver,
    /// The driver's handle of the card.
    pub(super) device: CUdevice,
    handle: CUcontext,
    /// Shared memory that a block may have if it asks.
    block_bytes: u32,
    /// The card.
    pub card: Card,
}

// SAFETY: a context may be used by any thread on which it is current (CUDA Driver API, "Context
// Management"); `Context` makes it current for each call and never changes the handle.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// A kernel that is loaded into a context; for the process's life.
#[derive(Debug, Clone, Copy)]
pub struct Function(CUfunction);

// SAFETY: a handle that the driver gives out and takes from any thread.
unsafe impl Send for Function {}
// SAFETY: as above; nothing changes it.
unsafe impl Sync for Function {}

/// The driver of this machine.
///
/// # Errors
/// [`GpuProblem::DriverMissing`] where there is none; [`GpuProblem::MissingFunction`] where it is
/// too old; [`GpuProblem::Driver`] where it does not start, as with no card.
pub fn driver() -> Result<&'static Driver, GpuProblem> {
    static DRIVER: OnceLock<Result<Driver, GpuProblem>> = OnceLock::new();
    DRIVER
        .get_or_init(Driver::open)
        .as_ref()
        .map_err(Clone::clone)
}

impl Driver {
    fn open() -> Result<Self, GpuProblem> {
        let library = open(NAME).map_err(|reason| GpuProblem::DriverMissing { reason })?;
        let driver = Self {
            functions: Functions::of(&library, NAME)?,
            library: ManuallyDrop::new(library),
        };
        // SAFETY: the flags must be zero.
        driver.check("cuInit", unsafe { (driver.functions.cuInit)(0) })?;
        Ok(driver)
    }

    pub(super) fn check(&self, function: &'static str, code: u32) -> Result<(), GpuProblem> {
        if code == 0 {
            return Ok(());
        }
        let text = |get: unsafe extern "C" fn(u32, *mut *const c_char) -> u32| {
            let mut text = ptr::null();
            // SAFETY: a pointer to write to. The driver gives strings that end in zero and are
            // never freed, or leaves null for a code that it does not know.
            unsafe {
                if get(code, &raw mut text) != 0 || text.is_null() {
                    return "unknown error".to_owned();
                }
                CStr::from_ptr(text).to_string_lossy().into_owned()
            }
        };
        Err(GpuProblem::Driver {
            kernel: None,
            function,
            code,
            name: text(self.functions.cuGetErrorName),
            text: text(self.functions.cuGetErrorString),
        })
    }

    /// Where more of its functions can be looked up; it stays open.
    pub(super) fn library(&self) -> &Library {
        &self.library
    }

    /// The newest CUDA that the driver can run: 13 and 0 for CUDA 13.0.
    ///
    /// # Errors
    /// [`GpuProblem::Driver`].
    pub fn version(&self) -> Result<(u32, u32), GpuProblem> {
        let mut version = 0;
        // SAFETY: an integer to write to.
        let code = unsafe { (self.functions.cuDriverGetVersion)(&raw mut version) };
        self.check("cuDriverGetVersion", code)?;
        let version = version.cast_unsigned();
        Ok((version / 1000, version % 1000 / 10))
    }

    /// The cards that this process may see.
    ///
    /// # Errors
    /// [`GpuProblem::Driver`].
    pub fn devices(&self) -> Result<Vec<Device>, GpuProblem> {
        let mut count = 0;
        // SAFETY: an integer to write to.
        let code = unsafe { (self.functions.cuDeviceGetCount)(&raw mut count) };
        self.check("cuDeviceGetCount", code)?;
        (0..count.cast_unsigned())
            .map(|ordinal| self.device(ordinal))
            .collect()
    }

    fn device(&self, ordinal: u32) -> Result<Device, GpuProblem> {
        let handle = self.handle(ordinal)?;
        let mut name = [0_u8; 256];
        let mut memory = 0;
        // SAFETY: `name` has 256 bytes, as is said, of which the driver writes a string that ends
        // in zero; `handle` is a card's.
        let code =
            unsafe { (self.functions.cuDeviceGetName)(name.as_mut_ptr().cast(), 256, handle) };
        self.check("cuDeviceGetName", code)?;
        // SAFETY: a number to write to.
        let code = unsafe { (self.functions.cuDeviceTotalMem_v2)(&raw mut memory, handle) };
        self.check("cuDeviceTotalMem", code)?;
        let name = CStr::from_bytes_until_nul(&name).unwrap_or(c"?");
        Ok(Device {
            ordinal,
            name: name.to_string_lossy().into_owned(),
            memory: memory as u64,
            card: self.card(handle)?,
        })
    }

    pub(super) fn handle(&self, ordinal: u32) -> Result<CUdevice, GpuProblem> {
        let mut handle = 0;
        // No machine has as many cards as would not fit; the driver refuses such a number.
        let ordinal = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        // SAFETY: an integer to write to.
        let code = unsafe { (self.functions.cuDeviceGet)(&raw mut handle, ordinal) };
        self.check("cuDeviceGet", code)?;
        Ok(handle)
    }

    pub(super) fn attribute(
        &self,
        attribute: CUdevice_attribute,
        handle: CUdevice,
    ) -> Result<u32, GpuProblem> {
        let mut value = 0;
        // SAFETY: an integer to write to; `handle` is a card's.
        let code =
            unsafe { (self.functions.cuDeviceGetAttribute)(&raw mut value, attribute, handle) };
        self.check("cuDeviceGetAttribute", code)?;
        Ok(value.cast_unsigned())
    }

    fn card(&self, handle: CUdevice) -> Result<Card, GpuProblem> {
        use CUdevice_attribute as Attribute;
        let attribute = |attribute| self.attribute(attribute, handle);
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        Ok(Card {
            capability: 10 * major + minor,
            processors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        })
    }

    /// The primary context of a card.
    ///
    /// # Errors
    /// [`GpuProblem::Driver`].
    pub fn context(&'static self, ordinal: u32) -> Result<Context, GpuProblem> {
        let device = self.handle(ordinal)?;
        let mut handle = ptr::null_mut();
        // SAFETY: a handle to write to. It is never released: see `Context`.
        let code = unsafe { (self.functions.cuDevicePrimaryCtxRetain)(&raw mut handle, device) };
        self.check("cuDevicePrimaryCtxRetain", code)?;
        let most = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        Ok(Context {
            driver: self,
            device,
            handle,
            block_bytes: self.attribute(most, device)?,
            card: self.card(device)?,
        })
    }
}

impl Context {
    /// Runs `work` on this thread with the context current.
    pub(super) fn current<T>(
        &self,
        work: impl FnOnce() -> Result<T, GpuProblem>,
    ) -> Result<T, GpuProblem> {
        let functions = &self.driver.functions;
        let mut now = ptr::null_mut();
        // SAFETY: a handle to write to.
        let code = unsafe { (functions.cuCtxGetCurrent)(&raw mut now) };
        self.driver.check("cuCtxGetCurrent", code)?;
        if now == self.handle {
            return work();
        }
        // SAFETY: the context is retained for the process's life.
        let code = unsafe { (functions.cuCtxPushCurrent_v2)(self.handle) };
        self.driver.check("cuCtxPushCurrent", code)?;
        let result = work();
        // SAFETY: takes off what was just pushed; `work` leaves the stack as it was.
        let code = unsafe { (functions.cuCtxPopCurrent_v2)(&raw mut now) };
        let value = result?;
        self.driver.check("cuCtxPopCurrent", code)?;
        Ok(value)
    }

    /// Runs `work` such that it may allocate while this thread captures a graph.
    pub(super) fn relaxed<T>(
        &self,
        work: impl FnOnce() -> Result<T, GpuProblem>,
    ) -> Result<T, GpuProblem> {
        let exchange = self.driver.functions.cuThreadExchangeStreamCaptureMode;
        let mut mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: a mode to read and write; there have been three since there are any.
        let code = unsafe { exchange(&raw mut mode) };
        self.driver
            .check("cuThreadExchangeStreamCaptureMode", code)?;
        let result = work();
        // SAFETY: as above; puts back what was there.
        let code = unsafe { exchange(&raw mut mode) };
        let value = result?;
        self.driver
            .check("cuThreadExchangeStreamCaptureMode", code)?;
        Ok(value)
    }

    /// Loads a compiled kernel file and finds functions in it, which may have all of a block's
    /// shared memory. Nothing of it is ever unloaded.
    ///
    /// # Errors
    /// [`GpuProblem::Driver`].
    pub fn load(&self, image: &[u8], names: &[&CStr]) -> Result<Vec<Function>, GpuProblem> {
        let driver = self.driver;
        self.current(|| {
            self.relaxed(|| {
                let mut module = ptr::null_mut();
                // SAFETY: `image` is an ELF file, which says its size itself, or PTX, which the
                // compiler ends in a zero; whole by its checksum or fresh from the compiler. The
                // driver copies what it needs.
                let code = unsafe {
                    (driver.functions.cuModuleLoadData)(&raw mut module, image.as_ptr().cast())
                };
                driver.check("cuModuleLoadData", code)?;
                let find = |name: &&CStr| {
                    let mut function = ptr::null_mut();
                    // SAFETY: `module` was just loaded; `name` ends in zero.
                    let code = unsafe {
                        (driver.functions.cuModuleGetFunction)(
                            &raw mut function,
                            module,
                            name.as_ptr(),
                        )
                    };
                    driver.check("cuModuleGetFunction", code)?;
                    self.allow_shared_memory(function)?;
                    Ok(Function(function))
                };
                names.iter().map(find).collect()
            })
        })
    }

    /// Lets a launch ask for all shared memory that the function leaves; unasked it is 48 KiB. Here,
    /// since it also loads what the driver loads late: no launch does so in the middle of a capture.
    fn allow_shared_memory(&self, function: CUfunction) -> Result<(), GpuProblem> {
        use CUfunction_attribute as Attribute;
        let (declared, dynamic) = (
            Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
            Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        );
        let functions = &self.driver.functions;
        let mut used = 0;
        // SAFETY: an integer to write to; `function` was loaded into this context.
        let code = unsafe { (functions.cuFuncGetAttribute)(&raw mut used, declared, function) };
        self.driver.check("cuFuncGetAttribute", code)?;
        let left = self.block_bytes.saturating_sub(used.cast_unsigned());
        let left = c_int::try_from(left).unwrap_or(c_int::MAX);
        // SAFETY: `function` was loaded into this context.
        let code = unsafe { (functions.cuFuncSetAttribute)(function, dynamic, left) };
        self.driver.check("cuFuncSetAttribute", code)
    }

    /// Puts a launch into a stream.
    ///
    /// # Errors
    /// [`GpuProblem::Driver`]: for this launch, or for an earlier one that failed on the card.
    ///
    /// # Safety
    /// `function` is one of this context's, and `words` are its arguments, one for each parameter:
    /// every address among them is one of memory of the size and alignment that the kernel's file
    /// says, which the stream may use. `stream` is a live stream of this context, or 0.
    pub unsafe fn launch(
        &self,
        function: Function,
        geometry: Geometry,
        stream: usize,
        words: &[u64],
    ) -> Result<(), GpuProblem> {
        // The driver reads as many bytes of each word as the parameter has, and writes none.
        let mut arguments: Vec<*mut c_void> = words
            .iter()
            .map(|word| ptr::from_ref(word).cast_mut().cast())
            .collect();
        let [x, y, z] = geometry.grid;
        self.current(|| {
            // SAFETY: by this function's own contract; `arguments` and `words` outlive the call,
            // which copies them.
            let code = unsafe {
                (self.driver.functions.cuLaunchKernel)(
                    function.0,
                    x,
                    y,
                    z,
                    geometry.block,
                    1,
                    1,
                    geometry.dynamic_bytes,
                    stream as CUstream,
                    arguments.as_mut_ptr(),
                    ptr::null_mut(),
                )
            };
            self.driver.check("cuLaunchKernel", code)
        })
    }
}
