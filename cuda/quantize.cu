// Blockwise quantization: the largest magnitude of every BLOCK_SIZE elements as their scale, and
// for each element the code of the nearest value of the codebook. Same bytes as
// src/blockwise/scalar.rs: compiled without fused operations, one rounding an operation.
//
// Parameters of fourbit_quantize:
//   input      ELEMENT [count]; any address, multiples of 16 are faster
//   packed     u8 [ceil(count CODE_BITS / 8)], codes, the first of a byte in its high bits, the
//              rest of a last byte as of zeros
//   absmax     f32 [ceil(count / BLOCK_SIZE)]
//   count      i64
//   first_bad  u64 [1], all ones: afterwards the index of the first element that is a NaN or an
//              infinity, and then packed and absmax mean nothing
// A NaN or infinity is noted, not quantized. The element is multiplied by the rounded reciprocal of
// its scale; where that would overflow, both are lifted by 2^64 first. A number halfway between two
// values takes the lower, or with TIES_UPPER the upper one.
//
// Launch: block 256; grid any, best min(ceil(count sizeof(ELEMENT) / 16,384), 8 x processors); no
// dynamic shared memory.
//
// Floor: sizeof(ELEMENT) + CODE_BITS / 8 + 4 / BLOCK_SIZE bytes an element: 2.56 for bf16 to 4 bits
// in blocks of 64. One product, one comparison with the right midpoint and one maximum an element.
// Why it should be reached: a thread asks for four vectors of 16 bytes before it uses one, and the
// registers (48 on sm_80 to 90) let five blocks stay: 80 KiB under way. Warps read runs of 512
// bytes and write runs of 128 (bf16, 4 bits). A block of up to 1024 elements of 16 bits lies in
// one warp, so its maximum needs shuffles alone; larger ones one barrier a tile. A code takes
// one look: the number's bin, of 32, comes from its bits by one addition, a bin holds at most
// one midpoint, and the table stands in shared memory 16 times, so that no look of 8 bytes meets
// another's bank. (8-bit codebooks and those whose midpoints lie too close go down a search
// tree: CODE_BITS looks.)
// Counted for NF4, bf16, blocks of 64, on a lane's 32 elements: 411 instructions on sm_80, 405 on
// sm_90, of which 32 looks, 8 shuffles, 4 loads and 4 stores of codes: 12.8 an element. A warp's
// 1024 elements so take 103 cycles of issue and 64 of shared memory, and the memory 181 cycles
// of an H100, 196 of an A100 and 840 of an RTX 4090: it is the memory that binds. f32: 251 and
// 247 for 16 elements, 63 cycles, and the memory 161.
#include "vector.cuh"

constexpr u32 THREADS = 256;
// Vectors of 16 bytes that a thread holds.
constexpr u32 VECTORS = 4;
// Elements that a thread block holds: a multiple of every block size, so that no block of elements
// is shared by thread blocks.
constexpr u32 TILE = THREADS * VECTORS * LANE_ELEMENTS;
static_assert(TILE % BLOCK_SIZE == 0, "blocks do not cross tiles");

// How many lanes, vectors of a lane, and warps share a block; how many blocks a lane has a part of.
constexpr u32 BLOCK_LANES =
    BLOCK_SIZE / LANE_ELEMENTS < WARP ? BLOCK_SIZE / LANE_ELEMENTS : WARP;
constexpr u32 BLOCK_WARPS = BLOCK_SIZE > VECTORS * WARP_ELEMENTS
                                ? BLOCK_SIZE / (VECTORS * WARP_ELEMENTS)
                                : 1;
constexpr u32 BLOCK_VECTORS = BLOCK_SIZE / (BLOCK_LANES * LANE_ELEMENTS * BLOCK_WARPS);
constexpr u32 LANE_BLOCKS = VECTORS / BLOCK_VECTORS;
static_assert(LANE_BLOCKS <= BLOCK_LANES, "every block of a lane has a lane that owns it");

// --- from numbers to codes ----------------------------------------------------------------------

