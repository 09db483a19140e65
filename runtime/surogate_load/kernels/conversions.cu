// Conversions between float32 and the small types: one rounding, to nearest even, on every compute capability.
// Hardware conversions exist for bfloat16 from 8.0 on and for E4M3 from 8.9 on; below, integer arithmetic gives the same bits.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// Arithmetic in PTX, one rounding each: CuPy compiles with -ftz=true, which would flush subnormal operands and results of
// the C operators and of CUDA's own functions.
#define ARITHMETIC(name, instruction)                                                                                  \
    __device__ __forceinline__ float name(float a, float b) {                                                          \
        float result;                                                                                                  \
        asm(instruction " %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));                                               \
        return result;                                                                                                 \
    }
ARITHMETIC(add, "add.rn.f32")
ARITHMETIC(multiply, "mul.rn.f32")
ARITHMETIC(divide, "div.rn.f32")
ARITHMETIC(larger, "max.f32")
ARITHMETIC(smaller, "min.f32")

__device__ __forceinline__ u32 bits_of(float x) { return __float_as_uint(x); }

__device__ __forceinline__ bool is_nan(float x) { return (bits_of(x) & 0x7FFFFFFFu) > 0x7F800000u; }

__device__ __forceinline__ u32 to_bfloat16(float x) {
    u32 bits = bits_of(x);
    return is_nan(x) ? 0x7FFFu : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

__device__ __forceinline__ u32 to_bfloat16_pair(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return to_bfloat16(low) | to_bfloat16(high) << 16;
#endif
}

__device__ __forceinline__ u32 to_float16(float x) {
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
}

__device__ __forceinline__ u32 to_float16_pair(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return to_float16(low) | to_float16(high) << 16;
#endif
}

__device__ __forceinline__ float from_float16(u16 half) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
}

__device__ __forceinline__ float from_bfloat16(u16 bits) { return __uint_as_float((u32)bits << 16); }

// Saturates at the largest finite value; NaN stays NaN.
__device__ __forceinline__ u32 to_e4m3_pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    u32 pair = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float x = i ? high : low;
        float magnitude = smaller(__uint_as_float(bits_of(x) & 0x7FFFFFFFu), E4M3_MAX);
        // Adding 2^14 leaves a subnormal's multiple of 2^-9 in the last bits of the sum; a normal one's mantissa is
        // rounded to 3 bits in place, and its exponent then moves from bias 127 to bias 7.
        u32 subnormal = bits_of(add(magnitude, 16384.0f)) & 0xFu;
        u32 raised = bits_of(magnitude) + 0x7FFFFu + ((bits_of(magnitude) >> 20) & 1u);
        u32 code = bits_of(magnitude) < 0x3C800000u ? subnormal : (raised >> 20) - (120u << 3);
        pair |= ((is_nan(x) ? 0x7Fu : code) | (bits_of(x) >> 24 & 0x80u)) << (8 * i);
    }
    return pair;
#endif
}

// Saturates at the largest finite value; NaN stays NaN.
__device__ __forceinline__ u32 to_e5m2_pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
    u16 pair;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    u32 pair = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float x = i ? high : low;
        float magnitude = smaller(__uint_as_float(bits_of(x) & 0x7FFFFFFFu), E5M2_MAX);
        // As in E4M3: multiples of 2^-16 below 2^-14, two bits of mantissa, bias 15.
        u32 subnormal = bits_of(add(magnitude, 128.0f)) & 0x7u;
        u32 raised = bits_of(magnitude) + 0xFFFFFu + ((bits_of(magnitude) >> 21) & 1u);
        u32 code = bits_of(magnitude) < 0x38800000u ? subnormal : (raised >> 21) - (112u << 2);
        pair |= ((is_nan(x) ? 0x7Fu : code) | (bits_of(x) >> 24 & 0x80u)) << (8 * i);
    }
    return pair;
#endif
}

// The largest of a warp.
__device__ __forceinline__ u32 largest_of_warp(u32 mine) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xFFFFFFFFu, mine);
#else
    for (int step = 16; step; step /= 2) mine = max(mine, __shfl_xor_sync(0xFFFFFFFFu, mine, step));
    return mine;
#endif
}

