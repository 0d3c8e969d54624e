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
//! | [`team`] | the threads that share work |
//! | [`matmul`] | products on the CPU, straight from the codes |
//! | [`optimizer`] | AdamW on the CPU, its state in 32 bits or blockwise in 8 |
//! | [`gpu`] | the CUDA kernels: their source, compiled when first used |
//!
//! A tensor to 4 bits and back:
//!
//! ```
//! use fourbit::layout::Layout;
//! use fourbit::{BlockSize, Codebook, blockwise, double_quant};
//!
//! let (nf4, block_size) = (Codebook::nf4(), BlockSize::DEFAULT);
//! let weight: Vec<f32> = (0..1000_u16).map(|i| f32::from(i).sin()).collect();
//!
//! let layout = Layout::new(weight.len() as u64, block_size, nf4.code_bits());
//! let mut packed = vec![0; layout.packed_bytes as usize];
//! let mut absmax = vec![0.0; layout.blocks as usize];
//! blockwise::quantize(&weight, nf4, block_size, &mut packed, &mut absmax)?;
//!
//! // The scales in 8 bits, and back: 4.127 bits a number in all, for large tensors.
//! let mut codes = vec![0; absmax.len()];
//! let mut nested_absmax = vec![0.0; layout.nested_blocks as usize];
//! let offset = double_quant::quantize(&absmax, &mut codes, &mut nested_absmax)?;
//! double_quant::dequantize(&codes, &nested_absmax, offset, &mut absmax)?;
//!
//! let mut restored = vec![0.0_f32; weight.len()];
//! blockwise::dequantize(&packed, &absmax, nf4, block_size, &mut restored)?;
//! // Codes are at most 0.304 apart, so no number is off by more than half of that.
//! assert!(weight.iter().zip(&restored).all(|(a, b)| (a - b).abs() < 0.16));
//! # Ok::<(), fourbit::Error>(())
//! ```
//!
//! A checkpoint folder, converted and checked:
//!
//! ```no_run
//! use std::ops::ControlFlow;
//! use std::path::Path;
//!
//! use fourbit::checkpoint::verify;
//! use fourbit::convert::{Options, convert};
//!
//! let (source, target) = (Path::new("llama"), Path::new("llama-4bit"));
//! let report = convert(source, target, &Options::default(), &mut |now| {
//!     println!("{} of {} bytes", now.done, now.total);
//!     ControlFlow::Continue(())
//! })?;
//! assert_eq!(verify(target)?.shards, report.shards);
//! # Ok::<(), fourbit::Error>(())
//! ```

#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(target_arch = "x86_64")]
mod amx;
pub mod blockwise;
pub mod checkpoint;
pub mod codebook;
pub mod convert;
pub mod double_quant;
pub mod element;
pub mod error;
pub mod gpu;
pub mod layout;
pub mod matmul;
pub mod optimizer;
mod sums;
pub mod team;

#[cfg(feature = "python")]
mod python;

pub use blockwise::Backend;
pub use codebook::Codebook;
pub use element::Element;
pub use error::{Error, Result};
pub use layout::BlockSize;
