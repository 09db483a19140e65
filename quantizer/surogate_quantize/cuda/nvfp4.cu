// NVFP4: a thread takes 16 values of a row. With 2-D scales the 16 lanes of half a warp take the rows of a tile.

constexpr u32 WIDTH = 16;

__constant__ int offsets[] = NVFP4_OFFSETS; // of the codes of scales, as search tries them

struct Nvfp4 {
    i64 rows;
    u32 across;        // blocks of a row
    u32 metric;        // of Four-Over-Six
    u32 four_over_six; // whether each block takes the better of two scales
    float global_scale;
    u8* codes;
    u8* scale;
};

static_assert(sizeof(Nvfp4) == NVFP4_BYTES, "as Python packs it");

struct Scale {
    u32 code;
    float step; // scale / global scale; 1 where the block is all zero
};

__device__ __forceinline__ Scale block_scale(float amax, float global_scale, float stretch) {
    float value, wanted = multiply(stretch, multiply(divide(amax, E2M1_MAX), global_scale));
    u32 code = round_e4m3(bits_of(wanted), value);
    value = code == 0 ? E4M3_MIN : value;
    code = code == 0 ? 1 : code;
    bool empty = bits_of(amax) == 0;
    return {empty ? 0 : code, empty ? 1.0f : divide(value, global_scale)};
}

// Index and value of the E2M1 magnitude nearest to y, ties to even, at most 6. Adding 2^22 rounds to a
// multiple of 0.5, 2^23 to one of 1, 2^24 to one of 2; with 2 and 8 more the index stands in the last three bits.
__device__ __forceinline__ u32 round_magnitude(float y, float& value) {
    y = less(E2M1_MAX, y) ? E2M1_MAX : y;
    float magic = less(y, 2.0f) ? 0x1p22f : 0x1p23f + 2.0f;
    magic = less(y, 4.0f) ? magic : 0x1p24f + 8.0f;
    float total = add(y, magic);
    value = subtract(total, magic);
    return bits_of(total) & 7u;
}

__device__ __forceinline__ u32 round_e2m1(float magnitude, float step, float& value) {
    return round_magnitude(divide(magnitude, step), value);
}

// The error of a tile with this step. The format fixes the order of the sum, row after row: each lane adds its row to what
// the lane before it came to, and all wait for each other.
template <u32 HEIGHT>
__device__ __forceinline__ float error_of(const float (&magnitudes)[WIDTH], float step, u32 metric) {
    float terms[WIDTH], largest = 0.0f, total = 0.0f;
#pragma unroll
    for (u32 j = 0; j < WIDTH; ++j) {
        float value;
        round_e2m1(magnitudes[j], step, value);
        float missed = magnitude_of(subtract(multiply(value, step), magnitudes[j]));
        terms[j] = metric == METRIC_MSE ? multiply(missed, missed) : missed;
        largest = larger(largest, missed);
    }
    if (metric == METRIC_ABSMAX) return __uint_as_float(largest_of(bits_of(largest), HEIGHT));
#pragma unroll 1
    for (u32 row = 0; row < HEIGHT; ++row) {
        float sum = total;
#pragma unroll
        for (u32 j = 0; j < WIDTH; ++j) sum = add(sum, terms[j]);
        total = HEIGHT == 1 ? sum : __shfl_sync(ALL, sum, row, HEIGHT);
    }
    return total;
}

// The squared error of a tile with this step, by neighbours: a lane's own values first, then rows.
template <u32 HEIGHT>
__device__ __forceinline__ float squares_of(const float (&magnitudes)[WIDTH], float step) {
    float terms[WIDTH], inverse = divide(1.0f, larger(step, LEAST_NORMAL));
#pragma unroll
    for (u32 j = 0; j < WIDTH; ++j) {
        float value;
        round_magnitude(multiply(magnitudes[j], inverse), value);
        float missed = subtract(multiply(value, step), magnitudes[j]);
        terms[j] = multiply(missed, missed);
    }
    return pairwise_sum(pairwise_sum(terms), HEIGHT);
}

__device__ __forceinline__ Scale scale_of(u32 code, const Nvfp4& q) {
    return {code, code ? divide(value_of_e4m3(code), q.global_scale) : 1.0f};
}

