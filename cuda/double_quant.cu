// Double quantization (QLoRA, arXiv 2305.14314, section 3): scales less their mean as 8-bit
// codes of the signed dynamic map, in blocks of 256 with a nested scale each; and back. Same
// bytes as src/double_quant.rs: compiled without fused operations, one rounding an operation.
//
// Two kernels quantize, in this order on one stream:
//   fourbit_absmax_sums    sums of 1024 scales each, in double precision;
//   fourbit_absmax_encode  their mean, the codes and the nested scales.
// fourbit_absmax_decode is the way back, for those who want the scales themselves: the kernels that
// use weights decode scales on their own.
//
// Parameters:
//   absmax         f32 [count], of either sign; read, and by decode written
//   count          i64
//   sums           f64 [ceil(count / 1024)]
//   codes          u8 [count]
//   nested_absmax  f32 [ceil(count / 256)]
//   nested_offset  f32 [1], the mean; 0 for no scales
//   first_bad      u64 [2], all ones: afterwards the index of the first scale that is not finite
//                  when the mean is taken off, and of the first whose decoded value is not; then
//                  the rest means nothing
// The order of the mean is the specification's: 32 lanes of double precision a chunk of 1024, added
// as a tree, and chunks in their order. Only where no order could round is another one taken.
//
// Launch: block 256; grid any, best min(ceil(count / 8192), 8 x processors) for sums,
// min(ceil(count / 2048), 8 x processors) for encode and min(ceil(count / 256), 8 x processors) for
// decode; no dynamic shared memory.
//
// Floor: 4 bytes a scale for sums; 5.02 for encode, which reads the scales again; 5.02 for decode.
// With blocks of 64 that is 0.14 bytes an element for both that quantize, where quantize.cu has
// 2.56.
// Why it should come near: warps read runs of 128 bytes, a lane up to 32 numbers before it adds one
// (sums) or 8 before it uses one (encode), which is 8 KiB a block, 48 KiB and more a processor.
// Codes are written one a lane, 32 bytes a warp. The chunks' sums are added anew by every block,
// from the second-level cache, 8 bytes for 1024 scales, which saves a launch. The midpoints
// stand in shared memory as a search tree whose first six levels meet no bank conflicts; the
// last two may.
// Counted on a lane's scales: sums 281 instructions on sm_80 and 284 on sm_90 for 32, of which 32
// conversions and 37 additions in double precision: 9 a scale, where the memory's speed leaves
// 35 on an H100 and 38 on an A100; an RTX 4090, with 2 lanes for doubles a processor, takes 1.1
// cycles a scale for them and 1.3 for the memory. Encode: 502 and 559 for 8, of which 57 looks
// and 5 shuffles: 63 and 70 a scale, where there is room for 44 on an H100, 48 on an A100 and
// 205 on an RTX 4090: on the large cards instructions bind, at two thirds of the memory's speed.
// They are one an element, beside quantize's 13. Decode: 74 and 77 for 4, 19 a scale, with the
// same room.
#include "common.cuh"

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / WARP;
// Scales that are summed as a unit, one by a lane of a warp at a time.
constexpr u32 CHUNK = 1024;
// Scales that share a nested scale, and how many of them a lane has.
constexpr u32 NESTED_BLOCK_SIZE = 256;
constexpr u32 LANE_SCALES = NESTED_BLOCK_SIZE / WARP;
constexpr u32 NESTED_BITS = 8;
constexpr u32 NESTED_CODES = 1 << NESTED_BITS;

__constant__ float NESTED_VALUE[NESTED_CODES] = NESTED_VALUES;
__constant__ float NESTED_MIDPOINT[NESTED_CODES - 1] = NESTED_MIDPOINTS;

