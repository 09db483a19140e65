// NF4: a thread block takes a group of 256 blocks, and reads it twice: for the absmax of each block, then for its codes.

constexpr u32 GROUP = BLOCKS_PER_GROUP;
static_assert(GROUP == THREADS, "a thread for the absmax of each block");

__constant__ float codebook[16] = NF4_CODEBOOK;
__constant__ float midpoints[15] = NF4_MIDPOINTS;

constexpr u32 MULTIPLIERS = 16, BINS = 256;
__constant__ float multipliers[MULTIPLIERS] = NF4_MULTIPLIERS;
__device__ const int4 bin_errors[BINS][MULTIPLIERS / 4] = NF4_BIN_ERRORS;

struct Nf4 {
    i64 count;    // values of the weight
    u32 block;    // values that share an absmax
    u32 doubled;  // whether absmax is quantized in its turn
    u8* codes;
    void* absmax; // u8 if doubled, else float
    float* scale; // one a group, if doubled
    float* offset;
};

static_assert(sizeof(Nf4) == NF4_BYTES, "as Python packs it");

// CHUNK values from raw + 8 * chunk on; zeros beyond the weight's end.
template <class Source>
__device__ __forceinline__ void load_chunk(const typename Source::Word* raw, u32 chunk, u32 size, u32 (&words)[CHUNK]) {
    if (chunk * CHUNK + CHUNK <= size) {
        load(raw + chunk * CHUNK, words);
        return;
    }
#pragma unroll
    for (u32 j = 0; j < CHUNK; ++j) words[j] = chunk * CHUNK + j < size ? raw[chunk * CHUNK + j] : 0;
}

// What double quantization makes of the group's absmax.
struct Grid {
    bool doubled;
    float scale;
    float offset;
};

// The legal value next to an absmax, and what is stored for it.
__device__ __forceinline__ float legal(const Grid& grid, float absmax, u32& stored) {
    if (!grid.doubled) return absmax;
    bool flat = bits_of(grid.scale) == 0;
    int limit = flat ? 0 : 127;
    int step = min(max(nearest(divide(subtract(absmax, grid.offset), flat ? 1.0f : grid.scale)), -limit), limit);
    stored = (u32)(step + 128);
    return larger(add(multiply((float)step, grid.scale), grid.offset), 0.0f);
}

// Each thread brings the absmax of its block.
__device__ __forceinline__ Grid grid_of(const Nf4& q, float absmax, u32 blocks) {
    if (!q.doubled) return {false, 0.0f, 0.0f};
    bool mine = threadIdx.x < blocks;
    float high = __uint_as_float(largest_of_block(mine ? bits_of(absmax) : 0));
    float low = __uint_as_float(~largest_of_block(mine ? ~bits_of(absmax) : 0));
    return {true, divide(subtract(high, low), 254.0f), add(multiply(low, 0.5f), multiply(high, 0.5f))};
}

// The code is the number of midpoints below v.
__device__ __forceinline__ u32 round_nf4(float v, float& value) {
    u32 code = 0;
    value = codebook[0];
#pragma unroll
    for (u32 i = 0; i < 15; ++i) {
        bool above = less(midpoints[i], v);
        code += above;
        value = above ? codebook[i + 1] : value;
    }
    return code;
}

// What to multiply a block's values by. 0 where absmax is not positive: every value then gets code 7.
__device__ __forceinline__ float inverse_of(float absmax) {
    return less(0.0f, absmax) ? divide(1.0f, larger(absmax, ABSMAX_FLOOR)) : 0.0f;
}

// The squared error of a block, rounded to nearest under an absmax; `lanes` neighbours have its values.
__device__ __forceinline__ float squares_of(const float (&x)[CHUNK], float absmax, u32 lanes) {
    float terms[CHUNK], factor = inverse_of(absmax);
#pragma unroll
    for (u32 j = 0; j < CHUNK; ++j) {
        float value;
        round_nf4(multiply(x[j], factor), value);
        float missed = subtract(multiply(value, absmax), x[j]);
        terms[j] = multiply(missed, missed);
    }
    return pairwise_sum(pairwise_sum(terms), lanes);
}

// The multiplier of a block's own absmax that the bins of its values say is best.
__device__ __forceinline__ u32 best_multiplier(const float (&x)[CHUNK], float own, u32 lanes) {
    float factor = divide(1.0f, larger(own, ABSMAX_FLOOR));
    int bins[CHUNK], least = 0x7FFFFFFF;
#pragma unroll
    for (u32 j = 0; j < CHUNK; ++j) {
        float place = add(multiply(multiply(x[j], factor), (float)(BINS / 2)), (float)(BINS / 2));
        bins[j] = min(toward_zero(place), (int)BINS - 1);
    }
    u32 best = 0;
#pragma unroll 1
    for (u32 m = 0; m < MULTIPLIERS; m += 4) {
        int sums[4] = {};
#pragma unroll
        for (u32 j = 0; j < CHUNK; ++j) {
            int4 four = bin_errors[bins[j]][m / 4];
            sums[0] += four.x;
            sums[1] += four.y;
            sums[2] += four.z;
            sums[3] += four.w;
        }
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            for (u32 step = 1; step < lanes; step *= 2) sums[i] += __shfl_xor_sync(ALL, sums[i], step);
            bool better = sums[i] < least;
            best = better ? m + i : best;
            least = better ? sums[i] : least;
        }
    }
    return best;
}

