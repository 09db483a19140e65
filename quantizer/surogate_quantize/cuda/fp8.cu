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

#define FP8(Source)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        fp8_amax_##Source(const Source::Word* raw, const __grid_constant__ Fp8 q) {                                    \
        find_amax<Source>(raw, q);                                                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        fp8_##Source(const Source::Word* raw, const __grid_constant__ Fp8 q, const __grid_constant__ Ledger ledger) {  \
        quantize<Source>(raw, q, ledger);                                                                              \
    }
FOR_EVERY_SOURCE(FP8)
