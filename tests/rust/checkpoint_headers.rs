//! Headers made to break a reader, compared with the reference reader: ours accepts a file only
//! where the reference does, reads the same from it, and is stricter only in the listed ways.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Random, Tensors, bf16_tensor, f32_tensor, serialize};
use fourbit::checkpoint::{CheckpointProblem, Header};
use fourbit::{Error, checkpoint};
use proptest::prelude::*;
use safetensors::SafeTensors;

/// Names that no single change of a byte makes equal.
fn base() -> Vec<u8> {
    let mut tensors = Tensors::new();
    tensors.insert("alpha.weight".to_owned(), bf16_tensor(&[3, 5], &[1.0; 15]));
    tensors.insert("second.bias".to_owned(), f32_tensor(&[4], &[2.0; 4]));
    tensors.insert("third".to_owned(), f32_tensor(&[0, 7], &[]));
    tensors.insert("fourth.x".to_owned(), f32_tensor(&[], &[3.0]));
    serialize(&tensors)
}

fn split(file: &[u8]) -> (String, Vec<u8>) {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(file[8..8 + length].to_vec()).unwrap();
    (header.trim_end().to_owned(), file[8 + length..].to_vec())
}

fn join(header: &[u8], data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.extend_from_slice(data);
    file
}

/// The ways in which ours is stricter.
fn is_stricter(error: &Error) -> bool {
    match error.root() {
        Error::Checkpoint(problem) => match problem {
            CheckpointProblem::TensorName { .. } | CheckpointProblem::DuplicateTensor { .. } => {
                true
            }
            CheckpointProblem::Json { reason, .. } => [
                "stands twice",
                "unknown field",
                "more than",
                "does not start with {",
                "expected an object for the tensor",
            ]
            .iter()
            .any(|class| reason.contains(class)),
            _ => false,
        },
        // Non-zero dimensions that overflow beside a zero.
        Error::Overflow { shape } => shape.contains(&0),
        _ => false,
    }
}

/// Compares both readers on one file; returns whether ours accepted it.
fn compare(file: &[u8]) -> bool {
    let reference = SafeTensors::deserialize(file);
    match (Header::read(file), reference) {
        (Ok(ours), Ok(reference)) => {
            assert_eq!(ours.tensors.len(), reference.len());
            for tensor in &ours.tensors {
                let view = reference.tensor(&tensor.name).expect("the same names");
                let start = tensor.offset as usize;
                assert_eq!(view.data(), &file[start..start + tensor.bytes as usize]);
                assert_eq!(format!("{:?}", view.dtype()), tensor.dtype.name());
                let shape: Vec<u64> = view.shape().iter().map(|&dim| dim as u64).collect();
                assert_eq!(shape, tensor.shape);
            }
            true
        }
        (Err(_), Err(_)) => false,
        (Err(error), Ok(_)) => {
            assert!(is_stricter(&error), "only ours refuses: {error}");
            false
        }
        (Ok(_), Err(error)) => {
            panic!(
                "only ours accepts ({error}): {}",
                String::from_utf8_lossy(file)
            )
        }
    }
}

/// Pieces of JSON that headers are made of, good and bad.
const FRAGMENTS: [&str; 30] = [
    "0",
    "1",
    "-1",
    "1.0",
    "1e3",
    "18446744073709551615",
    "18446744073709551616",
    "4294967296",
    "[]",
    "[0]",
    "[0,0]",
    "[3,5]",
    "{}",
    "null",
    "true",
    "\"\"",
    "\"F32\"",
    "\"BF16\"",
    "\"F8_E4M3\"",
    "\"Q4\"",
    "\"dtype\"",
    "\"shape\"",
    "\"data_offsets\"",
    "\"\\u0000\"",
    "\"\\ud800\"",
    "\"__metadata__\":{}",
    "\"third\":{\"dtype\":\"F32\",\"shape\":[0],\
     \"data_offsets\":[30,30]}",
    "[[[[[[[[[[]]]]]]]]]]",
    "\"x\":1",
    "{\"F32\":null}",
];

