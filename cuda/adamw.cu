// AdamW (arXiv 1711.05101) with 32-bit or blockwise 8-bit state (arXiv 2110.02861), every parameter
// of an optimizer in one launch, or a slice of them in each of several. Same bytes as
// src/optimizer: compiled without fused operations, one rounding an operation.
//
// Two kernels, in this order on one stream:
//   fourbit_adamw_check  reads gradients (and the scales of 8-bit states) and sets flags;
//   fourbit_adamw        updates every parameter whose flag is 0; none where a scale is damaged.
// Where the state is in parts that come and go, the check is launched for all segments and the
// update for those of one part at a time: a flag is of a whole parameter, and must be known before
// the first of its segments is written.
//
// Parameters of both:
//   segments    [count] Segment, in device memory: a slice of a table of segments. A parameter is
//               one segment or several, each of its own elements, gradients, moments and scales
//   count       number of segments of the slice
//   first_tile  number of the slice's first tile: tiles are numbered through the whole table
//   tiles       tiles of the slice: the sum of ceil(elements / 256)
//   flags       u32 [parameters], zeros before the first check. After the last: flags[i] is 1 where
//               parameter i's gradient holds a NaN, an infinity or a number of 2^63 and more
//   damaged     u32 [1], zero before the first check. After the last: 1 where any scale of an 8-bit
//               state is not finite
//
// A tile is 256 elements, the block of the 8-bit state, and one warp's work: its scale needs
// shuffles and no barrier. A lane has elements 4 l to 4 l + 3 of each half of the tile, so that
// every access of the warp is one run of 128, 256 or 512 bytes. Tiles never cross segments, so a
// parameter is cut at multiples of 256 elements, where its blocks of 8-bit state end too.
//
// Floor, for each element of a bf16 parameter with a bf16 gradient: 2 bytes for the check, then 4
// for the parameter, 2 for the gradient and 4 (8-bit state) or 16 (32-bit) for the moments.
// Why it should be reached: all loads of a tile are issued before the first is used, 1.5 KiB
// (8-bit) or 3 KiB (32-bit) a warp; 24 warps (80 registers a thread) have 36 KiB and more in
// flight on each processor, and 3.35 TB/s at 700 ns on 132 processors need 18.
// Encoding takes a minimum of seven straight lines and one look into shared memory, where a binary
// search would take eight: 4 looks an element for both moments. Counted with the dtypes (bf16) and
// the state known to the compiler, to which the kernel as it is adds the branches between them, the
// update of a lane's 8 elements is 1143 instructions on sm_80 and 1214 on sm_90 for 8-bit states
// (143 and 152 an element: a division, a square root, two encodings) and 441 and 438 for 32-bit
// ones. A tile of 8-bit states so takes 304 cycles of issue or more, and the memory 177 cycles
// of an H100, 191 of an A100 and 826 of an RTX 4090: on the large cards instructions bind, at 60
// percent of the memory's speed or less. A tile of 32-bit states takes 110 cycles of issue and
// 388 of an H100's memory, which binds.
//
// Launch: block 256; grid any, best min(ceil(tiles / 8), 8 x processors); no dynamic shared memory.
#include "common.cuh"

constexpr u32 TILE = 256;
constexpr u32 GROUPS = 2;
constexpr u32 GROUP = 4;
constexpr u32 TILES_PER_BLOCK = 8;
static_assert(GROUPS * GROUP * WARP == TILE, "a warp covers a tile");

// As src/optimizer: squares of larger gradients overflow.
constexpr float GRADIENT_LIMIT = 0x1p63f;

enum Type : u32 { F32 = 0, F16 = 1, BF16 = 2 };

