// Softmax over the experts, the k most probable of them, and their routing weights as applied.
//
// LANES neighbouring lanes share a token and hold PER_LANE of its probabilities each, in registers, so that a warp serves
// 32 / LANES tokens and little of it is spent on talking. All that is compared is one whole number per expert, its key:
// [ the expert may be chosen : 1 ][ probability, its bits, which order as it does : 31 ][ number of experts - index : 32 ]
// Keys are distinct, so the next expert is the largest key under the last one; of equal probabilities the lowest index comes
// first. NaN counts as most probable, as for torch.topk.
//
// SCALAR: type of the weights; LANES, PER_LANE; VECTOR: logits per access.
// block = (LANES, tokens), grid = tokens; shared, by tokens of the block: long long [slots], float [slots], int [groups].
#include "common.cuh"

__device__ __forceinline__ unsigned probability_bits(float p) { return p == p ? __float_as_uint(p) : 0x7fffffffu; }

__device__ __forceinline__ unsigned long long largest_of_lanes(unsigned long long key) {
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) {
        const unsigned long long theirs = __shfl_xor_sync(~0u, key, other);
        if (theirs > key) key = theirs;
    }
    return key;
}

extern "C" __global__ void route(
    long long* __restrict__ indices,    // [tokens, slots]: most probable first
    SCALAR* __restrict__ weights,       // [tokens, slots]
    const float* __restrict__ logits,   // [tokens, experts]
    const bool* __restrict__ keep,      // [tokens, experts]: a removed expert has no probability; null: all are kept
    long long tokens,
    long long experts,
    long long slots,
    long long groups,                   // of equal size; 1: none
    long long groups_per_token,
    long long renormalize,              // whether the weights are rescaled to sum to one
    float scaling) {
    DYNAMIC_SHARED(long long, chosen);
    float* const chosen_weights = reinterpret_cast<float*>(chosen + blockDim.y * slots);
    unsigned* const best_of_group = reinterpret_cast<unsigned*>(chosen_weights + blockDim.y * slots) + threadIdx.y * groups;

    const long long first_token = static_cast<long long>(blockIdx.x) * blockDim.y;
    const long long token = first_token + threadIdx.y;
    const bool active = token < tokens;  // lanes without a token go along: shuffles want the whole warp
    const int lane = threadIdx.x;
    const auto expert_at = [&](int i) { return (i / VECTOR * LANES + lane) * VECTOR + i % VECTOR; };

    float p[PER_LANE], highest = -infinity();
#pragma unroll
    for (int i = 0; i < PER_LANE; i += VECTOR) {
        Pack<float, VECTOR> pack;
        const bool real = active && expert_at(i) < experts;
        if (real) pack = load<VECTOR>(logits + token * experts + expert_at(i));
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            p[i + c] = real ? pack.values[c] : -infinity();
            highest = fmaxf(highest, p[i + c]);
        }
    }
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, other));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        p[i] = expert_at(i) < experts ? expf(p[i] - highest) : 0.0f;
        sum += p[i];
    }
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);

    unsigned long long keys[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int expert = expert_at(i);
        const bool real = active && expert < experts;
        p[i] /= sum;
        if (keep && real) p[i] *= to_float(keep[token * experts + expert]);
        keys[i] = 1ull << 63 | static_cast<unsigned long long>(probability_bits(p[i])) << 32 | static_cast<unsigned>(experts - expert);
        if (!real) keys[i] = 0;
    }

    if (groups > 1) {  // only the groups of the most probable experts may be chosen from
        const int size = static_cast<int>(experts / groups);
        for (int group = lane; group < groups; group += LANES) best_of_group[group] = 0;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
            if (keys[i]) atomicMax(&best_of_group[expert_at(i) / size], probability_bits(p[i]));
        __syncwarp();
        const auto group_key = [&](int group) {
            return static_cast<unsigned long long>(best_of_group[group]) << 32 | static_cast<unsigned>(groups - group);
        };
        unsigned long long last = ~0ull;
        for (int rank = 0; rank < groups_per_token; ++rank) {
            unsigned long long next = 0;
            for (int group = lane; group < groups; group += LANES)
                if (group_key(group) < last && group_key(group) > next) next = group_key(group);
            last = largest_of_lanes(next);
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
            if (keys[i] && group_key(expert_at(i) / size) < last) keys[i] &= ~(1ull << 63);
    }

    unsigned long long last = ~0ull;
    float total = 0.0f;
    for (int slot = 0; slot < slots; ++slot) {
        unsigned long long next = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
            if (keys[i] < last && keys[i] > next) next = keys[i];
        last = largest_of_lanes(next);
        const float weight = __uint_as_float(static_cast<unsigned>(last >> 32) & 0x7fffffffu);
        total += weight;
        if (lane == slot % LANES) {
            chosen[threadIdx.y * slots + slot] = experts - static_cast<unsigned>(last);
            chosen_weights[threadIdx.y * slots + slot] = weight;
        }
    }
    __syncwarp();
    for (int slot = lane; slot < slots; slot += LANES) {
        float& weight = chosen_weights[threadIdx.y * slots + slot];
        if (renormalize) weight /= fmaxf(total, 1.17549435e-38f);  // the least normal number: zero if all were removed
        weight *= scaling;
    }

    // A block's tokens are neighbours, so its threads write side by side.
    __syncthreads();
    const int count = static_cast<int>((tokens - first_token < blockDim.y ? tokens - first_token : blockDim.y) * slots);
    for (int i = threadIdx.y * LANES + threadIdx.x; i < count; i += LANES * blockDim.y) {
        indices[first_token * slots + i] = chosen[i];
        weights[first_token * slots + i] = from_float<SCALAR>(chosen_weights[i]);
    }
}
