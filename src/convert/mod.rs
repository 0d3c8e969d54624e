//! A 16-bit checkpoint into a 4-bit one, streamed: memory is bounded by a budget, not by the
//! model or its largest tensor.
//!
//! A reader thread, the quantizer on all cores and a writer thread work side by side
//! (`pipeline`). What they do is decided from headers alone before anything is written
//! (`jobs`, [`rules`]), so equal sources and options give equal bytes, and an interrupted run
//! continues where it was.

mod experts;
mod files;
mod jobs;
mod pipeline;
mod quantizer;
pub mod rules;
mod scales;

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use rayon::ThreadPoolBuilder;

use crate::checkpoint::config::Config;
use crate::checkpoint::destination::{Destination, Found, Marker, check_space, look};
use crate::checkpoint::input::InputFile;
use crate::checkpoint::manifest::{ShardRecord, TensorRecord, is_missing};
use crate::checkpoint::output::{commit, write_file};
use crate::checkpoint::plan::ShardPlan;
use crate::checkpoint::{
    CheckpointProblem, Checksum, FORMAT_VERSION, Folder, Header, Manifest, names,
};
use crate::error::{DestinationProblem, OptionProblem};
use crate::{BlockSize, Codebook, Error, Result};

use files::SmallFile;
pub use files::{SkippedFile, small_files};
use jobs::Jobs;

/// Bytes of a shard where the caller does not say: few enough to copy and check with ease.
pub const DEFAULT_MAX_SHARD_BYTES: u64 = 2 << 30;
/// Memory for data in flight, per thread, where the caller does not say.
pub const DEFAULT_CHUNK_BYTES: u64 = 64 << 20;
/// The least memory for data in flight, per thread.
pub const LEAST_CHUNK_BYTES: u64 = 2 << 20;
/// The most threads: starting them takes time that grows with the square of their number.
pub const MOST_THREADS: usize = 1024;

/// How to convert.
#[derive(Debug, Clone)]
pub struct Options {
    /// The codebook of the quantized weights.
    pub codebook: Codebook,
    /// Elements that share a scale.
    pub block_size: BlockSize,
    /// Whether the scales are quantized too.
    pub double_quant: bool,
    /// Globs: quantize these matrices, whatever their names say, and nothing else.
    pub only: Vec<String>,
    /// Globs: leave these as they are.
    pub skip: Vec<String>,
    /// Bytes of a shard, at most; a larger tensor has a shard of its own.
    pub max_shard_bytes: u64,
    /// Memory for data in flight, per thread.
    pub chunk_bytes: u64,
    /// Threads that quantize, at most [`MOST_THREADS`]; 0 for one a core. The result does not
    /// depend on it.
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            codebook: Codebook::nf4().clone(),
            block_size: BlockSize::DEFAULT,
            double_quant: true,
            only: Vec::new(),
            skip: Vec::new(),
            max_shard_bytes: DEFAULT_MAX_SHARD_BYTES,
            chunk_bytes: DEFAULT_CHUNK_BYTES,
            threads: 0,
        }
    }
}

/// How far a conversion is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// Bytes of the source that are done.
    pub done: u64,
    /// All bytes of the source.
    pub total: u64,
    /// The tensor under way.
    pub tensor: &'a str,
}

/// What a conversion did.
#[derive(Debug, Clone)]
pub struct Report {
    /// What became of every tensor.
    pub tensors: Vec<TensorRecord>,
    /// Files that were copied.
    pub copied: Vec<String>,
    /// Files of the source that have no copy.
    pub skipped: Vec<SkippedFile>,
    /// Bytes of the source's weights.
    pub bytes_before: u64,
    /// Bytes of the result's weights.
    pub bytes_after: u64,
    /// Shards of the result.
    pub shards: usize,
    /// Shards that an interrupted run had written.
    pub shards_kept: usize,
    /// All of it was there: nothing was written.
    pub already_complete: bool,
    /// How long it took.
    pub seconds: f64,
}

