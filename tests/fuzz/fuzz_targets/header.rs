//! A file of weights: what our reader accepts, the reference reader accepts and reads alike.
#![no_main]

use fourbit::checkpoint::Header;
use libfuzzer_sys::fuzz_target;
use safetensors::SafeTensors;

fn compare(file: &[u8]) {
    let Ok(ours) = Header::read(file) else {
        return;
    };
    let reference = match SafeTensors::deserialize(file) {
        Ok(reference) => reference,
        Err(error) => panic!("only ours accepts: {error}"),
    };
    assert_eq!(ours.tensors.len(), reference.len());
    for tensor in &ours.tensors {
        let view = match reference.tensor(&tensor.name) {
            Ok(view) => view,
            Err(error) => panic!("only ours names {:?}: {error}", tensor.name),
        };
        let start = tensor.offset as usize;
        assert_eq!(view.data(), &file[start..start + tensor.bytes as usize]);
    }
}

fuzz_target!(|data: &[u8]| {
    compare(data);
    // With the right length before it, the header itself is reached more often.
    let cut = data
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(data.len());
    let (header, rest) = data.split_at(cut);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.extend_from_slice(rest.get(1..).unwrap_or_default());
    compare(&file);
});
