// Arithmetic in PTX, one rounding each and no operand flushed: CuPy compiles with -ftz=true, under which the C operators,
// comparisons and CUDA's own functions take a subnormal for zero.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define ARITHMETIC(name, instruction)                                                                                  \
    __device__ __forceinline__ float name(float a, float b) {                                                          \
        float result;                                                                                                  \
        asm(instruction " %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));                                               \
        return result;                                                                                                 \
    }
ARITHMETIC(add, "add.rn.f32")
ARITHMETIC(subtract, "sub.rn.f32")
ARITHMETIC(multiply, "mul.rn.f32")
ARITHMETIC(divide, "div.rn.f32")
ARITHMETIC(larger, "max.f32")

__device__ __forceinline__ bool less(float a, float b) {
    u32 result;
    asm("{ .reg .pred p; setp.lt.f32 p, %1, %2; selp.u32 %0, 1, 0, p; }" : "=r"(result) : "f"(a), "f"(b));
    return result != 0;
}

// The nearest integer, ties to even.
__device__ __forceinline__ int nearest(float x) {
    int result;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ int toward_zero(float x) {
    int result;
    asm("cvt.rzi.s32.f32 %0, %1;" : "=r"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ float from_float16(u16 half) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
}