// The values of the low two bytes of `pair`.
__device__ __forceinline__ void from_e4m3_pair(u32 pair, float& low, float& high) {
#if __CUDA_ARCH__ >= 890
    u32 halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((u16)pair));
    low = from_float16((u16)halves);
    high = from_float16((u16)(halves >> 16));
#else
    // The same bits read as float16 are the value times 2^-8, subnormals included.
    u32 codes[2] = {pair & 0xFFu, pair >> 8 & 0xFFu};
    float values[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        u16 half = (u16)((codes[i] & 0x80u) << 8 | (codes[i] & 0x7Fu) << 7);
        bool nan = (codes[i] & 0x7Fu) == 0x7Fu;
        values[i] = nan ? __uint_as_float(0x7FFFFFFFu) : multiply(from_float16(half), 256.0f);
    }
    low = values[0];
    high = values[1];
#endif
}

__device__ __forceinline__ float from_e4m3(u8 code) {
    float value, unused;
    from_e4m3_pair(code, value, unused);
    return value;
}

// What a kernel writes: `Code` is one value's storage, `pack` stores eight neighbours at an address aligned to them.
struct Float32 {
    typedef float Code;
    __device__ static float one(float x) { return x; }
    __device__ static void pack(Code* out, const float (&v)[8]) {
        __stcs((float4*)out, make_float4(v[0], v[1], v[2], v[3]));
        __stcs((float4*)out + 1, make_float4(v[4], v[5], v[6], v[7]));
    }
};

#define SIXTEEN_BITS(Name, convert)                                                                                    \
    struct Name {                                                                                                      \
        typedef u16 Code;                                                                                              \
        __device__ static u16 one(float x) { return (u16)convert(x, x); }                                              \
        __device__ static void pack(Code* out, const float (&v)[8]) {                                                  \
            __stcs((uint4*)out, make_uint4(convert(v[0], v[1]), convert(v[2], v[3]),                                   \
                                           convert(v[4], v[5]), convert(v[6], v[7])));                                 \
        }                                                                                                              \
    };
SIXTEEN_BITS(Bfloat16, to_bfloat16_pair)
SIXTEEN_BITS(Float16, to_float16_pair)

struct E4m3 {
    typedef u8 Code;
    __device__ static u8 one(float x) { return (u8)to_e4m3_pair(x, x); }
    __device__ static void pack(Code* out, const float (&v)[8]) {
        __stcs((uint2*)out, make_uint2(to_e4m3_pair(v[0], v[1]) | to_e4m3_pair(v[2], v[3]) << 16,
                                       to_e4m3_pair(v[4], v[5]) | to_e4m3_pair(v[6], v[7]) << 16));
    }
};

// What a kernel reads as float32: one value, or eight neighbours at an address aligned to them; `Out` writes the same type.
struct ReadFloat32 {
    typedef float Code;
    typedef Float32 Out;
    __device__ static float one(const Code* p) { return *p; }
    __device__ static void eight(const Code* p, float (&v)[8]) {
        float4 a = ((const float4*)p)[0], b = ((const float4*)p)[1];
        v[0] = a.x; v[1] = a.y; v[2] = a.z; v[3] = a.w; v[4] = b.x; v[5] = b.y; v[6] = b.z; v[7] = b.w;
    }
};

#define READ_SIXTEEN_BITS(Name, OutName, convert)                                                                      \
    struct Name {                                                                                                      \
        typedef u16 Code;                                                                                              \
        typedef OutName Out;                                                                                           \
        __device__ static float one(const Code* p) { return convert(*p); }                                             \
        __device__ static void eight(const Code* p, float (&v)[8]) {                                                   \
            uint4 w = *(const uint4*)p;                                                                                \
            u32 words[4] = {w.x, w.y, w.z, w.w};                                                                       \
            _Pragma("unroll") for (int i = 0; i < 4; ++i) {                                                            \
                v[2 * i] = convert((u16)words[i]);                                                                     \
                v[2 * i + 1] = convert((u16)(words[i] >> 16));                                                         \
            }                                                                                                          \
        }                                                                                                              \
    };
READ_SIXTEEN_BITS(ReadBfloat16, Bfloat16, from_bfloat16)
READ_SIXTEEN_BITS(ReadFloat16, Float16, from_float16)