// A parameter, or a part of one that begins at a multiple of 256 elements and, unless it is the
// last, ends at one. 112 bytes; the host writes the same.
struct alignas(16) Segment {
    void* values;
    const void* gradient;
    // 32 bits: f32 [elements]. 8 bits: codes, u8 [elements], of the signed and the unsigned map.
    void* exp_avg;
    void* exp_avg_sq;
    // f32 [ceil(elements / 256)]; not used with 32-bit state.
    f32* exp_avg_absmax;
    f32* exp_avg_sq_absmax;
    i64 elements;
    // Tiles of the segments before this one in the whole table.
    i64 first_tile;
    // As in src/optimizer/arithmetic.rs, `Constants`.
    f32 keep;
    f32 beta1;
    f32 one_minus_beta1;
    f32 beta2;
    f32 one_minus_beta2;
    f32 direction;
    f32 stride;
    f32 second_correction;
    f32 eps;
    // Which flag is this one's: all segments of a parameter have the same.
    u32 parameter;
    // `Type`s.
    u8 values_type;
    u8 gradient_type;
    // 8 or 32.
    u8 state_bits;
    u8 unused[5];
};
static_assert(sizeof(Segment) == 112, "the host's layout");

__device__ const float SIGNED_TABLE[256] = NESTED_VALUES;
__device__ const float SIGNED_MIDPOINTS[255] = NESTED_MIDPOINTS;
__device__ const float UNSIGNED_TABLE[256] = UNSIGNED_VALUES;
__device__ const float UNSIGNED_TABLE_MIDPOINTS[255] = UNSIGNED_MIDPOINTS;

struct Tables {
    float first[256];
    float first_midpoints[256];
    float second[256];
    float second_midpoints[256];
};

// --- the dynamic maps ---------------------------------------------------------------------------

// Where a magnitude lies among the values of a dynamic map, less a half: its integral part is the
// number of midpoints below the magnitude, or one less.
//
// This is a guess, which the midpoint decides; so it may be fused.
// The map has 2^i (signed) or 2^(i + 1) equal steps in decade i of seven, so the rank over the
// magnitude is a chain of straight lines, each a fifth as steep as the one before: their minimum.
template <bool SIGNED> __device__ __forceinline__ u32 rank_or_one_less(float magnitude) {
    constexpr float SCALES[7] = {1e6f, 1e5f, 1e4f, 1e3f, 1e2f, 1e1f, 1.0f};
    float least = SIGNED ? 127.5f : 254.5f;
#pragma unroll
    for (int decade = 0; decade < 7; ++decade) {
        const float steps = float(SIGNED ? 1 << decade : 2 << decade);
        const float before = SIGNED ? steps : steps - 1.0f;
        const float slope = steps * SCALES[decade] / 0.9f;
        const float offset = before - steps * 0.1f / 0.9f - 0.5f;
        least = fminf(least, __fmaf_rn(magnitude, slope, offset));
    }
    return u32(fmaxf(least, 0.0f));
}

__device__ __forceinline__ u32 encode_signed(const Tables& tables, float normalised) {
    const u32 rank = rank_or_one_less<true>(fabsf(normalised));
    // Zero has code 127, and there is no -1.
    const u32 lower = normalised < 0.0f ? 126 - min(rank, 126u) : 127 + rank;
    return lower + (tables.first_midpoints[lower] < normalised);
}

__device__ __forceinline__ u32 encode_unsigned(const Tables& tables, float normalised) {
    const u32 lower = rank_or_one_less<false>(fmaxf(normalised, 0.0f));
    return lower + (tables.second_midpoints[lower] < normalised);
}

__device__ __forceinline__ float warp_largest(float number) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        number = fmaxf(number, __shfl_xor_sync(ALL_LANES, number, distance));
    }
    return number;
}

// --- groups of four elements --------------------------------------------------------------------

// Bytes of a group as they lie in memory.
struct Raw {
    u32 words[GROUP];
};

// `left` elements of BYTES bytes, at most four; zeros for the rest. `wide`: all addresses of this
// tensor's groups are multiples of the group's size.
template <u32 BYTES> __device__ __forceinline__ Raw load(const void* group, u32 left, bool wide) {
    Raw raw{};
    if (wide && left == GROUP) {
        const auto pack = *static_cast<const Pack<u32, BYTES>*>(group);
#pragma unroll
        for (u32 word = 0; word < BYTES; ++word) raw.words[word] = pack.elements[word];
        return raw;
    }
    const u8* bytes = static_cast<const u8*>(group);
#pragma unroll
    for (u32 byte = 0; byte < GROUP * BYTES; ++byte) {
        if (byte < left * BYTES) raw.words[byte / 4] |= u32(bytes[byte]) << byte % 4 * 8;
    }
    return raw;
}