constexpr u32 MIDPOINTS = CODEBOOK_RANKS - 1;
__constant__ float CODEBOOK_MIDPOINT[MIDPOINTS] = CODEBOOK_MIDPOINTS;
__constant__ u8 CODE_OF_RANK[CODEBOOK_RANKS] = CODEBOOK_CODES;

constexpr u32 BINS = 32;
// A little below BINS / 2, so that 1 and what rounding puts next to it are in the last bin.
constexpr float BIN_SLOPE = 15.9375f;
// Adding it leaves a number's bin in bits 7 to 11 of the sum, and seven bits of fraction below.
constexpr float BIN_OFFSET = 65536.0f + BINS / 2;
constexpr u32 BIN_MASK = (BINS - 1) << 7;

// [-1, 1] cut into bins of which each holds at most one midpoint.
struct Bins {
    // Whether the codebook allows it, and whether codes are simply ranks.
    bool fit;
    bool ranks;
    // The number that must be strictly below another for it to lie above the bin's midpoint.
    float midpoints[BINS];
    // The code below the midpoint in byte 0, the one above in byte 1; of ranks, the one below.
    u32 codes[BINS];
};

__device__ constexpr float next_below(float number) {
    const u32 bits = __builtin_bit_cast(u32, number);
    if (number == 0.0f) return __builtin_bit_cast(float, 0x80000001u);
    return __builtin_bit_cast(float, number > 0.0f ? bits - 1 : bits + 1);
}

__device__ constexpr Bins make_bins() {
    constexpr float midpoints[MIDPOINTS] = CODEBOOK_MIDPOINTS;
    constexpr u8 codes[CODEBOOK_RANKS] = CODEBOOK_CODES;
    Bins bins{true, true, {}, {}};
    u32 in_bin[BINS] = {};
    for (u32 rank = 0; rank < CODEBOOK_RANKS; ++rank) {
        bins.ranks = bins.ranks && codes[rank] == rank;
    }
    for (u32 i = 0; i < MIDPOINTS; ++i) {
        // Where the kernel's sum, rounded to a 128th, passes into the next bin. A midpoint that is
        // not clearly on one side of such an edge is left to the tree.
        const double place = double(midpoints[i]) * double(BIN_SLOPE) + BINS / 2 + 1.0 / 256;
        const u32 bin = u32(place);
        const double above = place - bin;
        if (above < 1e-6 || above > 1 - 1e-6 || in_bin[bin] != 0) bins.fit = false;
        in_bin[bin] = i + 1;
    }
    u32 rank = 0;
    for (u32 bin = 0; bin < BINS; ++bin) {
        bins.midpoints[bin] = __builtin_bit_cast(float, INFINITY_BITS);
        u32 above = rank;
        if (in_bin[bin] != 0) {
            const float midpoint = midpoints[in_bin[bin] - 1];
            // The sum makes a positive zero of a negative one.
            bins.midpoints[bin] = TIES_UPPER ? next_below(midpoint) : midpoint + 0.0f;
            above = in_bin[bin];
        }
        bins.codes[bin] = bins.ranks ? rank : codes[rank] | u32(codes[above]) << 8;
        rank = above;
    }
    return bins;
}

__constant__ Bins CODEBOOK_BINS = make_bins();
constexpr bool BINS_FIT = make_bins().fit;
constexpr bool CODES_ARE_RANKS = make_bins().ranks;

template <bool FIT> struct Encoder;

