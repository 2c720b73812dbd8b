// out[place[t, j]] = x[t]: each token's row once for every expert it goes to, sorted by expert.
//
// Written from the tokens' side: a row of x is read once and written k times, where gathering for each row of out would read it
// k times. `place` names every row of out once.
//
// SCALAR; VECTOR: scalars per access. block = (columns / VECTOR, tokens), grid = (tokens, columns).
#include "common.cuh"

extern "C" __global__ void gather_rows(
    SCALAR* __restrict__ out,             // [tokens * slots, width]
    const SCALAR* __restrict__ x,         // [tokens, width], rows at `x_stride`
    const long long* __restrict__ place,  // [tokens, slots]
    long long tokens,
    long long slots,
    long long width,
    long long x_stride) {
    const long long token = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
    const long long column = (static_cast<long long>(blockIdx.y) * blockDim.x + threadIdx.x) * VECTOR;
    if (token >= tokens || column >= width) return;
    const Pack<SCALAR, VECTOR> pack = load<VECTOR>(x + token * x_stride + column);
    for (long long j = 0; j < slots; ++j) store(out + place[token * slots + j] * width + column, pack);
}
