// CUDA's names for one thread block at a time on the CPU: a fiber for each thread, which stops where threads wait for each
// other. The kernels' own text follows; float arithmetic is the machine's, without contraction.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <ucontext.h>

#define __device__
#define __forceinline__ inline
#define __constant__ static
#define __shared__ static
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef long long i64;

struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct int4 { int x, y, z, w; };
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }

template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

// What ptx.cu has, and the bits of floats.
static u32 __float_as_uint(float x) {
    u32 bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static float __uint_as_float(u32 bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static float add(float a, float b) { return a + b; }
static float subtract(float a, float b) { return a - b; }
static float multiply(float a, float b) { return a * b; }
static float divide(float a, float b) { return a / b; }
static float larger(float a, float b) { return fmaxf(a, b); }
static bool less(float a, float b) { return a < b; }
static int saturated(float whole) {
    if (std::isnan(whole)) return 0;
    if (whole >= 0x1p31f) return 0x7FFFFFFF;
    return whole < -0x1p31f ? -0x7FFFFFFF - 1 : (int)whole;
}
static int nearest(float x) { return saturated(rintf(x)); }
static int toward_zero(float x) { return saturated(truncf(x)); }
static float from_float16(u16 half) {
    return __uint_as_float((u32)(half & 0x7FFF) << 13 | (u32)(half & 0x8000) << 16) * 0x1p112f;
}

// Threads: each runs until it waits, for its warp or for the block; what has ended is not waited for.
enum State { RUNS, WAITS_FOR_WARP, WAITS_FOR_BLOCK, ENDED };
struct Index { u32 x; };
static Index threadIdx, blockIdx, gridDim;
static const size_t STACK = 1 << 16;
static char stacks[THREADS][STACK];
static ucontext_t scheduler, fibers[THREADS];
static State states[THREADS];
static int current;

static void wait_for(State what) {
    int me = current;
    states[me] = what;
    swapcontext(&fibers[me], &scheduler);
}
static void __syncthreads() { wait_for(WAITS_FOR_BLOCK); }

static u64 slots[THREADS];
template <class T> T exchange(T mine, int lane) {
    memcpy(&slots[current], &mine, sizeof mine);
    wait_for(WAITS_FOR_WARP);
    T other;
    memcpy(&other, &slots[current / 32 * 32 + lane], sizeof other);
    wait_for(WAITS_FOR_WARP);
    return other;
}
template <class T> T __shfl_xor_sync(u32, T mine, u32 step) { return exchange(mine, current % 32 ^ step); }
template <class T> T __shfl_sync(u32, T mine, u32 from, u32 width) {
    return exchange(mine, current % 32 / width * width + from);
}
static bool __any_sync(u32 mask, bool mine) {
    int any = mine;
    for (u32 step = 1; step < 32; step *= 2) any |= __shfl_xor_sync(mask, any, step);
    return any;
}
static void atomicMax(u32* place, u32 value) { *place = max(*place, value); }
static void atomicAdd(u64* place, u64 value) { *place += value; }

typedef void (*Body)(const void*, const void*, const void*);
static Body body;
static const void* arguments[3];

static void run_thread() {
    body(arguments[0], arguments[1], arguments[2]);
    wait_for(ENDED);
}

// Lets those threads go on who all wait for each other.
static void release(int first, int count, State what) {
    for (int t = first; t < first + count; ++t)
        if (states[t] != what && states[t] != ENDED) return;
    for (int t = first; t < first + count; ++t)
        if (states[t] == what) states[t] = RUNS;
}

static bool step_block() {
    bool alive = false;
    for (current = 0; current < THREADS; ++current) {
        threadIdx.x = current;
        if (states[current] == RUNS) swapcontext(&scheduler, &fibers[current]);
        alive |= states[current] != ENDED;
    }
    for (int warp = 0; warp < THREADS; warp += 32) release(warp, 32, WAITS_FOR_WARP);
    release(0, THREADS, WAITS_FOR_BLOCK);
    return alive;
}

static void grid(Body kernel, u32 blocks, const void* a, const void* b, const void* c) {
    body = kernel;
    arguments[0] = a, arguments[1] = b, arguments[2] = c;
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        for (int t = 0; t < THREADS; ++t) {
            states[t] = RUNS;
            getcontext(&fibers[t]);
            fibers[t].uc_stack.ss_sp = stacks[t];
            fibers[t].uc_stack.ss_size = STACK;
            makecontext(&fibers[t], run_thread, 0);
        }
        while (step_block()) {}
    }
}
