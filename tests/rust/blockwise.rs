//! Blockwise quantization against hand-worked values.

#![allow(clippy::expect_used, clippy::panic)]

use fourbit::codebook::Ties;
use fourbit::{BlockSize, Codebook, blockwise};

#[test]
fn the_published_two_bit_example() {
    let map = [(0, -1.0), (1, 0.3), (2, 0.5), (3, 1.0)];
    let codebook = Codebook::from_map("example", &map, Ties::Upper).expect("a good map");
    let (mut packed, mut absmax) = ([0], [0.0]);
    let input = [10.0_f32, -3.0, 5.0, 4.0];
    blockwise::quantize(
        &input,
        &codebook,
        BlockSize::DEFAULT,
        &mut packed,
        &mut absmax,
    )
    .expect("finite input");
    assert_eq!((packed, absmax), ([0b11_01_10_10], [10.0]));
    let mut output = [0.0_f32; 4];
    blockwise::dequantize(&packed, &absmax, &codebook, BlockSize::DEFAULT, &mut output)
        .expect("right sizes");
    assert_eq!(output, [10.0, 3.0, 5.0, 5.0]);
}
