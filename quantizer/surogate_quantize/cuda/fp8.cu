// FP8: a warp takes SEGMENT columns of a row, TILE_SIDE at a time: so many always share a scale.

constexpr u32 SEGMENT = 512;
static_assert(SEGMENT * WARPS == FP8_VALUES, "as Python counts thread blocks");

struct Fp8 {
    i64 columns;
    u32 segments;       // of a row
    u32 warps;          // that have work
    u32 height;         // rows that share a scale
    u32 across;         // scales of a row
    u32 narrow;         // whether TILE_SIDE columns share a scale, else all of a row
    u32 unused;
    u32* amax;          // magnitude bits, by scale
    const float* scale;
    u8* codes;
};

static_assert(sizeof(Fp8) == FP8_BYTES, "as Python packs it");

// Calls `work(index of a value, index of its scale, number of the 32 columns)` for the lane's values of each tile, and
// `done(index of the scale)` after each tile.
template <class Work, class Done>
__device__ __forceinline__ void for_tiles(const Fp8& q, Work work, Done done) {
    u32 warp = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp >= q.warps) return;
    u32 row = warp / q.segments;
    i64 first = (i64)(warp % q.segments) * SEGMENT, last = min(first + SEGMENT, q.columns);
    for (i64 column = first; column < last; column += TILE_SIDE) {
        i64 scale = (i64)(row / q.height) * q.across + (q.narrow ? column / TILE_SIDE : 0);
#pragma unroll
        for (u32 i = 0; i < TILE_SIDE; i += 32)
            if (column + i + lane < last) work(row * q.columns + column + i + lane, scale);
        done(scale);
    }
}

template <class Source>
__device__ __forceinline__ void find_amax(const typename Source::Word* raw, const Fp8& q) {
    u32 mine = 0;
    for_tiles(
        q, [&](i64 i, i64) { mine = max(mine, raw[i] & Source::MAGNITUDE); },
        [&](i64 scale) {
            mine = largest_of(mine, 32);
            if (threadIdx.x % 32 == 0) atomicMax(q.amax + scale, mine);
            mine = 0;
        });
}

template <class Source>
__device__ __forceinline__ void quantize(const typename Source::Word* raw, const Fp8& q, const Ledger& ledger) {
    Sums sums;
    for_tiles(
        q,
        [&](i64 i, i64 place) {
            float x = Source::widen(raw[i]), scale = q.scale[place], value;
            u32 bits = bits_of(divide(x, scale));
            q.codes[i] = (u8)(round_e4m3(bits & 0x7FFFFFFFu, value) | (bits >> 24 & 0x80u));
            sums.count(subtract(multiply(value, scale), magnitude_of(x)), x, ledger.unit);
        },
        [](i64) {});
    settle(sums, ledger);
}

// A search for scales: thread blocks take a channel, a thread every THREADS-th column, or warps a tile, a lane 4 columns.
struct Fp8Search {
    i64 rows;
    i64 columns;
    u32 across;         // scales of a row
    u32 count;          // scales
    const float* tried; // [multipliers, scales]
    float* scale;
};

static_assert(sizeof(Fp8Search) == FP8_SEARCH_BYTES, "as Python packs it");
static_assert(CHANNEL_LANES == THREADS, "a thread for each sum");

constexpr u32 EACH = TILE_SIDE / 32;

__device__ __forceinline__ float sum_of_block(float mine) {
    __shared__ float of_warp[WARPS];
    float sum = pairwise_sum(mine, 32), warps[WARPS];
    __syncthreads();
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < WARPS; ++i) warps[i] = of_warp[i];
    return pairwise_sum(warps);
}

__device__ __forceinline__ float square_of(float x, float scale, float inverse) {
    float value;
    round_e4m3(bits_of(multiply(x, inverse)) & 0x7FFFFFFFu, value);
    float missed = subtract(multiply(value, scale), magnitude_of(x));
    return multiply(missed, missed);
}

// The squared error of the thread block's channel.
template <class Source>
__device__ __forceinline__ float channel_error(const typename Source::Word* raw, const Fp8Search& q, float scale) {
    float inverse = divide(1.0f, scale), sum = 0.0f;
    for (i64 column = threadIdx.x; column < q.columns; column += THREADS)
        sum = add(sum, square_of(Source::widen(raw[blockIdx.x * q.columns + column]), scale, inverse));
    return sum_of_block(sum);
}

// The squared error of the warp's tile.
template <class Source>
__device__ __forceinline__ float tile_error(const typename Source::Word* raw, const Fp8Search& q, u32 place,
                                            float scale) {
    i64 top = (i64)(place / q.across) * TILE_SIDE, bottom = min(top + TILE_SIDE, q.rows);
    i64 column = (i64)(place % q.across) * TILE_SIDE + threadIdx.x % 32 * EACH;
    float inverse = divide(1.0f, scale), lanes[EACH] = {};
    for (i64 row = top; row < bottom; ++row)
#pragma unroll
        for (u32 j = 0; j < EACH; ++j)
            if (column + j < q.columns)
                lanes[j] = add(lanes[j], square_of(Source::widen(raw[row * q.columns + column + j]), scale, inverse));
    return pairwise_sum(pairwise_sum(lanes), 32);
}

template <class Source, bool NARROW>
__device__ __forceinline__ void search(const typename Source::Word* raw, const Fp8Search& q) {
    u32 place = NARROW ? blockIdx.x * WARPS + threadIdx.x / 32 : blockIdx.x;
    if (place >= q.count) return;
    float best = q.tried[place], least = __uint_as_float(0x7F800000u);
#pragma unroll 1
    for (u32 m = 0; m < FP8_MULTIPLIERS; ++m) {
        float scale = q.tried[m * q.count + place];
        float error = NARROW ? tile_error<Source>(raw, q, place, scale) : channel_error<Source>(raw, q, scale);
        bool better = less(error, least);
        best = better ? scale : best;
        least = better ? error : least;
    }
    if (threadIdx.x % (NARROW ? 32 : THREADS) == 0) q.scale[place] = best;
}

#define FP8(Source)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        fp8_amax_##Source(const Source::Word* raw, const __grid_constant__ Fp8 q) {                                    \
        find_amax<Source>(raw, q);                                                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        fp8_##Source(const Source::Word* raw, const __grid_constant__ Fp8 q, const __grid_constant__ Ledger ledger) {  \
        quantize<Source>(raw, q, ledger);                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        fp8_search_channels_##Source(const Source::Word* raw, const __grid_constant__ Fp8Search q) {                   \
        search<Source, false>(raw, q);                                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        fp8_search_tiles_##Source(const Source::Word* raw, const __grid_constant__ Fp8Search q) {                      \
        search<Source, true>(raw, q);                                                                                  \
    }
FOR_EVERY_SOURCE(FP8)