/// One change that keeps most of the header.
fn mutate(header: &str, data: &[u8], random: &mut Random) -> Vec<u8> {
    let fragment = FRAGMENTS[random.below(FRAGMENTS.len())];
    let mut text = header.as_bytes().to_vec();
    let mut data = data.to_vec();
    let position = random.below(text.len());
    match random.below(12) {
        // A byte changed, removed, doubled or made no text.
        0 => text[position] ^= 1 << random.below(8),
        1 => drop(text.remove(position)),
        2 => text.insert(position, text[position]),
        3 => text[position] = 0x80 | (random.next() as u8),
        // A number changed: sizes, offsets, overflow.
        4 | 5 => {
            let digits: Vec<usize> = (0..text.len())
                .filter(|&at| text[at].is_ascii_digit() && !text[at - 1].is_ascii_digit())
                .collect();
            let start = digits[random.below(digits.len())];
            let end = (start..text.len())
                .find(|&at| !text[at].is_ascii_digit())
                .unwrap();
            let number = [
                "0",
                "1",
                "2",
                "30",
                "46",
                "50",
                "18446744073709551615",
                "9".repeat(30).as_str(),
            ][random.below(8)]
            .to_owned();
            text.splice(start..end, number.into_bytes());
        }
        // A value or a key put somewhere a value or a key can stand.
        6 | 7 => {
            let places: Vec<usize> = (0..text.len())
                .filter(|&at| matches!(text[at], b',' | b':' | b'[' | b'{'))
                .collect();
            let at = places[random.below(places.len())] + 1;
            let mut insert = fragment.as_bytes().to_vec();
            if random.below(2) == 0 {
                insert.push(b',');
            }
            text.splice(at..at, insert);
        }
        // A part of the header doubled: keys that stand twice.
        8 => {
            let entries: Vec<usize> = (0..text.len()).filter(|&at| text[at] == b',').collect();
            let from = entries[random.below(entries.len())];
            let to = (from + 1..text.len())
                .find(|&at| matches!(text[at], b',' | b'}'))
                .unwrap();
            let part = text[from..to].to_vec();
            text.splice(from..from, part);
        }
        // Data cut off, or with a tail.
        9 => data.truncate(random.below(data.len() + 1)),
        10 => data.resize(data.len() + 1 + random.below(9), 0),
        // The header's own length.
        _ => {
            let mut file = join(&text, &data);
            let length = text.len() as u64;
            let claims = [
                0,
                1,
                length - 1,
                length + 1,
                length + 8,
                100_000_000,
                100_000_001,
                u64::MAX,
                u64::MAX - 7,
                1 << 63,
                file.len() as u64,
                file.len() as u64 - 8,
            ];
            let claim = claims[random.below(claims.len())];
            file[..8].copy_from_slice(&claim.to_le_bytes());
            return file;
        }
    }
    join(&text, &data)
}

#[test]
fn twenty_thousand_broken_headers() {
    let (header, data) = split(&base());
    let mut random = Random::new(1);
    let mut accepted = 0;
    for _ in 0..20_000 {
        accepted += usize::from(compare(&mutate(&header, &data, &mut random)));
    }
    // Some changes do no harm; if most did none, the test would be blunt.
    assert!((100..10_000).contains(&accepted), "{accepted} accepted");
}

#[test]
fn every_truncation_is_refused() {
    let file = base();
    assert!(compare(&file));
    for length in 0..file.len() {
        assert!(!compare(&file[..length]), "{length} bytes");
    }
}

