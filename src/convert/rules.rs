//! What is quantized: decided from names, shapes and types alone, since only headers are known.

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use crate::checkpoint::config::Config;
use crate::checkpoint::{CheckpointProblem, TensorInfo};
use crate::error::OptionProblem;
use crate::layout::element_count;
use crate::{BlockSize, Error, Result};

use super::experts::{can_be_packed, experts_of, fits, is_experts, is_stacked};

/// Names of embeddings: tables that are looked up, not multiplied with.
const EMBEDDINGS: [&str; 19] = [
    "embed",
    "emb",
    "embed_tokens",
    "embed_positions",
    "embed_in",
    "embed_tokens_per_layer",
    "embeddings",
    "embedding",
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
    "tok_embeddings",
    "token_embedding",
    "position_embedding",
    "wte",
    "wpe",
    "shared",
    "relative_attention_bias",
    "rel_attn_bias",
];

/// Names of output heads, which lose most by quantization.
const HEADS: [&str; 12] = [
    "lm_head",
    "embed_out",
    "output_layer",
    "score",
    "classifier",
    "classification_head",
    "qa_outputs",
    "vocab_projector",
    "head",
    "cls",
    "v_head",
    "value_head",
];
/// Names that are heads only where nothing stands before them.
const TOP_LEVEL_HEADS: [&str; 2] = ["output", "proj_out"];

/// Heads that share the embedding's weight where a model ties the two.
const TIED_HEADS: [&str; 3] = ["lm_head", "embed_out", "output_layer"];

/// Names of what sends tokens to experts: small, and a wrong choice is no small error.
const ROUTERS: [&str; 3] = ["gate", "router", "shared_expert_gate"];

/// Model types whose linear layers are stored transposed (`Conv1D`), and the layers' names.
const TRANSPOSED_TYPES: [&str; 5] = [
    "gpt2",
    "openai-gpt",
    "imagegpt",
    "decision_transformer",
    "clvp",
];
const TRANSPOSED_LAYERS: [&str; 4] = ["c_attn", "c_proj", "c_fc", "q_attn"];

/// What is done with a tensor, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// Whether it is quantized.
    pub quantize: bool,
    /// Why.
    pub reason: Reason,
}

/// Why a tensor is quantized or kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The weight of a linear layer.
    Linear,
    /// The user's `only` names it.
    Only,
    /// The user's `skip` names it.
    Skip,
    /// The user's `only` does not name it.
    NotOnly,
    /// No weight: a bias or a buffer.
    NotWeight,
    /// Elements that are no real numbers.
    NotFloat,
    /// A weight of experts, all of them in one tensor or each in its own.
    Experts,
    /// A weight of experts whose matrices are no whole blocks.
    ExpertsBlocks,
    /// A weight of experts that models of this type cannot compute with packed.
    ExpertsForm,
    /// Not a matrix.
    NotMatrix,
    /// Fewer elements than one block.
    Small,
    /// An embedding.
    Embedding,
    /// An output head.
    Head,
    /// A head that is the embedding.
    Tied,
    /// A norm.
    Norm,
    /// A router of experts.
    Router,
    /// Stored transposed.
    Transposed,
}

impl Reason {
    /// In a few words.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Linear => "linear layer",
            Self::Only => "named by only",
            Self::Skip => "named by skip",
            Self::NotOnly => "not named by only",
            Self::NotWeight => "not a weight",
            Self::NotFloat => "not floating point",
            Self::Experts => "mixture of experts",
            Self::ExpertsBlocks => "experts whose matrices are not whole blocks",
            Self::ExpertsForm => "experts that this model type computes with in another form",
            Self::NotMatrix => "not a matrix",
            Self::Small => "smaller than one block",
            Self::Embedding => "embedding",
            Self::Head => "output head",
            Self::Tied => "tied to the embedding",
            Self::Norm => "norm",
            Self::Router => "router of experts",
            Self::Transposed => "stored transposed",
        }
    }
}

/// The rules of one conversion.
#[derive(Debug)]
pub struct Rules {
    only: Patterns,
    skip: Patterns,
    block_size: BlockSize,
    transposed: bool,
    packs_experts: bool,
    tied: bool,
}

impl Rules {
    /// # Errors
    /// [`Error::Option`] for a pattern that is no glob.
    pub fn new(
        only: &[String],
        skip: &[String],
        block_size: BlockSize,
        config: &Config,
    ) -> Result<Self> {
        let model_type = config.model_type.as_deref().unwrap_or_default();
        Ok(Self {
            only: Patterns::new("only", only)?,
            skip: Patterns::new("skip", skip)?,
            block_size,
            transposed: TRANSPOSED_TYPES.contains(&model_type),
            packs_experts: can_be_packed(model_type),
            tied: config.tied,
        })
    }

