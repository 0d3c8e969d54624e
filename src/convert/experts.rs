//! Weights of mixtures of experts: which tensors they are, and which of them can be quantized.
//!
//! A checkpoint holds the experts of a layer one by one (`experts.3.w1.weight`), or all in one
//! tensor of three dimensions (`experts.gate_up_proj`). transformers computes with the latter, and
//! puts it together as it loads the former, so that every matrix must start with a block.

use crate::checkpoint::TensorInfo;
use crate::layout::element_count;
use crate::{BlockSize, Result};

use super::rules::module_of;

/// Where Granite keeps its experts; their names say nothing of it.
const GRANITE: [&str; 2] = [
    "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.output_linear.weight",
];

/// Model types whose experts are stored as transformers does not compute with them: transposed, or
/// gate and up interleaved. Packed codes cannot be put in another order.
const REARRANGED: [&str; 6] = [
    "inkling_mm_model",
    "inkling_text",
    "inkling2",
    "inkling2_text",
    "qwen3_vl_moe",
    "qwen3_vl_moe_text",
];
/// Model types whose experts have a forward of their own, which cannot be exchanged.
const OWN_FORWARD: [&str; 6] = [
    "jetmoe",
    "llama4",
    "llama4_text",
    "longcat_flash",
    "step3p5",
    "step3p7",
];

/// Whether loaders can compute with packed experts of a model type. Of one that is not known here
/// they can as a rule.
pub(super) fn can_be_packed(model_type: &str) -> bool {
    !REARRANGED.contains(&model_type) && !OWN_FORWARD.contains(&model_type)
}

/// Whether a tensor holds the matrices of all experts.
pub(super) fn is_stacked(tensor: &TensorInfo) -> bool {
    tensor.shape.len() == 3
        && (tensor.name.split('.').any(|part| part == "experts")
            || GRANITE.iter().any(|name| tensor.name.ends_with(name)))
}

/// Whether a tensor holds weights of experts.
pub(super) fn is_experts(tensor: &TensorInfo) -> bool {
    let numbered = || module_of(&tensor.name).is_some_and(|module| experts_of(module).is_some());
    is_stacked(tensor) || tensor.shape.len() == 2 && numbered()
}

/// Whether each of a tensor's matrices starts with a block.
pub(super) fn fits(tensor: &TensorInfo, block_size: BlockSize) -> Result<bool> {
    let matrix = tensor.shape.get(tensor.shape.len().saturating_sub(2)..);
    Ok(element_count(matrix.unwrap_or_default())? % block_size.get() as u64 == 0)
}

/// Of a numbered expert, the module that holds all of them: `mlp.experts` of
/// `mlp.experts.3.up_proj`.
pub(super) fn experts_of(module: &str) -> Option<&str> {
    module
        .match_indices("experts.")
        .filter(|&(at, _)| at == 0 || module.get(..at).is_some_and(|before| before.ends_with('.')))
        .find_map(|(at, found)| {
            let number = module.get(at + found.len()..)?.split('.').next()?;
            let numbered = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
            module.get(..at + found.len() - 1).filter(|_| numbered)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::FileDtype;

    fn tensor(name: &str, shape: &[u64]) -> TensorInfo {
        TensorInfo {
            name: name.to_owned(),
            dtype: FileDtype::BF16,
            shape: shape.to_vec(),
            offset: 0,
            bytes: 0,
        }
    }

    #[test]
    fn loaders_are_told_of_all_experts_at_once() {
        for (module, all) in [
            (
                "model.layers.0.mlp.experts.3.up_proj",
                Some("model.layers.0.mlp.experts"),
            ),
            ("experts.0", Some("experts")),
            ("experts.0.experts.x", Some("experts")),
            ("experts.x.experts.12.w1", Some("experts.x.experts")),
            ("mlp.shared_experts.0.w1", None),
            ("mlp.experts.w1", None),
            ("mlp.experts.", None),
            ("mlp.experts", None),
        ] {
            assert_eq!(experts_of(module), all, "{module}");
        }
    }

    #[test]
    fn experts_are_told_by_name_and_shape() {
        for (name, shape, expected) in [
            ("mlp.experts.0.w1.weight", &[64, 64][..], true),
            ("mlp.experts.0.w1.weight", &[64], false),
            ("mlp.experts.gate_up_proj", &[4, 64, 64], true),
            ("mlp.experts.fc1.weight", &[4, 64, 64], true),
            ("mlp.experts.gate_up_proj_bias", &[4, 64], false),
            ("block_sparse_moe.input_linear.weight", &[4, 64, 64], true),
            ("block_sparse_moe.input_linear.weight", &[64, 64], false),
            ("mlp.shared_experts.gate_proj", &[4, 64, 64], false),
            ("mlp.shared_experts.up_proj.weight", &[64, 64], false),
        ] {
            assert_eq!(
                is_experts(&tensor(name, shape)),
                expected,
                "{name} {shape:?}"
            );
        }
    }

    #[test]
    fn matrices_that_are_no_whole_blocks_do_not_fit() {
        for (shape, expected) in [
            (&[8, 8][..], true),
            (&[7, 8], false),
            (&[3, 8, 8], true),
            // Whole in sum, but not one by one.
            (&[8, 4, 8], false),
            (&[0, 8, 8], true),
        ] {
            let found = fits(&tensor("experts.x", shape), BlockSize::DEFAULT);
            assert_eq!(found.expect("small"), expected, "{shape:?}");
        }
    }
}
