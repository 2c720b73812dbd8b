// What the kernels share: scalar types, vectors of them, and the instructions that plain C++ has no word for.
//
// No header is included: NVRTC compiles the kernels as they are, on machines without a CUDA toolkit. Where the compiler is not
// one for CUDA (tests run the same sources on the CPU), the functions under "Instructions" are given by whoever compiles.
//
// Arguments of kernels are pointers, `long long` and `float` only, so that any caller can pass them without a table of types.
#pragma once

using float32 = float;
struct float16 {
    unsigned short bits;
};
struct bfloat16 {
    unsigned short bits;
};

// Instructions ---------------------------------------------------------------------------------------------------------------

#ifdef __CUDACC__

__device__ __forceinline__ float float_from_half_bits(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ __forceinline__ unsigned short half_bits_from_float(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ unsigned short bfloat_bits_from_float(float x) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Ends the kernel with an error, for good: what it was given is not what it takes.
__device__ __forceinline__ void trap() { asm volatile("trap;"); }

// d += a b over a 16 x 8 tile with 16 products an element: a is [16, 16] by rows, b [16, 8] by columns, two scalars to a word,
// spread over the lanes of a warp as PTX lays m16n8k16 out.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], float16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Sixteen bytes from global to shared memory, both aligned, without a register between; there after async_copies_done.
__device__ __forceinline__ void async_copy_16(void* to_shared, const void* from_global) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from_global) : "memory");
}

__device__ __forceinline__ void async_copies_end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `PENDING` of this thread's last groups are still on their way; other threads' need a barrier besides.
template <int PENDING>
__device__ __forceinline__ void async_copies_done() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// The block's dynamic shared memory as an array.
#define DYNAMIC_SHARED(type, name)                                  \
    extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
    type* const name = reinterpret_cast<type*>(dynamic_shared)

#endif

// Scalars --------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ __forceinline__ float to_float(bool x) { return x ? 1.0f : 0.0f; }
__device__ __forceinline__ float to_float(float32 x) { return x; }
__device__ __forceinline__ float to_float(float16 x) { return float_from_half_bits(x.bits); }
__device__ __forceinline__ float to_float(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float32 from_float(float x) {
    return x;
}
template <>
__device__ __forceinline__ float16 from_float(float x) {
    return {half_bits_from_float(x)};
}
template <>
__device__ __forceinline__ bfloat16 from_float(float x) {
    return {bfloat_bits_from_float(x)};
}

// Vectors --------------------------------------------------------------------------------------------------------------------

// N neighbours that are read or written at once: 16 bytes is the most that one instruction moves.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
    T values[N];
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
    return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
}
