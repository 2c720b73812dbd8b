// Kernels that try the shim itself: each does one thing, right or wrong.
#include "common.cuh"

extern "C" __global__ void convert(SCALAR* to, float* back, const float* from, long long n) {
    for (long long i = threadIdx.x; i < n; i += blockDim.x) {
        to[i] = from_float<SCALAR>(from[i]);
        back[i] = to_float(to[i]);
    }
}

// d = a b, [16, 8] of [16, 16] and [16, 8], by one warp.
extern "C" __global__ void multiply(float* d, const SCALAR* a, const SCALAR* b) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const auto pair = [](SCALAR lower, SCALAR upper) { return static_cast<unsigned>(upper.bits) << 16 | lower.bits; };
    unsigned left[4], right[2];
    for (int i = 0; i < 4; ++i) {
        const int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
        left[i] = pair(a[row * 16 + column], a[row * 16 + column + 1]);
    }
    for (int i = 0; i < 2; ++i) right[i] = pair(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
    float sum[4] = {};
    mma_16x8x16(sum, left, right, SCALAR{});
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// What lanes tell each other, in halves of a warp that take different ways.
extern "C" __global__ void talk(int* out) {
    const int lane = threadIdx.x;
    int sum = lane;
    const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
    if (lane < 16)
        for (int other = 8; other > 0; other /= 2) sum += __shfl_xor_sync(half, sum, other, 16);
    else
        sum = __shfl_sync(half, sum, 3, 16);
    out[lane] = sum;
    out[32 + lane] = __ballot_sync(~0u, lane % 3 == 0);
    out[64 + lane] = __match_any_sync(~0u, lane % 5);
    out[96 + lane] = __shfl_up_sync(~0u, lane, 2);
    out[128 + lane] = __shfl_down_sync(~0u, lane, 2, 8);
}

// Turns a block's numbers round by way of shared memory.
extern "C" __global__ void reverse(int* out, const int* in, long long with_barrier) {
    DYNAMIC_SHARED(int, shared);
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    shared[threadIdx.x] = in[i];
    if (with_barrier) __syncthreads();
    out[i] = shared[blockDim.x - 1 - threadIdx.x];
}

// Copies by way of shared memory, without waiting for its last group if so asked.
extern "C" __global__ void copy(int* out, const int* in, long long pending) {
    DYNAMIC_SHARED(int, shared);
    const int at = 8 * threadIdx.x;
    async_copy_16(shared + at, in + at);
    async_copies_end_group();
    async_copy_16(shared + at + 4, in + at + 4);
    async_copies_end_group();
    if (pending)
        async_copies_done<1>();
    else
        async_copies_done<0>();
    for (int i = 0; i < 8; ++i) out[at + i] = shared[at + i];
}

extern "C" __global__ void barrier_for_some() {
    if (threadIdx.x < 40) __syncthreads();
}

extern "C" __global__ void shuffle_for_some() {
    if (threadIdx.x < 40) __shfl_xor_sync(~0u, 1, 1);
}

extern "C" __global__ void write_past_the_end(int* out, long long n) { out[n] = 1; }

extern "C" __global__ void load_unaligned(float* out, const float* in) { store(out, load<4>(in + 1)); }