template <u32 BYTES>
__device__ __forceinline__ void store(void* group, const Raw& raw, u32 left, bool wide) {
    if (wide && left == GROUP) {
        Pack<u32, BYTES> pack;
#pragma unroll
        for (u32 word = 0; word < BYTES; ++word) pack.elements[word] = raw.words[word];
        *static_cast<Pack<u32, BYTES>*>(group) = pack;
        return;
    }
    u8* bytes = static_cast<u8*>(group);
#pragma unroll
    for (u32 byte = 0; byte < GROUP * BYTES; ++byte) {
        if (byte < left * BYTES) bytes[byte] = u8(raw.words[byte / 4] >> byte % 4 * 8);
    }
}

__device__ __forceinline__ void widen(float (&numbers)[GROUP], const Raw& raw, u32 type) {
#pragma unroll
    for (u32 i = 0; i < GROUP; ++i) {
        const u16 half = u16(raw.words[i / 2] >> i % 2 * 16);
        numbers[i] = type == F32   ? bits_to_float(raw.words[i])
                     : type == F16 ? to_float(f16{half})
                                   : to_float(bf16{half});
    }
}

__device__ __forceinline__ Raw narrow(const float (&numbers)[GROUP], u32 type) {
    Raw raw{};
#pragma unroll
    for (u32 i = 0; i < GROUP; ++i) {
        if (type == F32) {
            raw.words[i] = float_to_bits(numbers[i]);
        } else {
            const u16 half = type == F16 ? from_float<f16>(numbers[i]).bits
                                         : from_float<bf16>(numbers[i]).bits;
            raw.words[i / 2] |= u32(half) << i % 2 * 16;
        }
    }
    return raw;
}

// A tensor of a segment, cut into groups.
struct Groups {
    u8* bytes;
    u32 size;
    bool wide;

    __device__ __forceinline__ Groups(const void* tensor, u32 element_bytes, i64 first_element)
        : bytes(static_cast<u8*>(const_cast<void*>(tensor)) + first_element * element_bytes),
          size(element_bytes),
          wide(reinterpret_cast<u64>(tensor) % (GROUP * element_bytes) == 0) {}

    __device__ __forceinline__ Raw load_at(u32 element, u32 left) const {
        const u8* group = bytes + element * size;
        return size == 4   ? load<4>(group, left, wide)
               : size == 2 ? load<2>(group, left, wide)
                           : load<1>(group, left, wide);
    }

    __device__ __forceinline__ void store_at(u32 element, const Raw& raw, u32 left) const {
        u8* group = bytes + element * size;
        if (size == 4) {
            store<4>(group, raw, left, wide);
        } else if (size == 2) {
            store<2>(group, raw, left, wide);
        } else {
            store<1>(group, raw, left, wide);
        }
    }
};

__device__ __forceinline__ u32 type_bytes(u32 type) { return type == F32 ? 4 : 2; }

// --- tiles --------------------------------------------------------------------------------------

// The tile with which this warp begins.
__device__ __forceinline__ i64 tile_of_warp(i64 first_tile) {
    return first_tile + i64(blockIdx.x) * TILES_PER_BLOCK + threadIdx.x / WARP;
}

// The last segment whose first tile is not after this one; the first segment's must not be. All
// lanes of the warp search together: 32 segments in one step, 1024 in two.
__device__ __forceinline__ u32 find_segment(const Segment* segments, u32 count, i64 tile) {
    const u32 lane = threadIdx.x % WARP;
    u32 first = 0;
    while (count > 1) {
        const u32 step = (count + WARP - 1) / WARP;
        const u64 place = u64(lane) * step;
        const bool reached = place < count && segments[first + place].first_tile <= tile;
        const u32 last = u32(__popc(__ballot_sync(ALL_LANES, reached))) - 1;
        first += last * step;
        count = min(step, count - last * step);
    }
    return first;
}

// How many elements of its group `group` a lane has, and where the group begins in the tile.
__device__ __forceinline__ u32 group_start(u32 group) {
    return (group * WARP + threadIdx.x % WARP) * GROUP;
}
__device__ __forceinline__ u32 group_left(u32 start, u32 tile_left) {
    return tile_left > start ? min(tile_left - start, GROUP) : 0;
}

