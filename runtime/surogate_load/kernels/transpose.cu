// Transposes a matrix of bytes, 128 x 128 at a time, in words of four: loads and stores of a warp are 128 bytes long.

constexpr int SIDE = TRANSPOSE_SIDE;
constexpr int THREADS = TRANSPOSE_THREADS;
constexpr int WORDS = SIDE / 4;
constexpr int PER_WARP = SIDE / (THREADS / 32);

struct Transpose {
    const u8* in;  // [rows, columns], both multiples of four
    u8* out;       // [columns, rows]
    i64 rows;
    i64 columns;
};

static_assert(sizeof(Transpose) == TRANSPOSE_BYTES, "as Python packs it");

extern "C" __global__ void __launch_bounds__(THREADS) transpose_bytes(const __grid_constant__ Transpose t) {
    // Row 4 n + r stands at r * WORDS + n, so that a warp that reads four neighbouring rows for each n meets every bank.
    __shared__ u32 tile[SIDE][WORDS + 1];
    i64 across = (t.columns + SIDE - 1) / SIDE;
    i64 row = blockIdx.x / across * SIDE, column = blockIdx.x % across * SIDE;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 words[PER_WARP];
#pragma unroll
    for (int i = 0; i < PER_WARP; ++i) {
        i64 r = row + warp * PER_WARP + i, c = column + 4 * lane;
        words[i] = r < t.rows && c < t.columns ? __ldcs((const u32*)(t.in + r * t.columns + c)) : 0;
    }
#pragma unroll
    for (int i = 0; i < PER_WARP; ++i) {
        int r = warp * PER_WARP + i;
        tile[r % 4 * WORDS + r / 4][lane] = words[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PER_WARP / 4; ++i) {
        int w = warp * (PER_WARP / 4) + i;
        u32 a = tile[lane][w], b = tile[WORDS + lane][w], c = tile[2 * WORDS + lane][w], d = tile[3 * WORDS + lane][w];
        u32 ab_low = __byte_perm(a, b, 0x5140), ab_high = __byte_perm(a, b, 0x7362);
        u32 cd_low = __byte_perm(c, d, 0x5140), cd_high = __byte_perm(c, d, 0x7362);
        u32 columns[4] = {__byte_perm(ab_low, cd_low, 0x5410), __byte_perm(ab_low, cd_low, 0x7632),
                          __byte_perm(ab_high, cd_high, 0x5410), __byte_perm(ab_high, cd_high, 0x7632)};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            i64 out_row = column + 4 * w + j, out_column = row + 4 * lane;
            if (out_row < t.columns && out_column < t.rows)
                *(u32*)(t.out + out_row * t.rows + out_column) = columns[j];
        }
    }
}
