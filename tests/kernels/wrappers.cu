// Calls of the wrappers of common.cuh, so that tests can hold each to what the PTX ISA says of the
// instruction behind it. ELEMENT is bf16 or f16. A block is one warp.
#include "common.cuh"

// a u32 [32, 4], b u32 [32, 2], d f32 [32, 4]: fragments by lane.
extern "C" __global__ void fourbit_try_mma(const u32* a, const u32* b, float* d) {
    const u32 lane = threadIdx.x;
    u32 left[4], right[2];
    float sums[4];
    for (u32 i = 0; i < 4; ++i) left[i] = a[lane * 4 + i];
    for (u32 i = 0; i < 2; ++i) right[i] = b[lane * 2 + i];
    for (u32 i = 0; i < 4; ++i) sums[i] = d[lane * 4 + i];
    mma_16x8x16<ELEMENT>(sums, left, right);
    for (u32 i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

// rows: 32 rows of 16 bytes; fragments u32 [2, 32, 4]: as they are, and transposed.
extern "C" __global__ void fourbit_try_load_matrix(const Wide* rows, u32* fragments) {
    __shared__ Wide matrices[WARP];
    const u32 lane = threadIdx.x;
    matrices[lane] = rows[lane];
    __syncthreads();
    u32 straight[4], transposed[4];
    load_matrix_x4(straight, &matrices[lane]);
    load_matrix_x4_transposed(transposed, &matrices[lane]);
    for (u32 i = 0; i < 4; ++i) {
        fragments[lane * 4 + i] = straight[i];
        fragments[(WARP + lane) * 4 + i] = transposed[i];
    }
}

// Lane l copies its 16 bytes, and in a second group the first l % 17 of them. seen u32 [32]:
// whether the first group was there when the second might still be under way.
extern "C" __global__ void fourbit_try_copy(const Wide* source, Wide* target, u32* seen) {
    __shared__ Wide copies[2][WARP];
    const u32 lane = threadIdx.x;
    for (u32 group = 0; group < 2; ++group) {
        copy_async_16(&copies[group][lane], source + lane, group ? lane % 17 : 16);
        copy_async_commit();
    }
    copy_async_wait<1>();
    seen[lane] = copies[0][lane].words[3] == source[lane].words[3];
    copy_async_wait<0>();
    target[lane] = copies[1][lane];
}

// numbers f32 [32, 2]; pairs u32 [32], larger u32 [32]: of a lane's pair and the next lane's, both
// without signs; halves u16 [32] and back f32 [32], of the first number.
extern "C" __global__ void fourbit_try_conversions(const float* numbers, u32* pairs, u32* larger,
                                                   u16* halves, float* back) {
    const u32 lane = threadIdx.x;
    const u32 pair = pack_pair<ELEMENT>(numbers[2 * lane], numbers[2 * lane + 1]);
    const u32 magnitudes = pair & 0x7fff7fffu;
    const u32 next = __shfl_sync(ALL_LANES, magnitudes, int((lane + 1) % WARP));
    pairs[lane] = pair;
    larger[lane] = larger_pair<ELEMENT>(magnitudes, next);
    halves[lane] = float_to_half(numbers[2 * lane]);
    back[lane] = half_to_float(halves[lane]);
}

#ifdef FOURBIT_EMULATED
FOURBIT_EMULATE(fourbit_try_mma)
FOURBIT_EMULATE(fourbit_try_load_matrix)
FOURBIT_EMULATE(fourbit_try_copy)
FOURBIT_EMULATE(fourbit_try_conversions)
#endif
