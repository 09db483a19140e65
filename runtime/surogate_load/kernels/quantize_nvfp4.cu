// NVFP4 quantization of what a step computes: the amax, then codes and scales. A thread rounds a block of 16 values, or
// a tile of 16 such rows, so that errors are summed in the order of the elements.

constexpr int THREADS = FP4_THREADS;

struct QuantizeNvfp4 {
    const void* x;        // [rows, columns]
    u8* codes;            // [rows, columns / 2]
    u8* scale;            // [rows, columns / 16]
    float* global_scale;  // [1]
    float* partial;       // [FP4_BLOCKS], amax by block of the first kernel
    const i64* seed;      // [1], or null
    i64* offset;          // [1], or null; the first kernel counts it up
    i64* noise;           // [1], the offset before that
    i64 rows;
    i64 columns;
    float reach;          // the largest scale times the largest code
    u32 power_of_two;
    u32 four_over_six;    // of tiles
    u32 metric;
};

static_assert(sizeof(QuantizeNvfp4) == QUANTIZE_NVFP4_BYTES, "as Python packs it");

__device__ __forceinline__ u32 largest_of_block(u32 mine) {
    __shared__ u32 of_warp[THREADS / 32];
    mine = largest_of_warp(mine);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = threadIdx.x < THREADS / 32 ? of_warp[threadIdx.x] : 0;
    return threadIdx.x < 32 ? largest_of_warp(mine) : 0;
}

template <class Read>
__device__ __forceinline__ void find_amax(const QuantizeNvfp4& q) {
    i64 vectors = q.rows * q.columns / 8;
    u32 largest = 0;
#pragma unroll 4
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < vectors; i += (i64)FP4_BLOCKS * THREADS) {
        float v[8];
        Read::eight((const typename Read::Code*)q.x + 8 * i, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) largest = max(largest, bits_of(v[j]) & 0x7FFFFFFFu);
    }
    largest = largest_of_block(largest);
    if (threadIdx.x) return;
    q.partial[blockIdx.x] = __uint_as_float(largest);
    if (blockIdx.x == 0 && q.offset) *q.offset = (*q.noise = *q.offset) + 1;
}

__device__ __forceinline__ float find_global_scale(const QuantizeNvfp4& q) {
    __shared__ float shared;
    u32 largest = 0;
    for (int i = threadIdx.x; i < FP4_BLOCKS; i += THREADS) largest = max(largest, bits_of(q.partial[i]));
    largest = largest_of_block(largest);
    if (threadIdx.x == 0) {
        float g = divide(q.reach, __uint_as_float(largest));
        if (g > LARGEST_GLOBAL_SCALE) g = LARGEST_GLOBAL_SCALE;
        if (q.power_of_two) g = __uint_as_float(bits_of(g) & 0x7F800000u);
        shared = largest == 0 ? 1.0f : g;
        if (blockIdx.x == 0) *q.global_scale = shared;
    }
    __syncthreads();
    return shared;
}

__device__ __forceinline__ void write_block(const QuantizeNvfp4& q, i64 i, const Values& x, u32 scale,
                                            const u32 (&words)[2]) {
    q.scale[i] = (u8)scale;
    // A block without magnitude has no signs.
    ((uint2*)q.codes)[i] = make_uint2(words[0] | (scale ? x.signs[0] : 0), words[1] | (scale ? x.signs[1] : 0));
}

template <class Read>
struct Nearest {
    __device__ static i64 count(const QuantizeNvfp4& q) { return q.rows * q.columns / BLOCK; }

    __device__ static void quantize(const QuantizeNvfp4& q, i64 i, float g) {
        Values x = read_block<Read>(q.x, i);
        u32 largest = x.largest(), words[2];
        Scale six = scale_for(sixth_of(largest, g), largest, g);
        round_block<NoError>(x, six.step, words);
        write_block(q, i, x, six.code, words);
    }
};

template <class Read, class Metric>
struct FourOverSix : Nearest<Read> {
    __device__ static void quantize(const QuantizeNvfp4& q, i64 i, float g) {
        Values x = read_block<Read>(q.x, i);
        u32 largest = x.largest(), words_6[2], words_4[2];
        float sixth = sixth_of(largest, g);
        Scale six = scale_for(sixth, largest, g);
        Scale four = scale_for(multiply(1.5f, sixth), largest, g);
        float error_6 = round_block<Metric>(x, six.step, words_6);
        float error_4 = round_block<Metric>(x, four.step, words_4);
        bool smaller_error = bits_of(error_4) < bits_of(error_6);
        u32 words[2] = {smaller_error ? words_4[0] : words_6[0], smaller_error ? words_4[1] : words_6[1]};
        write_block(q, i, x, smaller_error ? four.code : six.code, words);
    }
};