// The scale with the least squared error among those around that of rounding to nearest.
template <u32 HEIGHT>
__device__ __forceinline__ Scale search(const float (&magnitudes)[WIDTH], const Nvfp4& q, u32 nearest) {
    u32 best = nearest;
    float error = squares_of<HEIGHT>(magnitudes, scale_of(nearest, q).step);
#pragma unroll 1
    for (u32 k = HEIGHT == 1 ? 0 : NVFP4_CLIPPING; k < sizeof(offsets) / sizeof(*offsets); ++k) {
        bool here = nearest && (k < NVFP4_NORMAL || nearest < E4M3_LEAST_NORMAL);
        u32 code = here ? (u32)min(max((int)nearest + offsets[k], 1), 126) : best;
        float missed = squares_of<HEIGHT>(magnitudes, scale_of(code, q).step);
        bool better = less(missed, error);
        best = better ? code : best;
        error = better ? missed : error;
    }
    return scale_of(best, q);
}

template <class Source, u32 HEIGHT, bool SEARCH>
__device__ __forceinline__ void quantize(const typename Source::Word* raw, const Nvfp4& q, const Ledger& ledger) {
    u64 own = (u64)blockIdx.x * THREADS + threadIdx.x;
    u32 tile = (u32)(own / HEIGHT);
    i64 row = (i64)(tile / q.across) * HEIGHT + own % HEIGHT, block = row * q.across + tile % q.across;
    u32 words[WIDTH] = {}, peak = 0;
    if (row < q.rows) load(raw + block * WIDTH, words);
    float magnitudes[WIDTH];
    u32 signs = 0;
#pragma unroll
    for (u32 j = 0; j < WIDTH; ++j) {
        peak = max(peak, words[j] & Source::MAGNITUDE);
        magnitudes[j] = Source::widen(words[j] & Source::MAGNITUDE);
        signs |= (u32)(words[j] > Source::MAGNITUDE) << j;
    }
    float amax = Source::widen(largest_of(peak, HEIGHT));
    Scale scale = block_scale(amax, q.global_scale, 1.0f);
    if (SEARCH) {
        scale = search<HEIGHT>(magnitudes, q, scale.code);
    } else if (q.four_over_six) {
        Scale four = block_scale(amax, q.global_scale, 1.5f);
        float error_6 = error_of<HEIGHT>(magnitudes, scale.step, q.metric);
        float error_4 = error_of<HEIGHT>(magnitudes, four.step, q.metric);
        if (less(error_4, error_6)) scale = four;
    }
    u32 packed[2] = {};
    Sums sums;
#pragma unroll
    for (u32 j = 0; j < WIDTH; ++j) {
        float value;
        u32 code = round_e2m1(magnitudes[j], scale.step, value) | (signs >> j & 1u) << 3;
        packed[j / 8] |= code << (4 * (j % 8)); // the first of two: low nibble
        sums.count(subtract(multiply(value, scale.step), magnitudes[j]), magnitudes[j], ledger.unit);
    }
    if (row < q.rows) {
        bool empty = bits_of(amax) == 0;
        ((uint2*)q.codes)[block] = empty ? make_uint2(0, 0) : make_uint2(packed[0], packed[1]);
        q.scale[block] = (u8)scale.code;
    }
    settle(sums, ledger);
}

#define NVFP4(Source)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        nvfp4_1d_##Source(const Source::Word* raw, const __grid_constant__ Nvfp4 q,                                    \
                          const __grid_constant__ Ledger ledger) {                                                     \
        quantize<Source, 1, false>(raw, q, ledger);                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        nvfp4_2d_##Source(const Source::Word* raw, const __grid_constant__ Nvfp4 q,                                    \
                          const __grid_constant__ Ledger ledger) {                                                     \
        quantize<Source, WIDTH, false>(raw, q, ledger);                                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        nvfp4_1d_search_##Source(const Source::Word* raw, const __grid_constant__ Nvfp4 q,                             \
                                 const __grid_constant__ Ledger ledger) {                                              \
        quantize<Source, 1, true>(raw, q, ledger);                                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        nvfp4_2d_search_##Source(const Source::Word* raw, const __grid_constant__ Nvfp4 q,                             \
                                 const __grid_constant__ Ledger ledger) {                                              \
        quantize<Source, WIDTH, true>(raw, q, ledger);                                                                 \
    }
FOR_EVERY_SOURCE(NVFP4)