extern "C" __global__ void __launch_bounds__(TILES_PER_BLOCK* WARP)
    fourbit_adamw_check(const Segment* segments, u32 count, i64 first_tile, i64 tiles, u32* flags,
                        u32* damaged) {
    const i64 stride = i64(gridDim.x) * TILES_PER_BLOCK, end = first_tile + tiles;
    for (i64 tile = tile_of_warp(first_tile); tile < end; tile += stride) {
        const Segment& segment = segments[find_segment(segments, count, tile)];
        const i64 block = tile - segment.first_tile;
        const u32 left = u32(min(i64(TILE), segment.elements - block * TILE));
        const u32 type = segment.gradient_type;
        const Groups gradient(segment.gradient, type_bytes(type), block * TILE);
        Raw raw[GROUPS];
#pragma unroll
        for (u32 group = 0; group < GROUPS; ++group) {
            const u32 start = group_start(group);
            raw[group] = gradient.load_at(start, group_left(start, left));
        }
        bool good = true;
#pragma unroll
        for (u32 group = 0; group < GROUPS; ++group) {
            float numbers[GROUP];
            widen(numbers, raw[group], type);
            for (u32 i = 0; i < GROUP; ++i) good &= fabsf(numbers[i]) < GRADIENT_LIMIT;
        }
        if (__any_sync(ALL_LANES, !good) && threadIdx.x % WARP == 0) {
            atomicMax(&flags[segment.parameter], 1u);
        }
        if (segment.state_bits == 8 && threadIdx.x % WARP == 0) {
            const float larger = fmaxf(fabsf(segment.exp_avg_absmax[block]),
                                       fabsf(segment.exp_avg_sq_absmax[block]));
            // A maximum leaves NaN out.
            const float sum =
                segment.exp_avg_absmax[block] * 0.0f + segment.exp_avg_sq_absmax[block] * 0.0f;
            if (!(larger <= LARGEST_FLOAT && sum == 0.0f)) atomicMax(damaged, 1u);
        }
    }
}

// The update of one element, as src/optimizer/arithmetic.rs.
__device__ __forceinline__ void update(const Segment& c, float& p, float g, float& m, float& v) {
    g = c.direction * g;
    m = c.beta1 * m + c.one_minus_beta1 * g;
    v = c.beta2 * v + c.one_minus_beta2 * (g * g);
    const float denominator = __fsqrt_rn(v) * c.second_correction + c.eps;
    p = p * c.keep - c.stride * __fdiv_rn(m, denominator);
}

