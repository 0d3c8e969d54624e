//! Folders made to break a reader, and damage that `verify` must find.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use common::{
    Random, bf16_tensor, contents, f32_tensor, options, run, serialize, tiny_model, write_model,
    write_sharded,
};
use fourbit::checkpoint::plan::PlannedTensor;
use fourbit::checkpoint::{
    CheckpointProblem, FileDtype, Folder, QuantState, Writer, quantized, verify,
};
use fourbit::error::DestinationProblem;
use fourbit::{BlockSize, Codebook, Error};
use tempfile::{TempDir, tempdir};

fn problem(error: &Error) -> &CheckpointProblem {
    match error.root() {
        Error::Checkpoint(problem) => problem,
        other => panic!("no checkpoint problem: {other:?}"),
    }
}

fn refused(folder: &Path) -> CheckpointProblem {
    problem(&Folder::open(folder).expect_err("a bad folder")).clone()
}

/// A folder of two shards, `a` in the first and `b` in the second.
fn two_shards() -> TempDir {
    let folder = tempdir().unwrap();
    let tensors = [
        ("a".to_owned(), f32_tensor(&[1], &[1.0])),
        ("b".to_owned(), f32_tensor(&[2], &[2.0, 3.0])),
    ];
    write_sharded(folder.path(), &tensors.into(), 2);
    folder
}

const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";

fn set_index(folder: &Path, weight_map: &str) {
    let text = format!("{{\"metadata\": {{}}, \"weight_map\": {weight_map}}}");
    fs::write(folder.join("model.safetensors.index.json"), text).unwrap();
}

#[test]
fn a_good_folder_opens_and_reads() {
    let folder = two_shards();
    let opened = Folder::open(folder.path()).expect("a good folder");
    let mut bytes = [0; 8];
    opened.read("b", &mut bytes).expect("it is there");
    assert_eq!(bytes[..4], 2.0_f32.to_le_bytes());
    assert!(opened.read("b", &mut bytes[..4]).is_err());
    assert!(opened.read("c", &mut bytes).is_err());
}

#[test]
fn an_index_that_disagrees_with_the_shards_is_refused() {
    let folder = two_shards();
    let path = folder.path();
    let entry = |tensor: &str, shard: &str| format!("\"{tensor}\": \"{shard}\"");
    let (a, b) = (entry("a", FIRST), entry("b", SECOND));
    for (map, matches) in [
        (format!("{{{a}, {}}}", entry("b", FIRST)), "ShardNotIndexed"),
        (format!("{{{a}, {b}, {}}}", entry("c", FIRST)), "NotInShard"),
        (
            format!("{{{}, {}}}", entry("a", SECOND), entry("b", FIRST)),
            "NotIndexed",
        ),
        (format!("{{{a}, {b}, {b}}}"), "Json"),
        (format!("{{{b}}}"), "ShardNotIndexed"),
        (format!("{{{b}, {}}}", entry("c", FIRST)), "NotIndexed"),
        (
            format!("{{{a}, {}}}", entry("b", "../x.safetensors")),
            "ShardName",
        ),
        (
            format!("{{{a}, {}}}", entry("b", "/etc/x.safetensors")),
            "ShardName",
        ),
        (
            format!("{{{a}, {}}}", entry("b", "x\\\\y.safetensors")),
            "ShardName",
        ),
        (
            format!("{{{a}, {}}}", entry("b", "x\\u0000.safetensors")),
            "ShardName",
        ),
        (format!("{{{a}, {}}}", entry("b", "x.bin")), "ShardName"),
    ] {
        set_index(path, &map);
        let found = format!("{:?}", refused(path));
        assert!(found.starts_with(matches), "{map}: {found}");
    }
    set_index(
        path,
        &format!("{{{a}, {b}, {}}}", entry("c", "missing.safetensors")),
    );
    let error = Folder::open(path).expect_err("a missing shard");
    assert!(matches!(error.root(), Error::Io(_)), "{error}");
    assert!(error.to_string().contains("missing.safetensors"), "{error}");
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let folder = two_shards();
    let file = fs::read(folder.path().join(FIRST)).unwrap();
    fs::write(folder.path().join("model-3.safetensors"), file).unwrap();
    let map =
        format!("{{\"a\": \"{FIRST}\", \"b\": \"{SECOND}\", \"c\": \"model-3.safetensors\"}}");
    set_index(folder.path(), &map);
    assert!(matches!(
        refused(folder.path()),
        CheckpointProblem::DuplicateTensor { name } if name == "a"
    ));
}

