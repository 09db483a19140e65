// FP8: e4m3 * scale, with one scale a tensor, a row, or a TILE_SIDE x TILE_SIDE tile; scales float32 or bfloat16.

struct Fp8 {
    __device__ static float scale(const Weight& weight, i64 index) {
        if (weight.scale_is_bfloat16) return from_bfloat16(__ldg((const u16*)weight.scale + index));
        return __ldg((const float*)weight.scale + index);
    }

    // The scale of the value in this row and column.
    __device__ static float scale_at(const Weight& weight, i64 row, i64 column) {
        if (weight.option == SCALE_PER_CHANNEL) return scale(weight, row);
        i64 tiles = (weight.columns + TILE_SIDE - 1) / TILE_SIDE;
        return scale(weight, row / TILE_SIDE * tiles + column / TILE_SIDE);
    }

    __device__ static float at(const Weight& weight, i64 i) {
        float step = weight.option == SCALE_PER_TENSOR
                         ? scale(weight, 0)
                         : scale_at(weight, i / weight.columns, i % weight.columns);
        return multiply(from_e4m3(weight.codes[i]), step);
    }

    // `aligned` says for scales finer than a tensor's that K is a multiple of CHUNK, so a chunk has one scale.
    __device__ static void chunk_scales(const Weight& weight, i64 first, u32 lane, float (&steps)[CHUNKS]) {
        if (weight.option == SCALE_PER_TENSOR) {
            float only = scale(weight, 0);
#pragma unroll
            for (int u = 0; u < CHUNKS; ++u) steps[u] = only;
            return;
        }
        u32 width = (u32)(weight.columns / CHUNK), chunk = (u32)(first / CHUNK) + lane;
        u32 row = chunk / width, column = chunk % width;
#pragma unroll
        for (int u = 0; u < CHUNKS; ++u) {
            steps[u] = scale_at(weight, row, (i64)column * CHUNK);
            row += weight.rows_per_step;
            column += weight.chunks_per_step;
            if (column >= width) {
                column -= width;
                ++row;
            }
        }
    }

    template <class Out>
    __device__ static void span(const Weight& weight, typename Out::Code* out, i64 first, float multiplier, u32 lane) {
        uint2 words[CHUNKS];
        load_span(weight.codes + first, lane, words);
        float steps[CHUNKS];
        chunk_scales(weight, first, lane, steps);
#pragma unroll
        for (int u = 0; u < CHUNKS; ++u) {
            float v[CHUNK];
            from_e4m3_pair(words[u].x, v[0], v[1]);
            from_e4m3_pair(words[u].x >> 16, v[2], v[3]);
            from_e4m3_pair(words[u].y, v[4], v[5]);
            from_e4m3_pair(words[u].y >> 16, v[6], v[7]);
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) v[i] = multiply(multiply(v[i], steps[u]), multiplier);
            Out::pack(out + (u * LANES + lane) * CHUNK, v);
        }
    }
};

KERNELS(fp8, Fp8)