#[test]
fn each_stricter_way_is_refused() {
    let entry = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    let data = [0; 4];
    let many = vec!["1"; 65].join(",");
    for (header, why) in [
        (
            format!(r#"{{"a":{entry},"a":{entry}}}"#),
            "a name that stands twice",
        ),
        (
            r#"{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#.to_owned(),
            "a field that stands twice",
        ),
        (
            format!(r#"{{"__metadata__":{{"x":"1","x":"2"}},"a":{entry}}}"#),
            "a metadata key that stands twice",
        ),
        (
            format!(r#"{{"__metadata__":{{}},"__metadata__":{{}},"a":{entry}}}"#),
            "metadata twice",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}"#.to_owned(),
            "an unknown field",
        ),
        (
            r#"{"a":["F32",[1],[0,4]]}"#.to_owned(),
            "an entry that is a list",
        ),
        (format!(r#"{{"":{entry}}}"#), "an empty name"),
        (format!(r#"{{"a\u0000":{entry}}}"#), "NUL in a name"),
        (
            format!(r#"{{"a\u001b[2J":{entry}}}"#),
            "an escape sequence in a name",
        ),
        (format!(" {{\"a\":{entry}}}"), "a space before the header"),
        (
            format!(r#"{{"a":{{"dtype":"F32","shape":[{many}],"data_offsets":[0,4]}}}}"#),
            "too many dimensions",
        ),
    ] {
        let file = join(header.as_bytes(), &data);
        let error = Header::read(&file[..]).expect_err(why);
        assert!(is_stricter(&error), "{why}: {error}");
        compare(&file);
    }
    assert!(compare(&join(
        format!(r#"{{"a":{entry}}}  "#).as_bytes(),
        &data
    )));
}

#[test]
fn other_formats_are_named() {
    for (start, name) in [
        (&b"PK\x03\x04\x14\x00\x08\x00rest of the archive"[..], "zip"),
        (&b"\x80\x02}q\x00(X\x05\x00\x00\x00"[..], "pickle"),
        (&b"version https://git-lfs.github.com/spec/v1\n"[..], "LFS"),
        (&b"GGUF\x03\x00\x00\x00\x10\x01\x00\x00"[..], "GGUF"),
        (&b"\x89HDF\r\n\x1a\n\x00\x00"[..], "HDF5"),
        (&b"<!DOCTYPE html>"[..], "HTML"),
    ] {
        let error = Header::read(start).expect_err("not safetensors");
        assert!(
            matches!(
                error.root(),
                Error::Checkpoint(CheckpointProblem::NotSafetensors { looks_like })
                    if looks_like.contains(name)
            ),
            "{name}: {error}"
        );
    }
}

#[test]
fn a_million_empty_tensors_are_refused() {
    let entry = r#"{"dtype":"F32","shape":[0],"data_offsets":[0,0]}"#;
    let entries: Vec<String> = (0..1_000_000).map(|i| format!("\"{i}\":{entry}")).collect();
    let file = join(format!("{{{}}}", entries.join(",")).as_bytes(), &[]);
    let error = Header::read(&file[..]).expect_err("too many tensors");
    assert!(
        error.to_string().contains("more than 262144 tensors"),
        "{error}"
    );
}

#[test]
fn a_million_strings_of_metadata_are_refused() {
    let strings: Vec<String> = (0..1_000_000).map(|i| format!("\"{i:x}\":\"\"")).collect();
    let header = format!("{{\"__metadata__\":{{{}}}}}", strings.join(","));
    let error = Header::read(join(header.as_bytes(), &[]).as_slice()).expect_err("too many");
    assert!(error.to_string().contains("more than"), "{error}");
    let entries: Vec<String> = (0..1_100_000)
        .map(|i| format!("\"{i:x}\":\"a.safetensors\""))
        .collect();
    let index = format!("{{\"weight_map\":{{{}}}}}", entries.join(","));
    let error = checkpoint::index::Index::parse(&index).expect_err("too many");
    assert!(error.to_string().contains("more than"), "{error}");
}

#[test]
fn long_names_are_refused_and_not_repeated() {
    for (length, good) in [(4096, true), (4097, false), (10_000_000, false)] {
        let name = "n".repeat(length);
        let header =
            format!("{{\"{name}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}}}");
        match Header::read(join(header.as_bytes(), &[]).as_slice()) {
            Ok(_) => assert!(good),
            Err(error) => {
                assert!(!good && is_stricter(&error), "{error}");
                assert!(error.to_string().len() < 300);
            }
        }
    }
}

#[test]
fn deep_nesting_does_not_exhaust_the_stack() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = format!(
            "{{\"a\":{}0{}}}",
            open.repeat(100_000),
            close.repeat(100_000)
        );
        assert!(!compare(&join(deep.as_bytes(), &[])));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// The stable twins of the fuzz targets: no input makes a parser panic.
    #[test]
    fn arbitrary_bytes_do_not_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        header in "[{}\\[\\]\",:a-z0-9_ -]{0,80}",
    ) {
        compare(&bytes);
        compare(&join(&bytes, &[]));
        compare(&join(header.as_bytes(), &bytes));
        let _ = checkpoint::index::Index::parse(&header);
        let _ = checkpoint::QuantState::parse(&bytes, "nf4");
        let _ = checkpoint::QuantState::parse(header.as_bytes(), "nf4");
        let _ = checkpoint::Manifest::parse(&header);
        let _ = checkpoint::config::Config::parse(header);
    }

    /// Quant states near good ones.
    #[test]
    fn quant_states_with_odd_values_do_not_panic(
        blocksize in any::<u64>(),
        shape in proptest::collection::vec(any::<u64>(), 0..4),
        offset in any::<f64>(),
        dtype in "(bfloat16|float16|float32|float64|)",
        nested in any::<bool>(),
    ) {
        let mut text = format!(
            "{{\"quant_type\": \"nf4\", \"blocksize\": {blocksize}, \"dtype\": \"{dtype}\", \
             \"shape\": {shape:?}"
        );
        if nested {
            text += &format!(
                ", \"nested_blocksize\": 256, \"nested_dtype\": \"float32\", \
                 \"nested_offset\": {offset}"
            );
        }
        text += "}";
        let good = fourbit::BlockSize::new(blocksize).is_ok()
            && ["bfloat16", "float16", "float32"].contains(&dtype.as_str())
            && (!nested || (offset as f32).is_finite());
        prop_assert_eq!(checkpoint::QuantState::parse(text.as_bytes(), "nf4").is_ok(), good);
    }
}