#[cfg(unix)]
#[test]
fn links_and_pipes_are_not_followed() {
    use std::os::unix::fs::symlink;
    let folder = two_shards();
    let elsewhere = tempdir().unwrap();
    let target = elsewhere.path().join("x.safetensors");
    fs::rename(folder.path().join(SECOND), &target).unwrap();
    symlink(&target, folder.path().join(SECOND)).unwrap();
    assert!(matches!(
        refused(folder.path()),
        CheckpointProblem::Link { .. }
    ));
    fs::remove_file(folder.path().join(SECOND)).unwrap();
    fs::create_dir(folder.path().join(SECOND)).unwrap();
    assert_eq!(refused(folder.path()), CheckpointProblem::NotAFile);
    fs::remove_dir(folder.path().join(SECOND)).unwrap();
    // Opening a pipe that nobody writes to would wait for ever.
    let pipe = std::process::Command::new("mkfifo")
        .arg(folder.path().join(SECOND))
        .status()
        .unwrap();
    assert!(pipe.success());
    assert_eq!(refused(folder.path()), CheckpointProblem::NotAFile);
}

#[cfg(unix)]
#[test]
fn the_links_of_the_hugging_face_cache_are_followed() {
    use std::os::unix::fs::symlink;
    let cache = tempdir().unwrap();
    let snapshot = cache.path().join("snapshots/0123");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir(cache.path().join("blobs")).unwrap();
    let plain = tempdir().unwrap();
    write_model(plain.path(), &tiny_model(1));
    for (index, (name, bytes)) in contents(plain.path()).into_iter().enumerate() {
        let blob = format!("abcdef0{index}");
        fs::write(cache.path().join("blobs").join(&blob), bytes).unwrap();
        symlink(format!("../../blobs/{blob}"), snapshot.join(name)).unwrap();
    }
    let result = tempdir().unwrap();
    let report = run(&snapshot, result.path(), &options()).expect("a good source");
    assert_eq!(report.copied, ["tokenizer.json"]);
}

#[test]
fn folders_without_weights_say_why() {
    let folder = tempdir().unwrap();
    assert_eq!(
        refused(folder.path()),
        CheckpointProblem::NoWeights { pickles: false }
    );
    fs::write(folder.path().join("pytorch_model.bin"), "PK").unwrap();
    assert_eq!(
        refused(folder.path()),
        CheckpointProblem::NoWeights { pickles: true }
    );
    fs::write(folder.path().join("model.safetensors"), b"PK\x03\x04 a zip").unwrap();
    assert!(matches!(
        refused(folder.path()),
        CheckpointProblem::NotSafetensors { .. }
    ));
    set_index(folder.path(), "{}");
    assert_eq!(refused(folder.path()), CheckpointProblem::Ambiguous);
    let missing = Folder::open(&folder.path().join("x")).expect_err("not there");
    assert!(matches!(missing.root(), Error::Io(_)));
    let file = Folder::open(&folder.path().join("pytorch_model.bin")).expect_err("a file");
    assert_eq!(problem(&file), &CheckpointProblem::NotAFolder);
}

/// A converted model of two shards.
fn converted() -> TempDir {
    let (source, result) = (tempdir().unwrap(), tempdir().unwrap());
    write_model(source.path(), &tiny_model(2));
    let options = fourbit::convert::Options {
        max_shard_bytes: 7_000,
        ..options()
    };
    let report = run(source.path(), result.path(), &options).expect("a good source");
    assert_eq!(report.shards, 3);
    result
}

