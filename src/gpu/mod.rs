//! CUDA: the kernels of `cuda/`, embedded as source.
//!
//! | module | what it does |
//! |---|---|
//! | [`source`] | the whole translation unit of a kernel, specialised for a dtype and a codebook |

pub mod source;

/// What can go wrong with kernels and cards.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuProblem {
    /// No kernel file of that name.
    #[error("no kernel file is named {name:?}; there are {known:?}")]
    UnknownKernel {
        /// The name asked for.
        name: String,
        /// Those that exist.
        known: Vec<&'static str>,
    },
}
