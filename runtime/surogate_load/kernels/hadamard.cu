// The 16-wide Hadamard transform with fixed signs. Two neighbouring lanes hold a group, eight values each.

constexpr int THREADS = HADAMARD_THREADS;

struct Hadamard {
    const void* x;
    float* out;
    i64 chunks;  // of eight values, two for each group
};

static_assert(sizeof(Hadamard) == HADAMARD_BYTES, "as Python packs it");

ARITHMETIC(subtract, "sub.rn.f32")

template <class Read>
__device__ __forceinline__ void transform(const Hadamard& h) {
    i64 chunk = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (chunk >= h.chunks) return;
    float v[8], sum[8];
    Read::eight((const typename Read::Code*)h.x + 8 * chunk, v);
    u32 upper = threadIdx.x % 2, negative = HADAMARD_NEGATIVE >> 8 * upper;
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(bits_of(v[i]) ^ (negative >> i & 1u) << 31);
#pragma unroll
    for (int width = 1; width < 8; width *= 2) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] = i & width ? subtract(v[i - width], v[i]) : add(v[i], v[i + width]);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = sum[i];
    }
    u32 both = 3u << (threadIdx.x % 32 & ~1u);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float other = __shfl_xor_sync(both, v[i], 1);
        v[i] = multiply(upper ? subtract(other, v[i]) : add(v[i], other), 0.25f);
    }
    Float32::pack(h.out + 8 * chunk, v);
}

#define HADAMARD(name, Read)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ Hadamard h) {                   \
        transform<Read>(h);                                                                                            \
    }

HADAMARD(hadamard16_float32, ReadFloat32)
HADAMARD(hadamard16_bfloat16, ReadBfloat16)
HADAMARD(hadamard16_float16, ReadFloat16)