    /// What becomes of a tensor.
    ///
    /// # Errors
    /// [`CheckpointProblem::UnsupportedDtype`] for a floating-point weight that would be
    /// quantized and is of a type that cannot be.
    pub fn decide(&self, tensor: &TensorInfo) -> Result<Decision> {
        let reason = self.reason(tensor)?;
        let quantize = matches!(reason, Reason::Linear | Reason::Experts | Reason::Only);
        if quantize && tensor.dtype.element().is_none() {
            let dtype = tensor.dtype;
            return Err(
                Error::from(CheckpointProblem::UnsupportedDtype { dtype }).in_tensor(&tensor.name)
            );
        }
        Ok(Decision { quantize, reason })
    }

    fn reason(&self, tensor: &TensorInfo) -> Result<Reason> {
        let stacked = is_stacked(tensor);
        let module = match module_of(&tensor.name) {
            Some(module) => module,
            None if stacked => &tensor.name,
            None => return Ok(Reason::NotWeight),
        };
        let kind = self.kind(module);
        if !tensor.dtype.is_float() {
            return Ok(Reason::NotFloat);
        }
        if tensor.shape.len() != 2 && !stacked {
            return Ok(kind.unwrap_or(Reason::NotMatrix));
        }
        if element_count(&tensor.shape)? < self.block_size.get() as u64 {
            return Ok(Reason::Small);
        }
        if self.skip.matches(&tensor.name) {
            return Ok(Reason::Skip);
        }
        // Nothing could compute with them as they are stored, whoever names them.
        if let Some(kept @ (Reason::Tied | Reason::Transposed)) = kind {
            return Ok(kept);
        }
        let experts = is_experts(tensor);
        // Nothing could put them together, whoever names them.
        if experts && !fits(tensor, self.block_size)? {
            return Ok(Reason::ExpertsBlocks);
        }
        if !self.only.is_empty() {
            let named = self.only.matches(&tensor.name);
            return Ok(if named { Reason::Only } else { Reason::NotOnly });
        }
        Ok(kind.unwrap_or(match (experts, self.packs_experts) {
            (false, _) => Reason::Linear,
            (true, true) => Reason::Experts,
            (true, false) => Reason::ExpertsForm,
        }))
    }

    /// Why a module of that name is no linear layer to be quantized, if it is none.
    fn kind(&self, module: &str) -> Option<Reason> {
        let last = module.rsplit('.').next().unwrap_or(module);
        match kept_module(module) {
            Some(Reason::Head) if self.tied && TIED_HEADS.contains(&last) => Some(Reason::Tied),
            None if self.transposed && TRANSPOSED_LAYERS.contains(&last) => {
                Some(Reason::Transposed)
            }
            reason => reason,
        }
    }

    /// That every pattern matches a tensor.
    ///
    /// # Errors
    /// [`OptionProblem::MatchesNothing`] names the one that does not.
    pub fn check_patterns<'a>(&self, names: impl Iterator<Item = &'a str> + Clone) -> Result<()> {
        self.only.check(names.clone())?;
        self.skip.check(names)
    }
}

/// Why a module is kept for its name alone, whatever the model's configuration says.
#[must_use]
pub fn kept_module(module: &str) -> Option<Reason> {
    let last = module.rsplit('.').next().unwrap_or(module);
    let head = HEADS.iter().any(|name| has_part(module, name))
        || last.ends_with("_head")
        || TOP_LEVEL_HEADS.contains(&module);
    let embedding = EMBEDDINGS.contains(&last)
        || last.ends_with("_embedding")
        || last.ends_with("_embeddings")
        || last.ends_with("_embed");
    let norm = last.contains("norm") || last.starts_with("ln_") || last == "ln";
    let router = ROUTERS.contains(&last) || has_part(module, "router");
    [
        (head, Reason::Head),
        (embedding, Reason::Embedding),
        (norm, Reason::Norm),
        (router, Reason::Router),
    ]
    .into_iter()
    .find_map(|(applies, reason)| applies.then_some(reason))
}

/// The module that a weight belongs to.
#[must_use]
pub fn module_of(tensor: &str) -> Option<&str> {
    tensor.strip_suffix(".weight")
}