template <class Read, class Metric>
struct Tile {
    __device__ static i64 count(const QuantizeNvfp4& q) { return (q.rows + BLOCK - 1) / BLOCK * (q.columns / BLOCK); }

    __device__ static void quantize(const QuantizeNvfp4& q, i64 i, float g) {
        i64 across = q.columns / BLOCK, row = i / across * BLOCK;
        i64 first = row * across + i % across, end = first + min(q.rows - row, (i64)BLOCK) * across;
        u32 largest = 0, words[2];
#pragma unroll 1
        for (i64 b = first; b < end; b += across) largest = max(largest, read_block<Read>(q.x, b).largest());
        float sixth = sixth_of(largest, g), error_6 = 0.0f;
        Scale chosen = scale_for(sixth, largest, g), tried = chosen;
#pragma unroll 1
        for (int candidate = 0; q.four_over_six && candidate < 2; ++candidate) {
            float error = 0.0f;
#pragma unroll 1
            for (i64 b = first; b < end; b += across)
                error = round_block<Metric>(read_block<Read>(q.x, b), tried.step, words, error);
            if (candidate == 0) error_6 = error, tried = scale_for(multiply(1.5f, sixth), largest, g);
            else if (bits_of(error) < bits_of(error_6)) chosen = tried;
        }
#pragma unroll 1
        for (i64 b = first; b < end; b += across) {
            Values x = read_block<Read>(q.x, b);
            round_block<NoError>(x, chosen.step, words);
            write_block(q, b, x, chosen.code, words);
        }
    }
};

template <class Read>
struct Stochastic : Nearest<Read> {
    __device__ static void quantize(const QuantizeNvfp4& q, i64 i, float g) {
        Values x = read_block<Read>(q.x, i);
        u32 largest = x.largest(), words[2];
        Scale up = scale_for<true>(sixth_of(largest, g), largest, g);
#pragma unroll
        for (int four = 0; four < BLOCK / 4; ++four) {
            u32 noise[4], &word = words[four / 2];
            philox((u64)(BLOCK / 4 * i + four), (u64)*q.noise, (u64)*q.seed, noise);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float normalized = quotient(x.v[4 * four + j], up.step);
                word = __funnelshift_r(word, random_code(normalized, noise[j]), 4);
            }
        }
        write_block(q, i, x, up.code, words);
    }
};

template <class Rounding>
__device__ __forceinline__ void quantize(const QuantizeNvfp4& q) {
    float g = find_global_scale(q);
    i64 count = Rounding::count(q), stride = (i64)gridDim.x * THREADS;
#pragma unroll 1
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < count; i += stride) Rounding::quantize(q, i, g);
}

template <template <class, class> class Rounding, class Read>
__device__ __forceinline__ void quantize_by_metric(const QuantizeNvfp4& q) {
    if (q.metric == METRIC_MSE) quantize<Rounding<Read, Mse>>(q);
    else if (q.metric == METRIC_L1) quantize<Rounding<Read, L1>>(q);
    else quantize<Rounding<Read, Absmax>>(q);
}

#define KERNEL(name) extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ QuantizeNvfp4 q)

#define FP4_KERNELS(name, Read)                                                                                        \
    KERNEL(fp4_amax_##name) { find_amax<Read>(q); }                                                                    \
    KERNEL(fp4_nearest_##name) { quantize<Nearest<Read>>(q); }                                                         \
    KERNEL(fp4_four_over_six_##name) { quantize_by_metric<FourOverSix, Read>(q); }                                     \
    KERNEL(fp4_tiles_##name) { quantize_by_metric<Tile, Read>(q); }                                                    \
    KERNEL(fp4_stochastic_##name) { quantize<Stochastic<Read>>(q); }

FP4_KERNELS(float32, ReadFloat32)
FP4_KERNELS(bfloat16, ReadBfloat16)
FP4_KERNELS(float16, ReadFloat16)
