//! The converter against the quantizer itself, and everything that can stop it.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use common::{
    CONFIG, Tensors, bf16_tensor, contents, f32_tensor, options, run, serialize, tensors_of,
    tiny_model, write_model, write_sharded,
};
use fourbit::checkpoint::manifest::Action;
use fourbit::checkpoint::names::Part;
use fourbit::checkpoint::{CheckpointProblem, Folder, quantized, verify};
use fourbit::codebook::Ties;
use fourbit::convert::{Options, convert};
use fourbit::error::{DestinationProblem, OptionProblem};
use fourbit::layout::Layout;
use fourbit::{BlockSize, Codebook, Element, Error, blockwise, double_quant};
use half::{bf16, f16};
use tempfile::tempdir;

/// What one weight must become, computed at one go.
fn expected_parts(
    weight: &str,
    bytes: &[u8],
    options: &Options,
    kind: safetensors::Dtype,
) -> Tensors {
    fn quantize<T: Element + bytemuck::Pod>(
        bytes: &[u8],
        options: &Options,
    ) -> (Vec<u8>, Vec<f32>) {
        let input: Vec<T> = bytemuck::allocation::pod_collect_to_vec(bytes);
        let bits = options.codebook.code_bits();
        let layout = Layout::new(input.len() as u64, options.block_size, bits);
        let mut packed = vec![0; layout.packed_bytes as usize];
        let mut absmax = vec![0.0; layout.blocks as usize];
        let codebook = &options.codebook;
        blockwise::quantize(
            &input,
            codebook,
            options.block_size,
            &mut packed,
            &mut absmax,
        )
        .unwrap();
        (packed, absmax)
    }
    let (packed, absmax) = match kind {
        safetensors::Dtype::BF16 => quantize::<bf16>(bytes, options),
        safetensors::Dtype::F16 => quantize::<f16>(bytes, options),
        _ => quantize::<f32>(bytes, options),
    };
    let mut parts = Tensors::new();
    let mut add = |name: String, bytes: Vec<u8>| {
        let shape = vec![bytes.len()];
        let dtype = safetensors::Dtype::U8;
        parts.insert(
            name,
            common::Tensor {
                dtype,
                shape,
                bytes,
            },
        );
    };
    let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
    add(weight.to_owned(), packed);
    add(Part::QuantMap.of(weight), floats(options.codebook.table()));
    if options.double_quant {
        let mut codes = vec![0; absmax.len()];
        let mut nested = vec![0.0; absmax.len().div_ceil(256)];
        double_quant::quantize(&absmax, &mut codes, &mut nested).unwrap();
        add(Part::Absmax.of(weight), codes);
        add(Part::NestedAbsmax.of(weight), floats(&nested));
        add(
            Part::NestedQuantMap.of(weight),
            floats(Codebook::dynamic_signed().table()),
        );
    } else {
        add(Part::Absmax.of(weight), floats(&absmax));
    }
    parts
}

fn check_result(source: &Tensors, result: &Path, options: &Options) {
    let folder = Folder::open(result).expect("a good folder");
    let mut stored = std::collections::BTreeMap::new();
    for shard in folder.shards() {
        stored.extend(tensors_of(&fs::read(shard.file.path()).unwrap()));
    }
    let weights = quantized(&folder).expect("complete weights");
    let mut expected_count = 0;
    for (name, tensor) in source {
        match weights.iter().find(|weight| weight.name == *name) {
            None => assert_eq!(stored[name], tensor.bytes, "{name}"),
            Some(weight) => {
                expected_count += 1; // its quant state
                let shape: Vec<u64> = tensor.shape.iter().map(|&dim| dim as u64).collect();
                assert_eq!(weight.state.shape, shape);
                assert_eq!(
                    weight.codebook.values()[..4],
                    options.codebook.values()[..4]
                );
                let parts = expected_parts(name, &tensor.bytes, options, tensor.dtype);
                for (part, expected) in &parts {
                    assert_eq!(stored[part], expected.bytes, "{part}");
                }
                expected_count += parts.len() - 1;
            }
        }
        expected_count += 1;
    }
    assert_eq!(stored.len(), expected_count);
}