struct Block {
    float absmax; // as the reader restores it
    u32 stored;
    float error;
};

__device__ __forceinline__ void take_better(const float (&x)[CHUNK], const Grid& grid, float wanted, bool where,
                                            u32 lanes, Block& block) {
    Block other = {0.0f, 0, 0.0f};
    other.absmax = legal(grid, wanted, other.stored);
    other.error = squares_of(x, other.absmax, lanes);
    block = where && less(other.error, block.error) ? other : block;
}

// The absmax under which the error of the lane's block is least.
__device__ __forceinline__ Block search(const float (&x)[CHUNK], const Grid& grid, float own, u32 lanes) {
    Block block = {0.0f, 0, 0.0f};
    block.absmax = legal(grid, own, block.stored);
    block.error = squares_of(x, block.absmax, lanes);
    bool coarse = less(own, multiply(grid.scale, NF4_COARSE));
    take_better(x, grid, multiply(multipliers[best_multiplier(x, own, lanes)], own), !coarse, lanes, block);
    if (!__any_sync(ALL, coarse && bits_of(own) != 0)) return block;
#pragma unroll 1
    for (u32 m = 0; m < MULTIPLIERS; ++m) take_better(x, grid, multiply(multipliers[m], own), coarse, lanes, block);
    return block;
}

template <class Source, bool SEARCH>
__device__ __forceinline__ void quantize(const typename Source::Word* raw, const Nf4& q, const Ledger& ledger) {
    __shared__ u32 largest[GROUP], stored[GROUP];
    __shared__ float absmax[GROUP], inverse[GROUP];
    i64 first = (i64)blockIdx.x * GROUP * q.block;
    u32 size = (u32)min(q.count - first, (i64)GROUP * q.block), blocks = (size + q.block - 1) / q.block;
    raw += first;
    largest[threadIdx.x] = 0;
    __syncthreads();
    u32 words[CHUNK];
    for (u32 chunk = threadIdx.x; chunk * CHUNK < size; chunk += THREADS) {
        load_chunk<Source>(raw, chunk, size, words);
        u32 peak = 0;
#pragma unroll
        for (u32 j = 0; j < CHUNK; ++j) peak = max(peak, words[j] & Source::MAGNITUDE);
        atomicMax(largest + chunk * CHUNK / q.block, peak);
    }
    __syncthreads();
    float own = Source::widen(largest[threadIdx.x]);
    Grid grid = grid_of(q, own, blocks);
    u32 code = 0;
    absmax[threadIdx.x] = legal(grid, own, code);
    stored[threadIdx.x] = code;
    __syncthreads();
    if (SEARCH) {
        // Every lane of a warp has to take part, those beyond the end with zeros.
        for (u32 start = 0; start * CHUNK < size; start += THREADS) {
            u32 chunk = start + threadIdx.x, place = chunk * CHUNK / q.block;
            load_chunk<Source>(raw, chunk, size, words);
            float x[CHUNK];
#pragma unroll
            for (u32 j = 0; j < CHUNK; ++j) x[j] = Source::widen(words[j]);
            Block block = search(x, grid, Source::widen(largest[place]), q.block / CHUNK);
            if (place < blocks && chunk % (q.block / CHUNK) == 0) {
                absmax[place] = block.absmax;
                stored[place] = block.stored;
            }
        }
        __syncthreads();
    }
    inverse[threadIdx.x] = inverse_of(absmax[threadIdx.x]);
    if (threadIdx.x < blocks) {
        i64 place = (i64)blockIdx.x * GROUP + threadIdx.x;
        if (q.doubled)
            ((u8*)q.absmax)[place] = (u8)stored[threadIdx.x];
        else
            ((float*)q.absmax)[place] = absmax[threadIdx.x];
    }
    if (q.doubled && threadIdx.x == 0) {
        q.scale[blockIdx.x] = grid.scale;
        q.offset[blockIdx.x] = grid.offset;
    }
    __syncthreads();
    Sums sums;
    for (u32 chunk = threadIdx.x; chunk * CHUNK < size; chunk += THREADS) {
        load_chunk<Source>(raw, chunk, size, words);
        float scale = absmax[chunk * CHUNK / q.block], factor = inverse[chunk * CHUNK / q.block];
        u32 packed = 0;
#pragma unroll
        for (u32 j = 0; j < CHUNK; ++j) {
            float x = Source::widen(words[j]), value;
            packed |= round_nf4(multiply(x, factor), value) << (4 * (j ^ 1u)); // the first of two: high nibble
            sums.count(subtract(multiply(value, scale), x), x, ledger.unit);
        }
        u8* out = q.codes + first / 2 + chunk * (CHUNK / 2);
        if (chunk * CHUNK + CHUNK <= size) {
            *(u32*)out = packed;
            continue;
        }
        for (u32 j = 0; chunk * CHUNK + 2 * j < size; ++j) out[j] = (u8)(packed >> (8 * j));
    }
    settle(sums, ledger);
}

#define NF4(Source)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        nf4_##Source(const Source::Word* raw, const __grid_constant__ Nf4 q,                                           \
                     const __grid_constant__ Ledger ledger) {                                                          \
        quantize<Source, false>(raw, q, ledger);                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        nf4_search_##Source(const Source::Word* raw, const __grid_constant__ Nf4 q,                                    \
                            const __grid_constant__ Ledger ledger) {                                                   \
        quantize<Source, true>(raw, q, ledger);                                                                        \
    }
FOR_EVERY_SOURCE(NF4)
