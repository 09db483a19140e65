// What every kernel needs: reading a source's bits, largest magnitudes, rounding to E4M3, and sums of errors in units.

constexpr u32 WARPS = THREADS / 32;
constexpr u32 ALL = 0xFFFFFFFFu;

__device__ __forceinline__ u32 bits_of(float x) { return __float_as_uint(x); }

__device__ __forceinline__ float magnitude_of(float x) { return __uint_as_float(bits_of(x) & 0x7FFFFFFFu); }

// The dtypes of a source: magnitudes order as their bits do, and widening to float32 is exact.
struct F32 {
    typedef u32 Word;
    static constexpr u32 MAGNITUDE = 0x7FFFFFFFu;
    __device__ static float widen(u32 bits) { return __uint_as_float(bits); }
};
struct BF16 {
    typedef u16 Word;
    static constexpr u32 MAGNITUDE = 0x7FFFu;
    __device__ static float widen(u32 bits) { return __uint_as_float(bits << 16); }
};
struct F16 {
    typedef u16 Word;
    static constexpr u32 MAGNITUDE = 0x7FFFu;
    __device__ static float widen(u32 bits) { return from_float16((u16)bits); }
};

// COUNT neighbouring words at an address aligned to 16 bytes.
template <u32 COUNT>
__device__ __forceinline__ void load(const u16* p, u32 (&words)[COUNT]) {
#pragma unroll
    for (u32 i = 0; i < COUNT / 8; ++i) {
        uint4 v = ((const uint4*)p)[i];
        u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            words[8 * i + 2 * j] = pairs[j] & 0xFFFFu;
            words[8 * i + 2 * j + 1] = pairs[j] >> 16;
        }
    }
}
template <u32 COUNT>
__device__ __forceinline__ void load(const u32* p, u32 (&words)[COUNT]) {
#pragma unroll
    for (u32 i = 0; i < COUNT / 4; ++i) {
        uint4 v = ((const uint4*)p)[i];
        words[4 * i] = v.x;
        words[4 * i + 1] = v.y;
        words[4 * i + 2] = v.z;
        words[4 * i + 3] = v.w;
    }
}

// The largest of `width` neighbouring lanes, for each of them.
__device__ __forceinline__ u32 largest_of(u32 mine, u32 width) {
    for (u32 step = width / 2; step; step /= 2) mine = max(mine, __shfl_xor_sync(ALL, mine, step));
    return mine;
}

// The largest of the thread block, for every thread.
__device__ __forceinline__ u32 largest_of_block(u32 mine) {
    __shared__ u32 of_warp[WARPS];
    mine = largest_of(mine, 32);
    __syncthreads();
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < WARPS; ++i) mine = max(mine, of_warp[i]);
    return mine;
}

// The E4M3 magnitude nearest to that of the float32 with these bits (no sign, no NaN), ties to even, up to 448. A float32
// 2^20 times the value's power of two has the step of E4M3 at the value as its last bit: adding it rounds.
__device__ __forceinline__ u32 round_e4m3(u32 bits, float& value) {
    bits = min(bits, bits_of(E4M3_MAX));
    u32 binade = max(bits, bits_of(0x1p-6f)) & 0x7F800000u;
    float magic = __uint_as_float(binade + (20u << 23)), total = add(__uint_as_float(bits), magic);
    value = subtract(total, magic);
    return bits_of(total) - bits_of(magic) + (binade >> 20) - ((127u - 6u) << 3);
}

// The value of an E4M3 code without sign, 0 to 126.
__device__ __forceinline__ float value_of_e4m3(u32 code) {
    return code >= E4M3_LEAST_NORMAL ? __uint_as_float((code + ((127u - 7u) << 3)) << 20) : multiply((float)code, E4M3_MIN);
}

// The sum of what `width` neighbouring lanes bring, for each of them: neighbours are added, then neighbours of those sums.
__device__ __forceinline__ float pairwise_sum(float mine, u32 width) {
    for (u32 step = 1; step < width; step *= 2) mine = add(mine, __shfl_xor_sync(ALL, mine, step));
    return mine;
}

// The same of a thread's own terms, a power of two of them.
__device__ __forceinline__ float pairwise_sum(const float (&terms)[1]) { return terms[0]; }
template <u32 COUNT>
__device__ __forceinline__ float pairwise_sum(const float (&terms)[COUNT]) {
    float sums[COUNT / 2];
#pragma unroll
    for (u32 i = 0; i < COUNT / 2; ++i) sums[i] = add(terms[2 * i], terms[2 * i + 1]);
    return pairwise_sum(sums);
}

// Sums over at most 2^20 values, whose squares in units fit 63 bits: see kernels/errors.py.
struct Totals {
    u64 error;
    u64 square;
    u32 worst;
    u32 unused;
};

static_assert(sizeof(Totals) == TOTALS_BYTES, "as Python reads it");

// Where the thread blocks of a grid add up their errors.
struct Ledger {
    Totals* totals;
    u32 blocks_each; // thread blocks that share one of the totals
    float unit;      // error units in 1
};

static_assert(sizeof(Ledger) == LEDGER_BYTES, "as Python packs it");

struct Sums {
    i64 error = 0;
    i64 square = 0;
    u32 worst = 0;

    __device__ void count(float missed, float x, float unit) {
        i64 units = nearest(multiply(missed, unit)), own = nearest(multiply(x, unit));
        error += units * units;
        square += own * own;
        worst = max(worst, bits_of(magnitude_of(missed)));
    }
};

__device__ __forceinline__ i64 sum_of_warp(i64 mine) {
    for (u32 step = 16; step; step /= 2) mine += __shfl_xor_sync(ALL, mine, step);
    return mine;
}

// Every thread of a block has to come here.
__device__ __forceinline__ void settle(const Sums& sums, const Ledger& ledger) {
    __shared__ i64 errors[WARPS], squares[WARPS];
    i64 error = sum_of_warp(sums.error), square = sum_of_warp(sums.square);
    if (threadIdx.x % 32 == 0) {
        errors[threadIdx.x / 32] = error;
        squares[threadIdx.x / 32] = square;
    }
    u32 worst = largest_of_block(sums.worst);
    if (threadIdx.x != 0) return;
    for (u32 i = 1; i < WARPS; ++i) {
        error += errors[i];
        square += squares[i];
    }
    Totals* total = ledger.totals + blockIdx.x / ledger.blocks_each;
    atomicAdd(&total->error, (u64)error);
    atomicAdd(&total->square, (u64)square);
    atomicMax(&total->worst, worst);
}

// A kernel for every dtype of the source.
#define FOR_EVERY_SOURCE(KERNEL) KERNEL(F32) KERNEL(BF16) KERNEL(F16)