// --- the mean -----------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS)
fourbit_absmax_sums(const float* __restrict__ absmax, i64 count, double* __restrict__ sums) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 chunks = (count + CHUNK - 1) / CHUNK;
    for (i64 chunk = i64(blockIdx.x) * WARPS + warp; chunk < chunks;
         chunk += i64(gridDim.x) * WARPS) {
        const i64 first = chunk * CHUNK + lane;
        float scales[CHUNK / WARP];
#pragma unroll
        for (u32 i = 0; i < CHUNK / WARP; ++i) {
            const i64 index = first + i * WARP;
            scales[i] = index < count ? absmax[index] : 0.0f;
        }
        double sum = 0.0;
        for (const float scale : scales) sum += scale;
        // The upper half of the lanes is added to the lower, and so on; lane 0 has the sum.
        for (u32 step = WARP / 2; step > 0; step /= 2) {
            sum += __shfl_down_sync(ALL_LANES, sum, step);
        }
        if (lane == 0) sums[chunk] = sum;
    }
}

// What decides whether sums of some numbers are exact: the sum of their magnitudes, and the
// exponent of the smallest power of two that any of them is an odd multiple of.
struct Extent {
    double magnitude;
    i32 exponent;
};

constexpr i32 NO_EXPONENT = 2000;

__device__ __forceinline__ i32 lowest_exponent(double number) {
    const u64 bits = __builtin_bit_cast(u64, number);
    const u64 fraction = bits & 0xfffffffffffffull;
    const i32 exponent = i32(bits >> 52 & 0x7ff);
    // Sums of floats are zero or normal.
    if (exponent == 0) return NO_EXPONENT;
    return exponent - 1075 + __ffsll(i64(fraction | 1ull << 52)) - 1;
}

// The sum of `sums` in their order, by all threads of a block; the same in all of them.
//
// Added one after the other they would keep one thread busy for longer than the whole quantization
// of a large tensor takes. But if all are multiples of 2^e and their magnitudes add up to less than
// 2^(e + 53), then every partial sum in every order is exact, and any order gives the same bits.
// Scales of weights have few enough bits for that to be the rule; where it fails, they are added in
// order. (The computed sum of magnitudes may be rounded, but not from 2^(e + 53) or more to less.)
__device__ double sum_in_order(const double* sums, i64 chunks) {
    __shared__ double partial[WARPS];
    __shared__ Extent extents[WARPS];
    __shared__ double result;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    double sum = 0.0;
    Extent extent{0.0, NO_EXPONENT};
    for (i64 i = threadIdx.x; i < chunks; i += THREADS) {
        const double number = sums[i];
        sum += number;
        extent.magnitude += number < 0.0 ? -number : number;
        extent.exponent = min(extent.exponent, lowest_exponent(number));
    }
    for (u32 step = WARP / 2; step > 0; step /= 2) {
        sum += __shfl_xor_sync(ALL_LANES, sum, step);
        extent.magnitude += __shfl_xor_sync(ALL_LANES, extent.magnitude, step);
        extent.exponent =
            min(extent.exponent, __shfl_xor_sync(ALL_LANES, extent.exponent, step));
    }
    if (lane == 0) {
        partial[warp] = sum;
        extents[warp] = extent;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 i = 1; i < WARPS; ++i) {
            sum += partial[i];
            extent.magnitude += extents[i].magnitude;
            extent.exponent = min(extent.exponent, extents[i].exponent);
        }
        const i32 limit_exponent = min(extent.exponent + 53, 1023);
        const double limit = __builtin_bit_cast(double, u64(limit_exponent + 1023) << 52);
        // False also for a NaN.
        if (!(extent.magnitude < limit)) {
            sum = 0.0;
            for (i64 i = 0; i < chunks; ++i) sum += sums[i];
        }
        result = sum;
    }
    __syncthreads();
    return result;
}

// --- codes --------------------------------------------------------------------------------------

