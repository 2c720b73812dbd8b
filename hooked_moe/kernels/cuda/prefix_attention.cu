// Attention of counterfactual tokens: queries against the clean run's keys strictly before a position, then against their own.
//
//   out[v, b, q * width + o, h] = softmax of scale * scores over keys[b, : positions[b, q]], own_k[v, b, q * width ..= + o]
//                                 times their values
//
// for windows of `width` tokens, of which the one at offset o sees its window up to itself; width 1 is the single token.
//
// The queries that share a key/value head, of all variants and of all heads of its group, are the rows of one matrix, in the order
// of their positions. A block takes ROWS of them through the keys before the last of their positions, KEYS at a time: one reading
// of a tile of keys and values serves all its rows (FlashAttention-2, Dao 2023, arXiv 2307.08691). Values are copied while scores
// are computed, the next keys while values are mixed. Scores, sums and own weights are float32. Tensor cores want the weights of
// the prefix rounded to SCALAR; these are normalised by the sum of what they were rounded to.
//
// SCALAR: type; HEAD_WIDTH, VALUE_WIDTH; ROWS: a multiple of 64; KEYS: a multiple of 16; SHARED_BYTES.
// block = 128, grid = (rows / ROWS, kv_heads, batch); shared: tiles of queries, keys and values.
#include "tiles.cuh"

constexpr int WARP_ROWS = ROWS / 4, ROW_TILES = WARP_ROWS / 16, KEY_TILES = KEYS / 8;
constexpr int HEAD_COLUMNS = round_up(HEAD_WIDTH, 16), VALUE_COLUMNS = round_up(VALUE_WIDTH, 16);
constexpr int HEAD_PITCH = pitch_of<SCALAR>(HEAD_COLUMNS), VALUE_PITCH = pitch_of<SCALAR>(VALUE_COLUMNS);
constexpr int VALUE_TILES = VALUE_COLUMNS / 8;
static_assert(ROWS % 64 == 0 && KEYS % 16 == 0, "four warps of whole tiles");
static_assert(SHARED_BYTES == ((ROWS + KEYS) * HEAD_PITCH + KEYS * VALUE_PITCH) * sizeof(SCALAR), "what launches.py reserves");
constexpr float LOG2_E = 1.4426950408889634f;

// Where things are of a row: rows are [query, variant, offset, member of the group].
struct Layout {
    long long variants, batch, queries, width, kv_heads, group;

    __device__ __forceinline__ long long rows() const { return queries * variants * width * group; }
    __device__ __forceinline__ long long query(long long row) const { return row / (variants * width * group); }
    __device__ __forceinline__ long long offset(long long row) const { return row / group % width; }

    // Index into [variant, batch, token, kv_head], of the token at an offset of the row's window.
    __device__ __forceinline__ long long own(long long row, long long b, long long kv_head, long long offset) const {
        const long long variant = row / (width * group) % variants;
        return (((variant * batch + b) * queries + query(row)) * width + offset) * kv_heads + kv_head;
    }

    // Index into [variant, batch, token, head].
    __device__ __forceinline__ long long head(long long row, long long b, long long kv_head) const {
        return own(row, b, kv_head, offset(row)) * group + row % group;
    }
};

// The dot product of a query in shared and a key in global memory, by the four lanes of a row together.
__device__ __forceinline__ float dot(const SCALAR* query, const SCALAR* key, bool vectors) {
    constexpr int VECTOR = 16 / sizeof(SCALAR);
    const int t = lane_index() % 4;
    float sum = 0.0f;
    if (vectors) {
        for (int at = t * VECTOR; at < HEAD_WIDTH; at += 4 * VECTOR) {
            const Pack<SCALAR, VECTOR> a = load<VECTOR>(query + at), b = load<VECTOR>(key + at);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) sum += to_float(a.values[i]) * to_float(b.values[i]);
        }
    } else {
        for (int at = t; at < HEAD_WIDTH; at += 4) sum += to_float(query[at]) * to_float(key[at]);
    }
    return row_sum(sum);
}