#[test]
fn verify_finds_ten_thousand_flipped_bits() {
    let folder = converted();
    assert!(verify(folder.path()).expect("it is whole").checksums);
    let files = contents(folder.path());
    let mut random = Random::new(3);
    for (name, bytes) in &files {
        let path = folder.path().join(name);
        let mut flipped = bytes.clone();
        for _ in 0..10_000_usize.div_ceil(files.len()) {
            let bit = random.below(bytes.len() * 8);
            flipped[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &flipped).unwrap();
            assert!(verify(folder.path()).is_err(), "{name}: bit {bit}");
            flipped[bit / 8] ^= 1 << (bit % 8);
        }
        fs::write(&path, bytes).unwrap();
    }
    verify(folder.path()).expect("all bits are back");
}

#[test]
fn verify_tells_how_far_it_is_and_can_be_stopped() {
    let folder = converted();
    let files = contents(folder.path());
    let record = files["fourbit.json"].len() as u64;
    let all = files.values().map(|file| file.len() as u64).sum::<u64>() - record;
    let most = std::sync::atomic::AtomicU64::new(0);
    verify::verify_watched(folder.path(), &|done, total| {
        assert_eq!(total, all);
        most.fetch_max(done, std::sync::atomic::Ordering::Relaxed);
        ControlFlow::Continue(())
    })
    .expect("a whole folder");
    assert_eq!(most.into_inner(), all);
    for stop_at in [1, all / 2, all] {
        let error = verify::verify_watched(folder.path(), &|done, _| {
            if done < stop_at {
                return ControlFlow::Continue(());
            }
            ControlFlow::Break(())
        })
        .expect_err("stopped");
        assert!(matches!(error.root(), Error::Interrupted), "{error}");
    }
}

#[test]
fn damage_is_named_by_file_and_tensor() {
    let folder = converted();
    let path = folder.path().join("model-00001-of-00003.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let opened = Folder::open(folder.path()).unwrap();
    let tensor = opened.shards()[0].header.tensors[1].clone();
    bytes[tensor.offset as usize] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = verify(folder.path()).expect_err("a flipped bit");
    assert!(matches!(
        problem(&error),
        CheckpointProblem::Checksum { .. }
    ));
    let message = error.to_string();
    assert!(message.contains(&tensor.name), "{message}");
    assert!(
        message.contains("model-00001-of-00003.safetensors"),
        "{message}"
    );
}

#[test]
fn verify_finds_every_truncation_of_a_header_and_many_of_data() {
    let folder = converted();
    for (name, bytes) in contents(folder.path()) {
        let path = folder.path().join(&name);
        let header = match name.ends_with(".safetensors") {
            true => 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize,
            false => bytes.len(),
        };
        let data = bytes.len() - header;
        let cuts = (0..header).chain((0..1000.min(data)).map(|i| header + i * data / 1000));
        for cut in cuts {
            fs::write(&path, &bytes[..cut]).unwrap();
            assert!(verify(folder.path()).is_err(), "{name}: {cut} bytes");
        }
        let mut longer = bytes.clone();
        longer.push(b' ');
        fs::write(&path, &longer).unwrap();
        assert!(verify(folder.path()).is_err(), "{name}: a byte too many");
        fs::remove_file(&path).unwrap();
        assert!(verify(folder.path()).is_err(), "{name}: missing");
        fs::write(&path, &bytes).unwrap();
    }
    verify(folder.path()).expect("all is back");
}

#[test]
fn verify_finds_swapped_and_stray_shards() {
    let folder = converted();
    let shard = |index: usize| {
        folder
            .path()
            .join(format!("model-0000{index}-of-00003.safetensors"))
    };
    let (first, second) = (fs::read(shard(1)).unwrap(), fs::read(shard(2)).unwrap());
    fs::write(shard(1), &second).unwrap();
    fs::write(shard(2), &first).unwrap();
    verify(folder.path()).expect_err("swapped");
    fs::write(shard(1), &first).unwrap();
    fs::write(shard(2), &second).unwrap();
    let stray = folder.path().join("model-00004-of-00004.safetensors");
    fs::write(&stray, &first).unwrap();
    let error = verify(folder.path()).expect_err("a stray shard");
    assert_eq!(problem(&error), &CheckpointProblem::StrayShard);
    fs::remove_file(stray).unwrap();
    // A shard of another conversion of the same shape, whole in itself.
    let (source, other) = (tempdir().unwrap(), tempdir().unwrap());
    write_model(source.path(), &tiny_model(99));
    let options = fourbit::convert::Options {
        max_shard_bytes: 7_000,
        ..options()
    };
    run(source.path(), other.path(), &options).unwrap();
    fs::copy(
        other.path().join("model-00001-of-00003.safetensors"),
        shard(1),
    )
    .unwrap();
    verify(folder.path()).expect_err("a stale shard");
}

/// A folder as bitsandbytes writes it, with one weight of 64 elements; `change` spoils it.
fn bitsandbytes_folder(double: bool, change: impl Fn(&mut common::Tensors)) -> TempDir {
    let state = QuantState {
        codebook: "nf4".to_owned(),
        ties: fourbit::codebook::Ties::Lower,
        block_size: BlockSize::DEFAULT,
        dtype: fourbit::element::Dtype::Bf16,
        shape: vec![8, 16],
        nested_offset: double.then_some(0.5),
    };
    let bytes = |bytes: Vec<u8>| common::Tensor {
        dtype: safetensors::Dtype::U8,
        shape: vec![bytes.len()],
        bytes,
    };
    let mut tensors = common::Tensors::new();
    let mut add = |name: &str, tensor| tensors.insert(format!("x.weight{name}"), tensor);
    add("", bytes(vec![0x77; 64]));
    add(".quant_map", f32_tensor(&[16], Codebook::nf4().table()));
    add(
        ".quant_state.bitsandbytes__nf4",
        bytes(state.to_json().into_bytes()),
    );
    if double {
        add(".absmax", bytes(vec![127; 2]));
        add(".nested_absmax", f32_tensor(&[1], &[0.1]));
        let map = Codebook::dynamic_signed().table();
        add(".nested_quant_map", f32_tensor(&[256], map));
    } else {
        add(".absmax", f32_tensor(&[2], &[1.0, 2.0]));
    }
    change(&mut tensors);
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("model.safetensors"), serialize(&tensors)).unwrap();
    folder
}

