#include "common.cuh"

using Element = ELEMENT;
#if DOUBLE_QUANT
using Scale = u8;
#else
using Scale = float;
#endif

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / WARP;
// Vectors of 16 bytes that a lane writes; all are decoded together.
constexpr u32 VECTORS = 4;
constexpr u32 LANE_ELEMENTS = 16 / sizeof(Element);
constexpr u32 WARP_ELEMENTS = WARP * LANE_ELEMENTS;
constexpr u32 TILE = VECTORS * WARP_ELEMENTS;
// Scales of a tile: never more than there are lanes.
constexpr u32 TILE_BLOCKS = TILE > BLOCK_SIZE ? TILE / BLOCK_SIZE : 1;
static_assert(TILE_BLOCKS <= WARP, "a lane has a scale");
constexpr u32 NESTED_BLOCK_SIZE = 256;
constexpr u32 NESTED_CODES = 256;

// Codes of a vector, in words of at most 32 bits.
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

constexpr u32 CODES = 1 << CODE_BITS;
__constant__ float CODEBOOK_VALUE[CODES] = CODEBOOK_VALUES;
#if DOUBLE_QUANT
__constant__ float NESTED_VALUE[NESTED_CODES] = NESTED_VALUES;
#endif

// The codebook in shared memory: up to 4 bits, a copy in each bank, so that every lane reads its
// own; of 8 bits, one copy.
constexpr u32 COPIES = CODE_BITS == 8 ? 1 : WARP;
constexpr u32 ENTRY_BYTES = COPIES * sizeof(float);
constexpr u32 ENTRY_SHIFT = CODE_BITS == 8 ? 2 : 7;
static_assert(ENTRY_BYTES == 1 << ENTRY_SHIFT, "a shift in place of a product");

// Codes behind the end are never used.
__device__ __forceinline__ Packed load_part(const u8* packed, i64 first, i64 bytes) {
    Packed part{};
    for (u32 i = 0; i < CODE_BYTES; ++i) {
        if (first + i >= bytes) break;
        part.elements[i / WORD_BYTES] |= Word(packed[first + i]) << 8 * (i % WORD_BYTES);
    }
    return part;
}

// The value of code `i` of a word; `copy` is the lane's copy of the codebook.
__device__ __forceinline__ float value_of(const u8* copy, u32 word, u32 i) {
    constexpr u32 BYTE_CODES = 8 / CODE_BITS;
    // The first code stands highest in its byte.
    const u32 low_bit = i / BYTE_CODES * 8 + (BYTE_CODES - 1 - i % BYTE_CODES) * CODE_BITS;
    const u32 moved = low_bit < ENTRY_SHIFT ? word << (ENTRY_SHIFT - low_bit)
                                            : word >> (low_bit - ENTRY_SHIFT);
    return *reinterpret_cast<const float*>(copy + (moved & (CODES - 1) << ENTRY_SHIFT));
}

__device__ __forceinline__ Wide pack(const float (&numbers)[LANE_ELEMENTS]) {
    Wide vector;
    for (u32 i = 0; i < 4; ++i) {
        if constexpr (sizeof(Element) == 4) {
            vector.words[i] = float_to_bits(numbers[i]);
        } else {
            vector.words[i] = pack_pair<Element>(numbers[2 * i], numbers[2 * i + 1]);
        }
    }
    return vector;
}

extern "C" __global__ void __launch_bounds__(THREADS)
fourbit_dequantize(const u8* __restrict__ packed, const Scale* __restrict__ absmax,
                   [[maybe_unused]] const float* __restrict__ nested_absmax,
                   [[maybe_unused]] const float* __restrict__ nested_offset,
                   ELEMENT* __restrict__ output,
                   i64 count) {
    __shared__ float table[CODES * COPIES];
    for (u32 i = threadIdx.x; i < CODES * COPIES; i += THREADS) {
        table[i] = CODEBOOK_VALUE[i / COPIES];
    }
#if DOUBLE_QUANT
    __shared__ float nested_table[NESTED_CODES];
    for (u32 i = threadIdx.x; i < NESTED_CODES; i += THREADS) nested_table[i] = NESTED_VALUE[i];
    const float offset = *nested_offset;
#endif
    __syncthreads();

    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u8* const copy = reinterpret_cast<const u8*>(table + lane % COPIES);
    const bool aligned = reinterpret_cast<u64>(output) % sizeof(Wide) == 0 &&
                         reinterpret_cast<u64>(packed) % CODE_BYTES == 0;
    const i64 bytes = (count + 8 / CODE_BITS - 1) / (8 / CODE_BITS);
    const i64 blocks = (count + BLOCK_SIZE - 1) / BLOCK_SIZE;

    for (i64 tile = (i64(blockIdx.x) * WARPS + warp) * TILE; tile < count;
         tile += i64(gridDim.x) * WARPS * TILE) {
        const i64 first = tile + lane * LANE_ELEMENTS;
        const bool whole = aligned && tile + TILE <= count;
        Packed codes[VECTORS];
        if (whole) {
            for (u32 v = 0; v < VECTORS; ++v) {
                codes[v] = load_aligned(reinterpret_cast<const Packed*>(
                    packed + (first + v * WARP_ELEMENTS) / (8 / CODE_BITS)));
            }
        } else {
            for (u32 v = 0; v < VECTORS; ++v) {
                codes[v] = load_part(packed, (first + v * WARP_ELEMENTS) / (8 / CODE_BITS), bytes);
            }
        }

        // Each lane decodes one scale of the tile; then it asks the one that has its own.
        const i64 block = tile / BLOCK_SIZE + lane % TILE_BLOCKS;
        float owned_scale = 0.0f;
        if (block < blocks) {
#if DOUBLE_QUANT
            owned_scale = decode_scale(nested_table[absmax[block]],
                                       nested_absmax[block / NESTED_BLOCK_SIZE], offset);
#else
            owned_scale = absmax[block];
#endif
        }
        for (u32 v = 0; v < VECTORS; ++v) {
            const float scale =
                TILE_BLOCKS == 1
                    ? owned_scale
                    : __shfl_sync(ALL_LANES, owned_scale,
                                  (v * WARP_ELEMENTS + lane * LANE_ELEMENTS) / BLOCK_SIZE);
            float numbers[LANE_ELEMENTS];
            for (u32 i = 0; i < LANE_ELEMENTS; ++i) {
                const u32 word = codes[v].elements[i / WORD_ELEMENTS];
                numbers[i] = value_of(copy, word, i % WORD_ELEMENTS) * scale;
            }
            const i64 vector = first + v * WARP_ELEMENTS;
            if (whole) {
                store_aligned(reinterpret_cast<Wide*>(output + vector), pack(numbers));
            } else {
                for (u32 i = 0; i < LANE_ELEMENTS; ++i) {
                    if (vector + i < count) output[vector + i] = from_float<Element>(numbers[i]);
                }
            }
        }
    }
}

#ifdef FOURBIT_EMULATED
FOURBIT_EMULATE(fourbit_dequantize)
#endif
