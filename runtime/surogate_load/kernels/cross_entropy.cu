// Cross-entropy of rows of logits, each by one thread block, and its gradient where the logits stand.
//
// A row is read twice: for its largest value and the sum of exponentials, kept up to date on the way, then for the
// gradient. One block a multiprocessor keeps all rows that are being worked on in the second cache, so that the second
// reading costs no memory traffic.

#define LOWEST __int_as_float(0xFF800000)  // minus infinity

constexpr int THREADS = CROSS_ENTROPY_THREADS;

struct CrossEntropy {
    void* logits;         // [rows, columns]; becomes the gradient
    const i64* labels;    // [rows]
    const float* factor;  // [rows]
    float* loss;          // [rows]
    i64 columns;
    float scale;
    float cap;            // 0: none
    u32 gradient;
    u32 aligned;          // eight values at a time
};

static_assert(sizeof(CrossEntropy) == CROSS_ENTROPY_BYTES, "as Python packs it");

__device__ __forceinline__ float transformed(float x, const CrossEntropy& c) {
    x *= c.scale;
    return c.cap == 0.0f ? x : tanhf(x / c.cap) * c.cap;
}

__device__ __forceinline__ float slope(float value, const CrossEntropy& c) {
    float relative = c.cap == 0.0f ? 0.0f : value / c.cap;
    return (1.0f - relative * relative) * c.scale;
}

// The largest value so far, and the sum of exp(value - largest).
struct Sum {
    float largest, sum;
    __device__ void join(float other_largest, float other_sum) {
        float top = fmaxf(largest, other_largest);
        if (top == LOWEST) return;
        sum = sum * __expf(largest - top) + other_sum * __expf(other_largest - top);
        largest = top;
    }
};

__device__ __forceinline__ Sum across_block(Sum mine) {
    __shared__ float largest[THREADS / 32], sums[THREADS / 32];
    for (int step = 16; step; step /= 2)
        mine.join(__shfl_xor_sync(0xFFFFFFFFu, mine.largest, step), __shfl_xor_sync(0xFFFFFFFFu, mine.sum, step));
    if (threadIdx.x % 32 == 0) {
        largest[threadIdx.x / 32] = mine.largest;
        sums[threadIdx.x / 32] = mine.sum;
    }
    __syncthreads();
    Sum whole = {LOWEST, 0.0f};
    for (int warp = 0; warp < THREADS / 32; ++warp) whole.join(largest[warp], sums[warp]);
    return whole;
}

template <class Read>
__device__ __forceinline__ void cross_entropy(const CrossEntropy& c) {
    typedef typename Read::Code Code;
    Code* row = (Code*)c.logits + (i64)blockIdx.x * c.columns;
    float factor = c.factor[blockIdx.x];
    i64 label = c.labels[blockIdx.x], vectors = c.aligned ? c.columns / 8 : 0;
    Sum mine = {LOWEST, 0.0f};
    if (factor != 0.0f) {
#pragma unroll 2
        for (i64 i = threadIdx.x; i < vectors; i += THREADS) {
            float v[8], top = LOWEST, sum = 0.0f;
            Read::eight(row + 8 * i, v);
#pragma unroll
            for (int j = 0; j < 8; ++j) top = fmaxf(top, v[j] = transformed(v[j], c));
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += __expf(v[j] - top);
            mine.join(top, sum);
        }
        for (i64 i = 8 * vectors + threadIdx.x; i < c.columns; i += THREADS)
            mine.join(transformed(Read::one(row + i), c), 1.0f);
    }
    Sum whole = across_block(mine);
    float normalizer = whole.largest + __logf(whole.sum);
    if (threadIdx.x == 0)
        c.loss[blockIdx.x] = factor == 0.0f ? 0.0f : (normalizer - transformed(Read::one(row + label), c)) * factor;
    if (!c.gradient) return;
    __syncthreads();  // the label's logit has been read
#pragma unroll 2
    for (i64 i = threadIdx.x; i < vectors; i += THREADS) {
        float v[8];
        Read::eight(row + 8 * i, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float value = transformed(v[j], c);
            float p = __expf(value - normalizer) - (8 * i + j == label ? 1.0f : 0.0f);
            v[j] = factor == 0.0f ? 0.0f : p * factor * slope(value, c);
        }
        Read::Out::pack(row + 8 * i, v);
    }
    for (i64 i = 8 * vectors + threadIdx.x; i < c.columns; i += THREADS) {
        float value = transformed(Read::one(row + i), c);
        float p = __expf(value - normalizer) - (i == label ? 1.0f : 0.0f);
        row[i] = Read::Out::one(factor == 0.0f ? 0.0f : p * factor * slope(value, c));
    }
}

#define CROSS_ENTROPY(name, Read)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ CrossEntropy c) {               \
        cross_entropy<Read>(c);                                                                                        \
    }

CROSS_ENTROPY(cross_entropy_float32, ReadFloat32)
CROSS_ENTROPY(cross_entropy_bfloat16, ReadBfloat16)
CROSS_ENTROPY(cross_entropy_float16, ReadFloat16)