// By bins: a lane looks up its own copy of the one midpoint that may matter.
template <> struct Encoder<true> {
    // Half a warp's 64-bit accesses are served at once, so 16 copies keep lanes apart.
    static constexpr u32 COPIES = 16;
    struct alignas(8) Entry {
        float midpoint;
        u32 codes;
    };
    struct Table {
        Entry entries[BINS * COPIES];
    };

    const u8* table;
    u32 copy;

    static __device__ __forceinline__ void fill(Table& table) {
        for (u32 i = threadIdx.x; i < BINS * COPIES; i += THREADS) {
            const u32 bin = i / COPIES;
            table.entries[i] = {CODEBOOK_BINS.midpoints[bin], CODEBOOK_BINS.codes[bin]};
        }
    }
    __device__ __forceinline__ Encoder(const Table& filled)
        : table(reinterpret_cast<const u8*>(&filled)),
          copy(computed(threadIdx.x % COPIES * u32(sizeof(Entry)))) {}

    // The codes of the numbers of a word, the first one highest.
    __device__ __forceinline__ u32 encode(const float (&numbers)[WORD_ELEMENTS]) const {
        u32 word = 0;
#pragma unroll
        for (const float number : numbers) {
            const u32 bin = float_to_bits(__fmaf_rn(number, BIN_SLOPE, BIN_OFFSET)) & BIN_MASK;
            const auto entry = load_aligned(reinterpret_cast<const Entry*>(table + (bin | copy)));
            // 1 if the number is above: then the difference is negative, and only then.
            const u32 above = float_to_bits(entry.midpoint - number) >> 31;
            const u32 code = CODES_ARE_RANKS ? entry.codes + above
                                             : __byte_perm(entry.codes, 0, 0x4440 + above);
            word = (word << CODE_BITS) + code;
        }
        return word;
    }
};

// By binary search, for codebooks of 8 bits or with midpoints that lie close together.
template <> struct Encoder<false> {
    struct Table {
        float tree[1 << CODE_BITS];
        u8 codes[1 << CODE_BITS];
    };

    const Table& table;

    static __device__ __forceinline__ void fill(Table& table) {
        for (u32 i = threadIdx.x; i < 1u << CODE_BITS; i += THREADS) {
            const u32 index = index_of_node<CODE_BITS>(i);
            table.tree[i] = i > 0 && index < MIDPOINTS ? CODEBOOK_MIDPOINT[index]
                                                       : bits_to_float(INFINITY_BITS);
            table.codes[i] = i < CODEBOOK_RANKS ? CODE_OF_RANK[i] : 0;
        }
    }
    __device__ __forceinline__ Encoder(const Table& filled) : table(filled) {}

    __device__ __forceinline__ u32 encode(const float (&numbers)[WORD_ELEMENTS]) const {
        u32 ranks[WORD_ELEMENTS], word = 0;
        search_tree<CODE_BITS, !TIES_UPPER>(table.tree, numbers, ranks);
#pragma unroll
        for (const u32 rank : ranks) {
            word = word << CODE_BITS | (CODES_ARE_RANKS ? rank : table.codes[rank]);
        }
        return word;
    }
};

using Codes = Encoder<BINS_FIT>;

// --- vectors ------------------------------------------------------------------------------------

using Elements = Pack<Element, LANE_ELEMENTS>;

// Zeros stand for elements behind the end: they change no scale, and fill a last byte.
__device__ __forceinline__ Wide load_part(const Element* input, i64 first, i64 count) {
    Elements elements{};
#pragma unroll
    for (u32 i = 0; i < LANE_ELEMENTS; ++i) {
        if (first + i < count) elements.elements[i] = input[first + i];
    }
    return __builtin_bit_cast(Wide, elements);
}

// `magnitude_bits` of the largest magnitude of a vector.
template <class T> __device__ __forceinline__ u32 largest_magnitude(const Wide& vector) {
    if constexpr (sizeof(T) == 4) {
        u32 largest = vector.words[0] & 0x7fffffffu;
#pragma unroll
        for (u32 i = 1; i < 4; ++i) largest = max(largest, vector.words[i] & 0x7fffffffu);
        return largest;
    } else {
        u32 pair = vector.words[0] & 0x7fff7fffu;
#pragma unroll
        for (u32 i = 1; i < 4; ++i) {
            pair = larger_pair<T>(pair, vector.words[i] & 0x7fff7fffu);
        }
        float low, high;
        unpack_pair<T>(pair, low, high);
        return max(float_to_bits(low), float_to_bits(high));
    }
}

