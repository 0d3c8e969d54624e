//! What the tests of checkpoints share: small models, written by the reference implementation of
//! safetensors, and numbers that look random.
#![allow(dead_code, unreachable_pub, clippy::expect_used, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use fourbit::checkpoint::Header;
use fourbit::convert::{Options, Report, convert};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};

/// A small generator of pseudo-random numbers (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Roughly normal.
    pub fn normal(&mut self) -> f32 {
        let sum: f32 = (0..12)
            .map(|_| (self.next() >> 40) as f32 / (1 << 24) as f32)
            .sum();
        sum - 6.0
    }
}

/// A tensor to be stored.
#[derive(Clone)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

pub fn f32_tensor(shape: &[usize], values: &[f32]) -> Tensor {
    Tensor {
        dtype: Dtype::F32,
        shape: shape.to_vec(),
        bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

pub fn bf16_tensor(shape: &[usize], values: &[f32]) -> Tensor {
    Tensor {
        dtype: Dtype::BF16,
        shape: shape.to_vec(),
        bytes: (values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes())).collect(),
    }
}

pub fn f16_tensor(shape: &[usize], values: &[f32]) -> Tensor {
    Tensor {
        dtype: Dtype::F16,
        shape: shape.to_vec(),
        bytes: (values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes())).collect(),
    }
}

pub type Tensors = BTreeMap<String, Tensor>;

pub fn serialize(tensors: &Tensors) -> Vec<u8> {
    let views: Vec<(&String, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, t)| {
            (
                name,
                TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap(),
            )
        })
        .collect();
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize(views, Some(metadata)).unwrap()
}

/// A model of two small layers in the three types that can be quantized, and all that stays.
pub fn tiny_model(seed: u64) -> Tensors {
    let mut random = Random::new(seed);
    let mut values = |count: usize| -> Vec<f32> { (0..count).map(|_| random.normal()).collect() };
    let mut tensors = Tensors::new();
    for layer in 0..2 {
        let name = |rest: &str| format!("model.layers.{layer}.{rest}");
        tensors.insert(
            name("self_attn.q_proj.weight"),
            bf16_tensor(&[24, 32], &values(768)),
        );
        tensors.insert(
            name("mlp.up_proj.weight"),
            f16_tensor(&[41, 37], &values(1517)),
        );
        tensors.insert(
            name("mlp.down_proj.weight"),
            f32_tensor(&[32, 48], &values(1536)),
        );
        tensors.insert(name("mlp.down_proj.bias"), f32_tensor(&[32], &values(32)));
        tensors.insert(
            name("input_layernorm.weight"),
            bf16_tensor(&[32], &values(32)),
        );
    }
    tensors.insert(
        "model.embed_tokens.weight".to_owned(),
        bf16_tensor(&[40, 32], &values(1280)),
    );
    tensors.insert(
        "lm_head.weight".to_owned(),
        bf16_tensor(&[40, 32], &values(1280)),
    );
    tensors
}

pub const CONFIG: &str = "{\n  \"model_type\": \"llama\",\n  \"rms_norm_eps\": 1e-05\n}\n";

/// Writes a model folder with one file of weights.
pub fn write_model(folder: &Path, tensors: &Tensors) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("model.safetensors"), serialize(tensors)).unwrap();
    fs::write(folder.join("config.json"), CONFIG).unwrap();
    fs::write(folder.join("tokenizer.json"), "{\"tokens\": []}").unwrap();
}

/// Writes a model folder with an index and so many shards.
pub fn write_sharded(folder: &Path, tensors: &Tensors, shards: usize) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("config.json"), CONFIG).unwrap();
    let mut weight_map = BTreeMap::new();
    for shard in 0..shards {
        let name = format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
        let part: Tensors = (tensors.iter().enumerate())
            .filter(|(index, _)| index % shards == shard)
            .map(|(_, (name, tensor))| (name.clone(), tensor.clone()))
            .collect();
        for tensor in part.keys() {
            weight_map.insert(tensor.clone(), name.clone());
        }
        fs::write(folder.join(name), serialize(&part)).unwrap();
    }
    let index = serde_json::json!({"metadata": {"total_size": 0}, "weight_map": weight_map});
    fs::write(
        folder.join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
}

/// Two threads, and so small a budget that tensors are read in pieces.
pub fn options() -> Options {
    Options {
        threads: 2,
        chunk_bytes: 2 << 20,
        ..Options::default()
    }
}

pub fn run(source: &Path, destination: &Path, options: &Options) -> fourbit::Result<Report> {
    convert(source, destination, options, &mut |_| {
        ControlFlow::Continue(())
    })
}

/// Name and bytes of every file of a folder.
pub fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, fs::read(path).unwrap())
        })
        .collect()
}

/// Bytes of every tensor of a file's bytes, read with our own header.
pub fn tensors_of(file: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let header = Header::read(file).expect("a good file");
    (header.tensors.iter())
        .map(|t| {
            let start = t.offset as usize;
            (
                t.name.clone(),
                file[start..start + t.bytes as usize].to_vec(),
            )
        })
        .collect()
}
