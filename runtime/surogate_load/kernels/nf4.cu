// NF4: codebook[code] * absmax, value 2i in the high nibble. Blocks run over the flattened weight.

__constant__ float codebook[16] = NF4_CODEBOOK;

struct PlainAbsmax {
    __device__ static float of(const Weight& weight, i64 block) { return __ldg((const float*)weight.scale + block); }
};

// max(0, (q - 128) * scale + offset), each operation rounded; scale and offset of a group of BLOCKS_PER_GROUP blocks.
struct AffineAbsmax {
    __device__ static float of(const Weight& weight, i64 block) {
        i64 group = block / BLOCKS_PER_GROUP;
        float steps = (float)((int)__ldg(weight.scale + block) - 128);
        float scale = __ldg(weight.scale_2 + group), offset = __ldg(weight.offset + group);
        return larger(add(multiply(steps, scale), offset), 0.0f);
    }
};

// In global memory, since the lanes of a warp read different entries: it stays in the first cache.
__device__ const float dynamic_map[256] = DYNAMIC_MAP;

// map[q] * nested absmax + offset, each operation rounded; a nested absmax for BLOCKS_PER_GROUP blocks, and an offset
// for the weight, or in merged weights for the group.
struct DynamicAbsmax {
    __device__ static float of(const Weight& weight, i64 block) {
        i64 group = block / BLOCKS_PER_GROUP;
        float value = __ldg(dynamic_map + __ldg(weight.scale + block)), nested = __ldg(weight.scale_2 + group);
        return add(multiply(value, nested), __ldg(weight.offset + group * weight.rows_per_step));
    }
};

template <class Absmax>
struct Nf4 {
    __device__ static float at(const Weight& weight, i64 i) {
        u32 code = weight.codes[i / 2] >> (i % 2 ? 0 : 4) & 15u;
        return multiply(codebook[code], Absmax::of(weight, i >> weight.option));
    }

    // Lane j holds absmax of the span's block j: blocks have at least SPAN / LANES values.
    template <class Out>
    __device__ static void span(const Weight& weight, typename Out::Code* out, i64 first, float multiplier, u32 lane) {
        u32 words[CHUNKS];
        load_span(weight.codes + first / 2, lane, words);
        u32 shift = weight.option;
        float absmax = Absmax::of(weight, (first >> shift) + (lane & ((SPAN >> shift) - 1)));
        float table = codebook[lane % 16];
#pragma unroll
        for (int u = 0; u < CHUNKS; ++u) {
            u32 value = (u * LANES + lane) * CHUNK;
            float v[CHUNK];
            look_up<true>(words[u], table, __shfl_sync(ALL, absmax, value >> shift), multiplier, v);
            Out::pack(out + value, v);
        }
    }
};

KERNELS(nf4, Nf4<PlainAbsmax>)
KERNELS(nf4_affine, Nf4<AffineAbsmax>)
KERNELS(nf4_dynamic, Nf4<DynamicAbsmax>)