// The codes of a vector, given what `normalise` takes; LIFTED if that may be negative.
template <class T, bool LIFTED>
__device__ __forceinline__ Packed encode(const Codes& codes, const Wide& vector, float inverse) {
    float numbers[WORDS][WORD_ELEMENTS];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            numbers[0][i] = bits_to_float(vector.words[i]);
        } else {
            float* const two = &numbers[2 * i / WORD_ELEMENTS][2 * i % WORD_ELEMENTS];
            unpack_pair<T>(vector.words[i], two[0], two[1]);
        }
    }
#pragma unroll
    for (u32 i = 0; i < LANE_ELEMENTS; ++i) {
        float& number = numbers[i / WORD_ELEMENTS][i % WORD_ELEMENTS];
        number = LIFTED ? normalise(number, inverse) : number * inverse;
    }
    Packed packed;
#pragma unroll
    for (u32 w = 0; w < WORDS; ++w) {
        // The first code stands highest in its byte, but the first byte lowest in its word.
        constexpr u32 ORDER = WORD_BYTES == 4 ? 0x0123 : WORD_BYTES == 2 ? 0x4401 : 0x4440;
        packed.elements[w] = Word(__byte_perm(codes.encode(numbers[w]), 0, ORDER));
    }
    return packed;
}

// Bytes with codes of the first `count` elements.
__device__ __forceinline__ void store_part(u8* target, const Packed& bytes, i64 count) {
#pragma unroll
    for (u32 i = 0; i < CODE_BYTES; ++i) {
        if (i64(i * BYTE_ELEMENTS) < count) {
            target[i] = u8(bytes.elements[i / WORD_BYTES] >> 8 * (i % WORD_BYTES));
        }
    }
}

// --- the kernel ---------------------------------------------------------------------------------

// Notes the first element of this thread's vectors that is not finite. Rare: it reads them again.
__device__ __noinline__ void report_bad(const Element* input, i64 first, i64 count,
                                        u64* first_bad) {
#pragma unroll 1
    for (u32 v = 0; v < VECTORS; ++v) {
#pragma unroll 1
        for (u32 i = 0; i < LANE_ELEMENTS; ++i) {
            const i64 index = first + v * WARP_ELEMENTS + i;
            if (index >= count) return;
            if (magnitude_bits(to_float(input[index])) >= INFINITY_BITS) {
                atomicMin(first_bad, u64(index));
                return;
            }
        }
    }
}

// The largest magnitude of a block, for each block that the lanes hold, given those of each lane.
// Lane l gets that of its block l % LANE_BLOCKS: where lanes have several blocks, they hand each
// other halves of them.
__device__ __forceinline__ u32 reduce_in_warp(u32 (&largest)[LANE_BLOCKS]) {
    const u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 step = 1; step < BLOCK_LANES; step *= 2) {
        if (step < LANE_BLOCKS) {
            const bool odd = lane & step;
#pragma unroll
            for (u32 i = 0; i < LANE_BLOCKS / (2 * step); ++i) {
                const u32 mine = odd ? largest[2 * i + 1] : largest[2 * i];
                const u32 theirs = odd ? largest[2 * i] : largest[2 * i + 1];
                largest[i] = max(mine, __shfl_xor_sync(ALL_LANES, theirs, step));
            }
        } else {
            largest[0] = max(largest[0], __shfl_xor_sync(ALL_LANES, largest[0], step));
        }
    }
    return largest[0];
}

