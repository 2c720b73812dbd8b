// Attention of counterfactual tokens: queries against the clean run's keys strictly before a position, then against their own.
//
//   out[v, b, q * width + o, h] = softmax of scale * scores over keys[b, : positions[b, q]], own_k[v, b, q * width ..= + o]
//                                 times their values
//
// for windows of `width` tokens, of which the one at offset o sees its window up to itself; width 1 is the single token. With a
// `reach`, a token sees only its last `reach` positions, its own among them. A sink of each query head takes a share of the softmax
// and has no value.
//
// The queries that share a key/value head, of all variants and of all heads of its group, are the rows of one matrix, in the order
// of their positions. A block takes ROWS of them through the keys before the last of their positions, KEYS at a time: one reading
// of a tile of keys and values serves all its rows (FlashAttention-2, Dao 2023, arXiv 2307.08691). Values are copied while scores
// are computed, the next keys while values are mixed. Scores, sums and own weights are float32. Tensor cores want the weights of
// the prefix rounded to SCALAR; these are normalised by the sum of what they were rounded to.
//
// SCALAR: type; HEAD_WIDTH, VALUE_WIDTH; ROWS: a multiple of 64; KEYS: a multiple of 16; SHARED_BYTES.
// block = 128, grid = (rows / ROWS, kv_heads, batch); shared: tiles of queries, keys and values; the table of rows.
#include "tiles.cuh"

constexpr int WARP_ROWS = ROWS / 4, ROW_TILES = WARP_ROWS / 16, KEY_TILES = KEYS / 8;
constexpr int HEAD_COLUMNS = round_up(HEAD_WIDTH, 16), VALUE_COLUMNS = round_up(VALUE_WIDTH, 16);
constexpr int HEAD_PITCH = pitch_of<SCALAR>(HEAD_COLUMNS), VALUE_PITCH = pitch_of<SCALAR>(VALUE_COLUMNS);
constexpr int VALUE_TILES = VALUE_COLUMNS / 8;
static_assert(ROWS % 64 == 0 && KEYS % 16 == 0, "four warps of whole tiles");
constexpr float LOG2_E = 1.4426950408889634f;

// Which query a row is: rows are [query, variant, offset, member of the group].
struct Row {
    long long window;  // index of its window's first token in [variant, batch, token]
    int offset, member;
    int first, prefix;  // the clean keys that it sees: from the first, before the last
};
static_assert(SHARED_BYTES == ((ROWS + KEYS) * HEAD_PITCH + KEYS * VALUE_PITCH) * sizeof(SCALAR) + ROWS * sizeof(Row),
              "what launches.py reserves");

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