#[test]
fn folders_of_bitsandbytes_are_read() {
    for double in [false, true] {
        let folder = bitsandbytes_folder(double, |_| {});
        let weights = quantized(&Folder::open(folder.path()).unwrap()).expect("complete");
        assert_eq!(weights.len(), 1);
        assert_eq!(weights[0].state.nested_offset.is_some(), double);
        assert_eq!(weights[0].layout.packed_bytes, 64);
        let report = verify(folder.path()).expect("a good structure");
        assert!(!report.checksums);
    }
    // Packed bytes under another type.
    let folder = bitsandbytes_folder(false, |tensors| {
        let packed = tensors.get_mut("x.weight").unwrap();
        (packed.dtype, packed.shape) = (safetensors::Dtype::BF16, vec![32, 1]);
    });
    quantized(&Folder::open(folder.path()).unwrap()).expect("bytes are bytes");
}

#[test]
fn incomplete_quantized_weights_are_refused() {
    type Change = fn(&mut common::Tensors);
    let remove: [Change; 5] = [
        |t| drop(t.remove("x.weight")),
        |t| drop(t.remove("x.weight.absmax")),
        |t| drop(t.remove("x.weight.quant_map")),
        |t| drop(t.remove("x.weight.nested_absmax")),
        |t| drop(t.remove("x.weight.nested_quant_map")),
    ];
    for change in remove {
        let folder = bitsandbytes_folder(true, change);
        let error = verify(folder.path()).expect_err("incomplete");
        assert!(
            matches!(problem(&error), CheckpointProblem::MissingCompanion { .. }),
            "{error}"
        );
        assert!(error.to_string().contains("x.weight"), "{error}");
    }
    let others: [(Change, &str); 9] = [
        (
            |t| drop(t.remove("x.weight.quant_state.bitsandbytes__nf4")),
            "StrayCompanion",
        ),
        (
            |t| drop(t.insert("x.weight.more".to_owned(), f32_tensor(&[1], &[1.0]))),
            "Stray",
        ),
        (
            |t| drop(t.insert("y.absmax".to_owned(), f32_tensor(&[1], &[1.0]))),
            "Stray",
        ),
        (
            |t| {
                let state = t["x.weight.quant_state.bitsandbytes__nf4"].clone();
                t.insert("x.weight.quant_state.bitsandbytes__fp4".to_owned(), state);
            },
            "QuantState",
        ),
        (
            |t| drop(t.insert("x.weight.absmax".to_owned(), f32_tensor(&[2], &[1.0; 2]))),
            "Companion",
        ),
        (
            |t| {
                drop(t.insert(
                    "x.weight.nested_absmax".to_owned(),
                    bf16_tensor(&[1], &[1.0]),
                ))
            },
            "Companion",
        ),
        (
            |t| {
                drop(t.insert(
                    "x.weight.quant_map".to_owned(),
                    f32_tensor(&[16], &[0.5; 16]),
                ))
            },
            "Table",
        ),
        (
            |t| {
                let map = t.get_mut("x.weight.nested_quant_map").unwrap();
                map.bytes[3] ^= 0x40;
            },
            "Table",
        ),
        (
            |t| {
                let packed = t.get_mut("x.weight").unwrap();
                packed.bytes.pop();
                packed.shape = vec![63];
            },
            "Companion",
        ),
    ];
    for (change, expected) in others {
        let folder = bitsandbytes_folder(true, change);
        let error = verify(folder.path()).expect_err("not as it must be");
        let found = format!("{:?}", problem(&error));
        assert!(found.starts_with(expected), "{expected}: {found}");
    }
}