extern "C" __global__ void __launch_bounds__(128) prefix_attention(
    SCALAR* __restrict__ out,                 // [variants, batch, queries * width, kv_heads * group, VALUE_WIDTH]
    const SCALAR* __restrict__ q,             // [variants, batch, queries * width, kv_heads * group, HEAD_WIDTH]
    const SCALAR* __restrict__ own_k,         // [variants, batch, queries * width, kv_heads, HEAD_WIDTH]
    const SCALAR* __restrict__ own_v,         // [variants, batch, queries * width, kv_heads, VALUE_WIDTH]
    const SCALAR* __restrict__ keys,          // [batch, n_keys, kv_heads, HEAD_WIDTH]
    const SCALAR* __restrict__ values,        // [batch, n_keys, kv_heads, VALUE_WIDTH]
    const long long* __restrict__ positions,  // [batch, queries]; null: query i is at position i
    long long variants,
    long long batch,
    long long queries,
    long long width,
    long long kv_heads,
    long long group,
    long long n_keys,
    float scale) {
    DYNAMIC_SHARED(SCALAR, query_tile);
    SCALAR* const key_tile = query_tile + ROWS * HEAD_PITCH;
    SCALAR* const value_tile = key_tile + KEYS * HEAD_PITCH;

    const Layout layout = {variants, batch, queries, width, kv_heads, group};
    const long long kv_head = blockIdx.y, b = blockIdx.z;
    const long long first_row = static_cast<long long>(gridDim.x - 1 - blockIdx.x) * ROWS;  // the longest prefixes first
    const int rows = static_cast<int>(layout.rows() - first_row < ROWS ? layout.rows() - first_row : ROWS);
    const auto prefix_of = [&](long long query) {
        const long long at = positions ? positions[b * queries + query] : query;
        return static_cast<int>(at < n_keys ? at : n_keys);
    };
    int shortest = static_cast<int>(n_keys), longest = 0;
    for (long long query = layout.query(first_row); query <= layout.query(first_row + rows - 1); ++query) {
        const int prefix = prefix_of(query);
        shortest = prefix < shortest ? prefix : shortest;
        longest = prefix > longest ? prefix : longest;
    }

    const bool key_vectors = whole_vectors(keys, HEAD_WIDTH), value_vectors = whole_vectors(values, VALUE_WIDTH);
    const auto start_keys = [&](int start) {
        const auto row_of = [&](int i) {
            return start + i < longest ? keys + ((b * n_keys + start + i) * kv_heads + kv_head) * HEAD_WIDTH : nullptr;
        };
        load_tile<KEYS, HEAD_COLUMNS>(key_tile, row_of, 0, HEAD_WIDTH, key_vectors);
        async_copies_end_group();
    };
    const auto start_values = [&](int start) {
        const auto row_of = [&](int i) {
            return start + i < longest ? values + ((b * n_keys + start + i) * kv_heads + kv_head) * VALUE_WIDTH : nullptr;
        };
        load_tile<KEYS, VALUE_COLUMNS>(value_tile, row_of, 0, VALUE_WIDTH, value_vectors);
        async_copies_end_group();
    };
    const auto query_of = [&](int i) { return i < rows ? q + layout.head(first_row + i, b, kv_head) * HEAD_WIDTH : nullptr; };
    load_tile<ROWS, HEAD_COLUMNS>(query_tile, query_of, 0, HEAD_WIDTH, whole_vectors(q, HEAD_WIDTH));
    start_keys(0);

    const int lane = lane_index(), g = lane / 4, t = lane % 4, warp_row = threadIdx.x / 32 * WARP_ROWS;
    const float log2_scale = scale * LOG2_E;  // the hardware has powers of two
    int prefix[ROW_TILES][2];
    float top[ROW_TILES][2], sum[ROW_TILES][2];  // of a row's weights: sum * 2^top, this lane's part of them
    float mixed[ROW_TILES][VALUE_TILES][4] = {};
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int i = warp_row + m * 16 + h * 8 + g;
            prefix[m][h] = i < rows ? prefix_of(layout.query(first_row + i)) : 0;
            top[m][h] = -infinity();
            sum[m][h] = 0.0f;
        }
    }
    for (int start = 0; start < longest; start += KEYS) {
        async_copies_done<0>();
        __syncthreads();  // keys are there, and no warp still reads the last values
        start_values(start);
        float scores[ROW_TILES][KEY_TILES][4] = {};
        multiply_rows<HEAD_COLUMNS>(scores, query_tile + warp_row * HEAD_PITCH, key_tile);
        async_copies_done<0>();
        __syncthreads();  // values are there, and no warp still reads the keys
        if (start + KEYS < longest) start_keys(start + KEYS);

        const bool all_see_all = start + KEYS <= shortest;
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float highest = -infinity();
#pragma unroll
                for (int i = 0; i < KEY_TILES * 2; ++i) {
                    float& score = scores[m][i / 2][2 * h + i % 2];
                    const bool seen = all_see_all || start + i / 2 * 8 + 2 * t + i % 2 < prefix[m][h];
                    score = seen ? score * log2_scale : -infinity();
                    highest = fmaxf(highest, score);
                }
                const float new_top = fmaxf(top[m][h], row_max(highest));
                const float base = new_top == -infinity() ? 0.0f : new_top;  // a row may have seen nothing yet
                const float shrink = exp2f(top[m][h] - base);
                top[m][h] = new_top;
                sum[m][h] *= shrink;
#pragma unroll
                for (int i = 0; i < KEY_TILES * 2; ++i) {
                    float& weight = scores[m][i / 2][2 * h + i % 2];
                    weight = as_operand(exp2f(weight - base), SCALAR{});
                    sum[m][h] += weight;
                }
#pragma unroll
                for (int i = 0; i < VALUE_TILES * 2; ++i) mixed[m][i / 2][2 * h + i % 2] *= shrink;
            }
        }
        multiply_weights(mixed, scores, value_tile);
    }

    async_copies_done<0>();
    __syncthreads();  // without a prefix, nobody has waited for the queries yet
    const bool own_vectors = whole_vectors(own_k, HEAD_WIDTH);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int i = warp_row + m * 16 + h * 8 + g;
            const long long row = first_row + (i < rows ? i : rows - 1);  // lanes without a row keep the others company
            float all = row_sum(sum[m][h]);
            for (long long offset = 0; offset < width; ++offset) {
                const bool seen = offset <= layout.offset(row);
                const long long own = layout.own(row, b, kv_head, offset);
                const float score = dot(query_tile + i * HEAD_PITCH, own_k + own * HEAD_WIDTH, own_vectors) * log2_scale;
                const float new_top = seen ? fmaxf(top[m][h], score) : top[m][h];
                const float shrink = exp2f(top[m][h] - new_top), weight = seen ? exp2f(score - new_top) : 0.0f;
                top[m][h] = new_top;
                all = all * shrink + weight;
                if (!seen) continue;
#pragma unroll
                for (int n = 0; n < VALUE_TILES * 2; ++n) {
                    const int column = n / 2 * 8 + 2 * t + n % 2;
                    float& mix = mixed[m][n / 2][2 * h + n % 2];
                    if (column < VALUE_WIDTH) mix = mix * shrink + weight * to_float(own_v[own * VALUE_WIDTH + column]);
                }
            }
            if (i >= rows) continue;
#pragma unroll
            for (int n = 0; n < VALUE_TILES * 2; ++n) {
                const int column = n / 2 * 8 + 2 * t + n % 2;
                if (column < VALUE_WIDTH) {
                    const float mix = mixed[m][n / 2][2 * h + n % 2];
                    out[layout.head(row, b, kv_head) * VALUE_WIDTH + column] = from_float<SCALAR>(mix / all);
                }
            }
        }
    }
}
