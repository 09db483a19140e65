// The part of dequantization that the formats share: which values a warp writes, of which weight of a group.
//
// A warp writes SPAN consecutive values. Each lane loads CHUNKS words of eight codes, one every 32 words, before it uses
// the first, and stores eight neighbouring values at a time: loads and stores of a warp are contiguous and a lane has
// CHUNKS loads in flight. There is no shared memory, hence no barrier at a block's start: tables and block scales stand
// in the lanes' registers, and a shuffle looks them up.
//
// A format gives `at(weight, i)`, the float32 value i, and `span<Out>`, SPAN values from value
// `first` on, where they are aligned. Both compute alike; `at` serves ragged ends and everything unaligned.

constexpr int SPAN = LANES * CHUNKS * CHUNK;
constexpr int TILE = SPAN * WARPS;

constexpr u32 ALL = 0xFFFFFFFFu;

// Python packs both structures. Pointers that a format doesn't have are null.
struct Weight {
    const u8* codes;
    const u8* scale;         // absmax; block scales; scales
    const float* scale_2;    // absmax_scale; nested absmax; global scale
    const float* offset;     // absmax_offset; nested offset
    const float* multiplier; // null: 1
    i64 out;                 // bytes from the launch's output
    i64 count;               // values
    i64 columns;
    u32 first_tile;          // of the group's
    u32 option;              // NF4: log2 of the block size; NVFP4: the global scale multiplies; FP8: what shares a scale
    u32 scale_is_bfloat16;
    u32 aligned;             // `span` may be used
    u32 rows_per_step;       // LANES chunks further on: that many rows; NF4: 1 where each group has a nested offset
    u32 chunks_per_step;     // and that many chunks
};

struct Launch {
    void* out;
    const Weight* group;     // null: `weight` alone
    const u32* first_tiles;  // of `group`
    i64 group_size;
    Weight weight;
};

static_assert(sizeof(Weight) == WEIGHT_BYTES && sizeof(Launch) == LAUNCH_BYTES, "as Python packs them");

// The index of the last weight whose first tile is at most `tile`. Every lane of the warp takes part.
__device__ __forceinline__ u32 find_weight(const u32* first_tiles, u32 size, u32 tile, u32 lane) {
    u32 started = 0;
#pragma unroll 1
    for (u32 start = 0; start < size; start += LANES) {
        u32 index = start + lane;
        started += __popc(__ballot_sync(ALL, index < size && __ldg(first_tiles + index) <= tile));
    }
    return started - 1;
}

template <class Format, class Out>
__device__ __forceinline__ void dequantize(const Launch& launch) {
    u32 lane = threadIdx.x % LANES, tile = blockIdx.x;
    Weight weight = launch.weight;
    if (launch.group) {
        weight = launch.group[find_weight(launch.first_tiles, launch.group_size, tile, lane)];
        tile -= weight.first_tile;
    }
    i64 first = (i64)tile * TILE + (i64)(threadIdx.x / LANES) * SPAN;
    if (first >= weight.count) return;
    typename Out::Code* out = (typename Out::Code*)((u8*)launch.out + weight.out);
    float multiplier = weight.multiplier ? __ldg(weight.multiplier) : 1.0f;
    if (weight.aligned && first + SPAN <= weight.count) {
        Format::template span<Out>(weight, out + first, first, multiplier, lane);
        return;
    }
    i64 end = min(first + SPAN, weight.count);
#pragma unroll 1
    for (i64 i = first + lane; i < end; i += LANES) out[i] = Out::one(multiply(Format::at(weight, i), multiplier));
}

// With room for two blocks a multiprocessor the compiler uses more registers on 8.6, where it spills otherwise.
#if __CUDA_ARCH__ == 860
#define BOUNDS __launch_bounds__(LANES * WARPS, 2)
#else
#define BOUNDS __launch_bounds__(LANES * WARPS)
#endif

#define KERNEL(name, Format, Out)                                                                                      \
    extern "C" __global__ void BOUNDS name(const __grid_constant__ Launch launch) { dequantize<Format, Out>(launch); }

#define KERNELS(name, Format)                                                                                          \
    KERNEL(name##_float32, Format, Float32)                                                                            \
    KERNEL(name##_bfloat16, Format, Bfloat16)                                                                          \
    KERNEL(name##_float16, Format, Float16)                                                                            \
    KERNEL(name##_float8_e4m3fn, Format, E4m3)

// Loads CHUNKS words of a lane, all before the first use. Codes are read once: no cache line is kept for them.
template <class Word>
__device__ __forceinline__ void load_span(const u8* from, u32 lane, Word (&words)[CHUNKS]) {
#pragma unroll
    for (int u = 0; u < CHUNKS; ++u) words[u] = __ldcs((const Word*)from + u * LANES + lane);
}

// Eight values of one word: `table` holds entry lane % 16 of a 16-entry table, so only a nibble's own bits choose.
template <bool FIRST_HIGH>
__device__ __forceinline__ void look_up(u32 word, float table, float step, float multiplier, float (&v)[CHUNK]) {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
        u32 code = word >> (4 * (FIRST_HIGH ? i ^ 1 : i));
        v[i] = multiply(multiply(__shfl_sync(ALL, table, code), step), multiplier);
    }
}