extern "C" __global__ void __launch_bounds__(THREADS)
fourbit_quantize(const ELEMENT* __restrict__ input, u8* __restrict__ packed,
                 float* __restrict__ absmax, i64 count, u64* first_bad) {
    __shared__ Codes::Table table;
    // What warps that share a block tell each other, in turn in one row and in the other, so that
    // one barrier is enough.
    __shared__ u32 warp_largest[2][THREADS / WARP];
    u32 row = 0;

    Codes::fill(table);
    __syncthreads();
    const Codes codes(table);

    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const bool aligned = reinterpret_cast<u64>(input) % sizeof(Wide) == 0 &&
                         reinterpret_cast<u64>(packed) % CODE_BYTES == 0;
    // Of this thread's first vector and of its block, in the tile.
    const u32 start = (warp * VECTORS * WARP + lane) * LANE_ELEMENTS;
    const u32 owned_start = computed((warp * VECTORS + lane % LANE_BLOCKS * BLOCK_VECTORS) *
                                         WARP_ELEMENTS +
                                     lane / BLOCK_LANES * BLOCK_LANES * LANE_ELEMENTS);
    const bool owner = lane % BLOCK_LANES < LANE_BLOCKS && owned_start % BLOCK_SIZE == 0;

    for (i64 tile = i64(blockIdx.x) * TILE; tile < count; tile += i64(gridDim.x) * TILE) {
        const i64 first = tile + start;
        const bool whole = aligned && tile + TILE <= count;
        Wide vectors[VECTORS];
        if (whole) {
#pragma unroll
            for (u32 v = 0; v < VECTORS; ++v) {
                vectors[v] = load_once(
                    reinterpret_cast<const Wide*>(input + first + v * WARP_ELEMENTS));
            }
        } else {
#pragma unroll
            for (u32 v = 0; v < VECTORS; ++v) {
                vectors[v] = load_part(input, first + v * WARP_ELEMENTS, count);
            }
        }

        u32 largest[LANE_BLOCKS], of_all = 0;
#pragma unroll
        for (u32 i = 0; i < LANE_BLOCKS; ++i) {
            largest[i] = largest_magnitude<Element>(vectors[i * BLOCK_VECTORS]);
            for (u32 v = i * BLOCK_VECTORS + 1; v < (i + 1) * BLOCK_VECTORS; ++v) {
                largest[i] = max(largest[i], largest_magnitude<Element>(vectors[v]));
            }
            of_all = i ? max(of_all, largest[i]) : largest[i];
        }
        if (of_all >= INFINITY_BITS) report_bad(input, first, count, first_bad);

        u32 scale_bits = reduce_in_warp(largest);
        if constexpr (BLOCK_WARPS > 1) {
            if (lane == 0) warp_largest[row][warp] = scale_bits;
            __syncthreads();
            for (u32 i = 0; i < BLOCK_WARPS; ++i) {
                const u32 other = warp / BLOCK_WARPS * BLOCK_WARPS + i;
                scale_bits = max(scale_bits, warp_largest[row][other]);
            }
            row ^= 1;
        }
        const float scale = bits_to_float(scale_bits);
        if (owner && tile + owned_start < count) {
            absmax[tile / BLOCK_SIZE + owned_start / BLOCK_SIZE] = scale;
        }

        const float owned_inverse = inverse_of_scale(scale);
        float inverses[VECTORS];
#pragma unroll
        for (u32 v = 0; v < VECTORS; ++v) {
            inverses[v] = LANE_BLOCKS == 1 ? owned_inverse
                                           : __shfl_sync(ALL_LANES, owned_inverse,
                                                         v / BLOCK_VECTORS, LANE_BLOCKS);
        }
        Packed bytes[VECTORS];
        if (__any_sync(ALL_LANES, owned_inverse < 0.0f)) {
#pragma unroll
            for (u32 v = 0; v < VECTORS; ++v) {
                bytes[v] = encode<Element, true>(codes, vectors[v], inverses[v]);
            }
        } else {
#pragma unroll
            for (u32 v = 0; v < VECTORS; ++v) {
                bytes[v] = encode<Element, false>(codes, vectors[v], inverses[v]);
            }
        }

        u8* const target = packed + (tile / BYTE_ELEMENTS + start / BYTE_ELEMENTS);
#pragma unroll
        for (u32 v = 0; v < VECTORS; ++v) {
            u8* const of_vector = target + v * (WARP_ELEMENTS / BYTE_ELEMENTS);
            if (whole) {
                store_aligned(reinterpret_cast<Packed*>(of_vector), bytes[v]);
            } else {
                store_part(of_vector, bytes[v], count - (first + v * WARP_ELEMENTS));
            }
        }
    }
}

#ifdef FOURBIT_EMULATED
FOURBIT_EMULATE(fourbit_quantize)
#endif
