/* Prompts through 4-bit weights, for x86-64 CPUs with AVX2: llama.cpp's Q4_0 matrix product, in less time.
 *
 * Computes what ggml_gemm_q4_0_8x8_q8_0 does (ggml/src/ggml-cpu/arch/x86/repack.cpp), to the bit: the same integers,
 * scaled and added in the same order.
 *
 * What llama.cpp spends five instructions on (two of them to move signs about, because vpmaddubsw multiplies unsigned
 * by signed bytes), this spends two on: vpmaddubsw and a 16-bit addition.
 *   - Activations q in [-127, 127] are made unsigned once, for all columns: q + 128.
 *   - 128 times the sum of the weights, which that adds, is what the sums start from, negative.
 *   - Weights w are in [-8, 7]. A 16-bit lane adds up the 16 products of one block of 32 inputs (two a vpmaddubsw, eight
 *     of these). While k of them are in, it holds sum_k(q w) - 128 sum_rest(w), so at most 128 * 8 * 16 = 16384 in
 *     magnitude; and one vpmaddubsw at most 2 * 255 * 8 = 4080. Nothing saturates.
 * Tiles of 4 rows by 16 columns keep the sums of a block in eight registers. A panel of activations is copied to where
 * it lies without gaps and stays in the second-level cache; weights are unpacked once for all of its rows.
 */
#include <string.h>

#include "q4_formats.h"

#define PANEL_ROWS 192 /* tokens of a panel; a multiple of 4 */
#define PANEL_BLOCKS 32

typedef struct {
    uint8_t q[PANEL_BLOCKS][PANEL_ROWS / 4][128]; /* activations_4.qs + 128 */
    float d[PANEL_BLOCKS][PANEL_ROWS];
    float sum[PANEL_ROWS][2 * GROUP];
} panel;

/* Of 16 columns and one block. Columns of a group in the order 0 1 4 5 2 3 6 7, which is its own inverse. */
typedef struct {
    __m256i w[8][2]; /* bytes; w[i]: inputs 4 i to 4 i + 3 of each column */
    __m256i start[2];
    __m256 d[2];
} columns;

static _Thread_local panel thread_panel;

static void fill_panel(panel *p, const activations_4 *a, int n_blocks, int blocks, int rows) {
    const __m256i to_unsigned = _mm256_set1_epi8((char)128);
    for (int y = 0; y < rows / 4; y++, a += n_blocks) {
        for (int b = 0; b < blocks; b++) {
            _mm_storeu_ps(&p->d[b][4 * y], _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)a[b].d)));
            for (int i = 0; i < 128; i += 32) {
                const __m256i q = _mm256_loadu_si256((const __m256i *)(a[b].qs + i));
                _mm256_storeu_si256((__m256i *)(p->q[b][y] + i), _mm256_xor_si256(q, to_unsigned));
            }
        }
    }
}

static inline __m256i signed_nibbles(__m256i v) {
    const __m256i eight = _mm256_set1_epi8(8);
    return _mm256_sub_epi8(_mm256_xor_si256(_mm256_and_si256(v, _mm256_set1_epi8(15)), eight), eight);
}

static inline void unpack(columns *c, int group, const weights_8 *w) {
    for (int half = 0; half < 2; half++) {
        const __m256 p = _mm256_loadu_ps((const float *)(w->qs + 64 * half));
        const __m256 q = _mm256_loadu_ps((const float *)(w->qs + 64 * half + 32));
        const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(p, q, 0x88));
        const __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps(p, q, 0xdd));
        c->w[2 * half][group] = signed_nibbles(even);
        c->w[2 * half + 1][group] = signed_nibbles(odd);
        c->w[4 + 2 * half][group] = signed_nibbles(_mm256_srli_epi16(even, 4));
        c->w[4 + 2 * half + 1][group] = signed_nibbles(_mm256_srli_epi16(odd, 4));
    }
    __m256i start = _mm256_setzero_si256();
    for (int i = 0; i < 8; i++) {
        start = _mm256_sub_epi16(start, _mm256_maddubs_epi16(_mm256_set1_epi8((char)128), c->w[i][group]));
    }
    c->start[group] = start;
    c->d[group] = in_order(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)w->d)));
}

/* The empty asm keeps the order of the additions: a compiler that regroups them needs more registers than there are. */
#define ADD_PRODUCTS(sum, q, w)                                       \
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(q, w));          \
    __asm__("" : "+x"(sum))

#define FOUR_INPUTS(i)                                                \
    {                                                                 \
        const __m256i w0 = c->w[i][0], w1 = c->w[i][1];               \
        const uint8_t *at = q + 32 * ((i) / 2) + 4 * ((i) % 2);       \
        __m256i x = broadcast_4(at);                                  \
        ADD_PRODUCTS(s00, x, w0);                                     \
        ADD_PRODUCTS(s01, x, w1);                                     \
        x = broadcast_4(at + 8);                                      \
        ADD_PRODUCTS(s10, x, w0);                                     \
        ADD_PRODUCTS(s11, x, w1);                                     \
        x = broadcast_4(at + 16);                                     \
        ADD_PRODUCTS(s20, x, w0);                                     \
        ADD_PRODUCTS(s21, x, w1);                                     \
        x = broadcast_4(at + 24);                                     \
        ADD_PRODUCTS(s30, x, w0);                                     \
        ADD_PRODUCTS(s31, x, w1);                                     \
    }

