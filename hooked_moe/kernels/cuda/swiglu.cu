// out = silu(gate) * up, where a row of `both` is [gate, up]; in float32, rounded once. Clamped, it is
// out = (u + 1) g sigmoid(alpha g), where g = min(gate, limit) and u is up between -limit and limit.
//
// SCALAR; VECTOR: scalars per access. block = (columns / VECTOR, rows), grid = (rows, columns).
#include "common.cuh"

template <class Activation>
__device__ __forceinline__ void activate(
    SCALAR* out, const SCALAR* both, long long rows, long long width, long long both_stride, Activation activation) {
    const long long row = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
    const long long column = (static_cast<long long>(blockIdx.y) * blockDim.x + threadIdx.x) * VECTOR;
    if (row >= rows || column >= width) return;
    const SCALAR* const at = both + row * both_stride + column;
    const Pack<SCALAR, VECTOR> gate = load<VECTOR>(at), up = load<VECTOR>(at + width);
    Pack<SCALAR, VECTOR> result;
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) {
        result.values[c] = from_float<SCALAR>(activation(to_float(gate.values[c]), to_float(up.values[c])));
    }
    store(out + row * width + column, result);
}

extern "C" __global__ void swiglu(
    SCALAR* __restrict__ out,         // [rows, width]
    const SCALAR* __restrict__ both,  // [rows, 2 width], rows at `both_stride`
    long long rows,
    long long width,
    long long both_stride) {
    activate(out, both, rows, width, both_stride, [](float gate, float up) { return gate / (1.0f + expf(-gate)) * up; });
}

extern "C" __global__ void clamped_swiglu(
    SCALAR* __restrict__ out,         // [rows, width]
    const SCALAR* __restrict__ both,  // [rows, 2 width], rows at `both_stride`
    long long rows,
    long long width,
    long long both_stride,
    float limit,
    float alpha) {
    activate(out, both, rows, width, both_stride, [=](float gate, float up) {
        const float g = gate > limit ? limit : gate;  // NaN stays
        const float u = up > limit ? limit : up < -limit ? -limit : up;
        return (u + 1.0f) * (g / (1.0f + expf(-alpha * g)));
    });
}
