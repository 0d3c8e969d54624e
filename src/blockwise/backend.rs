//! Which instruction set does the work: found once, at run time.

use std::sync::OnceLock;

use crate::{Error, Result};

/// Names a backend in place of the fastest one; for tests and for measuring.
const VARIABLE: &str = "FOURBIT_SIMD";

/// An instruction set that this processor can run.
///
/// There is no value for one that it cannot run, which is what makes the calls into SIMD code
/// sound: whoever holds a backend has had the processor asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Backend {
    kind: Kind,
    /// Whether products may use the tiles of AMX, beside AVX-512 with `bf16`.
    tiles: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Backend {
    /// Plain Rust: the specification. Every processor runs it.
    pub const SCALAR: Self = Self::of(Kind::Scalar);

    const fn of(kind: Kind) -> Self {
        Self { kind, tiles: false }
    }

    /// Every backend this processor can run, the fastest last.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut available = vec![Self::SCALAR];
        #[cfg(target_arch = "x86_64")]
        {
            // Processors with AVX2 and without F16C do not exist; virtual machines may hide it.
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
                available.push(Self::of(Kind::Avx2));
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    available.push(Self::of(Kind::Avx512));
                    if crate::amx::supported() {
                        available.push(Self {
                            kind: Kind::Avx512,
                            tiles: true,
                        });
                    }
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            available.push(Self::of(Kind::Neon));
        }
        available
    }

    /// The fastest backend of this processor, or the one that the environment variable
    /// `FOURBIT_SIMD` names. The variable is read once a process; empty is as good as unset.
    ///
    /// # Errors
    /// [`Error::Backend`] where the variable names one that cannot run here.
    pub fn detect() -> Result<Self> {
        static CHOSEN: OnceLock<Result<Backend, String>> = OnceLock::new();
        let chosen = CHOSEN.get_or_init(|| {
            let name = std::env::var_os(VARIABLE)
                .filter(|name| !name.is_empty())
                .map(|name| name.to_string_lossy().into_owned());
            Self::choose(name.as_deref()).map_err(|_| name.unwrap_or_default())
        });
        match chosen {
            Ok(backend) => Ok(*backend),
            Err(name) => Self::by_name(name),
        }
    }

    fn choose(name: Option<&str>) -> Result<Self> {
        match name {
            Some(name) => Self::by_name(name),
            None => Ok(Self::available().pop().unwrap_or(Self::SCALAR)),
        }
    }

    /// The backend of that name.
    ///
    /// # Errors
    /// [`Error::Backend`] where there is none, or this processor cannot run it.
    pub fn by_name(name: &str) -> Result<Self> {
        let available = Self::available();
        available
            .iter()
            .copied()
            .find(|backend| backend.name() == name)
            .ok_or_else(|| Error::Backend {
                name: name.to_owned(),
                available: available.iter().map(|backend| backend.name()).collect(),
            })
    }

    /// `scalar`, `avx2`, `avx512`, `amx` (which is AVX-512 but for products) or `neon`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        if self.tiles {
            return "amx";
        }
        match self.kind {
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => "neon",
        }
    }

    pub(crate) const fn kind(self) -> Kind {
        self.kind
    }

    /// Whether the tiles of AMX can be used, and the instructions of AVX-512 BF16.
    pub(crate) const fn has_tiles(self) -> bool {
        self.tiles
    }

    /// Whether bytes can be looked up by bytes, for [`each_vector`]: AVX-512 with VBMI.
    pub(crate) fn has_byte_lookups(self) -> bool {
        match self.kind {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => is_x86_feature_detected!("avx512vbmi"),
            _ => false,
        }
    }
}

/// Calls a macro for every [`super::Vector`] of this architecture: the name of a function, the
/// type, the features it needs, and whether AVX-512 VBMI is among them.
macro_rules! each_vector {
    ($version:ident) => {
        #[cfg(target_arch = "x86_64")]
        $version!(
            avx512_vbmi,
            Avx512,
            "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,f16c",
            by_bytes: true
        );
        #[cfg(target_arch = "x86_64")]
        $version!(
            avx512,
            Avx512,
            "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c",
            by_bytes: false
        );
        #[cfg(target_arch = "x86_64")]
        $version!(avx2, Avx2, "avx2,f16c", by_bytes: false);
        #[cfg(target_arch = "aarch64")]
        $version!(neon, Neon, "neon", by_bytes: false);
    };
}
pub(crate) use each_vector;

/// Compiles an inlined function for each instruction set and picks by backend. The compiler
/// vectorises it; no operation is fused or reordered, so every version gives the same bits.
macro_rules! versions {
    ($(#[$doc:meta])* $name:ident = $body:ident($($argument:ident: $type:ty),*) -> $result:ty) => {
        $(#[$doc])*
        pub(crate) fn $name(backend: $crate::Backend, $($argument: $type),*) -> $result {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
            fn avx512($($argument: $type),*) -> $result {
                $body($($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2($($argument: $type),*) -> $result {
                $body($($argument),*)
            }
            // SAFETY: a `Backend` exists only where the processor has its features.
            #[cfg_attr(not(target_arch = "x86_64"), allow(unused_unsafe))]
            unsafe {
                match backend.kind() {
                    $crate::blockwise::Kind::Scalar => $body($($argument),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::blockwise::Kind::Avx2 => avx2($($argument),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::blockwise::Kind::Avx512 => avx512($($argument),*),
                    // Every 64-bit Arm program is compiled with NEON.
                    #[cfg(target_arch = "aarch64")]
                    $crate::blockwise::Kind::Neon => $body($($argument),*),
                }
            }
        }
    };
}
pub(crate) use versions;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_are_found_by_name_and_unknown_ones_refused() {
        for backend in Backend::available() {
            assert_eq!(Backend::choose(Some(backend.name())).ok(), Some(backend));
        }
        assert_eq!(
            Backend::choose(None).ok().as_ref(),
            Backend::available().last()
        );
        let Err(Error::Backend { name, available }) = Backend::choose(Some("mmx")) else {
            panic!("accepted");
        };
        assert_eq!((name.as_str(), available[0]), ("mmx", "scalar"));
    }
}
