// Quotients with a common divisor, and their E2M1 magnitudes. The C operators flush subnormals, the minus sign too.

#define UNARY(name, instruction)                                                                                       \
    __device__ __forceinline__ float name(float x) {                                                                   \
        float result;                                                                                                  \
        asm(instruction " %0, %1;" : "=f"(result) : "f"(x));                                                           \
        return result;                                                                                                 \
    }
UNARY(absolute, "abs.f32")
UNARY(negative, "neg.f32")
UNARY(reciprocal, "rcp.rn.f32")

#define FUSED(name, instruction)                                                                                       \
    __device__ __forceinline__ float name(float a, float b, float c) {                                                 \
        float result;                                                                                                  \
        asm(instruction " %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));                                   \
        return result;                                                                                                 \
    }
FUSED(multiply_add, "fma.rn.f32")
FUSED(multiply_add_to_zero, "fma.rz.f32")

// A divisor, ready for quotients by multiplication. Far from 1 it and the dividend are lifted by a power of two, so
// that neither its reciprocal nor a quotient that matters comes near the ends of float32's range. A quotient by 0, or
// by what is not finite, is 0.
struct Divisor {
    float value;
    float lift;
    float inverse;  // the rounded reciprocal, lifted
    float rest;     // what that lacks: both together have 48 bits
};

__device__ __forceinline__ Divisor divisor(float value) {
    if (bits_of(value) - 1 >= 0x7F7FFFFFu) return {value, 1.0f, 0.0f, 0.0f};
    float lift = value < 0x1p-64f ? 0x1p64f : value > 0x1p64f ? 0x1p-64f : 1.0f;
    float lifted = multiply(value, lift), inverse = reciprocal(lifted);
    float error = multiply_add(negative(inverse), lifted, 1.0f);
    return {value, lift, inverse, multiply(inverse, multiply_add(error, error, error))};
}

// x / divisor, either rounded or the other neighbour. Where the quotient is a tie of E2M1 or a neighbour of one, it is
// rounded right: tried for all 2^23 mantissas of a divisor.
__device__ __forceinline__ float near_quotient(float x, const Divisor& d) {
    x = multiply(x, d.lift);
    return multiply_add(x, d.inverse, multiply(x, d.rest));
}

// x / divisor, rounded, where that is a normal number: the exact remainder of a neighbour, times the rounded
// reciprocal, corrects it (Markstein, IBM J. Res. Dev. 34, 1990).
__device__ __forceinline__ float quotient(float x, const Divisor& d) {
    float near = near_quotient(x, d);
    float remainder = multiply_add(negative(near), multiply(d.value, d.lift), multiply(x, d.lift));
    return multiply_add(remainder, d.inverse, near);
}

struct Magnitude {
    float value;
    u32 code;  // in the low four bits
};

// The power of two, 1, 2 or 4, below a magnitude of at most 6. Magnitudes of E2M1 there are multiples of its half.
__device__ __forceinline__ float binade_of(float x) {
    return __uint_as_float(bits_of(larger(x, 1.0f)) & 0x7F800000u);
}

// With this times the binade added, the last bit of a magnitude stands for half the binade, and the last bits of the
// sum count these halves. Two more of them make the count and the binade's exponent add up to a code.
#define SHIFT 4194305.0f

__device__ __forceinline__ Magnitude to_magnitude(float sum, float binade) {
    return {multiply_add(negative(binade), SHIFT, sum), bits_of(sum) + (bits_of(binade) >> 22)};
}

// To nearest, ties to the even code, at most 6; so is a NaN.
__device__ __forceinline__ Magnitude nearest_magnitude(float x) {
    x = smaller(x, E2M1_MAX);
    float binade = binade_of(x);
    return to_magnitude(multiply_add(binade, SHIFT, x), binade);
}

// Up where 24 random bits, times 2^-24, are below the position between the two neighbours: the code.
__device__ __forceinline__ u32 random_code(float x, u32 word) {
    x = smaller(x, E2M1_MAX);
    float binade = binade_of(x);
    Magnitude lower = to_magnitude(multiply_add_to_zero(binade, SHIFT, x), binade);
    float above = add(x, negative(lower.value)), noise = multiply((float)(word >> 8), multiply(binade, 0x1p-25f));
    return lower.code + (bits_of(noise) < bits_of(above));
}
