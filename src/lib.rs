//! # fourbit
//!
//! Fine-tune a large language model with its frozen base in 4 bits (QLoRA, arXiv 2305.14314).
//! This crate is the core: the number format, the file format and the optimizer. It does not
//! know Python; the `python` feature adds the extension module that the `fourbit` wheel ships.
//!
//! The modules, in the order in which data flows through them:
//!
//! | module | what it does |
//! |---|---|
//! | [`error`] | the one error type |
//! | [`element`] | the floating-point types that tensors are made of |
//! | [`codebook`] | the tables: NF4, FP4, INT4, any map of 2 to 8 bits |
//! | [`layout`] | every size in bytes and blocks, overflow-checked |
//! | [`blockwise`] | absmax block quantization and its inverse |
//! | [`double_quant`] | the block scales themselves in 8 bits, and back |
//! | [`checkpoint`] | the file format: read, write, verify; every file is taken as hostile |
//! | [`convert`](mod@convert) | a 16-bit checkpoint into a 4-bit one, streamed |
//! | [`optimizer`] | AdamW on the CPU, its state in 32 bits or blockwise in 8 |

#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod blockwise;
pub mod checkpoint;
pub mod codebook;
pub mod convert;
pub mod double_quant;
pub mod element;
pub mod error;
pub mod layout;
pub mod optimizer;

#[cfg(feature = "python")]
mod python;

pub use blockwise::Backend;
pub use codebook::Codebook;
pub use element::Element;
pub use error::{Error, Result};
pub use layout::BlockSize;