fn plan(name: &str) -> PlannedTensor {
    PlannedTensor::new(name, FileDtype::U8, vec![4])
}

#[test]
fn a_writer_leaves_nothing_that_loads_before_it_is_finished() {
    let parent = tempdir().unwrap();
    let path = parent.path().join("new");
    let groups = || vec![vec![plan("a")], vec![plan("b"), plan("c")]];
    let files = || vec![("config.json".to_owned(), b"{}".to_vec())];
    let mut writer = Writer::create(&path, groups(), 4, files()).expect("a free folder");
    assert!(matches!(
        Writer::create(&path, groups(), 4, files())
            .map(drop)
            .expect_err("locked")
            .root(),
        Error::Destination(DestinationProblem::Locked)
    ));
    assert!(writer.write("b", &[0; 4]).is_err(), "out of order");
    writer.write("a", &[1; 4]).expect("the first");
    assert!(writer.write("b", &[0; 5]).is_err(), "too long");
    assert!(matches!(refused(&path), CheckpointProblem::Unfinished));
    drop(writer);
    assert!(!path.exists(), "a dropped writer leaves nothing");

    let mut writer = Writer::create(&path, groups(), 4, files()).expect("a free folder");
    for (name, byte) in [("a", 1), ("b", 2), ("c", 3)] {
        writer.write(name, &[byte; 4]).expect("in order");
    }
    writer.finish().expect("all is written");
    let report = verify(&path).expect("a good folder");
    assert_eq!(
        (report.shards, report.tensors, report.checksums),
        (2, 3, true)
    );
    let error = Writer::create(&path, groups(), 4, files())
        .map(drop)
        .expect_err("taken");
    assert!(matches!(
        error.root(),
        Error::Destination(DestinationProblem::NotEmpty { .. })
    ));
}

#[test]
fn a_writer_finished_early_is_an_error_and_leaves_nothing() {
    let parent = tempdir().unwrap();
    fs::write(parent.path().join("tokenizer.json"), "{}").unwrap();
    let groups = vec![vec![plan("a")], vec![plan("b")]];
    let mut writer = Writer::create(parent.path(), groups, 1, vec![]).expect("no weights there");
    writer.write("a", &[1; 4]).expect("the first");
    assert!(matches!(writer.finish(), Err(Error::WriteOrder { .. })));
    assert_eq!(
        contents(parent.path()).into_keys().collect::<Vec<_>>(),
        ["tokenizer.json"]
    );
}