#[test]
fn every_tensor_becomes_what_the_quantizer_makes_of_it() {
    let model = tiny_model(1);
    let map = [(0, -1.0), (3, 1.0), (1, 0.25), (2, 0.5)];
    let two_bits = Codebook::from_map("two-bits", &map, Ties::Upper).unwrap();
    for (codebook, block_size, double_quant) in [
        (Codebook::nf4().clone(), 64, true),
        (Codebook::nf4().clone(), 32, false),
        (Codebook::fp4().clone(), 128, true),
        (Codebook::int4().clone(), 64, true),
        (two_bits, 256, false),
    ] {
        let (source, result) = (tempdir().unwrap(), tempdir().unwrap());
        write_model(source.path(), &model);
        let options = Options {
            codebook,
            block_size: BlockSize::new(block_size).unwrap(),
            double_quant,
            ..options()
        };
        let report = run(source.path(), result.path(), &options).expect("a good source");
        assert_eq!(report.tensors.len(), model.len());
        let count = report
            .tensors
            .iter()
            .filter(|t| t.action == Action::Quantized)
            .count();
        assert_eq!(count, 6);
        check_result(&model, result.path(), &options);
        let verified = verify(result.path()).expect("a whole folder");
        assert_eq!((verified.quantized, verified.checksums), (6, true));
    }
}

#[test]
fn tensors_larger_than_a_piece_are_quantized_as_a_whole() {
    // Two pieces and a tail of an odd number of elements, in bf16 and f32.
    let elements = 1 << 20;
    let values: Vec<f32> = (0..elements + 37)
        .map(|i| ((i * 7919) % 1013) as f32 - 500.0)
        .collect();
    let model: Tensors = [
        (
            "a.weight".to_owned(),
            bf16_tensor(&[1, elements + 37], &values),
        ),
        (
            "b.weight".to_owned(),
            f32_tensor(&[elements / 2 + 3, 1], &values[..elements / 2 + 3]),
        ),
        (
            "c.bias".to_owned(),
            f32_tensor(&[elements], &values[..elements]),
        ),
    ]
    .into();
    for double_quant in [true, false] {
        let (source, result) = (tempdir().unwrap(), tempdir().unwrap());
        write_model(source.path(), &model);
        let options = Options {
            double_quant,
            threads: 1,
            ..options()
        };
        let mut calls = 0;
        let mut last = 0;
        convert(source.path(), result.path(), &options, &mut |now| {
            calls += 1;
            assert!(now.done > last && now.done <= now.total);
            last = now.done;
            ControlFlow::Continue(())
        })
        .expect("a good source");
        assert!(calls >= 10, "{calls} pieces");
        check_result(&model, result.path(), &options);
    }
}

