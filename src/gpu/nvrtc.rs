//! NVIDIA's run-time compiler, opened when it is first needed.
#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::ptr;

use cudarc::nvrtc::sys::nvrtcProgram;
use libloading::Library;

use super::GpuProblem;
use super::library::{functions, open};

/// `NVRTC_ERROR_COMPILATION`: the program is at fault, and the log says why.
const COMPILATION: u32 = 6;

functions! {
    /// The functions of NVRTC (NVRTC documentation, "User Interface"). All are in CUDA 11.2 and
    /// later.
    Functions {
        nvrtcVersion(*mut c_int, *mut c_int);
        nvrtcGetNumSupportedArchs(*mut c_int);
        nvrtcGetSupportedArchs(*mut c_int);
        nvrtcCreateProgram(
            *mut nvrtcProgram,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        );
        nvrtcCompileProgram(nvrtcProgram, c_int, *const *const c_char);
        nvrtcDestroyProgram(*mut nvrtcProgram);
        nvrtcGetCUBINSize(nvrtcProgram, *mut usize);
        nvrtcGetCUBIN(nvrtcProgram, *mut c_char);
        nvrtcGetPTXSize(nvrtcProgram, *mut usize);
        nvrtcGetPTX(nvrtcProgram, *mut c_char);
        nvrtcGetProgramLogSize(nvrtcProgram, *mut usize);
        nvrtcGetProgramLog(nvrtcProgram, *mut c_char);
    }
}

/// The oldest CUDA whose compiler takes the kernels: before, it lacks `__builtin_bit_cast`.
const OLDEST_MAJOR: u32 = 12;

/// What a kernel is compiled for; printed as the compiler's option names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Machine code of an architecture (10 major + minor), which cards of the same major and no
    /// lower minor run.
    Machine(u32),
    /// Code that the driver compiles for the card, of this architecture or a later one.
    Virtual(u32),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine(architecture) => write!(f, "sm_{architecture}"),
            Self::Virtual(architecture) => write!(f, "compute_{architecture}"),
        }
    }
}

/// The compiler of one library file.
#[derive(Debug)]
pub struct Compiler {
    functions: Functions,
    path: PathBuf,
    version: (u32, u32),
    /// What it compiles for, ascending.
    architectures: Vec<u32>,
    /// Never closed: it may have threads of its own.
    _library: ManuallyDrop<Library>,
}

/// What the compiler gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// What the driver loads: machine code, as an ELF file, or for [`Target::Virtual`] PTX, as text
    /// that ends in a zero.
    pub image: Vec<u8>,
    /// Warnings, and what the options asked for.
    pub log: String,
}

impl Compiler {
    /// Opens a library. A bare file name is looked for where the system keeps libraries.
    ///
    /// # Errors
    /// [`GpuProblem::NvrtcMissing`] where it cannot be opened; [`GpuProblem::MissingFunction`] where
    /// it is too old, or something else.
    pub fn open(path: &Path) -> Result<Self, GpuProblem> {
        let missing = |reason| GpuProblem::NvrtcMissing {
            path: path.display().to_string(),
            reason,
        };
        let library = open(path).map_err(missing)?;
        let functions = Functions::of(&library, &path.display().to_string())?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two integers to write to, as documented.
        let status = unsafe { (functions.nvrtcVersion)(&raw mut major, &raw mut minor) };
        if status != 0 {
            return Err(missing(format!("error {status} of nvrtcVersion")));
        }
        let version = (major.cast_unsigned(), minor.cast_unsigned());
        if version.0 < OLDEST_MAJOR {
            return Err(missing(format!(
                "it is of CUDA {major}.{minor}, and the kernels need CUDA {OLDEST_MAJOR} or later"
            )));
        }
        let architectures = supported(&functions)
            .map_err(|status| missing(format!("error {status} of nvrtcGetSupportedArchs")))?;
        Ok(Self {
            functions,
            path: path.to_path_buf(),
            version,
            architectures,
            _library: ManuallyDrop::new(library),
        })
    }

    /// Its version: 13 and 2 for CUDA 13.2.
    #[must_use]
    pub const fn version(&self) -> (u32, u32) {
        self.version
    }

    /// The file it was opened from, or the name the system found it by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is best compiled for a card of this capability (10 major + minor), which may be newer
    /// than the compiler.
    #[must_use]
    pub fn target(&self, capability: u32) -> Target {
        best_target(&self.architectures, capability)
    }