extern "C" __global__ void __launch_bounds__(128, 2) prefix_attention(
    SCALAR* __restrict__ out,                 // [variants, batch, queries * width, kv_heads * group, VALUE_WIDTH]
    const SCALAR* __restrict__ q,             // [variants, batch, queries * width, kv_heads * group, HEAD_WIDTH]
    const SCALAR* __restrict__ own_k,         // [variants, batch, queries * width, kv_heads, HEAD_WIDTH]
    const SCALAR* __restrict__ own_v,         // [variants, batch, queries * width, kv_heads, VALUE_WIDTH]
    const SCALAR* __restrict__ keys,          // [batch, n_keys, kv_heads, HEAD_WIDTH]
    const SCALAR* __restrict__ values,        // [batch, n_keys, kv_heads, VALUE_WIDTH]
    const long long* __restrict__ positions,  // [batch, queries]; null: query i is at position i
    const float* __restrict__ sink,           // [kv_heads * group]; null: none
    long long variants,
    long long batch,
    long long queries,
    long long width,
    long long kv_heads,
    long long group,
    long long n_keys,
    long long reach,  // 0: everything
    float scale) {
    DYNAMIC_SHARED(SCALAR, query_tile);
    SCALAR* const key_tile = query_tile + ROWS * HEAD_PITCH;
    SCALAR* const value_tile = key_tile + KEYS * HEAD_PITCH;
    Row* const table = reinterpret_cast<Row*>(value_tile + KEYS * VALUE_PITCH);

    const long long kv_head = blockIdx.y, b = blockIdx.z;
    const long long rows_per_query = variants * width * group, all_rows = queries * rows_per_query;
    const long long first_row = static_cast<long long>(gridDim.x - 1 - blockIdx.x) * ROWS;  // the longest prefixes first
    const int rows = static_cast<int>(all_rows - first_row < ROWS ? all_rows - first_row : ROWS);
    const auto position_of = [&](long long query) { return positions ? positions[b * queries + query] : query; };
    const auto prefix_of = [&](long long query) {
        const long long at = position_of(query);
        return static_cast<int>(at < n_keys ? at : n_keys);
    };
    const auto first_of = [&](long long query, long long offset) {
        const long long first = position_of(query) + offset + 1 - reach;
        return static_cast<int>(reach == 0 || first < 0 ? 0 : first < n_keys ? first : n_keys);
    };
    for (int i = threadIdx.x; i < ROWS; i += blockDim.x) {
        const long long row = first_row + (i < rows ? i : rows - 1);  // those without a row of their own keep the last company
        const long long query = row / rows_per_query, variant = row / (width * group) % variants;
        const long long window = ((variant * batch + b) * queries + query) * width;
        const int offset = static_cast<int>(row / group % width);
        table[i] = {window, offset, static_cast<int>(row % group), first_of(query, offset), prefix_of(query)};
    }
    int shortest = static_cast<int>(n_keys), longest = 0;
    int lowest = static_cast<int>(n_keys), highest = 0;  // first keys
    for (long long query = first_row / rows_per_query; query <= (first_row + rows - 1) / rows_per_query; ++query) {
        const int prefix = prefix_of(query);
        shortest = prefix < shortest ? prefix : shortest;
        longest = prefix > longest ? prefix : longest;
        const int first = first_of(query, 0), last_first = first_of(query, width - 1);
        lowest = first < lowest ? first : lowest;
        highest = last_first > highest ? last_first : highest;
    }
    __syncthreads();
    const auto head_of = [&](int i) {  // index into [variant, batch, token, head]
        return ((table[i].window + table[i].offset) * kv_heads + kv_head) * group + table[i].member;
    };

    const SCALAR* const first_key = keys + (b * n_keys * kv_heads + kv_head) * HEAD_WIDTH;
    const SCALAR* const first_value = values + (b * n_keys * kv_heads + kv_head) * VALUE_WIDTH;
    const unsigned heads = static_cast<unsigned>(kv_heads);  // from key to key; 64 bits would cost registers where they are scarce
    const bool key_vectors = whole_vectors(keys, HEAD_WIDTH), value_vectors = whole_vectors(values, VALUE_WIDTH);
    const auto start_keys = [&](int start) {
        const auto key_of = [&](int i) {
            return start + i < longest ? first_key + static_cast<unsigned long long>(start + i) * (heads * HEAD_WIDTH) : nullptr;
        };
        load_tile<KEYS, HEAD_COLUMNS>(key_tile, key_of, 0, HEAD_WIDTH, key_vectors);
        async_copies_end_group();
    };
    const auto start_values = [&](int start) {
        const auto value_of = [&](int i) {
            return start + i < longest ? first_value + static_cast<unsigned long long>(start + i) * (heads * VALUE_WIDTH) : nullptr;
        };
        load_tile<KEYS, VALUE_COLUMNS>(value_tile, value_of, 0, VALUE_WIDTH, value_vectors);
        async_copies_end_group();
    };
    const auto query_of = [&](int i) { return q + head_of(i) * HEAD_WIDTH; };
    load_tile<ROWS, HEAD_COLUMNS>(query_tile, query_of, 0, HEAD_WIDTH, whole_vectors(q, HEAD_WIDTH));
    start_keys(lowest);

    const int lane = lane_index(), g = lane / 4, t = lane % 4, warp_row = threadIdx.x / 32 * WARP_ROWS;
    const float log2_scale = scale * LOG2_E;  // the hardware has powers of two
    float top[ROW_TILES][2], sum[ROW_TILES][2];  // of a row's weights: sum * 2^top, this lane's part of them
    float mixed[ROW_TILES][VALUE_TILES][4] = {};
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            top[m][h] = -infinity();
            sum[m][h] = 0.0f;
        }
    }
    for (int start = lowest; start < longest; start += KEYS) {
        async_copies_done<0>();
        __syncthreads();  // keys are there, and no warp still reads the last values
        start_values(start);
        float scores[ROW_TILES][KEY_TILES][4] = {};
        multiply_rows<HEAD_COLUMNS>(scores, query_tile + warp_row * HEAD_PITCH, key_tile);
        async_copies_done<0>();
        __syncthreads();  // values are there, and no warp still reads the keys
        if (start + KEYS < longest) start_keys(start + KEYS);

        const bool all_see_all = start + KEYS <= shortest && highest <= start;
        const Row* const lane_rows = table + warp_row + g;
        LeftOperand<SCALAR, ROW_TILES, KEY_TILES> weights;
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int visible = all_see_all ? KEYS : lane_rows[m * 16 + h * 8].prefix - start;
                const int hidden = all_see_all ? 0 : lane_rows[m * 16 + h * 8].first - start;
                float highest = -infinity();
#pragma unroll
                for (int i = 0; i < KEY_TILES * 2; ++i) {
                    float& score = scores[m][i / 2][2 * h + i % 2];
                    const int key = i / 2 * 8 + 2 * t + i % 2;
                    score = key < visible && key >= hidden ? score * log2_scale : -infinity();
                    highest = fmaxf(highest, score);
                }
                const float new_top = fmaxf(top[m][h], row_max(highest));
                const float base = new_top == -infinity() ? 0.0f : new_top;  // a row may have seen nothing yet
                const float shrink = power_of_two(top[m][h] - base);
                top[m][h] = new_top;
                sum[m][h] *= shrink;
#pragma unroll
                for (int n = 0; n < KEY_TILES; ++n) {
                    const float left = power_of_two(scores[m][n][2 * h] - base);
                    const float right = power_of_two(scores[m][n][2 * h + 1] - base);
                    sum[m][h] += weights.set(m, n, h, left, right);
                }
#pragma unroll
                for (int i = 0; i < VALUE_TILES * 2; ++i) mixed[m][i / 2][2 * h + i % 2] *= shrink;
            }
        }
        multiply(mixed, weights, value_tile);
    }

    async_copies_done<0>();
    __syncthreads();  // without a prefix, nobody has waited for the queries yet
    const bool own_key_vectors = whole_vectors(own_k, HEAD_WIDTH);
    const bool own_value_vectors = whole_vectors(own_v, VALUE_WIDTH), out_vectors = whole_vectors(out, VALUE_WIDTH);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int i = warp_row + m * 16 + h * 8 + g;
            const Row row = table[i];
            float total = row_sum(sum[m][h]);
            for (int offset = 0; offset < width; ++offset) {
                const bool seen = offset <= row.offset && (reach == 0 || offset > row.offset - reach);
                const long long own = (row.window + offset) * kv_heads + kv_head;
                const float score = dot(query_tile + i * HEAD_PITCH, own_k + own * HEAD_WIDTH, own_key_vectors) * log2_scale;
                if (!seen) continue;
                const float new_top = fmaxf(top[m][h], score);
                const float shrink = power_of_two(top[m][h] - new_top), weight = power_of_two(score - new_top);
                top[m][h] = new_top;
                total = total * shrink + weight;
#pragma unroll
                for (int n = 0; n < VALUE_TILES; ++n) {
                    const SCALAR* value = own_v + own * VALUE_WIDTH;
                    const Pack<SCALAR, 2> two = load_two(value, n * 8 + 2 * t, VALUE_WIDTH, own_value_vectors);
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        float& mix = mixed[m][n][2 * h + j];
                        mix = mix * shrink + weight * to_float(two.values[j]);
                    }
                }
            }
            if (sink) total += power_of_two(sink[kv_head * group + row.member] * LOG2_E - top[m][h]);
            if (i >= rows) continue;
            SCALAR* const target = out + head_of(i) * VALUE_WIDTH;
#pragma unroll
            for (int n = 0; n < VALUE_TILES; ++n) {
                Pack<SCALAR, 2> two;
#pragma unroll
                for (int j = 0; j < 2; ++j) two.values[j] = from_float<SCALAR>(mixed[m][n][2 * h + j] / total);
                store_two(target, n * 8 + 2 * t, VALUE_WIDTH, two, out_vectors);
            }
        }
    }
}
