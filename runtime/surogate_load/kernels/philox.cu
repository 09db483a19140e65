// Philox 4x32-10: four random words of a counter and a key, both of 64-bit halves.

__device__ __forceinline__ void philox(u64 index, u64 offset, u64 seed, u32 (&words)[4]) {
    u32 c0 = (u32)index, c1 = (u32)(index >> 32), c2 = (u32)offset, c3 = (u32)(offset >> 32);
    u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        u64 a = (u64)c0 * PHILOX_MULTIPLIER_0, b = (u64)c2 * PHILOX_MULTIPLIER_1;
        c0 = (u32)(b >> 32) ^ c1 ^ k0;
        c1 = (u32)b;
        c2 = (u32)(a >> 32) ^ c3 ^ k1;
        c3 = (u32)a;
        k0 += PHILOX_INCREMENT_0;
        k1 += PHILOX_INCREMENT_1;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}
