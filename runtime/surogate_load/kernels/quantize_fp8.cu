// E4M3 and E5M2 quantization with one scale, and the largest magnitude of what is quantized.
//
// A lane works on eight neighbouring values at a time. The scale is the delayed one, or where that is 0, as before the
// first step, this tensor's own: the first kernel finds its amax, and returns at once where nobody asks for it.

constexpr int THREADS = FP8_THREADS;

struct QuantizeFp8 {
    const void* x;
    u8* codes;
    const float* column_scale;  // [columns], or null
    const float* scale;         // [1], the delayed encoding scale; 0: take this tensor's own
    float* current;             // [1], the largest amax since the last step
    float* decode;              // [copies], what the codes are to be multiplied by
    float* partial;             // [FP8_BLOCKS], amax by block of the first kernel
    i64 count;
    i64 columns;
    i64 copies;
    float reach;                // fmax * 2^-margin
    float smallest;
    float largest;
    u32 record;
    u32 aligned;                // eight values at a time
};

static_assert(sizeof(QuantizeFp8) == QUANTIZE_FP8_BYTES, "as Python packs it");

// Magnitudes order as their bits do; a NaN is above all.
__device__ __forceinline__ u32 magnitude(float x) { return bits_of(x) & 0x7FFFFFFFu; }

struct ToE4m3 {
    __device__ static u32 pair(float low, float high) { return to_e4m3_pair(low, high); }
};
struct ToE5m2 {
    __device__ static u32 pair(float low, float high) { return to_e5m2_pair(low, high); }
};

__device__ __forceinline__ u32 largest_of_block(u32 mine) {
    __shared__ u32 of_warp[THREADS / 32];
    mine = largest_of_warp(mine);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = threadIdx.x < THREADS / 32 ? of_warp[threadIdx.x] : 0;
    return threadIdx.x < 32 ? largest_of_warp(mine) : 0;
}

template <class Read>
__device__ __forceinline__ float scaled_one(const QuantizeFp8& q, i64 i) {
    float v = Read::one((const typename Read::Code*)q.x + i);
    return q.column_scale ? multiply(v, q.column_scale[i % q.columns]) : v;
}

// Eight values from 8 * i on; aligned columns are a multiple of eight.
template <class Read>
__device__ __forceinline__ void scaled_eight(const QuantizeFp8& q, i64 i, float (&v)[8]) {
    Read::eight((const typename Read::Code*)q.x + 8 * i, v);
    if (!q.column_scale) return;
    const float* scale = q.column_scale + 8 * i % q.columns;
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = multiply(v[j], scale[j]);
}

template <class Read>
__device__ __forceinline__ void find_amax(const QuantizeFp8& q) {
    if (*q.scale > 0.0f) return;
    i64 vectors = q.aligned ? q.count / 8 : 0, first = (i64)blockIdx.x * THREADS + threadIdx.x;
    u32 largest = 0;
#pragma unroll 1
    for (i64 i = first; i < vectors; i += (i64)FP8_BLOCKS * THREADS) {
        float v[8];
        scaled_eight<Read>(q, i, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) largest = max(largest, magnitude(v[j]));
    }
#pragma unroll 1
    for (i64 i = 8 * vectors + first; i < q.count; i += (i64)FP8_BLOCKS * THREADS)
        largest = max(largest, magnitude(scaled_one<Read>(q, i)));
    largest = largest_of_block(largest);
    if (threadIdx.x == 0) q.partial[blockIdx.x] = __uint_as_float(largest);
}

__device__ __forceinline__ float encoding_scale(const QuantizeFp8& q) {
    __shared__ float shared;
    float scale = *q.scale;
    if (scale > 0.0f) return scale;
    u32 largest = 0;
    for (int i = threadIdx.x; i < FP8_BLOCKS; i += THREADS) largest = max(largest, bits_of(q.partial[i]));
    largest = largest_of_block(largest);
    if (threadIdx.x == 0) {
        bool usable = largest != 0 && largest < 0x7F800000u;
        shared = usable ? smaller(larger(divide(q.reach, __uint_as_float(largest)), q.smallest), q.largest) : 1.0f;
    }
    __syncthreads();
    return shared;
}

template <class Read, class To>
__device__ __forceinline__ void quantize(const QuantizeFp8& q) {
    float scale = encoding_scale(q);
    i64 vectors = q.aligned ? q.count / 8 : 0, stride = (i64)gridDim.x * THREADS;
    i64 first = (i64)blockIdx.x * THREADS + threadIdx.x;
    for (i64 i = first; i < q.copies; i += stride) q.decode[i] = divide(1.0f, scale);
    u32 largest = 0;
#pragma unroll 2
    for (i64 i = first; i < vectors; i += stride) {
        float v[8];
        scaled_eight<Read>(q, i, v);
        u32 pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            largest = max(largest, max(magnitude(v[2 * j]), magnitude(v[2 * j + 1])));
            pairs[j] = To::pair(multiply(v[2 * j], scale), multiply(v[2 * j + 1], scale));
        }
        ((uint2*)q.codes)[i] = make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
    }
#pragma unroll 1
    for (i64 i = 8 * vectors + first; i < q.count; i += stride) {
        float v = scaled_one<Read>(q, i);
        largest = max(largest, magnitude(v));
        q.codes[i] = (u8)To::pair(multiply(v, scale), 0.0f);
    }
    if (!q.record) return;
    largest = largest_of_block(largest);
    if (threadIdx.x == 0) atomicMax((u32*)q.current, largest);
}

#define FP8_KERNELS(name, Read)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) fp8_amax_##name(const __grid_constant__ QuantizeFp8 q) {     \
        find_amax<Read>(q);                                                                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) to_e4m3_##name(const __grid_constant__ QuantizeFp8 q) {      \
        quantize<Read, ToE4m3>(q);                                                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) to_e5m2_##name(const __grid_constant__ QuantizeFp8 q) {      \
        quantize<Read, ToE5m2>(q);                                                                                     \
    }

FP8_KERNELS(float32, ReadFloat32)
FP8_KERNELS(bfloat16, ReadBfloat16)
FP8_KERNELS(float16, ReadFloat16)
