//! Whether this process may use the tile registers of AMX.
#![allow(unsafe_code)]

use std::sync::OnceLock;

/// Whether the processor has tiles, the system saves them, and this process may use them; asked
/// once.
pub(crate) fn supported() -> bool {
    static SUPPORTED: OnceLock<bool> = OnceLock::new();
    *SUPPORTED.get_or_init(|| has_instructions() && may_use())
}

fn has_instructions() -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    // What feeds the tiles is AVX-512; every processor with AMX has it.
    if !is_x86_feature_detected!("avx512bf16") {
        return false;
    }
    // A processor with AVX-512 has leaf 7.
    let leaf = std::arch::x86_64::__cpuid_count(7, 0);
    leaf.edx & AMX_BF16 != 0 && leaf.edx & AMX_TILE != 0
}

/// Linux gives the eight kilobytes of tiles only to processes that ask. Threads that exist have
/// them then, too.
#[cfg(target_os = "linux")]
fn may_use() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: this call of the system reads no memory; a kernel that does not know it says so.
    let refused = unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_PERM,
            XFEATURE_XTILEDATA,
        )
    };
    refused == 0
}

#[cfg(not(target_os = "linux"))]
fn may_use() -> bool {
    false
}
