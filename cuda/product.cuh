// What products share: the scales of a packed weight, and where the sums of tensor cores go.
#pragma once
#include "common.cuh"

// --- a quantized weight -------------------------------------------------------------------------

[[maybe_unused]] static __device__ const float NESTED_TABLE[256] = NESTED_VALUES;

// The scales of a weight's blocks. Fetching one and decoding it are two steps, so that others can
// be under way in between.
struct Scales {
    // f32 [blocks], or u8 codes [blocks] with double quantization.
    const void* absmax;
    // f32 [ceil(blocks / 256)], and f32 [1]; not used without double quantization.
    const f32* nested_absmax;
    const f32* nested_offset;

    struct Fetched {
        u32 code;
        float absmax;
    };

    __device__ __forceinline__ Fetched fetch(i64 block) const {
        if (DOUBLE_QUANT) {
            return {static_cast<const u8*>(absmax)[block], nested_absmax[block / 256]};
        }
        return {0, static_cast<const f32*>(absmax)[block]};
    }

    // `table` is NESTED_TABLE or a copy of it.
    __device__ __forceinline__ static float decode(const Fetched& fetched, float offset,
                                                   const float* table = NESTED_TABLE) {
        if (DOUBLE_QUANT) return decode_scale(table[fetched.code], fetched.absmax, offset);
        return fetched.absmax;
    }

    // What `decode` adds; the same for all blocks.
    __device__ __forceinline__ float offset() const { return DOUBLE_QUANT ? *nested_offset : 0.0f; }
};

// The scales of a row of the weight that begins with a whole chunk of 32 elements. Within a row
// 32 bits count the chunks.
struct RowScales {
    // From the row's first block and its first nested block on.
    const void* absmax;
    const f32* nested_absmax;
    // Chunks of that block, and blocks of that nested block, that belong to the rows before.
    u32 chunks_before;
    u32 blocks_before;

    RowScales() = default;
    __device__ __forceinline__ RowScales(const Scales& scales, u64 first_chunk) {
        const u64 block = first_chunk / (BLOCK_SIZE / 32);
        absmax = static_cast<const u8*>(scales.absmax) + block * (DOUBLE_QUANT ? 1 : 4);
        nested_absmax = scales.nested_absmax + block / 256;
        chunks_before = u32(first_chunk % (BLOCK_SIZE / 32));
        blocks_before = u32(block % 256);
    }

    __device__ __forceinline__ Scales::Fetched fetch(u32 chunk) const {
        const u32 block = (chunks_before + chunk) / (BLOCK_SIZE / 32);
        if (DOUBLE_QUANT) {
            return {static_cast<const u8*>(absmax)[block],
                    nested_absmax[(blocks_before + block) / 256]};
        }
        return {0, static_cast<const f32*>(absmax)[block]};
    }
};

// --- sums of a tensor-core product --------------------------------------------------------------

// Where the sums of a product go. A block of 256 threads has 128 features (left operand, 16 a warp)
// by some rows (right operand, 8 a tile); the grid's third dimension splits the terms that are
// summed.
template <class T> struct Output {
    // [features], or null.
    const T* bias;
    // [rows, features].
    T* output;
    // f32 [splits, blocks of a split, tiles of a block, 256, 4]: a thread's sums of a tile are 16
    // bytes beside those of its neighbours. Not used where splits is 1.
    f32* partial;
    // u32, one for each block of a split: zero before and after.
    u32* arrived;
    i64 rows;
    i64 features;
    u32 splits;

    // Writes a block's sums, a lane's being those of mma_16x8x16. Those of splits are added in
    // their order by the block that comes last.
    template <u32 TILES>
    __device__ __forceinline__ void write(float (&sums)[TILES][4], i64 first_feature,
                                          i64 first_row) const {
        if (splits > 1 && !gather(sums, first_row)) return;
        const u32 lane = threadIdx.x % WARP;
        const i64 feature = first_feature + threadIdx.x / WARP * 16 + lane / 4;
        const bool there[2] = {feature < features, feature + 8 < features};
        float added[2] = {};
        if (bias && there[0]) added[0] = to_float(bias[feature]);
        if (bias && there[1]) added[1] = to_float(bias[feature + 8]);
        T* const target = output + (first_row + lane % 4 * 2) * features + feature;
        const i64 left = rows - first_row - lane % 4 * 2;
#pragma unroll
        for (u32 tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (u32 side = 0; side < 2; ++side) {
                const float (&of_tile)[4] = sums[tile];
                const u32 pair = pack_pair<T>(of_tile[2 * side] + added[side],
                                              of_tile[2 * side + 1] + added[side]);
                T* const first = target + tile * 8 * features + side * 8;
                if (there[side] && tile * 8 < left) *first = T{u16(pair)};
                if (there[side] && tile * 8 + 1 < left) first[features] = T{u16(pair >> 16)};
            }
        }
    }

    // Leaves a block's sums for the one that comes last, which gets all of them.
    template <u32 TILES>
    __device__ __forceinline__ bool gather(float (&sums)[TILES][4], i64 first_row) const {
        using Four = Pack<float, 4>;
        const u64 block = u64(blockIdx.y) * gridDim.x + blockIdx.x;
        const u64 pitch = u64(gridDim.y) * gridDim.x * (TILES * 256);
        Four* const first = reinterpret_cast<Four*>(partial) + block * (TILES * 256) + threadIdx.x;
        // Tiles of rows that do not exist are left out.
        const u32 tiles = u32(min(i64(TILES), (rows - first_row + 7) / 8));
#pragma unroll
        for (u32 tile = 0; tile < TILES; ++tile) {
            const Four own{{sums[tile][0], sums[tile][1], sums[tile][2], sums[tile][3]}};
            if (tile < tiles) first[blockIdx.z * pitch + tile * 256] = own;
        }
        // All writes of the block come before the barrier, the barrier before thread 0's count,
        // which releases; the last block's thread 0 acquires by its own, and its block reads after
        // the barrier that follows. Release and acquire are cumulative: they order not the thread's
        // own accesses alone, but all that barriers order before and after them.
        __shared__ u32 before;
        __syncthreads();
        if (threadIdx.x == 0) before = count_released(arrived + block);
        __syncthreads();
        if (before + 1 < splits) return false;
        if (threadIdx.x == 0) arrived[block] = 0;
#pragma unroll
        for (u32 tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) sums[tile][i] = 0.0f;
        }
        // A split's reads are under way together, and with few tiles those of several splits.
#pragma unroll(TILES < 8 ? 8 / TILES : 1)
        for (u32 split = 0; split < splits; ++split) {
            Four theirs[TILES];
#pragma unroll
            for (u32 tile = 0; tile < TILES; ++tile) {
                theirs[tile] = Four{};
                const Four* from = first + split * pitch + tile * 256;
                if (tile < tiles) theirs[tile] = load_shared_by_blocks(from);
            }
#pragma unroll
            for (u32 tile = 0; tile < TILES; ++tile) {
#pragma unroll
                for (u32 i = 0; i < 4; ++i) sums[tile][i] += theirs[tile].elements[i];
            }
        }
        return true;
    }
};
