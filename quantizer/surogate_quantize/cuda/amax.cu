// The largest magnitude bits of a weight.

struct Amax {
    const void* raw;
    i64 count;
    u32* largest; // [1], at first 0
};

static_assert(sizeof(Amax) == AMAX_BYTES, "as Python packs it");

template <class Source>
__device__ __forceinline__ void find_largest(const Amax& q) {
    const typename Source::Word* raw = (const typename Source::Word*)q.raw;
    i64 count = q.count;
    i64 chunks = count / CHUNK, stride = (i64)gridDim.x * THREADS, first = (i64)blockIdx.x * THREADS + threadIdx.x;
    u32 mine = 0;
    for (i64 i = first; i < chunks; i += stride) {
        u32 words[CHUNK];
        load(raw + i * CHUNK, words);
#pragma unroll
        for (u32 j = 0; j < CHUNK; ++j) mine = max(mine, words[j] & Source::MAGNITUDE);
    }
    for (i64 i = chunks * CHUNK + first; i < count; i += stride) mine = max(mine, raw[i] & Source::MAGNITUDE);
    mine = largest_of_block(mine);
    if (threadIdx.x == 0) atomicMax(q.largest, mine);
}

#define AMAX(Source)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        amax_##Source(const __grid_constant__ Amax q) {                                                                \
        find_largest<Source>(q);                                                                                       \
    }
FOR_EVERY_SOURCE(AMAX)
