// Blockwise dequantization: value of the code times scale of the block, rounded once. With
// DOUBLE_QUANT the scales are decoded in the same launch. Same bytes as src/blockwise/scalar.rs:
// compiled without fused operations, one rounding an operation.
//
// Parameters of fourbit_dequantize:
//   packed         u8 [ceil(count CODE_BITS / 8)], codes, the first of a byte in its high bits
//   absmax         f32 [ceil(count / BLOCK_SIZE)], or u8 codes with DOUBLE_QUANT
//   nested_absmax  f32 [ceil(blocks / 256)], null without DOUBLE_QUANT
//   nested_offset  f32 [1], null without DOUBLE_QUANT
//   output         ELEMENT [count]
//   count          i64
// Addresses are any; output on a multiple of 16 and packed on a multiple of the codes of 16 bytes
// of output are faster. A code without a value gives NaN.
//
// Launch: block 256; grid any, best min(ceil(count sizeof(ELEMENT) / 16,384), 8 x processors); no
// dynamic shared memory.
//
// Floor: sizeof(ELEMENT) + CODE_BITS / 8 + 1 / BLOCK_SIZE bytes an element (4 / BLOCK_SIZE without
// DOUBLE_QUANT): 2.52 for 4 bits to bf16 in blocks of 64. One look and one product an element.
// Why it should be reached: four fifths of the bytes are writes, which a lane makes by 16 bytes, a
// warp by runs of 512. A lane asks for the codes of four such vectors at once; with 32 registers
// (sm_80, 90, 100) eight blocks stay, which is all a processor takes, and have 32 KiB of codes
// under way for bf16 and 16 KiB for f32, where this share of the traffic needs 4. Every scale of
// a warp's tile is decoded by one lane and handed on by a shuffle. Up to 4 bits the codebook
// stands in shared memory once for each bank, so that no look meets another's; 8-bit codes share
// one copy, and looks may meet.
// Counted for 4 bits, bf16, blocks of 64, DOUBLE_QUANT, on a lane's 32 elements: 209
// instructions on sm_80, 245 on sm_90, of which 33 looks, 4 shuffles, 6 loads, 4 stores and 68
// to 66 shifts and masks for addresses: 6.5 and 7.7 an element. A warp's 1024 elements so take
// 52 and 61 cycles of issue and 37 of shared memory with its shuffles, and the memory 178 cycles
// of an H100, 192 of an A100 and 826 of an RTX 4090: it is the memory that binds. f32: 123 and
// 148 for 16 elements, 37 cycles, and the memory 160.
#include "vector.cuh"

#if DOUBLE_QUANT
using Scale = u8;
#else
using Scale = float;
#endif

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / WARP;
// Vectors of 16 bytes that a lane writes; all are decoded together.
constexpr u32 VECTORS = 4;
constexpr u32 TILE = VECTORS * WARP_ELEMENTS;
// Scales of a tile: never more than there are lanes.
constexpr u32 TILE_BLOCKS = TILE > BLOCK_SIZE ? TILE / BLOCK_SIZE : 1;
static_assert(TILE_BLOCKS <= WARP, "a lane has a scale");
constexpr u32 NESTED_BLOCK_SIZE = 256;
constexpr u32 NESTED_CODES = 256;

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

// The place of code `i` in bytes that stand one behind the other: the first code stands highest in
// its byte.
__device__ constexpr u32 lowest_bit(u32 i) {
    return i / BYTE_ELEMENTS * 8 + (BYTE_ELEMENTS - 1 - i % BYTE_ELEMENTS) * CODE_BITS;
}

// The value of code `i` of a word, in the lane's copy of the codebook.
__device__ __forceinline__ float value_of(const u8* table, u32 copy, u32 word, u32 i) {
    const u32 bit = lowest_bit(i);
    const u32 moved = bit < ENTRY_SHIFT ? word << (ENTRY_SHIFT - bit) : word >> (bit - ENTRY_SHIFT);
    const u32 offset = moved & (CODES - 1) << ENTRY_SHIFT;
    return *reinterpret_cast<const float*>(table + (offset | copy));
}

template <class T>
__device__ __forceinline__ Wide pack(const float (&numbers)[16 / sizeof(T)]) {
    Wide vector;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            vector.words[i] = float_to_bits(numbers[i]);
        } else {
            vector.words[i] = pack_pair<T>(numbers[2 * i], numbers[2 * i + 1]);
        }
    }
    return vector;
}

extern "C" __global__ void __launch_bounds__(THREADS)
fourbit_dequantize(const u8* __restrict__ packed, const Scale* __restrict__ absmax,
                   [[maybe_unused]] const float* __restrict__ nested_absmax,
                   [[maybe_unused]] const float* __restrict__ nested_offset,
                   ELEMENT* __restrict__ output, i64 count) {
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

    const auto scale_of = [&](i64 block) {
#if DOUBLE_QUANT
        return decode_scale(nested_table[absmax[block]], nested_absmax[block / NESTED_BLOCK_SIZE],
                            offset);
#else
        return absmax[block];
#endif
    };
    const u8* const values = reinterpret_cast<const u8*>(table);
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 copy = computed(lane % COPIES * u32(sizeof(float)));
    const bool aligned = reinterpret_cast<u64>(output) % sizeof(Wide) == 0 &&
                         reinterpret_cast<u64>(packed) % CODE_BYTES == 0;

    for (i64 tile = (i64(blockIdx.x) * WARPS + warp) * TILE; tile < count;
         tile += i64(gridDim.x) * WARPS * TILE) {
        if (!aligned || tile + TILE > count) {
            // Lanes take elements in turn.
#pragma unroll 1
            for (i64 i = tile + lane; i < tile + TILE && i < count; i += WARP) {
                const float value =
                    value_of(values, copy, packed[i / BYTE_ELEMENTS], u32(i % BYTE_ELEMENTS));
                output[i] = from_float<Element>(value * scale_of(i / BLOCK_SIZE));
            }
            continue;
        }
        const auto* const source = reinterpret_cast<const Packed*>(packed + tile / BYTE_ELEMENTS);
        Packed codes[VECTORS];
#pragma unroll
        for (u32 v = 0; v < VECTORS; ++v) codes[v] = load_aligned(source + v * WARP + lane);
        // Each lane decodes one scale of the tile; then it asks the one that has its own.
        const float owned_scale = scale_of(tile / BLOCK_SIZE + lane % TILE_BLOCKS);
        auto* const target = reinterpret_cast<Wide*>(output + tile);
#pragma unroll
        for (u32 v = 0; v < VECTORS; ++v) {
            const u32 owner = v * WARP_ELEMENTS / BLOCK_SIZE + lane * LANE_ELEMENTS / BLOCK_SIZE;
            const float scale =
                TILE_BLOCKS == 1 ? owned_scale : __shfl_sync(ALL_LANES, owned_scale, owner);
            float numbers[LANE_ELEMENTS];
#pragma unroll
            for (u32 i = 0; i < LANE_ELEMENTS; ++i) {
                const u32 word = codes[v].elements[i / WORD_ELEMENTS];
                numbers[i] = value_of(values, copy, word, i % WORD_ELEMENTS) * scale;
            }
            store_wide(target + v * WARP + lane, pack<Element>(numbers));
        }
    }
}

#ifdef FOURBIT_EMULATED
FOURBIT_EMULATE(fourbit_dequantize)
#endif