/// Whether one of the dotted parts of a name is `part`.
fn has_part(name: &str, part: &str) -> bool {
    name.split('.').any(|other| other == part)
}

/// What a loader that replaces linear layers must be told to leave: this tensor's module, where
/// it is a matrix and so may be one; for one of many experts, the module of all of them.
#[must_use]
pub fn must_be_skipped(tensor: &TensorInfo, decision: Decision) -> Option<&str> {
    let linear = !decision.quantize
        && tensor.shape.len() == 2
        && tensor.dtype.is_float()
        && !matches!(
            decision.reason,
            Reason::Norm | Reason::Embedding | Reason::NotWeight
        );
    let module = module_of(&tensor.name).filter(|_| linear)?;
    Some(experts_of(module).unwrap_or(module))
}

/// Which of the weights of some modules patterns match: `only`'s, then `skip`'s.
///
/// # Errors
/// [`Error::Option`] for a pattern that is no glob, or that matches none.
pub fn matched_modules(
    only: &[String],
    skip: &[String],
    modules: &[String],
) -> Result<(Vec<bool>, Vec<bool>)> {
    let weights: Vec<String> = modules.iter().map(|m| format!("{m}.weight")).collect();
    let matched = |option, texts: &[String]| -> Result<Vec<bool>> {
        let patterns = Patterns::new(option, texts)?;
        patterns.check(weights.iter().map(String::as_str))?;
        Ok(weights.iter().map(|name| patterns.matches(name)).collect())
    };
    Ok((matched("only", only)?, matched("skip", skip)?))
}

/// Globs over tensor names; one that names the module means its weight.
#[derive(Debug)]
struct Patterns {
    option: &'static str,
    texts: Vec<String>,
    set: GlobSet,
}

impl Patterns {
    fn new(option: &'static str, texts: &[String]) -> Result<Self> {
        let bad = |text: &str, error: &globset::Error| Error::Option {
            option,
            value: text.to_owned(),
            problem: OptionProblem::Glob(error.kind().to_string()),
        };
        let mut builder = GlobSetBuilder::new();
        for text in texts {
            let glob = GlobBuilder::new(text)
                .build()
                .map_err(|error| bad(text, &error))?;
            builder.add(glob);
        }
        let set = builder
            .build()
            .map_err(|error| bad(&texts.join(" "), &error))?;
        Ok(Self {
            option,
            texts: texts.to_vec(),
            set,
        })
    }

    fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    fn matches(&self, name: &str) -> bool {
        self.set.is_match(name) || module_of(name).is_some_and(|module| self.set.is_match(module))
    }

