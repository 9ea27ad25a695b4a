/* llama.cpp's memory layouts of Q4_0 weights and Q8_0 activations, for products of 8 columns at a time. */
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define QK 32   /* inputs that share a scale, in all formats */
#define GROUP 8 /* columns (outputs) that one vector holds */

/* block_q4_0x8 of ggml/src/ggml-cpu/repack.h */
typedef struct {
    uint16_t d[GROUP]; /* binary16 */
    uint8_t qs[128];   /* eight bytes of each column, twice: low nibbles inputs 0-15, high 16-31; two's complement */
} weights_8;

/* block_q8_0x4 of ggml/src/ggml-cpu/repack.h */
typedef struct {
    uint16_t d[4];  /* binary16 */
    int8_t qs[128]; /* eight bytes of each row, four times */
} activations_4;

/* block_q8_0 of ggml/src/ggml-common.h */
typedef struct {
    uint16_t d; /* binary16 */
    int8_t qs[QK];
} activations_1;

/* s [nr][bs] (nc columns of it) = activations vy [nr][n] x weights vx [nc][n]; n a multiple of 32, nc of 8. */
typedef void product(int n, float *s, size_t bs, const void *vx, const void *vy, int nr, int nc);

product mobilevlm_gemm_q4_0; /* nr a multiple of 4, vy in activations_4 */
product mobilevlm_gemv_q4_0; /* vy in activations_1 */

/* Between the order of columns and the order that unpacking gives, 0 1 4 5 2 3 6 7: its own inverse. */
static inline __m256 in_order(__m256 v) {
    return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7));
}
