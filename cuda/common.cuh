// What all kernels share: fixed-width types, conversions, wide memory accesses, warp-wide
// operations and the handful of PTX instructions that have no C++ form.
//
// No toolkit header is included, because NVRTC's package ships none. Everything that is not plain
// C++ is in the last section, once in PTX and once, for the tests that run kernels on a CPU, as
// calls into tests/kernels/emulator.h, which defines FOURBIT_EMULATED.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;
static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "fixed widths");

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// --- element types ------------------------------------------------------------------------------

// The numbers of a tensor as they lie in memory; arithmetic is in float.
struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};
using f32 = float;

__device__ __forceinline__ float bits_to_float(u32 bits);
__device__ __forceinline__ u32 float_to_bits(float number);
__device__ __forceinline__ float half_to_float(u16 bits);
__device__ __forceinline__ u16 float_to_half(float number);

__device__ __forceinline__ float to_float(f32 number) { return number; }
__device__ __forceinline__ float to_float(bf16 number) {
    return bits_to_float(u32(number.bits) << 16);
}
__device__ __forceinline__ float to_float(f16 number) { return half_to_float(number.bits); }

// Rounds to nearest even; a NaN stays one. Integer arithmetic, so that every card and the CPU give
// the same bits; the instruction of sm_80 and later would give another NaN.
__device__ __forceinline__ u16 float_to_bf16_bits(float number) {
    const u32 bits = float_to_bits(number);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return u16((bits >> 16) | 0x0040u);
    return u16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class T> __device__ __forceinline__ T from_float(float number);
template <> __device__ __forceinline__ f32 from_float<f32>(float number) { return number; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float number) {
    return bf16{float_to_bf16_bits(number)};
}
template <> __device__ __forceinline__ f16 from_float<f16>(float number) {
    return f16{float_to_half(number)};
}

// --- memory -------------------------------------------------------------------------------------

// Sixteen bytes, the widest access of a thread.
struct alignas(16) Wide {
    u32 words[4];
};

// N elements that are moved at once. N * sizeof(T) is 1, 2, 4, 8 or 16 bytes or a multiple of 16.
template <class T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
    T elements[N];
};

// --- what is not plain C++ ----------------------------------------------------------------------

#ifdef FOURBIT_EMULATED

__device__ __forceinline__ float bits_to_float(u32 bits) { return emulator::bits_to_float(bits); }
__device__ __forceinline__ u32 float_to_bits(float number) {
    return emulator::float_to_bits(number);
}
__device__ __forceinline__ float half_to_float(u16 bits) { return emulator::half_to_float(bits); }
__device__ __forceinline__ u16 float_to_half(float number) {
    return emulator::float_to_half(number);
}
__device__ __forceinline__ Wide load_once(const Wide* source) {
    emulator::check_aligned(source, 16);
    return *source;
}
__device__ __forceinline__ void store_once(Wide* target, Wide value) {
    emulator::check_aligned(target, 16);
    *target = value;
}
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, u32 bytes) {
    emulator::copy_async(shared, global, bytes);
}
__device__ __forceinline__ void copy_async_commit() { emulator::copy_async_commit(); }
template <int PENDING> __device__ __forceinline__ void copy_async_wait() {
    emulator::copy_async_wait(PENDING);
}
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::mma_16x8x16(d, a, b, [](u16 bits) { return to_float(T{bits}); });
}
__device__ __forceinline__ void load_matrix_x4(u32 (&fragment)[4], const void* row) {
    emulator::load_matrix_x4(fragment, row, false);
}
__device__ __forceinline__ void load_matrix_x4_transposed(u32 (&fragment)[4], const void* row) {
    emulator::load_matrix_x4(fragment, row, true);
}

#else

__device__ __forceinline__ float bits_to_float(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ u32 float_to_bits(float number) { return __float_as_uint(number); }
__device__ __forceinline__ float half_to_float(u16 bits) {
    float number;
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
    return number;
}
__device__ __forceinline__ u16 float_to_half(float number) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
}

// Reads what no thread will read again: past the first-level cache.
__device__ __forceinline__ Wide load_once(const Wide* source) {
    Wide value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.words[0]), "=r"(value.words[1]), "=r"(value.words[2]),
                   "=r"(value.words[3])
                 : "l"(source));
    return value;
}

// Writes what this kernel will not read: first to leave the second-level cache.
__device__ __forceinline__ void store_once(Wide* target, Wide value) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(value.words[0]),
                 "r"(value.words[1]), "r"(value.words[2]), "r"(value.words[3])
                 : "memory");
}

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Copies `bytes` (at most 16) from global to shared memory in the background and fills the rest of
// the 16 with zeros. Both addresses are multiples of 16. Before sm_80, at once.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, u32 bytes) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
#else
    Wide value{};
    if (bytes == 16) {
        value = *static_cast<const Wide*>(global);
    } else {
        for (u32 byte = 0; byte < bytes; ++byte) {
            reinterpret_cast<u8*>(&value)[byte] = static_cast<const u8*>(global)[byte];
        }
    }
    *static_cast<Wide*>(shared) = value;
#endif
}

// Ends a group of background copies.
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the PENDING newest groups of this thread are under way. Other threads see
// what has arrived after the next barrier.
template <int PENDING> __device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// d += a b for a 16 x 16 (row-major), b 16 x 8 (column-major), d 16 x 8, in the fragments of
// mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"). T is bf16 or f16.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);

template <>
__device__ __forceinline__ void mma_16x8x16<f16>(float (&d)[4], const u32 (&a)[4],
                                                 const u32 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    // sm_75 has half of it: two steps over k.
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ void mma_16x8x16<bf16>(float (&d)[4], const u32 (&a)[4],
                                                  const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Four 8 x 8 matrices of 16-bit numbers from shared memory into fragments: lane l gives the address
// of row l % 8 of matrix l / 8 (16 bytes, aligned), and gets of each matrix i row l / 4, columns
// 2 (l % 4) and 2 (l % 4) + 1; transposed, the same of each matrix's transpose.
__device__ __forceinline__ void load_matrix_x4(u32 (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(u32 (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#endif
