//! The text stored with a quantized weight: what is accepted is written back the same.
#![no_main]

use fourbit::checkpoint::QuantState;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for codebook in ["nf4", "mine"] {
        if let Ok(state) = QuantState::parse(data, codebook) {
            let text = state.to_json();
            assert!(text.len() as u64 <= state.longest_json());
            assert_eq!(
                QuantState::parse(text.as_bytes(), codebook).ok(),
                Some(state)
            );
        }
    }
});
