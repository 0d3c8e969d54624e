// What quantize and dequantize share: the vector of 16 bytes of elements that a lane reads or writes
// at once, and how its codes lie in memory.
#pragma once
#include "common.cuh"

using Element = ELEMENT;

// Elements of a vector, and of a vector of every lane.
constexpr u32 LANE_ELEMENTS = 16 / sizeof(Element);
constexpr u32 WARP_ELEMENTS = WARP * LANE_ELEMENTS;

// Codes of a vector, in words of at most 32 bits.
constexpr u32 BYTE_ELEMENTS = 8 / CODE_BITS;
constexpr u32 CODE_BYTES = LANE_ELEMENTS * CODE_BITS / 8;
constexpr u32 WORDS = CODE_BYTES > 4 ? CODE_BYTES / 4 : 1;
constexpr u32 WORD_BYTES = CODE_BYTES / WORDS;
constexpr u32 WORD_ELEMENTS = LANE_ELEMENTS / WORDS;
template <u32 BYTES> struct Unsigned;
template <> struct Unsigned<1> { using Type = u8; };
template <> struct Unsigned<2> { using Type = u16; };
template <> struct Unsigned<4> { using Type = u32; };
using Word = Unsigned<WORD_BYTES>::Type;
using Packed = Pack<Word, WORDS>;
