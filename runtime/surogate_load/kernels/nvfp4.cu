// NVFP4: e2m1[code] * step, the step being scale / global scale, or with the option set their product; value 2i in the
// low nibble. K is a multiple of 16, so the blocks of the flattened weight are those of its rows.

__constant__ float e2m1[16] = E2M1_VALUES;

struct Nvfp4 {
    static constexpr int BLOCK = 16;
    static constexpr int CHUNKS_PER_BLOCK = BLOCK / CHUNK;
    static constexpr int SCALES = SPAN / BLOCK / LANES; // of a lane

    // scale / global scale. Where the divisor is a power of two, which is the default, its reciprocal is exact, and a
    // product with it is rounded as the quotient is.
    __device__ static float step(u8 scale, float global_scale, bool multiplies) {
        if (multiplies) return multiply(from_e4m3(scale), global_scale);
        u32 exponent = bits_of(global_scale) >> 23;
        bool power_of_two = (bits_of(global_scale) & 0x7FFFFFu) == 0 && exponent > 0 && exponent < 254;
        if (power_of_two) return multiply(from_e4m3(scale), __uint_as_float((254 - exponent) << 23));
        return divide(from_e4m3(scale), global_scale);
    }

    __device__ static float at(const Weight& weight, i64 i) {
        u32 code = weight.codes[i / 2] >> (i % 2 ? 4 : 0) & 15u;
        return multiply(e2m1[code], step(__ldg(weight.scale + i / BLOCK), __ldg(weight.scale_2), weight.option));
    }

    // Lane j holds the steps of the span's blocks j, j + 32, ...: those of one chunk stand in one register.
    template <class Out>
    __device__ static void span(const Weight& weight, typename Out::Code* out, i64 first, float multiplier, u32 lane) {
        u32 words[CHUNKS];
        load_span(weight.codes + first / 2, lane, words);
        u8 scales[SCALES];
#pragma unroll
        for (int s = 0; s < SCALES; ++s) scales[s] = __ldg(weight.scale + first / BLOCK + s * LANES + lane);
        float global_scale = __ldg(weight.scale_2), steps[SCALES];
#pragma unroll
        for (int s = 0; s < SCALES; ++s) steps[s] = step(scales[s], global_scale, weight.option);
        float table = e2m1[lane % 16];
#pragma unroll
        for (int u = 0; u < CHUNKS; ++u) {
            float own = __shfl_sync(ALL, steps[u / CHUNKS_PER_BLOCK],
                                    u % CHUNKS_PER_BLOCK * (LANES / CHUNKS_PER_BLOCK) + lane / CHUNKS_PER_BLOCK);
            float v[CHUNK];
            look_up<false>(words[u], table, own, multiplier, v);
            Out::pack(out + (u * LANES + lane) * CHUNK, v);
        }
    }
};

KERNELS(nvfp4, Nvfp4)