// Notes a scale that is no number without the offset, or whose decoded value is none.
__device__ __noinline__ void report_bad(float shifted, float decoded, i64 index, u64* first_bad) {
    if (magnitude_bits(shifted) >= INFINITY_BITS) {
        atomicMin(&first_bad[0], u64(index));
    } else if (magnitude_bits(decoded) >= INFINITY_BITS) {
        atomicMin(&first_bad[1], u64(index));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
fourbit_absmax_encode(const float* __restrict__ absmax, i64 count, const double* __restrict__ sums,
                      u8* __restrict__ codes, float* __restrict__ nested_absmax,
                      float* __restrict__ nested_offset, u64* first_bad) {
    __shared__ float tree[NESTED_CODES];
    for (u32 i = threadIdx.x; i < NESTED_CODES; i += THREADS) {
        tree[i] = i > 0 ? NESTED_MIDPOINT[index_of_node<NESTED_BITS>(i)] : 0.0f;
    }
    // Ends with a barrier.
    const double sum = sum_in_order(sums, (count + CHUNK - 1) / CHUNK);
    const float offset = count > 0 ? float(sum / double(count)) : 0.0f;
    if (blockIdx.x == 0 && threadIdx.x == 0) *nested_offset = offset;

    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 blocks = (count + NESTED_BLOCK_SIZE - 1) / NESTED_BLOCK_SIZE;
    for (i64 block = i64(blockIdx.x) * WARPS + warp; block < blocks;
         block += i64(gridDim.x) * WARPS) {
        const i64 first = block * NESTED_BLOCK_SIZE + lane;
        // Loads, searches and stores each by themselves, so that those of a lane overlap.
        float shifted[LANE_SCALES];
#pragma unroll
        for (u32 i = 0; i < LANE_SCALES; ++i) {
            shifted[i] = first + i * WARP < count ? absmax[first + i * WARP] : offset;
        }
        u32 largest = 0;
#pragma unroll
        for (u32 i = 0; i < LANE_SCALES; ++i) {
            // 0 for what is behind the end, if the offset is finite.
            shifted[i] -= offset;
            largest = max(largest, magnitude_bits(shifted[i]));
        }
        for (u32 step = WARP / 2; step > 0; step /= 2) {
            largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, step));
        }
        const float scale = bits_to_float(largest);
        const float inverse = inverse_of_scale(scale);
        if (lane == 0) nested_absmax[block] = scale;
        u32 ranks[LANE_SCALES];
#pragma unroll
        for (u32 i = 0; i < LANE_SCALES; ++i) shifted[i] = normalise(shifted[i], inverse);
        search_tree<NESTED_BITS, true>(tree, shifted, ranks);
#pragma unroll
        for (u32 i = 0; i < LANE_SCALES; ++i) {
            if (first + i * WARP < count) codes[first + i * WARP] = u8(ranks[i]);
        }
        if (!(scale + (offset < 0.0f ? -offset : offset) <= LARGEST_FLOAT)) {
            for (i64 i = first; i < count && i < first + NESTED_BLOCK_SIZE; i += WARP) {
                report_bad(absmax[i] - offset, decode_scale(NESTED_VALUE[codes[i]], scale, offset),
                           i, first_bad);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
fourbit_absmax_decode(const u8* __restrict__ codes, const float* __restrict__ nested_absmax,
                      const float* __restrict__ nested_offset, i64 count,
                      float* __restrict__ absmax) {
    __shared__ float values[NESTED_CODES];
    for (u32 i = threadIdx.x; i < NESTED_CODES; i += THREADS) values[i] = NESTED_VALUE[i];
    __syncthreads();
    const float offset = *nested_offset;
    for (i64 i = i64(blockIdx.x) * THREADS + threadIdx.x; i < count;
         i += i64(gridDim.x) * THREADS) {
        absmax[i] = decode_scale(values[codes[i]], nested_absmax[i / NESTED_BLOCK_SIZE], offset);
    }
}

#ifdef FOURBIT_EMULATED
FOURBIT_EMULATE(fourbit_absmax_sums)
FOURBIT_EMULATE(fourbit_absmax_encode)
FOURBIT_EMULATE(fourbit_absmax_decode)
#endif
