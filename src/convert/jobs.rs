//! What is to be done with every tensor of a source, and what the result's files look like:
//! decided before any data is read.

use std::collections::HashSet;

use crate::checkpoint::config::{Config, Quantization};
use crate::checkpoint::manifest::{Action, OptionsRecord, SourceRecord, SourceShard, TensorRecord};
use crate::checkpoint::names;
use crate::checkpoint::plan::{PlannedTensor, ShardPlan, plan};
use crate::checkpoint::quant_state::ties_name;
use crate::checkpoint::quantized::planned_parts;
use crate::checkpoint::{CheckpointProblem, Checksum, Folder, QuantState, TensorInfo};
use crate::element::Dtype;
use crate::layout::{Layout, element_count};
use crate::{Error, Result};

use super::Options;
use super::experts::{experts_of, is_experts};
use super::files::SmallFile;
use super::rules::{Decision, Rules, must_be_skipped};

/// One tensor of the source, and what becomes of it.
#[derive(Debug)]
pub(super) struct Job {
    /// Its shard in the source.
    pub(super) shard: usize,
    /// Its place in that shard.
    pub(super) tensor: TensorInfo,
    /// None where it is copied.
    pub(super) quantize: Option<QuantizeJob>,
    decision: Decision,
    /// Its bytes in the result.
    bytes_after: u64,
}

/// How one tensor is quantized.
#[derive(Debug)]
pub(super) struct QuantizeJob {
    /// Its element type.
    pub(super) dtype: Dtype,
    /// Its sizes.
    pub(super) layout: Layout,
    /// Its quant state, the offset not known yet.
    pub(super) state: QuantState,
    /// The name of the quant state's tensor.
    pub(super) state_name: String,
}

/// All that a conversion will do.
#[derive(Debug)]
pub(super) struct Jobs {
    /// One for every tensor of the source, in the order of shards and data.
    pub(super) jobs: Vec<Job>,
    /// The shards of the result; their groups are `jobs`.
    pub(super) shards: Vec<ShardPlan>,
    /// The identity of the source.
    pub(super) source: SourceRecord,
    /// The options as they are recorded.
    pub(super) options: OptionsRecord,
    /// The text of the new config, where the source has one.
    pub(super) config: Option<String>,
    /// Checksum of everything that decides the bytes of the result.
    pub(super) plan: Checksum,
}

impl Jobs {
    /// # Errors
    /// [`Error::Option`] for patterns without effect, [`Error::Checkpoint`] for a source that
    /// cannot be converted.
    pub(super) fn new(
        source: &Folder,
        config: Option<&Config>,
        files: &[SmallFile],
        options: &Options,
    ) -> Result<Self> {
        refuse_quantized(source, config)?;
        let default_config = Config::default();
        let rules = Rules::new(
            &options.only,
            &options.skip,
            options.block_size,
            config.unwrap_or(&default_config),
        )?;
        rules.check_patterns(source.tensors().map(|(_, tensor)| tensor.name.as_str()))?;
        let mut jobs = Vec::new();
        let mut groups = Vec::new();
        for (index, shard) in source.shards().iter().enumerate() {
            for tensor in &shard.header.tensors {
                let (job, group) = job(index, tensor, &rules, options)
                    .map_err(|error| error.in_file(shard.file.path()))?;
                jobs.push(job);
                groups.push(group);
            }
        }
        let shards = plan(&groups, options.max_shard_bytes)?;
        let config = config.map(|config| {
            config.with_quantization(&Quantization {
                codebook: &options.codebook,
                block_size: options.block_size,
                double_quant: options.double_quant,
                dtype: main_dtype(&jobs),
                skipped: &skipped(&jobs),
                experts: jobs.iter().any(|job| job.quantizes_experts()),
            })
        });
        let source = identify(source);
        let options = record(options);
        let plan = plan_checksum(&shards, &source, &options, config.as_deref(), files);
        Ok(Self {
            jobs,
            shards,
            source,
            options,
            config,
            plan,
        })
    }

    /// What is recorded of every tensor.
    pub(super) fn records(&self) -> Vec<TensorRecord> {
        self.jobs.iter().map(Job::record).collect()
    }

    /// Bytes of all tensors of the source.
    pub(super) fn source_bytes(&self) -> u64 {
        self.jobs.iter().map(|job| job.tensor.bytes).sum()
    }
}

impl Job {
    fn quantizes_experts(&self) -> bool {
        self.quantize.is_some() && is_experts(&self.tensor)
    }

    fn record(&self) -> TensorRecord {
        TensorRecord {
            name: self.tensor.name.clone(),
            action: match self.quantize {
                Some(_) => Action::Quantized,
                None => Action::Kept,
            },
            reason: self.decision.reason.text().to_owned(),
            dtype: self.tensor.dtype.name().to_owned(),
            shape: self.tensor.shape.clone(),
            bytes_before: self.tensor.bytes,
            bytes_after: self.bytes_after,
        }
    }
}