// One tile of a segment with state of BITS bits.
template <u32 BITS>
__device__ __forceinline__ void update_tile(const Segment& segment, i64 block,
                                            const Tables& tables) {
    const i64 begin = block * TILE;
    const u32 tile_left = u32(min(i64(TILE), segment.elements - begin));
    const Groups values(segment.values, type_bytes(segment.values_type), begin);
    const Groups gradient(segment.gradient, type_bytes(segment.gradient_type), begin);
    const Groups first(segment.exp_avg, BITS / 8, begin);
    const Groups second(segment.exp_avg_sq, BITS / 8, begin);

    // Everything is asked for before anything is used.
    Raw raw_p[GROUPS], raw_g[GROUPS], raw_m[GROUPS], raw_v[GROUPS];
#pragma unroll
    for (u32 group = 0; group < GROUPS; ++group) {
        const u32 start = group_start(group), left = group_left(start, tile_left);
        raw_p[group] = values.load_at(start, left);
        raw_g[group] = gradient.load_at(start, left);
        raw_m[group] = first.load_at(start, left);
        raw_v[group] = second.load_at(start, left);
    }
    float m_scale = 0.0f, v_scale = 0.0f;
    if (BITS == 8) {
        m_scale = segment.exp_avg_absmax[block];
        v_scale = segment.exp_avg_sq_absmax[block];
    }

    float m[GROUPS][GROUP], v[GROUPS][GROUP];
    float m_largest = 0.0f, v_largest = 0.0f;
#pragma unroll
    for (u32 group = 0; group < GROUPS; ++group) {
        const u32 start = group_start(group), left = group_left(start, tile_left);
        float p[GROUP], g[GROUP];
        widen(p, raw_p[group], segment.values_type);
        widen(g, raw_g[group], segment.gradient_type);
#pragma unroll
        for (u32 i = 0; i < GROUP; ++i) {
            if (BITS == 32) {
                m[group][i] = bits_to_float(raw_m[group].words[i]);
                v[group][i] = bits_to_float(raw_v[group].words[i]);
            } else {
                // The code of what is not there is not that of zero.
                const bool there = i < left;
                const u32 m_code = raw_m[group].words[0] >> i * 8 & 0xff;
                const u32 v_code = raw_v[group].words[0] >> i * 8 & 0xff;
                m[group][i] = there ? tables.first[m_code] * m_scale : 0.0f;
                v[group][i] = there ? tables.second[v_code] * v_scale : 0.0f;
            }
            update(segment, p[i], g[i], m[group][i], v[group][i]);
            m_largest = fmaxf(m_largest, fabsf(m[group][i]));
            v_largest = fmaxf(v_largest, fabsf(v[group][i]));
        }
        values.store_at(start, narrow(p, segment.values_type), left);
    }

    float m_inverse = 0.0f, v_inverse = 0.0f;
    if (BITS == 8) {
        m_largest = warp_largest(m_largest);
        v_largest = warp_largest(v_largest);
        m_inverse = inverse_of_scale(m_largest);
        v_inverse = inverse_of_scale(v_largest);
        if (threadIdx.x % WARP == 0) {
            segment.exp_avg_absmax[block] = m_largest;
            segment.exp_avg_sq_absmax[block] = v_largest;
        }
    }
#pragma unroll
    for (u32 group = 0; group < GROUPS; ++group) {
        const u32 start = group_start(group), left = group_left(start, tile_left);
        Raw m_raw{}, v_raw{};
#pragma unroll
        for (u32 i = 0; i < GROUP; ++i) {
            const float m_number = m[group][i], v_number = v[group][i];
            if (BITS == 32) {
                m_raw.words[i] = float_to_bits(m_number);
                v_raw.words[i] = float_to_bits(v_number);
            } else {
                const u32 m_code = encode_signed(tables, normalise(m_number, m_inverse));
                u32 v_code = encode_unsigned(tables, normalise(v_number, v_inverse));
                // A second moment that is not zero never takes the code of zero.
                if (v_number > 0.0f && v_code == 0) v_code = 1;
                m_raw.words[0] |= m_code << i * 8;
                v_raw.words[0] |= v_code << i * 8;
            }
        }
        first.store_at(start, m_raw, left);
        second.store_at(start, v_raw, left);
    }
}

extern "C" __global__ void __launch_bounds__(TILES_PER_BLOCK* WARP)
    fourbit_adamw(const Segment* segments, u32 count, i64 first_tile, i64 tiles, const u32* flags,
                  const u32* damaged) {
    __shared__ Tables tables;
    for (u32 i = threadIdx.x; i < 256; i += blockDim.x) {
        tables.first[i] = SIGNED_TABLE[i];
        tables.second[i] = UNSIGNED_TABLE[i];
        tables.first_midpoints[i] = SIGNED_MIDPOINTS[min(i, 254u)];
        tables.second_midpoints[i] = UNSIGNED_TABLE_MIDPOINTS[min(i, 254u)];
    }
    __syncthreads();
    if (*damaged) return;
    const i64 stride = i64(gridDim.x) * TILES_PER_BLOCK, end = first_tile + tiles;
    for (i64 tile = tile_of_warp(first_tile); tile < end; tile += stride) {
        const Segment& segment = segments[find_segment(segments, count, tile)];
        if (flags[segment.parameter]) continue;
        const i64 block = tile - segment.first_tile;
        if (segment.state_bits == 8) {
            update_tile<8>(segment, block, tables);
        } else {
            update_tile<32>(segment, block, tables);
        }
    }
}

#ifdef FOURBIT_EMULATED
FOURBIT_EMULATE(fourbit_adamw_check)
FOURBIT_EMULATE(fourbit_adamw)
#endif
