// out = silu(gate) * up, where a row of `both` is [gate, up]; in float32, rounded once.
//
// SCALAR; VECTOR: scalars per access. block = (columns / VECTOR, rows), grid = (rows, columns).
#include "common.cuh"

extern "C" __global__ void swiglu(
    SCALAR* __restrict__ out,         // [rows, width]
    const SCALAR* __restrict__ both,  // [rows, 2 width], rows at `both_stride`
    long long rows,
    long long width,
    long long both_stride) {
    const long long row = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
    const long long column = (static_cast<long long>(blockIdx.y) * blockDim.x + threadIdx.x) * VECTOR;
    if (row >= rows || column >= width) return;
    const SCALAR* const at = both + row * both_stride + column;
    const Pack<SCALAR, VECTOR> gate = load<VECTOR>(at), up = load<VECTOR>(at + width);
    Pack<SCALAR, VECTOR> result;
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) {
        const float x = to_float(gate.values[c]);
        result.values[c] = from_float<SCALAR>(x / (1.0f + expf(-x)) * to_float(up.values[c]));
    }
    store(out + row * width + column, result);
}
