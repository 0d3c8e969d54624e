//! The file format: a Hugging Face checkpoint folder in the bitsandbytes layout, with a version,
//! checksums and a record of what was quantized added where other readers do not look.
//!
//! Reading takes every file as hostile: [`header`], [`index`], [`quant_state`] parse strictly,
//! [`folder`] cross-checks a folder, [`mod@quantized`] puts quantized weights together,
//! [`mod@verify`] checks every byte. Nothing is memory-mapped.
//!
//! Writing plans first ([`plan`]): which tensor stands where is known before any data is, so data
//! can be streamed. [`writer`] writes tensors that a caller holds; [`crate::convert`] those of
//! another checkpoint. Files appear complete or not at all, the index last.

pub mod checksum;
pub mod config;
pub(crate) mod destination;
mod dtype;
pub mod folder;
pub mod header;
mod header_json;
pub mod index;
pub mod input;
pub mod manifest;
pub mod names;
pub(crate) mod output;
pub mod plan;
mod problem;
pub mod quant_state;
pub mod quantized;
pub mod verify;
pub mod writer;

pub use checksum::Checksum;
pub use dtype::FileDtype;
pub use folder::{Folder, Shard};
pub use header::{Header, MAX_HEADER_BYTES, MAX_TENSORS, TensorInfo};
pub use manifest::Manifest;
pub use names::FORMAT_VERSION;
pub use problem::CheckpointProblem;
pub use quant_state::QuantState;
pub use quantized::{QuantizedWeight, quantized};
pub use verify::verify;
pub use writer::Writer;

#[cfg(target_endian = "big")]
compile_error!("the file format is little-endian, and so must be the machine");
