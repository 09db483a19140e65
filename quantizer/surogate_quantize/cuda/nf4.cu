// NF4: a thread block takes a group of 256 blocks, and reads it twice: for the absmax of each block, then for its codes.

constexpr u32 GROUP = BLOCKS_PER_GROUP;
static_assert(GROUP == THREADS, "a thread for the absmax of each block");

__constant__ float codebook[16] = NF4_CODEBOOK;
__constant__ float midpoints[15] = NF4_MIDPOINTS;

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

// Double quantization of the group: a thread brings the absmax of its block, and gets what the reader will restore.
__device__ __forceinline__ float quantize_absmax(const Nf4& q, float absmax, u32 blocks) {
    bool mine = threadIdx.x < blocks;
    float high = __uint_as_float(largest_of_block(mine ? bits_of(absmax) : 0));
    float low = __uint_as_float(~largest_of_block(mine ? ~bits_of(absmax) : 0));
    float offset = add(multiply(low, 0.5f), multiply(high, 0.5f)), scale = divide(subtract(high, low), 254.0f);
    bool flat = bits_of(scale) == 0;
    int limit = flat ? 0 : 127;
    int step = min(max(nearest(divide(subtract(absmax, offset), flat ? 1.0f : scale)), -limit), limit);
    if (mine) ((u8*)q.absmax)[(i64)blockIdx.x * GROUP + threadIdx.x] = (u8)(step + 128);
    if (threadIdx.x == 0) {
        q.scale[blockIdx.x] = scale;
        q.offset[blockIdx.x] = offset;
    }
    return larger(add(multiply((float)step, scale), offset), 0.0f);
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

template <class Source>
__device__ __forceinline__ void quantize(const typename Source::Word* raw, const Nf4& q, const Ledger& ledger) {
    __shared__ u32 largest[GROUP];
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
    if (q.doubled)
        own = quantize_absmax(q, own, blocks);
    else if (threadIdx.x < blocks)
        ((float*)q.absmax)[(i64)blockIdx.x * GROUP + threadIdx.x] = own;
    absmax[threadIdx.x] = own;
    // 0 where absmax is: every value then gets code 7.
    inverse[threadIdx.x] = bits_of(own) == 0 ? 0.0f : divide(1.0f, larger(own, ABSMAX_FLOOR));
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
        nf4_##Source(const Source::Word* raw, const __grid_constant__ Nf4 q, const __grid_constant__ Ledger ledger) {  \
        quantize<Source>(raw, q, ledger);                                                                              \
    }
FOR_EVERY_SOURCE(NF4)
