// out[v, t] = base[t] + sum over slots j of mask[v, t, j] * weights[t, j] * rows[place[t, j]]
//
// Batched per-token expert masking: V variants of a token's weighted sum from one reading of its k expert outputs. A thread
// keeps its columns of these k rows in registers while all variants pass, so what moves is (k + 1 + V) rows a token, most of
// it written, in accesses of VECTOR scalars. The k + 1 loads do not wait for each other.
//
// Sums are in float32, in the order of the slots, and rounded once: the same bits wherever a token or its rows are.
//
// SCALAR, MASK: types; SLOTS: k; VECTOR: scalars per access; TILE: variants whose factors are in shared memory at a time.
// block = (columns / VECTOR, tokens), grid = (tokens, columns); shared: factors[tokens of the block][TILE][SLOTS] float.
#include "common.cuh"

extern "C" __global__ void masked_combine(
    SCALAR* __restrict__ out,              // [variants, tokens, width]
    const SCALAR* __restrict__ rows,       // [any, width]
    const long long* __restrict__ place,   // [tokens, SLOTS]
    const SCALAR* __restrict__ weights,    // [tokens, SLOTS]; null: all 1
    const MASK* __restrict__ mask,         // [variants, tokens, SLOTS], at these strides (0: the same for all)
    const SCALAR* __restrict__ base,       // [tokens, width]; null: all 0
    long long variants,
    long long tokens,
    long long width,
    long long mask_variant_stride,
    long long mask_token_stride) {
    DYNAMIC_SHARED(float, all_factors);
    float* const factors = all_factors + threadIdx.y * (TILE * SLOTS);

    const long long token = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
    const long long column = (static_cast<long long>(blockIdx.y) * blockDim.x + threadIdx.x) * VECTOR;
    const bool in_rows = token < tokens;
    const bool active = in_rows && column < width;

    Pack<SCALAR, VECTOR> y[SLOTS], start;
    if (active) {
#pragma unroll
        for (int j = 0; j < SLOTS; ++j) y[j] = load<VECTOR>(rows + place[token * SLOTS + j] * width + column);
        if (base) start = load<VECTOR>(base + token * width + column);
    }

    for (long long first = 0; first < variants; first += TILE) {
        const int count = variants - first < TILE ? static_cast<int>(variants - first) : TILE;
        __syncthreads();  // all have read the last tile
        for (int i = threadIdx.x; in_rows && i < count * SLOTS; i += blockDim.x) {
            const int j = i % SLOTS;
            const MASK kept = mask[(first + i / SLOTS) * mask_variant_stride + token * mask_token_stride + j];
            factors[i] = to_float(kept) * (weights ? to_float(weights[token * SLOTS + j]) : 1.0f);
        }
        __syncthreads();
        if (!active) continue;
        for (int v = 0; v < count; ++v) {
            float sum[VECTOR];
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) sum[c] = base ? to_float(start.values[c]) : 0.0f;
#pragma unroll
            for (int j = 0; j < SLOTS; ++j) {
                const float factor = factors[v * SLOTS + j];
#pragma unroll
                for (int c = 0; c < VECTOR; ++c) sum[c] += factor * to_float(y[j].values[c]);
            }
            Pack<SCALAR, VECTOR> result;
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) result.values[c] = from_float<SCALAR>(sum[c]);
            store(out + ((first + v) * tokens + token) * width + column, result);
        }
    }
}