#[test]
fn bytes_do_not_depend_on_threads_or_memory() {
    let source = tempdir().unwrap();
    write_sharded(source.path(), &tiny_model(4), 3);
    let mut results = Vec::new();
    for (threads, chunk_bytes) in [(1, 2 << 20), (2, 64 << 20), (7, 5 << 20)] {
        let result = tempdir().unwrap();
        let options = Options {
            threads,
            chunk_bytes,
            max_shard_bytes: 9_000,
            ..Options::default()
        };
        run(source.path(), result.path(), &options).expect("a good source");
        results.push(contents(result.path()));
    }
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn every_tensor_stands_aligned() {
    let (source, result) = (tempdir().unwrap(), tempdir().unwrap());
    write_model(source.path(), &tiny_model(5));
    run(source.path(), result.path(), &options()).expect("a good source");
    let folder = Folder::open(result.path()).unwrap();
    for (_, tensor) in folder.tensors() {
        assert_eq!(
            tensor.offset * 8 % tensor.dtype.bits(),
            0,
            "{}",
            tensor.name
        );
    }
}

#[test]
fn what_is_quantized_can_be_chosen() {
    let source = tempdir().unwrap();
    write_model(source.path(), &tiny_model(6));
    let chosen = |only: &[&str], skip: &[&str]| {
        let result = tempdir().unwrap();
        let options = Options {
            only: only.iter().map(|&glob| glob.to_owned()).collect(),
            skip: skip.iter().map(|&glob| glob.to_owned()).collect(),
            ..options()
        };
        run(source.path(), result.path(), &options).map(|report| {
            (report.tensors.into_iter())
                .filter(|tensor| tensor.action == Action::Quantized)
                .map(|tensor| tensor.name)
                .collect::<Vec<_>>()
        })
    };
    assert_eq!(chosen(&["lm_head"], &[]).unwrap(), ["lm_head.weight"]);
    assert_eq!(
        chosen(&[], &["*mlp*", "*.1.*"]).unwrap(),
        ["model.layers.0.self_attn.q_proj.weight"]
    );
    assert_eq!(
        chosen(&["*.up_proj.weight"], &["*.0.*"]).unwrap(),
        ["model.layers.1.mlp.up_proj.weight"]
    );
    for (only, skip) in [(&["*.upproj*"][..], &[][..]), (&[], &["lm_haed"])] {
        let error = chosen(only, skip).expect_err("a typing error");
        let Error::Option { problem, .. } = error.root() else {
            panic!("{error}");
        };
        assert_eq!(*problem, OptionProblem::MatchesNothing);
    }
    assert!(matches!(
        chosen(&["a{b"], &[]).expect_err("no glob").root(),
        Error::Option {
            problem: OptionProblem::Glob(_),
            ..
        }
    ));
}

#[test]
fn values_that_are_not_finite_are_refused_and_leave_nothing() {
    for (value, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let mut model = tiny_model(7);
        let weight = "model.layers.1.mlp.down_proj.weight";
        model.get_mut(weight).unwrap().bytes[4 * 700..4 * 701]
            .copy_from_slice(&value.to_le_bytes());
        let (source, parent) = (tempdir().unwrap(), tempdir().unwrap());
        write_model(source.path(), &model);
        let result = parent.path().join("result");
        let error = run(source.path(), &result, &options()).expect_err("not finite");
        assert!(
            matches!(error.root(), Error::NonFinite { index: 700, .. }),
            "{error}"
        );
        let message = error.to_string();
        for part in [weight, "model.safetensors", name] {
            assert!(message.contains(part), "{message}");
        }
        assert!(!result.exists());
    }
}

#[test]
fn bad_sources_are_refused_before_anything_is_written() {
    let mut fp8 = tiny_model(8);
    let weight = fp8
        .get_mut("model.layers.0.self_attn.q_proj.weight")
        .unwrap();
    weight.dtype = safetensors::Dtype::F8_E4M3;
    weight.shape = vec![24, 64];
    let quantized_config = "{\"quantization_config\": {\"quant_method\": \"gptq\"}}";
    for (tensors, config, expected) in [
        (fp8, CONFIG, "UnsupportedDtype"),
        (tiny_model(8), quantized_config, "AlreadyQuantized"),
        (tiny_model(8), "{\"a\": 1, \"a\": 2}", "Json"),
    ] {
        let (source, parent) = (tempdir().unwrap(), tempdir().unwrap());
        write_model(source.path(), &tensors);
        fs::write(source.path().join("config.json"), config).unwrap();
        let result = parent.path().join("result");
        let error = run(source.path(), &result, &options()).expect_err(expected);
        let Error::Checkpoint(problem) = error.root() else {
            panic!("{error}");
        };
        assert!(format!("{problem:?}").starts_with(expected), "{problem:?}");
        assert!(!result.exists());
    }
    // The result of a conversion is no source.
    let (source, result, again) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
    write_model(source.path(), &tiny_model(8));
    run(source.path(), result.path(), &options()).unwrap();
    fs::remove_file(result.path().join("config.json")).unwrap();
    let error = run(result.path(), again.path(), &options()).expect_err("quantized");
    assert!(matches!(
        error.root(),
        Error::Checkpoint(CheckpointProblem::AlreadyQuantized { .. })
    ));
}

#[test]
fn destinations_that_are_not_ours_are_refused() {
    let (source, other) = (tempdir().unwrap(), tempdir().unwrap());
    write_model(source.path(), &tiny_model(9));
    let refused = |destination: &Path, options: &Options| {
        let before = contents(destination);
        let error = run(source.path(), destination, options).expect_err("not ours");
        assert_eq!(contents(destination), before, "nothing was written");
        match error.root() {
            Error::Destination(problem) => problem.clone(),
            _ => panic!("{error}"),
        }
    };
    assert_eq!(
        refused(source.path(), &options()),
        DestinationProblem::SameAsSource
    );
    fs::write(other.path().join("notes.txt"), "mine").unwrap();
    assert!(matches!(
        refused(other.path(), &options()),
        DestinationProblem::NotEmpty { .. }
    ));
    let result = tempdir().unwrap();
    run(source.path(), result.path(), &options()).unwrap();
    let other_options = Options {
        double_quant: false,
        ..options()
    };
    assert_eq!(
        refused(result.path(), &other_options),
        DestinationProblem::OtherConversion
    );
    // The same headers, other data: trained on since.
    write_model(source.path(), &tiny_model(10));
    assert_eq!(
        refused(result.path(), &options()),
        DestinationProblem::OtherConversion
    );
    let file = other.path().join("notes.txt");
    assert!(run(source.path(), &file, &options()).is_err());
}

#[test]
fn a_finished_conversion_is_left_as_it_is() {
    let (source, result) = (tempdir().unwrap(), tempdir().unwrap());
    write_model(source.path(), &tiny_model(11));
    let first = run(source.path(), result.path(), &options()).unwrap();
    let before = contents(result.path());
    let again = run(source.path(), result.path(), &options()).expect("the same");
    assert!(again.already_complete && !first.already_complete);
    assert_eq!(contents(result.path()), before);
    // Where it is damaged, that is said.
    let shard = result.path().join("model-00001-of-00001.safetensors");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    run(source.path(), result.path(), &options()).expect_err("damaged");
}

/// Options that make several shards.
fn several_shards() -> Options {
    Options {
        max_shard_bytes: 4_000,
        ..options()
    }
}

/// Stops a conversion after so many pieces. True where it was finished before.
fn stop_after(source: &Path, destination: &Path, mut pieces: usize) -> bool {
    let stopped = convert(source, destination, &several_shards(), &mut |_| {
        if pieces == 0 {
            return ControlFlow::Break(());
        }
        pieces -= 1;
        ControlFlow::Continue(())
    });
    match stopped {
        Ok(_) => true,
        Err(error) => {
            assert!(matches!(error, Error::Interrupted), "{error}");
            false
        }
    }
}

#[test]
fn a_stopped_conversion_continues_to_the_same_bytes() {
    let (source, whole) = (tempdir().unwrap(), tempdir().unwrap());
    let model = tiny_model(12);
    write_model(source.path(), &model);
    run(source.path(), whole.path(), &several_shards()).unwrap();
    let expected = contents(whole.path());
    let mut kept_some = false;
    for pieces in 0..model.len() {
        let result = tempdir().unwrap();
        assert!(!stop_after(source.path(), result.path(), pieces));
        Folder::open(result.path()).expect_err("nothing loads before it is finished");
        let shards_before = contents(result.path())
            .keys()
            .filter(|name| name.starts_with("model-"))
            .count();
        let report = run(source.path(), result.path(), &several_shards()).expect("it continues");
        assert_eq!(report.shards_kept, shards_before);
        kept_some |= shards_before > 0;
        assert_eq!(contents(result.path()), expected);
    }
    assert!(kept_some);
}

#[test]
fn a_stopped_conversion_of_something_else_is_not_continued() {
    let (source, result) = (tempdir().unwrap(), tempdir().unwrap());
    write_model(source.path(), &tiny_model(13));
    assert!(!stop_after(source.path(), result.path(), 10));
    let error = run(source.path(), result.path(), &options()).expect_err("other options");
    assert!(matches!(
        error.root(),
        Error::Destination(DestinationProblem::OtherUnfinished)
    ));
    // The same headers, other data: what was written is worthless, and is written anew.
    std::thread::sleep(std::time::Duration::from_millis(20));
    let changed = tiny_model(14);
    write_model(source.path(), &changed);
    let report = run(source.path(), result.path(), &several_shards()).expect("it starts anew");
    assert_eq!(report.shards_kept, 0);
    check_result(&changed, result.path(), &several_shards());
}

#[test]
fn a_marker_cut_off_at_any_byte_starts_anew() {
    let (source, result) = (tempdir().unwrap(), tempdir().unwrap());
    write_model(source.path(), &tiny_model(15));
    assert!(!stop_after(source.path(), result.path(), 10));
    let marker = fs::read(result.path().join("fourbit.partial.json")).unwrap();
    for length in [0, 1, marker.len() - 1] {
        let other = tempdir().unwrap();
        fs::write(other.path().join("fourbit.partial.json"), &marker[..length]).unwrap();
        run(source.path(), other.path(), &several_shards()).expect("nothing was written yet");
    }
}

#[test]
fn the_source_may_not_change_meanwhile() {
    let (source, parent) = (tempdir().unwrap(), tempdir().unwrap());
    write_model(source.path(), &tiny_model(16));
    let file = source.path().join("model.safetensors");
    let result = parent.path().join("result");
    let mut touched = false;
    let error = convert(source.path(), &result, &several_shards(), &mut |_| {
        if !touched {
            std::thread::sleep(std::time::Duration::from_millis(20));
            fs::write(&file, serialize(&tiny_model(17))).unwrap();
            touched = true;
        }
        ControlFlow::Continue(())
    })
    .expect_err("it changed");
    assert!(matches!(
        error.root(),
        Error::Checkpoint(CheckpointProblem::SourceChanged)
    ));
}

#[test]
fn the_small_files_may_not_change_meanwhile() {
    let (source, parent) = (tempdir().unwrap(), tempdir().unwrap());
    write_model(source.path(), &tiny_model(22));
    let result = parent.path().join("result");
    let error = convert(source.path(), &result, &several_shards(), &mut |_| {
        fs::write(source.path().join("tokenizer.json"), "{}").unwrap();
        ControlFlow::Continue(())
    })
    .expect_err("it changed");
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
    assert!(matches!(
        error.root(),
        Error::Checkpoint(CheckpointProblem::SourceChanged)
    ));
    assert!(Folder::open(&result).is_err(), "nothing loads");
}

#[test]
fn more_threads_than_can_be_started_are_refused() {
    let (source, parent) = (tempdir().unwrap(), tempdir().unwrap());
    write_model(source.path(), &tiny_model(23));
    let result = parent.path().join("result");
    let many = Options {
        threads: 1025,
        ..options()
    };
    let error = run(source.path(), &result, &many).expect_err("too many");
    assert!(matches!(
        error.root(),
        Error::Option {
            option: "threads",
            problem: OptionProblem::TooLarge { most: 1024 },
            ..
        }
    ));
    assert!(!result.exists());
}

#[test]
fn headers_that_no_reader_takes_are_refused_before_anything_is_written() {
    // Names of 4000 bytes, 13,000 of them: the source's header has 53 MB, the result's would
    // name every tensor twice and so have more than the 100 MB that are allowed.
    let mut header = "{".to_owned();
    for index in 0..13_000 {
        let comma = if index == 0 { "" } else { "," };
        let name = "n".repeat(4000);
        header += &format!(
            "{comma}\"{name}{index}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}"
        );
    }
    header += "}";
    let (source, parent) = (tempdir().unwrap(), tempdir().unwrap());
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    fs::write(source.path().join("model.safetensors"), file).unwrap();
    let result = parent.path().join("result");
    let error = run(source.path(), &result, &options()).expect_err("too long");
    assert!(matches!(
        error.root(),
        Error::Checkpoint(CheckpointProblem::HeaderTooLong { .. })
    ));
    assert!(!result.exists());
}

#[test]
fn empty_and_odd_tensors_survive() {
    let model: Tensors = [
        ("a.weight".to_owned(), f32_tensor(&[0, 64], &[])),
        ("b.weight".to_owned(), f32_tensor(&[3, 4], &[1.0; 12])),
        ("c".to_owned(), f32_tensor(&[], &[7.0])),
        ("d.weight".to_owned(), bf16_tensor(&[2, 2, 32], &[1.0; 128])),
        (
            "experts.gate_up_proj".to_owned(),
            bf16_tensor(&[2, 2, 32], &[1.0; 128]),
        ),
        (
            "experts.down_proj".to_owned(),
            bf16_tensor(&[4, 1, 96], &[1.0; 384]),
        ),
        ("e.weight".to_owned(), f32_tensor(&[1, 65], &[0.0; 65])),
    ]
    .into();
    let (source, result) = (tempdir().unwrap(), tempdir().unwrap());
    write_model(source.path(), &model);
    let report = run(source.path(), result.path(), &options()).expect("a good source");
    let reasons: Vec<(&str, &str)> = (report.tensors.iter())
        .map(|tensor| (tensor.name.as_str(), tensor.reason.as_str()))
        .collect();
    for expected in [
        ("a.weight", "smaller than one block"),
        ("b.weight", "smaller than one block"),
        ("c", "not a weight"),
        ("d.weight", "not a matrix"),
        ("experts.gate_up_proj", "mixture of experts"),
        (
            "experts.down_proj",
            "experts whose matrices are not whole blocks",
        ),
        ("e.weight", "linear layer"),
    ] {
        assert!(reasons.contains(&expected), "{expected:?} in {reasons:?}");
    }
    check_result(&model, result.path(), &options());
    verify(result.path()).expect("a whole folder");
}

#[test]
fn a_finished_folder_is_never_cleared() {
    let (source, result, stopped) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
    write_model(source.path(), &tiny_model(18));
    assert!(!stop_after(source.path(), stopped.path(), 10));
    run(source.path(), result.path(), &several_shards()).unwrap();
    let whole = contents(result.path());
    let marker = "fourbit.partial.json";
    // Killed between the last rename and the removal of the marker.
    fs::copy(stopped.path().join(marker), result.path().join(marker)).unwrap();
    verify(result.path()).expect("it is complete");
    run(source.path(), result.path(), &several_shards()).expect("it only tidies up");
    assert_eq!(contents(result.path()), whole);
    // The same, and then the source changed: the result stays what it is.
    fs::copy(stopped.path().join(marker), result.path().join(marker)).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    write_model(source.path(), &tiny_model(19));
    let error = run(source.path(), result.path(), &several_shards()).expect_err("another source");
    assert!(matches!(
        error.root(),
        Error::Destination(DestinationProblem::OtherConversion)
    ));
    assert_eq!(contents(result.path()), whole);
    // A marker made by a run that came a moment too late.
    fs::write(result.path().join(marker), "").unwrap();
    let error = run(source.path(), result.path(), &several_shards()).expect_err("not empty");
    assert!(matches!(
        error.root(),
        Error::Destination(DestinationProblem::NotEmpty { .. })
    ));
    assert_eq!(contents(result.path()), whole);
}

#[test]
fn a_source_without_a_config_is_converted() {
    let (source, result) = (tempdir().unwrap(), tempdir().unwrap());
    write_model(source.path(), &tiny_model(20));
    fs::remove_file(source.path().join("config.json")).unwrap();
    run(source.path(), result.path(), &options()).expect("weights are enough");
    assert!(!result.path().join("config.json").exists());
    verify(result.path()).expect("a whole folder");
}

#[test]
fn small_files_are_copied_and_others_are_listed() {
    let (source, result) = (tempdir().unwrap(), tempdir().unwrap());
    write_model(source.path(), &tiny_model(21));
    for (name, text) in [
        ("LICENSE", "free"),
        ("chat_template.jinja", "{{ x }}"),
        ("tokenizer.model", "\0\u{1}"),
        ("merges.txt", "a b"),
        ("training_args.bin", "PK"),
        ("optimizer.pt", "PK"),
        ("other.safetensors", "x"),
        ("pytorch_model.bin.index.json", "{}"),
        (".hidden.json", "{}"),
    ] {
        fs::write(source.path().join(name), text).unwrap();
    }
    fs::create_dir(source.path().join("folder")).unwrap();
    let report = run(source.path(), result.path(), &options()).expect("a good source");
    let copied = [
        "LICENSE",
        "chat_template.jinja",
        "merges.txt",
        "tokenizer.json",
        "tokenizer.model",
    ];
    assert_eq!(report.copied, copied);
    for name in copied {
        let (before, after) = (source.path().join(name), result.path().join(name));
        assert_eq!(
            fs::read(before).unwrap(),
            fs::read(after).unwrap(),
            "{name}"
        );
    }
    let skipped: Vec<&str> = report
        .skipped
        .iter()
        .map(|file| file.name.as_str())
        .collect();
    assert_eq!(
        skipped,
        [
            ".hidden.json",
            "folder",
            "optimizer.pt",
            "other.safetensors",
            "pytorch_model.bin.index.json",
            "training_args.bin"
        ]
    );
}
