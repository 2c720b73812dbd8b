// A score of every expert, the k with the highest score plus bias, and their routing weights as applied, highest score first.
//
// LANES neighbouring lanes share a token and hold PER_LANE of its scores each, in registers, so that a warp serves 32 / LANES tokens
// and little of it is spent on talking. All that is compared is one whole number per expert, its key:
// [ in the token's groups : 1 ][ kept : 1 ][ score plus bias, as a number that orders as it does : 32 ][ experts - index : 30 ]
// Keys are distinct, so the next expert is the largest key under the last one; of equals the lowest index comes first. NaN counts as
// the highest score, as for torch.topk.
//
// SCALAR: type of the weights; LANES, PER_LANE; VECTOR: logits per access.
// block = (LANES, tokens), grid = tokens; shared, by tokens of the block: long long [slots], unsigned long long [2][groups],
// float [slots].
#include "common.cuh"

constexpr unsigned long long IN_GROUPS = 1ull << 63, KEPT = 1ull << 62;
constexpr int CHOICE_SHIFT = 30;

// A float as a whole number that orders as it does; NaN is the highest of all.
__device__ __forceinline__ unsigned ordered_bits(float x) {
    if (!(x == x)) return 0xffffffffu;
    const unsigned bits = __float_as_uint(x + 0.0f);  // -0 is 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered_bits(unsigned bits) {
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

__device__ __forceinline__ unsigned long long largest_of_lanes(unsigned long long key) {
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) {
        const unsigned long long theirs = __shfl_xor_sync(~0u, key, other);
        if (theirs > key) key = theirs;
    }
    return key;
}

// What an expert adds to the score of its group: one that is not kept, as little as there is.
__device__ __forceinline__ float in_group(unsigned long long key) {
    return key & KEPT ? from_ordered_bits(static_cast<unsigned>(key >> CHOICE_SHIFT)) : -3.402823466e38f;
}

extern "C" __global__ void route(
    long long* __restrict__ indices,    // [tokens, slots]: highest score first
    SCALAR* __restrict__ weights,       // [tokens, slots]
    const float* __restrict__ logits,   // [tokens, experts]
    const bool* __restrict__ keep,      // [tokens, experts]: a removed expert has no score and is chosen last; null: all are kept
    const float* __restrict__ bias,     // [experts]: of the choice, not of the weights; null: none
    long long tokens,
    long long experts,
    long long slots,
    long long groups,                   // of equal size; 1: none
    long long groups_per_token,
    long long sigmoid,                  // whether scores are sigmoids; else they are a softmax
    long long top2,                     // whether a group's score is the sum of its two best; else that of the best
    long long renormalize,              // whether the weights are rescaled to sum to one
    float scaling) {
    DYNAMIC_SHARED(long long, chosen);
    unsigned long long* const all_groups = reinterpret_cast<unsigned long long*>(chosen + blockDim.y * slots);
    unsigned long long* const best_of_group = all_groups + threadIdx.y * 2 * groups;  // [groups], and the second best, [groups]
    float* const chosen_weights = reinterpret_cast<float*>(all_groups + blockDim.y * 2 * groups);

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
    if (sigmoid) {
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) p[i] = 1.0f / (1.0f + expf(-p[i]));
    } else {
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
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) p[i] /= sum;
    }

    unsigned long long keys[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int expert = expert_at(i);
        const bool real = active && expert < experts, kept = !real || !keep || keep[token * experts + expert];
        if (!kept) p[i] *= 0.0f;  // NaN stays
        const unsigned choice = ordered_bits(bias && real ? p[i] + bias[expert] : p[i]);
        keys[i] = IN_GROUPS | (kept ? KEPT : 0) | static_cast<unsigned long long>(kept ? choice : 0) << CHOICE_SHIFT |
                  static_cast<unsigned>(experts - expert);
        if (!real) keys[i] = 0;
    }

    if (groups > 1) {  // only the groups with the best scores may be chosen from
        const int size = static_cast<int>(experts / groups);
        unsigned long long* const second = best_of_group + groups;
        for (int group = lane; group < 2 * groups; group += LANES) best_of_group[group] = 0;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
            if (keys[i]) atomicMax(&best_of_group[expert_at(i) / size], keys[i]);
        __syncwarp();
        if (top2) {
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i)
                if (keys[i] && keys[i] != best_of_group[expert_at(i) / size]) atomicMax(&second[expert_at(i) / size], keys[i]);
        }
        __syncwarp();
        const auto group_key = [&](int group) {
            const float score = in_group(best_of_group[group]) + (top2 ? in_group(second[group]) : 0.0f);
            return static_cast<unsigned long long>(ordered_bits(score)) << 32 | static_cast<unsigned>(groups - group);
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
            if (keys[i] && group_key(expert_at(i) / size) < last) keys[i] &= ~IN_GROUPS;
    }

    unsigned long long last = ~0ull;
    for (int slot = 0; slot < slots; ++slot) {
        unsigned long long next = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
            if (keys[i] < last && keys[i] > next) next = keys[i];
        last = largest_of_lanes(next);
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            if (keys[i] == last && active) {
                chosen[threadIdx.y * slots + slot] = expert_at(i);
                chosen_weights[threadIdx.y * slots + slot] = p[i];
            }
        }
    }
    __syncwarp();
    float total = 0.0f;
    if (active)
        for (int slot = 0; slot < slots; ++slot) total += chosen_weights[threadIdx.y * slots + slot];
    // As torch's definition has it; both give zero if all were removed.
    total = sigmoid ? total + 1e-20f : fmaxf(total, 1.17549435e-38f);
    __syncwarp();  // all have read
    if (active) {
        for (int slot = lane; slot < slots; slot += LANES) {
            float& weight = chosen_weights[threadIdx.y * slots + slot];
            if (renormalize) weight /= total;
            weight *= scaling;
        }
    }

    // A block's tokens are neighbours, so its threads write side by side.
    __syncthreads();
    const int count = static_cast<int>((tokens - first_token < blockDim.y ? tokens - first_token : blockDim.y) * slots);
    for (int i = threadIdx.y * LANES + threadIdx.x; i < count; i += LANES * blockDim.y) {
        int place = i;
        if (bias) {  // they stand in the order of their choice
            const int first = static_cast<int>(i / slots * slots);
            const unsigned own = ordered_bits(chosen_weights[i]);
            place = first;
            for (int j = first; j < first + slots; ++j) {
                const unsigned other = ordered_bits(chosen_weights[j]);
                place += other > own || (other == own && j < i);
            }
        }
        indices[first_token * slots + place] = chosen[i];
        weights[first_token * slots + place] = from_float<SCALAR>(chosen_weights[i]);
    }
}
