// A block of 16 values in one thread: its scales, and its codes under one of them.

constexpr int BLOCK = FP4_BLOCK;

// Magnitudes of a block, and the signs where they stand among the codes.
struct Values {
    float v[BLOCK];
    u32 signs[2];

    // The largest magnitude's bits, which order as the magnitudes do; a NaN is above all.
    __device__ __forceinline__ u32 largest() const {
        u32 largest = 0;
#pragma unroll
        for (int i = 0; i < BLOCK; ++i) largest = max(largest, bits_of(v[i]));
        return largest;
    }
};

template <class Read>
__device__ __forceinline__ Values read_block(const void* x, i64 i) {
    Values values;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float v[8];
        Read::eight((const typename Read::Code*)x + BLOCK * i + 8 * half, v);
        u32 signs = 0;
#pragma unroll
        for (int j = 7; j >= 0; --j) {
            signs = __funnelshift_l(bits_of(v[j]), signs, 4);
            values.v[8 * half + j] = absolute(v[j]);
        }
        values.signs[half] = signs & 0x88888888u;
    }
    return values;
}

struct Scale {
    u32 code;
    Divisor step;
};

// E4M3, at least the smallest where the block has magnitude, else 0.
template <bool UP = false>
__device__ __forceinline__ Scale scale_for(float wanted, u32 largest, float g) {
    u32 code = to_e4m3_pair(wanted, 0.0f) & 0xFFu;
    if (UP) code = min(code + (from_e4m3((u8)code) < wanted), 0x7Eu);
    bool has_magnitude = largest != 0 && largest <= 0x7F800000u;
    code = has_magnitude ? max(code, 1u) : 0;
    return {code, divisor(divide(from_e4m3((u8)code), g))};
}

__device__ __forceinline__ float sixth_of(u32 largest, float g) {
    return multiply(divide(__uint_as_float(largest), E2M1_MAX), g);
}

// How the error of a block, or of a tile, takes in that of the next value.
struct NoError {
    __device__ static float joined(float, float) { return 0.0f; }
};
struct Mse {
    __device__ static float joined(float total, float d) { return add(total, multiply(d, d)); }
};
struct L1 {
    __device__ static float joined(float total, float d) { return add(total, absolute(d)); }
};
struct Absmax {
    __device__ static float joined(float total, float d) { return larger(total, absolute(d)); }
};

// Codes without signs, and the error so far joined with this block's.
template <class Metric>
__device__ __forceinline__ float round_block(const Values& x, const Divisor& step, u32 (&words)[2],
                                             float total = 0.0f) {
    words[0] = words[1] = 0;
#pragma unroll
    for (int i = 0; i < BLOCK; ++i) {
        Magnitude rounded = nearest_magnitude(near_quotient(x.v[i], step));
        words[i / 8] = __funnelshift_r(words[i / 8], rounded.code, 4);
        total = Metric::joined(total, add(multiply(rounded.value, step.value), negative(x.v[i])));
    }
    return total;
}
