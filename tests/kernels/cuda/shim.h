// A CUDA device made of a CPU thread, for the kernels' sources as they are: `g++ -include shim.h kernel.cu`.
//
// Every CUDA thread is a fiber that runs until it must wait for others. Blocks run one after another, threads in a fixed order
// or in the opposite one: a kernel whose result depends on that order lacks a barrier. What a GPU would answer with a hang or
// with garbage (a barrier that not all threads reach, a shuffle without its partners) is an error with a message here.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time
#define __align__(n) alignas(n)
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(shim::dynamic_shared())

struct dim3 {
    unsigned x, y, z;
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // set before a fiber goes on
constexpr int warpSize = 32;

namespace shim {

struct Geometry {
    dim3 grid, block;
    unsigned shared_bytes;
    unsigned backwards;  // blocks and threads from the last to the first
};

// Null, or what went wrong. The text is good until the next run.
const char* run(const Geometry&, void (*thread)(void* context), void* context);

void* dynamic_shared();  // of exactly the bytes asked for, not initialised
unsigned lane();

// Ends the kernel: what it was given is not what it takes.
void trap();

// Waits for all threads of the block.
void block_barrier();

constexpr int WORDS = 8;
struct Words {
    unsigned word[WORDS];
};

// Waits for the lanes in `mask`, one of which calls; then what every lane brought, by lane.
const Words* exchange(unsigned mask, const Words& mine);

// Asynchronous copies arrive as late as they may: when waited for.
void async_copy(void* to, const void* from, unsigned bytes);
void async_copies_end_group();
void async_copies_wait(int pending_groups);

template <class T>
T shuffle(unsigned mask, T value, unsigned from_lane) {
    static_assert(sizeof(T) <= sizeof(Words), "too wide to shuffle");
    Words mine{};
    std::memcpy(&mine, &value, sizeof value);
    const Words* all = exchange(mask, mine);
    std::memcpy(&value, &all[from_lane], sizeof value);
    return value;
}

template <class F>
void for_lanes(unsigned mask, unsigned value, F each) {
    Words mine{};
    mine.word[0] = value;
    const Words* all = exchange(mask, mine);
    for (unsigned other = 0; other < 32; ++other)
        if (mask >> other & 1) each(other, all[other].word[0]);
}

template <class... A, std::size_t... I>
const char* launch(void (*kernel)(A...), const Geometry& geometry, void** arguments, std::index_sequence<I...>) {
    auto call = [&] { kernel(*static_cast<A*>(arguments[I])...); };
    return run(geometry, [](void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
}

template <class... A>
const char* launch(void (*kernel)(A...), const Geometry& geometry, void** arguments) {
    return launch(kernel, geometry, arguments, std::index_sequence_for<A...>());
}

}  // namespace shim

// Barriers and warps ---------------------------------------------------------------------------------------------------------

inline void __syncthreads() { shim::block_barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { shim::exchange(mask, {}); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    return shim::shuffle(mask, value, (shim::lane() & ~(width - 1)) | (from & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const unsigned from = shim::lane() ^ bits;
    return shim::shuffle(mask, value, from / width > shim::lane() / width ? shim::lane() : from);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned lane = shim::lane(), within = lane & (width - 1);
    return shim::shuffle(mask, value, within < delta ? lane : lane - delta);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned lane = shim::lane(), within = lane & (width - 1);
    return shim::shuffle(mask, value, within + delta >= unsigned(width) ? lane : lane + delta);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned result = 0;
    shim::for_lanes(mask, predicate != 0, [&](unsigned other, unsigned theirs) { result |= theirs << other; });
    return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline unsigned __match_any_sync(unsigned mask, unsigned value) {
    unsigned result = 0;
    shim::for_lanes(mask, value, [&](unsigned other, unsigned theirs) { result |= unsigned(theirs == value) << other; });
    return result;
}

// Atomics: fibers are never interrupted.
template <class T>
T atomicAdd(T* at, T value) {
    const T before = *at;
    *at = before + value;
    return before;
}

template <class T>
T atomicMax(T* at, T value) {
    const T before = *at;
    if (before < value) *at = value;
    return before;
}

// Scalars --------------------------------------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}

// Instructions of common.cuh -------------------------------------------------------------------------------------------------

// Keeps the upper bits of a significand, to nearest, ties to even.
inline std::uint64_t round_off(std::uint64_t significand, int bits) {
    const std::uint64_t half = std::uint64_t(1) << (bits - 1), odd = significand >> bits & 1;
    return (significand + half - 1 + odd) >> bits;
}

inline float float_from_half_bits(unsigned short half) {
    const unsigned sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ffu;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) return std::copysign(std::ldexp(float(fraction), -24), __uint_as_float(sign | 0x3f800000u));
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

inline unsigned short half_bits_from_float(float x) {
    const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffu;
    if (magnitude >= 0x47800000u) return sign | 0x7c00u;                                   // from 2^16 on
    if (magnitude >= 0x38800000u) return sign | (round_off(magnitude, 13) - (112u << 10));  // a carry reaches the exponent
    if (magnitude < 0x33000000u) return sign;                                              // below half of the smallest
    return sign | round_off((magnitude & 0x7fffffu) | 0x800000u, 126 - (magnitude >> 23));  // subnormal
}

inline unsigned short bfloat_bits_from_float(float x) {
    return x != x ? 0x7fffu : static_cast<unsigned short>(round_off(__float_as_uint(x), 16));
}

inline void trap() { shim::trap(); }

inline void async_copy_16(void* to_shared, const void* from_global) { shim::async_copy(to_shared, from_global, 16); }
inline void async_copies_end_group() { shim::async_copies_end_group(); }
template <int PENDING>
void async_copies_done() {
    shim::async_copies_wait(PENDING);
}

// The fragments of m16n8k16: lane 4 g + t holds of a rows g and g + 8, of b column g, of d rows g and g + 8.
template <class SCALAR>
void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], SCALAR) {
    shim::Words mine{{a[0], a[1], a[2], a[3], b[0], b[1]}};
    const shim::Words* all = shim::exchange(~0u, mine);
    auto scalar = [&](unsigned lane, int word, int upper) {
        return to_float(SCALAR{static_cast<unsigned short>(all[lane].word[word] >> (16 * upper))});
    };
    const unsigned g = shim::lane() / 4, t = shim::lane() % 4;
    for (int row = 0; row < 2; ++row)
        for (int column = 0; column < 2; ++column)
            for (int k = 0; k < 16; ++k) {
                const unsigned holder = k % 8 / 2;
                const float left = scalar(4 * g + holder, row + k / 8 * 2, k % 2);
                const float right = scalar(4 * (2 * t + column) + holder, 4 + k / 8, k % 2);
                d[2 * row + column] += left * right;
            }
}

// Instructions of tiles.cuh --------------------------------------------------------------------------------------------------

// Lane 8 i + r points at row r of matrix i; this lane gets of each matrix two neighbours of row (or column) lane / 4.
inline void load_matrices(unsigned (&words)[4], const void* row, bool transposed = false) {
    shim::Words mine{};
    std::memcpy(&mine, &row, sizeof row);
    const shim::Words* all = shim::exchange(~0u, mine);
    const unsigned g = shim::lane() / 4, t = shim::lane() % 4;
    for (unsigned i = 0; i < 4; ++i) {
        words[i] = 0;
        for (unsigned j = 0; j < 2; ++j) {
            const unsigned at_row = transposed ? 2 * t + j : g, at_column = transposed ? g : 2 * t + j;
            const unsigned short* from;
            std::memcpy(&from, &all[8 * i + at_row], sizeof from);
            words[i] |= static_cast<unsigned>(from[at_column]) << (16 * j);
        }
    }
}

inline void load_matrices_transposed(unsigned (&words)[4], const void* row) { load_matrices(words, row, true); }

template <class T>
T from_float(float x);  // of common.cuh

template <class SCALAR>
unsigned word_of(float low, float high, SCALAR) {
    return from_float<SCALAR>(low).bits | static_cast<unsigned>(from_float<SCALAR>(high).bits) << 16;
}

inline float power_of_two(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
