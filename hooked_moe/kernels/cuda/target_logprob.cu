// What -log softmax(weight hidden[r])[target[r]] takes, without logits in memory: of each row the log-sum-exp of its logits over spans
// of the vocabulary, and the target's logit. The loss is log_sums.logsumexp(0) - target_logits, in nats.
//
// A block takes ROWS rows of hidden over one span, COLUMNS logits at a time, in registers. Each lane keeps the running maximum and
// sum of exponentials of its own logits; lanes and warps merge once, at the end. Which block comes first changes nothing.
//
// hidden is [PARTS, rows, depth]. Where it is wider than the weights, its rows are given as sums of PARTS scalars of the weights'
// type: their products are exact in float32, in which everything is summed.
//
// SCALAR: type; PARTS; ROWS, COLUMNS: multiples of 32; STEP: depths of a tile; STAGES: tiles on their way or in use; SHARED_BYTES.
// block = 128, grid = (rows / ROWS, spans); shared: STAGES tiles.
#include "tiles.cuh"

constexpr int WARPS_DOWN = 2, WARPS_ACROSS = 2;
constexpr int TILES_M = ROWS / WARPS_DOWN / 16, TILES_N = COLUMNS / WARPS_ACROSS / 8;  // of a warp
constexpr int PITCH = pitch_of<SCALAR>(STEP);
constexpr int STAGE = (PARTS * ROWS + COLUMNS) * PITCH;
static_assert(ROWS % 32 == 0 && COLUMNS % 32 == 0, "four warps of whole tiles");
static_assert(SHARED_BYTES == STAGES * STAGE * sizeof(SCALAR), "what launches.py reserves");

// sum * exp(top), of some exponentials; of none, top is -infinity.
struct LogSum {
    float top, sum;

    __device__ __forceinline__ void add(LogSum other) {
        const float new_top = fmaxf(top, other.top);
        const float base = new_top == -infinity() ? 0.0f : new_top;
        sum = sum * expf(top - base) + other.sum * expf(other.top - base);
        top = new_top;
    }
};

extern "C" __global__ void __launch_bounds__(128) target_logprob(
    float* __restrict__ log_sums,           // [spans, rows]
    float* __restrict__ target_logits,      // [rows], left alone where the target is not in the vocabulary
    const SCALAR* __restrict__ hidden,      // [PARTS, rows, depth]
    const SCALAR* __restrict__ weight,      // [vocabulary, depth]
    const long long* __restrict__ targets,  // [rows]
    long long rows,
    long long vocabulary,
    long long depth,
    long long span) {
    DYNAMIC_SHARED(SCALAR, stages);
    const long long first_row = static_cast<long long>(blockIdx.x) * ROWS;
    const long long first_column = static_cast<long long>(blockIdx.y) * span;
    const int columns = static_cast<int>(vocabulary - first_column < span ? vocabulary - first_column : span);
    const int lane = lane_index(), g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
    const int warp_row = warp / WARPS_ACROSS * TILES_M * 16, warp_column = warp % WARPS_ACROSS * TILES_N * 8;
    const bool hidden_vectors = whole_vectors(hidden, depth), weight_vectors = whole_vectors(weight, depth);

    const int steps = static_cast<int>((depth + STEP - 1) / STEP);
    int next_column = 0, next_depth = 0;  // of the tile to copy next: along the depth, then on to the next columns
    const auto start_copies = [&](int stage) {
        if (next_column < columns) {
            SCALAR* tile = stages + stage * STAGE;
            for (int part = 0; part < PARTS; ++part, tile += ROWS * PITCH) {
                const auto row_of = [&](int i) {
                    return first_row + i < rows ? hidden + (part * rows + first_row + i) * depth : nullptr;
                };
                load_tile<ROWS, STEP>(tile, row_of, next_depth, depth, hidden_vectors);
            }
            const auto column_of = [&](int i) {
                return next_column + i < columns ? weight + (first_column + next_column + i) * depth : nullptr;
            };
            load_tile<COLUMNS, STEP>(tile, column_of, next_depth, depth, weight_vectors);
            next_depth += STEP;
            if (next_depth >= depth) {
                next_depth = 0;
                next_column += COLUMNS;
            }
        }
        async_copies_end_group();
    };
    for (int i = 0; i < STAGES - 1; ++i) start_copies(i);

    LogSum seen[TILES_M][2];
    int wanted[TILES_M][2];  // column of the target in this span
#pragma unroll
    for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const long long row = first_row + warp_row + m * 16 + h * 8 + g;
            const long long target = row < rows ? targets[row] - first_column : -1;
            wanted[m][h] = target >= 0 && target < columns ? static_cast<int>(target) : -1;
            seen[m][h] = {-infinity(), 0.0f};
        }
    }

    int stage = 0;
    for (int column = 0; column < columns; column += COLUMNS) {
        float logits[TILES_M][TILES_N][4] = {};
        for (int step = 0; step < steps; ++step) {
            async_copies_done<STAGES - 2>();
            __syncthreads();  // this stage is there, and no warp still reads the one before
            start_copies(stage == 0 ? STAGES - 1 : stage - 1);
            const SCALAR* const left = stages + stage * STAGE + warp_row * PITCH;
            const SCALAR* const right = stages + stage * STAGE + (PARTS * ROWS + warp_column) * PITCH;
            stage = stage + 1 < STAGES ? stage + 1 : 0;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) multiply_rows<STEP>(logits, left + part * ROWS * PITCH, right);
        }
#pragma unroll
        for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                LogSum here = {-infinity(), 0.0f};
#pragma unroll
                for (int i = 0; i < TILES_N * 2; ++i) {
                    float& logit = logits[m][i / 2][2 * h + i % 2];
                    const int at = column + warp_column + i / 2 * 8 + 2 * t + i % 2;
                    if (at >= columns) logit = -infinity();
                    if (at == wanted[m][h]) target_logits[first_row + warp_row + m * 16 + h * 8 + g] = logit;
                    here.top = fmaxf(here.top, logit);
                }
                const float base = here.top == -infinity() ? 0.0f : here.top;
#pragma unroll
                for (int i = 0; i < TILES_N * 2; ++i) here.sum += expf(logits[m][i / 2][2 * h + i % 2] - base);
                seen[m][h].add(here);
            }
        }
    }

    async_copies_done<0>();
    __syncthreads();  // the last tile has been read, and gives its place to what warps have seen of each row
    LogSum* const by_warp = reinterpret_cast<LogSum*>(stages);  // [WARPS_ACROSS, ROWS]
#pragma unroll
    for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            for (int other = 1; other < 4; other *= 2) {
                seen[m][h].add({__shfl_xor_sync(0xffffffffu, seen[m][h].top, other),
                                __shfl_xor_sync(0xffffffffu, seen[m][h].sum, other)});
            }
            if (t == 0) by_warp[warp % WARPS_ACROSS * ROWS + warp_row + m * 16 + h * 8 + g] = seen[m][h];
        }
    }
    __syncthreads();
    for (int r = threadIdx.x; r < ROWS && first_row + r < rows; r += blockDim.x) {
        LogSum all = by_warp[r];
        for (int across = 1; across < WARPS_ACROSS; ++across) all.add(by_warp[across * ROWS + r]);
        log_sums[blockIdx.y * rows + first_row + r] = all.top + logf(all.sum);
    }
}