static inline __m256i broadcast_4(const uint8_t *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
}

static inline void add_scaled(float *sum, __m256i products, __m256 d) {
    const __m256 whole = _mm256_cvtepi32_ps(_mm256_madd_epi16(products, _mm256_set1_epi16(1)));
    _mm256_storeu_ps(sum, _mm256_fmadd_ps(whole, d, _mm256_loadu_ps(sum)));
}

/* Adds one block's part of all rows of a panel to 16 columns; q [rows / 4][128], d [rows], sum [rows][16]. */
static void add_block(float *restrict sum, const uint8_t *restrict q, const float *restrict d, const columns *restrict c,
                      int rows) {
    for (int row = 0; row < rows; row += 4, q += 128, d += 4, sum += 4 * 2 * GROUP) {
        __m256i s00 = c->start[0], s10 = s00, s20 = s00, s30 = s00;
        __m256i s01 = c->start[1], s11 = s01, s21 = s01, s31 = s01;
        FOUR_INPUTS(0)
        FOUR_INPUTS(1)
        FOUR_INPUTS(2)
        FOUR_INPUTS(3)
        FOUR_INPUTS(4)
        FOUR_INPUTS(5)
        FOUR_INPUTS(6)
        FOUR_INPUTS(7)
        const __m256 d0 = c->d[0], d1 = c->d[1];
        __m256 row_d = _mm256_broadcast_ss(d);
        add_scaled(sum, s00, _mm256_mul_ps(d0, row_d));
        add_scaled(sum + 8, s01, _mm256_mul_ps(d1, row_d));
        row_d = _mm256_broadcast_ss(d + 1);
        add_scaled(sum + 16, s10, _mm256_mul_ps(d0, row_d));
        add_scaled(sum + 24, s11, _mm256_mul_ps(d1, row_d));
        row_d = _mm256_broadcast_ss(d + 2);
        add_scaled(sum + 32, s20, _mm256_mul_ps(d0, row_d));
        add_scaled(sum + 40, s21, _mm256_mul_ps(d1, row_d));
        row_d = _mm256_broadcast_ss(d + 3);
        add_scaled(sum + 48, s30, _mm256_mul_ps(d0, row_d));
        add_scaled(sum + 56, s31, _mm256_mul_ps(d1, row_d));
    }
}

/* One or two groups of columns, all rows of the panel; out [rows] of stride bs, to be begun or gone on with. */
static void add_columns(panel *p, const weights_8 *w, int n_blocks, int blocks, int rows, int groups, float *out,
                        size_t bs, int begin) {
    columns c;
    memset(&c, 0, sizeof c);
    for (int row = 0; row < rows; row++) {
        for (int g = 0; g < groups; g++) {
            const __m256 before = begin ? _mm256_setzero_ps() : in_order(_mm256_loadu_ps(out + row * bs + GROUP * g));
            _mm256_storeu_ps(&p->sum[row][GROUP * g], before);
        }
    }
    for (int b = 0; b < blocks; b++) {
        for (int g = 0; g < groups; g++) unpack(&c, g, w + (size_t)g * n_blocks + b);
        add_block(p->sum[0], p->q[b][0], p->d[b], &c, rows);
    }
    for (int row = 0; row < rows; row++) {
        for (int g = 0; g < groups; g++) {
            _mm256_storeu_ps(out + row * bs + GROUP * g, in_order(_mm256_loadu_ps(&p->sum[row][GROUP * g])));
        }
    }
}

/* s [nr][bs] (nc columns of it) = activations [nr][n] x weights [nc][n]; n a multiple of 32, nr of 4, nc of 8. */
void mobilevlm_gemm_q4_0(int n, float *s, size_t bs, const void *vx, const void *vy, int nr, int nc) {
    panel *p = &thread_panel;
    const int n_blocks = n / QK;
    const int n_panels = (nr + PANEL_ROWS - 1) / PANEL_ROWS;
    const int most_rows = n_panels ? (nr / 4 + n_panels - 1) / n_panels * 4 : 0;
    for (int row = 0; row < nr; row += most_rows) {
        const int rows = nr - row < most_rows ? nr - row : most_rows;
        const activations_4 *a = (const activations_4 *)vy + (size_t)(row / 4) * n_blocks;
        for (int block = 0; block < n_blocks; block += PANEL_BLOCKS) {
            const int blocks = n_blocks - block < PANEL_BLOCKS ? n_blocks - block : PANEL_BLOCKS;
            fill_panel(p, a + block, n_blocks, blocks, rows);
            for (int x = 0; x < nc / GROUP; x += 2) {
                const weights_8 *w = (const weights_8 *)vx + (size_t)x * n_blocks + block;
                const int groups = nc / GROUP - x < 2 ? 1 : 2;
                add_columns(p, w, n_blocks, blocks, rows, groups, s + row * bs + GROUP * x, bs, block == 0);
            }
        }
    }
}