    /// Compiles a self-contained program.
    ///
    /// # Errors
    /// [`GpuProblem::Compile`], with the compiler's log.
    pub fn compile(
        &self,
        file: &str,
        source: &str,
        target: Target,
        options: &[&str],
    ) -> Result<Compiled, GpuProblem> {
        let problem = |log: String| GpuProblem::Compile {
            file: file.to_owned(),
            target: target.to_string(),
            version: format!("{}.{}", self.version.0, self.version.1),
            log,
        };
        let c_string = |text: &str| {
            CString::new(text).map_err(|_| problem(format!("a zero byte in {text:?}")))
        };
        let name = c_string(&format!("cuda/{file}.cu"))?;
        let source = c_string(source)?;
        let mut options = options
            .iter()
            .map(|option| c_string(option))
            .collect::<Result<Vec<_>, _>>()?;
        options.push(c_string(&format!("--gpu-architecture={target}"))?);
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();

        let program = Program::new(&self.functions, &source, &name)
            .map_err(|status| problem(format!("error {status} of nvrtcCreateProgram")))?;
        // A handful of options.
        let count = c_int::try_from(options.len()).unwrap_or(c_int::MAX);
        // SAFETY: `program` is alive; `options` are `count` strings that end in zero and live until
        // the call returns.
        let status = unsafe {
            (self.functions.nvrtcCompileProgram)(program.handle, count, options.as_ptr())
        };
        let log = program.log();
        match status {
            0 => {}
            COMPILATION => return Err(problem(log)),
            status => {
                return Err(problem(format!(
                    "error {status} of nvrtcCompileProgram; {log}"
                )));
            }
        }
        let f = &self.functions;
        let (size, contents, name): (Size, Contents, _) = match target {
            Target::Machine(_) => (f.nvrtcGetCUBINSize, f.nvrtcGetCUBIN, "nvrtcGetCUBIN"),
            Target::Virtual(_) => (f.nvrtcGetPTXSize, f.nvrtcGetPTX, "nvrtcGetPTX"),
        };
        let image = program
            .bytes(size, contents)
            .map_err(|status| problem(format!("error {status} of {name}")))?;
        Ok(Compiled { image, log })
    }
}

fn supported(functions: &Functions) -> Result<Vec<u32>, u32> {
    let mut count = 0;
    // SAFETY: an integer to write to.
    let status = unsafe { (functions.nvrtcGetNumSupportedArchs)(&raw mut count) };
    if status != 0 {
        return Err(status);
    }
    let mut found = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: as many integers to write to as the compiler has just said.
    let status = unsafe { (functions.nvrtcGetSupportedArchs)(found.as_mut_ptr()) };
    if status != 0 {
        return Err(status);
    }
    let mut found: Vec<u32> = found.into_iter().map(c_int::cast_unsigned).collect();
    found.sort_unstable();
    Ok(found)
}

/// Of ascending architectures, the newest whose machine code the card runs; where its major is not
/// among them, the newest that the driver can take further.
fn best_target(architectures: &[u32], capability: u32) -> Target {
    let mut older = architectures
        .iter()
        .rev()
        .copied()
        .filter(|one| *one <= capability);
    match older.next() {
        Some(newest) if newest / 10 == capability / 10 => Target::Machine(newest),
        Some(newest) => Target::Virtual(newest),
        // The compiler has dropped it, and says so.
        None => Target::Machine(capability),
    }
}

type Size = unsafe extern "C" fn(nvrtcProgram, *mut usize) -> u32;
type Contents = unsafe extern "C" fn(nvrtcProgram, *mut c_char) -> u32;

/// A program, freed when it is dropped.
struct Program<'a> {
    functions: &'a Functions,
    handle: nvrtcProgram,
    /// The compiler may refer to it until the program is freed.
    _source: &'a CString,
    _name: &'a CString,
}

impl<'a> Program<'a> {
    fn new(functions: &'a Functions, source: &'a CString, name: &'a CString) -> Result<Self, u32> {
        let mut handle = ptr::null_mut();
        // SAFETY: two strings that end in zero and outlive the program; no headers, so the two
        // lists of none may be null.
        let status = unsafe {
            (functions.nvrtcCreateProgram)(
                &raw mut handle,
                source.as_ptr(),
                name.as_ptr(),
                0,
                ptr::null(),
                ptr::null(),
            )
        };
        if status != 0 {
            return Err(status);
        }
        Ok(Self {
            functions,
            handle,
            _source: source,
            _name: name,
        })
    }

    fn log(&self) -> String {
        let get = (
            self.functions.nvrtcGetProgramLogSize,
            self.functions.nvrtcGetProgramLog,
        );
        match self.bytes(get.0, get.1) {
            Ok(bytes) => String::from_utf8_lossy(&bytes)
                .trim_end_matches(['\0', '\n'])
                .to_owned(),
            Err(status) => format!("(no log: error {status})"),
        }
    }

    /// What a pair of functions, one for the size and one for the contents, says of the program.
    fn bytes(&self, size: Size, contents: Contents) -> Result<Vec<u8>, u32> {
        let mut count = 0;
        // SAFETY: the program is alive, and `count` is there to be written.
        let status = unsafe { size(self.handle, &raw mut count) };
        if status != 0 {
            return Err(status);
        }
        let mut bytes = vec![0_u8; count];
        // SAFETY: as above, and the compiler writes as many bytes as it has just said.
        let status = unsafe { contents(self.handle, bytes.as_mut_ptr().cast()) };
        if status == 0 { Ok(bytes) } else { Err(status) }
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: the handle came from `nvrtcCreateProgram` and is freed once. A failure would
        // leave memory behind, nothing worse.
        let _ = unsafe { (self.functions.nvrtcDestroyProgram)(&raw mut self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_newer_than_the_compiler_has_a_target() {
        let known = [75, 80, 86, 90, 100, 120];
        for (capability, expected) in [
            (75, "sm_75"),
            (86, "sm_86"),
            (87, "sm_86"),
            (89, "sm_86"),
            (103, "sm_100"),
            (121, "sm_120"),
            (110, "compute_100"),
            (130, "compute_120"),
            (70, "sm_70"),
        ] {
            assert_eq!(best_target(&known, capability).to_string(), expected);
        }
        assert_eq!(best_target(&[], 80), Target::Machine(80));
    }
}