    fn check<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<()> {
        let mut matched = vec![false; self.texts.len()];
        for name in names {
            let module = module_of(name).into_iter();
            for index in module.chain([name]).flat_map(|name| self.set.matches(name)) {
                if let Some(matched) = matched.get_mut(index) {
                    *matched = true;
                }
            }
        }
        match self
            .texts
            .iter()
            .zip(&matched)
            .find(|(_, matched)| !**matched)
        {
            None => Ok(()),
            Some((text, _)) => Err(Error::Option {
                option: self.option,
                value: text.clone(),
                problem: OptionProblem::MatchesNothing,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::FileDtype;

    fn reason(config: &str, name: &str, shape: &[u64]) -> Reason {
        reason_with(&[], config, name, shape)
    }

    fn reason_with(only: &[String], config: &str, name: &str, shape: &[u64]) -> Reason {
        let config = Config::parse(config.to_owned()).expect("a good config");
        let rules = Rules::new(only, &[], BlockSize::DEFAULT, &config).expect("good patterns");
        let tensor = TensorInfo {
            name: name.to_owned(),
            dtype: FileDtype::BF16,
            shape: shape.to_vec(),
            offset: 0,
            bytes: 0,
        };
        rules.decide(&tensor).expect("a known dtype").reason
    }

    #[test]
    fn matrices_are_told_apart_by_their_names() {
        for (name, expected) in [
            ("model.layers.0.self_attn.q_proj.weight", Reason::Linear),
            ("model.layers.0.mlp.gate_proj.weight", Reason::Linear),
            ("model.layers.0.mlp.gate_up_proj.weight", Reason::Linear),
            (
                "model.layers.0.block_sparse_moe.experts.3.w1.weight",
                Reason::Experts,
            ),
            (
                "model.layers.0.mlp.experts.63.down_proj.weight",
                Reason::Experts,
            ),
            (
                "model.layers.0.mlp.shared_experts.down_proj.weight",
                Reason::Linear,
            ),
            (
                "encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight",
                Reason::Linear,
            ),
            (
                "model.layers.0.block_sparse_moe.gate.weight",
                Reason::Router,
            ),
            ("model.layers.0.mlp.gate.weight", Reason::Router),
            (
                "model.layers.0.mlp.shared_expert_gate.weight",
                Reason::Router,
            ),
            (
                "decoder.block.1.layer.2.mlp.router.classifier.weight",
                Reason::Head,
            ),
            ("model.layers.0.feed_forward.router.weight", Reason::Router),
            ("model.embed_tokens.weight", Reason::Embedding),
            ("gpt_neox.embed_in.weight", Reason::Embedding),
            (
                "gpt_neox.layers.0.attention.query_key_value.weight",
                Reason::Linear,
            ),
            ("embed_out.weight", Reason::Head),
            ("transformer.wte.weight", Reason::Embedding),
            ("transformer.word_embeddings.weight", Reason::Embedding),
            (
                "bert.embeddings.position_embeddings.weight",
                Reason::Embedding,
            ),
            (
                "bert.encoder.layer.0.attention.self.query.weight",
                Reason::Linear,
            ),
            ("cls.predictions.decoder.weight", Reason::Head),
            ("shared.weight", Reason::Embedding),
            (
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                Reason::Embedding,
            ),
            (
                "encoder.block.0.layer.1.DenseReluDense.wi.weight",
                Reason::Linear,
            ),
            ("output.weight", Reason::Head),
            ("encoder.layer.0.output.dense.weight", Reason::Linear),
            ("score.weight", Reason::Head),
            ("classifier.out_proj.weight", Reason::Head),
            ("proj_out.weight", Reason::Head),
            (
                "model.decoder.layers.0.self_attn.out_proj.weight",
                Reason::Linear,
            ),
            ("multi_modal_projector.linear_1.weight", Reason::Linear),
            ("a.bias", Reason::NotWeight),
            ("model.layers.0.q_norm.weight", Reason::Norm),
        ] {
            assert_eq!(reason("{}", name, &[64, 64]), expected, "{name}");
        }
    }

    #[test]
    fn the_config_decides_what_names_cannot() {
        let conv = "transformer.h.0.attn.c_attn.weight";
        assert_eq!(reason("{}", conv, &[64, 192]), Reason::Linear);
        let gpt2 = r#"{"model_type": "gpt2"}"#;
        assert_eq!(reason(gpt2, conv, &[64, 192]), Reason::Transposed);
        let only = ["*c_attn".to_owned()];
        assert_eq!(
            reason_with(&only, gpt2, conv, &[64, 192]),
            Reason::Transposed
        );
        assert_eq!(reason_with(&only, "{}", conv, &[64, 192]), Reason::Only);
        let llama4 = r#"{"model_type": "llama4"}"#;
        let experts = "feed_forward.experts.gate_up_proj";
        assert_eq!(reason("{}", experts, &[4, 64, 64]), Reason::Experts);
        assert_eq!(reason(llama4, experts, &[4, 64, 64]), Reason::ExpertsForm);
        let tied = r#"{"tie_word_embeddings": true}"#;
        assert_eq!(reason(tied, "lm_head.weight", &[64, 64]), Reason::Tied);
        assert_eq!(reason("{}", "lm_head.weight", &[64, 64]), Reason::Head);
    }

    #[test]
    fn shapes_decide_before_names() {
        assert_eq!(reason("{}", "a.norm.weight", &[64]), Reason::Norm);
        assert_eq!(
            reason("{}", "a.conv1d.weight", &[64, 1, 4]),
            Reason::NotMatrix
        );
        assert_eq!(
            reason("{}", "a.experts.down_proj.weight", &[4, 64, 64]),
            Reason::Experts
        );
        assert_eq!(
            reason("{}", "a.experts.down_proj", &[4, 64, 64]),
            Reason::Experts
        );
        assert_eq!(
            reason("{}", "a.experts.down_proj", &[4, 33, 65]),
            Reason::ExpertsBlocks
        );
        assert_eq!(
            reason("{}", "a.experts.0.down_proj.weight", &[33, 65]),
            Reason::ExpertsBlocks
        );
        assert_eq!(
            reason("{}", "a.experts.down_proj_bias", &[4, 64]),
            Reason::NotWeight
        );
        assert_eq!(reason("{}", "a.q_proj.weight", &[7, 9]), Reason::Small);
    }
}