fn job(
    shard: usize,
    tensor: &TensorInfo,
    rules: &Rules,
    options: &Options,
) -> Result<(Job, Vec<PlannedTensor>)> {
    let decision = rules.decide(tensor)?;
    let quantize = match tensor.dtype.element() {
        Some(dtype) if decision.quantize => Some(quantize_job(tensor, dtype, options)?),
        _ => None,
    };
    let group = match &quantize {
        Some(job) => planned_parts(&tensor.name, &job.state, &options.codebook)?,
        None => vec![PlannedTensor::new(
            &tensor.name,
            tensor.dtype,
            tensor.shape.clone(),
        )],
    };
    let bytes_after = group
        .iter()
        .map(PlannedTensor::most_bytes)
        .sum::<Result<u64>>()?;
    let job = Job {
        shard,
        tensor: tensor.clone(),
        quantize,
        decision,
        bytes_after,
    };
    Ok((job, group))
}

fn quantize_job(tensor: &TensorInfo, dtype: Dtype, options: &Options) -> Result<QuantizeJob> {
    let elements = element_count(&tensor.shape)?;
    let codebook = &options.codebook;
    Ok(QuantizeJob {
        dtype,
        layout: Layout::new(elements, options.block_size, codebook.code_bits()),
        state: QuantState {
            codebook: codebook.name().to_owned(),
            ties: codebook.ties(),
            block_size: options.block_size,
            dtype,
            shape: tensor.shape.clone(),
            nested_offset: options.double_quant.then_some(0.0),
        },
        state_name: names::quant_state(&tensor.name, codebook.name())?,
    })
}

fn refuse_quantized(source: &Folder, config: Option<&Config>) -> Result<()> {
    let by_config = config.and_then(|config| config.quantized_by.clone());
    let by_name = || {
        let mut names = source.tensors().map(|(_, tensor)| &tensor.name);
        names.find_map(|name| Some(names::parse_quant_state(name)?.1.to_owned()))
    };
    match by_config.or_else(by_name) {
        None => Ok(()),
        Some(method) => {
            Err(Error::from(CheckpointProblem::AlreadyQuantized { method }).in_file(source.path()))
        }
    }
}

/// The element type of most of what is quantized.
fn main_dtype(jobs: &[Job]) -> Dtype {
    let elements = |dtype| -> u64 {
        jobs.iter()
            .filter_map(|job| job.quantize.as_ref())
            .filter(|job| job.dtype == dtype)
            .fold(0, |sum, job| sum.saturating_add(job.layout.elements))
    };
    // The last of equal ones wins, so of none at all it is bfloat16.
    [Dtype::F32, Dtype::F16, Dtype::Bf16]
        .into_iter()
        .max_by_key(|&dtype| elements(dtype))
        .unwrap_or(Dtype::Bf16)
}

/// The modules that loaders must leave alone. The head is always among them: a loader given a
/// list no longer leaves it alone by itself, even where it is tied and so not in the files.
fn skipped(jobs: &[Job]) -> Vec<String> {
    const HEAD: &str = "lm_head";
    let head_quantized = jobs
        .iter()
        .any(|job| job.quantize.is_some() && job.tensor.name == "lm_head.weight");
    let mut modules: Vec<String> = jobs
        .iter()
        .filter_map(|job| must_be_skipped(&job.tensor, job.decision))
        .map(str::to_owned)
        .collect();
    // Experts are named once, not once each, and only where none of them is quantized.
    let mut seen: HashSet<String> = (jobs.iter().filter(|job| job.quantize.is_some()))
        .filter_map(|job| experts_of(&job.tensor.name).map(str::to_owned))
        .collect();
    modules.retain(|module| seen.insert(module.clone()));
    if !head_quantized && !modules.iter().any(|module| module == HEAD) {
        modules.push(HEAD.to_owned());
    }
    modules
}

fn identify(source: &Folder) -> SourceRecord {
    let shards: Vec<SourceShard> = source
        .shards()
        .iter()
        .map(|shard| SourceShard {
            bytes: shard.file.stamp().bytes,
            header: shard.header.checksum,
        })
        .collect();
    let lines: Vec<String> = shards
        .iter()
        .map(|shard| format!("{} {}\n", shard.bytes, shard.header))
        .collect();
    SourceRecord {
        identity: Checksum::of_bytes(lines.concat().as_bytes()),
        shards,
    }
}

fn record(options: &Options) -> OptionsRecord {
    let codebook = &options.codebook;
    let entries = (0..).zip(codebook.table().iter().copied());
    OptionsRecord {
        codebook: codebook.name().to_owned(),
        entries: entries.filter(|(_, value)| !value.is_nan()).collect(),
        ties: ties_name(codebook.ties()).to_owned(),
        block_size: options.block_size.get() as u64,
        double_quant: options.double_quant,
        only: options.only.clone(),
        skip: options.skip.clone(),
        max_shard_bytes: options.max_shard_bytes,
    }
}

fn plan_checksum(
    shards: &[ShardPlan],
    source: &SourceRecord,
    options: &OptionsRecord,
    config: Option<&str>,
    files: &[SmallFile],
) -> Checksum {
    let mut text = format!("{}\n{}\n", names::FORMAT_VERSION, source.identity);
    // Plain values: it cannot fail.
    text += &serde_json::to_string(options).unwrap_or_default();
    for shard in shards {
        text += &shard.describe();
    }
    text += config.unwrap_or_default();
    for file in files {
        text += &format!("\n{} {} {}", file.name, file.bytes, file.checksum);
    }
    Checksum::of_bytes(text.as_bytes())
}