/// Converts the checkpoint in the folder `source` into the folder `destination`.
///
/// `progress` is called after every few megabytes, on this thread; it stops the conversion by
/// returning `Break`.
///
/// An interrupted conversion continues when it is called again, and ends in the same bytes. A
/// finished one of the same source with the same options is left as it is.
///
/// # Errors
/// [`Error::Checkpoint`] for a source that is damaged, hostile, or cannot be converted;
/// [`Error::Destination`], [`Error::Option`], [`Error::NoSpace`] before anything is written;
/// [`Error::NonFinite`] for NaN or infinity in a weight to be quantized, naming file, tensor and
/// index; [`Error::Interrupted`]; [`Error::Io`]. After an error the destination holds nothing
/// that loads.
pub fn convert(
    source: &Path,
    destination: &Path,
    options: &Options,
    progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Result<Report> {
    let started = Instant::now();
    check_options(options)?;
    let folder = Folder::open(source)?;
    if same_file::is_same_file(source, destination).unwrap_or(false) {
        return Err(Error::from(DestinationProblem::SameAsSource).in_file(destination));
    }
    let config = read_config(source)?;
    let weights: Vec<String> = folder.shards().iter().map(|s| s.name.clone()).collect();
    let (files, skipped) = files::find(source, &weights)?;
    let jobs = Jobs::new(&folder, config.as_ref(), &files, options)?;
    let pool = ThreadPoolBuilder::new()
        .num_threads(options.threads)
        .thread_name(|index| format!("fourbit-convert-{index}"))
        .build()
        .map_err(|error| Error::Option {
            option: "threads",
            value: options.threads.to_string(),
            problem: OptionProblem::Threads(error.to_string()),
        })?;
    let conversion = Conversion {
        folder: &folder,
        jobs: &jobs,
        files: &files,
        options,
        pool: &pool,
    };
    let outcome = match look(destination)? {
        Found::Complete => conversion.check_complete(destination, progress)?,
        Found::Free | Found::Partial => conversion.run(destination, progress)?,
        Found::Other(example) => {
            let problem = DestinationProblem::NotEmpty { example };
            return Err(Error::from(problem).in_file(destination));
        }
    };
    Ok(Report {
        tensors: jobs.records(),
        copied: files.into_iter().map(|file| file.name).collect(),
        skipped,
        bytes_before: folder.shards().iter().map(|s| s.file.stamp().bytes).sum(),
        bytes_after: outcome.shards.iter().map(|shard| shard.bytes).sum(),
        shards: outcome.shards.len(),
        shards_kept: outcome.kept,
        already_complete: outcome.already_complete,
        seconds: started.elapsed().as_secs_f64(),
    })
}

fn check_options(options: &Options) -> Result<()> {
    let bounds = [
        ("max_shard_bytes", options.max_shard_bytes, 1),
        ("chunk_bytes", options.chunk_bytes, LEAST_CHUNK_BYTES),
    ];
    for (option, value, least) in bounds {
        if value < least {
            return Err(Error::Option {
                option,
                value: value.to_string(),
                problem: OptionProblem::TooSmall { least },
            });
        }
    }
    if options.threads > MOST_THREADS {
        return Err(Error::Option {
            option: "threads",
            value: options.threads.to_string(),
            problem: OptionProblem::TooLarge {
                most: MOST_THREADS as u64,
            },
        });
    }
    names::quant_state("x", options.codebook.name()).map(|_| ())
}

fn read_config(source: &Path) -> Result<Option<Config>> {
    let path = source.join(names::CONFIG);
    let text = match InputFile::open(&path) {
        Ok(file) => file.read_text()?,
        Err(error) if is_missing(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    Config::parse(text)
        .map(Some)
        .map_err(|error| error.in_file(path))
}

/// One conversion, all decided.
struct Conversion<'a> {
    folder: &'a Folder,
    jobs: &'a Jobs,
    files: &'a [SmallFile],
    options: &'a Options,
    pool: &'a rayon::ThreadPool,
}

/// What a conversion wrote or found.
struct Outcome {
    shards: Vec<ShardRecord>,
    kept: usize,
    already_complete: bool,
}

impl Conversion<'_> {
    /// That a finished folder is what this conversion would make. The source's data is read and
    /// compared: it may have been trained on since, with the same header.
    fn check_complete(
        &self,
        destination: &Path,
        progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
    ) -> Result<Outcome> {
        let other = || Error::from(DestinationProblem::OtherConversion).in_file(destination);
        let manifest = Manifest::of_folder(destination)?.ok_or_else(other)?;
        if manifest.plan != self.jobs.plan {
            return Err(other());
        }
        let result = Folder::open(destination)?;
        manifest.check_shards(&result)?;
        let (mut done, total) = (0, self.jobs.source_bytes());
        for (plan, shard) in self.jobs.shards.iter().zip(result.shards()) {
            let now = pipeline::source_data(self.folder, self.jobs, plan, &mut |bytes, tensor| {
                done += bytes;
                progress(Progress {
                    done,
                    total,
                    tensor,
                })
            })?;
            let then = shard.header.metadata.get(names::META_SOURCE_DATA);
            if then != Some(&now.to_string()) {
                return Err(other());
            }
        }
        Ok(Outcome {
            shards: manifest.shards,
            kept: result.shards().len(),
            already_complete: true,
        })
    }

    fn run(
        &self,
        path: &Path,
        progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
    ) -> Result<Outcome> {
        check_space(path, self.bytes_needed(path))?;
        let marker = Marker {
            format_version: FORMAT_VERSION,
            plan: Some(self.jobs.plan),
            source: self
                .folder
                .shards()
                .iter()
                .map(|s| s.file.stamp())
                .collect(),
        };
        let destination = Destination::take(path, &marker)?;
        match self.write(&destination, progress) {
            Ok(outcome) => {
                destination.finish()?;
                Ok(outcome)
            }
            Err(error) => {
                destination.abandon();
                Err(error)
            }
        }
    }

    /// Bytes still to be written, and the scales that wait on the disk for their mean.
    fn bytes_needed(&self, path: &Path) -> u64 {
        let shards = self.jobs.shards.iter();
        let missing = shards.filter(|plan| !path.join(&plan.name).exists());
        let weights: u64 = missing.map(ShardPlan::most_file_bytes).sum();
        let files: u64 = self.files.iter().map(|file| file.bytes).sum();
        let quantized = self
            .jobs
            .jobs
            .iter()
            .filter_map(|job| job.quantize.as_ref());
        let scales = quantized
            .map(|job| job.layout.blocks * 4)
            .max()
            .unwrap_or(0);
        weights.saturating_add(files).saturating_add(scales)
    }

    fn write(
        &self,
        destination: &Destination,
        progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
    ) -> Result<Outcome> {
        let path = destination.path();
        let kept: Vec<Option<(ShardRecord, u64)>> = (self.jobs.shards.iter())
            .map(|plan| {
                let there = destination.is_resumed() && path.join(&plan.name).exists();
                there.then(|| self.existing(path, plan)).flatten()
            })
            .collect();
        let todo: Vec<&ShardPlan> = (self.jobs.shards.iter().zip(&kept))
            .filter_map(|(plan, kept)| kept.is_none().then_some(plan))
            .collect();
        let written = pipeline::run(self, path, &todo, progress)?;
        let mut written = written.into_iter();
        let kept_count = kept.iter().flatten().count();
        let all: Vec<(ShardRecord, u64)> = (kept.into_iter())
            .filter_map(|kept| kept.or_else(|| written.next()))
            .collect();
        let total_size = all.iter().map(|(_, data)| data).sum();
        let shards: Vec<ShardRecord> = all.into_iter().map(|(record, _)| record).collect();
        self.write_rest(path, shards.clone(), total_size)?;
        Ok(Outcome {
            shards,
            kept: kept_count,
            already_complete: false,
        })
    }

    /// The shard that an interrupted run of this very conversion wrote, if it is whole.
    fn existing(&self, path: &Path, plan: &ShardPlan) -> Option<(ShardRecord, u64)> {
        let file = InputFile::open(&path.join(&plan.name)).ok()?;
        let header = Header::read(&file).ok()?;
        let same_plan = header.metadata.get(names::META_PLAN) == Some(&self.jobs.plan.to_string());
        let same_tensors = header.tensors.len() == plan.tensors.len();
        (same_plan && same_tensors).then(|| {
            let record = ShardRecord {
                file: plan.name.clone(),
                bytes: file.stamp().bytes,
                header: header.checksum,
            };
            (record, file.stamp().bytes - header.data_start)
        })
    }

    /// Config, other files and record; the index last.
    fn write_rest(&self, path: &Path, shards: Vec<ShardRecord>, total_size: u64) -> Result<()> {
        let mut manifest = Manifest::new(self.jobs.plan);
        for file in self.files {
            let source = self.folder.path().join(&file.name);
            let bytes = files::read(&source)?;
            if Checksum::of_bytes(&bytes) != file.checksum {
                return Err(Error::from(CheckpointProblem::SourceChanged).in_file(source));
            }
            manifest.files.push(write_file(path, &file.name, &bytes)?);
        }
        if let Some(config) = &self.jobs.config {
            manifest
                .files
                .push(write_file(path, names::CONFIG, config.as_bytes())?);
        }
        manifest.source = Some(self.jobs.source.clone());
        manifest.options = Some(self.jobs.options.clone());
        manifest.tensors = self.jobs.records();
        manifest.shards = shards;
        commit(path, &mut manifest, &self.jobs.shards, total_size)
    }
}
