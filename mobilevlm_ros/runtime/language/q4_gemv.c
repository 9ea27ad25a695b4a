/* Single tokens through 4-bit weights, for x86-64 CPUs with AVX2: as fast as memory gives the weights, or nearly.
 *
 * Computes what ggml_gemv_q4_0_8x8_q8_0 does (ggml/src/ggml-cpu/arch/x86/repack.cpp), to the bit: the same integers,
 * scaled and added in the same order. Each answer token is such a product with every weight of the model, and so is
 * each of the one to three last tokens of a prompt whose length is no multiple of four.
 *
 * Here the weights are the unsigned factors of vpmaddubsw (w + 8, which is a nibble with its upper bit turned over), in
 * the order in which they lie, so that nothing is moved about. The sums start from minus eight times the activations.
 * A 16-bit lane adds up 8 products: at most 4 * 2 * 15 * 127 + 8 * 8 * 127 = 23368 in magnitude. Nothing saturates.
 */
#include <string.h>

#include "q4_formats.h"

#define MOST_BLOCKS 1024 /* inputs of one part: 32768 */
#define AHEAD 32         /* blocks; the CPU's own prefetching leaves a third of the memory's speed unused */

/* One block's activations, as the products want them: repeated for the four columns that a vector holds. */
typedef struct {
    int64_t q[4];  /* eight bytes each */
    int64_t start; /* four 16-bit sums: -8 * (q[2 p] + q[2 p + 1] of each of the four) */
    float d;
} inputs;

static _Thread_local inputs thread_inputs[MOST_BLOCKS];

static void fill_inputs(inputs *to, const activations_1 *a, int blocks) {
    for (int b = 0; b < blocks; b++) {
        memcpy(to[b].q, a[b].qs, QK);
        const __m256i q = _mm256_loadu_si256((const __m256i *)a[b].qs);
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(8), q);
        __m128i sums = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        sums = _mm_add_epi16(sums, _mm_unpackhi_epi64(sums, sums));
        to[b].start = _mm_cvtsi128_si64(_mm_sub_epi16(_mm_setzero_si128(), sums));
        to[b].d = _cvtsh_ss(a[b].d);
    }
}

static inline __m256i low(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }

static inline __m256i high(__m256i v) { return low(_mm256_srli_epi16(v, 4)); }

/* Products of four columns; v: their inputs 0-7 and 16-23, w: 8-15 and 24-31. Four 16-bit sums a column. */
static inline __m256i four_columns(const inputs *a, const uint8_t *at) {
    const __m256i flip = _mm256_set1_epi8((char)0x88);
    const __m256i v = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)at), flip);
    const __m256i w = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(at + 64)), flip);
    __m256i one = _mm256_set1_epi64x(a->start);
    one = _mm256_add_epi16(one, _mm256_maddubs_epi16(low(v), _mm256_set1_epi64x(a->q[0])));
    one = _mm256_add_epi16(one, _mm256_maddubs_epi16(low(w), _mm256_set1_epi64x(a->q[1])));
    __m256i other = _mm256_maddubs_epi16(high(v), _mm256_set1_epi64x(a->q[2]));
    other = _mm256_add_epi16(other, _mm256_maddubs_epi16(high(w), _mm256_set1_epi64x(a->q[3])));
    return _mm256_add_epi16(one, other);
}

static inline void fetch(const weights_8 *w) { /* of any address: beyond the end it does nothing */
    for (size_t i = 0; i < sizeof *w; i += 64) _mm_prefetch((const char *)w + i, _MM_HINT_T0);
}

void mobilevlm_gemv_q4_0(int n, float *s, size_t bs, const void *vx, const void *vy, int nr, int nc) {
    inputs *a = thread_inputs;
    const int n_blocks = n / QK;
    const __m256i ones = _mm256_set1_epi16(1);
    for (int row = 0; row < nr; row++, s += bs) {
        for (int block = 0; block < n_blocks; block += MOST_BLOCKS) {
            const int blocks = n_blocks - block < MOST_BLOCKS ? n_blocks - block : MOST_BLOCKS;
            fill_inputs(a, (const activations_1 *)vy + (size_t)row * n_blocks + block, blocks);
            for (int x = 0; x < nc / GROUP; x++) {
                const weights_8 *w = (const weights_8 *)vx + (size_t)x * n_blocks + block;
                __m256 sum = block ? in_order(_mm256_loadu_ps(s + GROUP * x)) : _mm256_setzero_ps();
                for (int b = 0; b < blocks; b++) {
                    fetch(w + b + AHEAD);
                    const __m256 p = _mm256_castsi256_ps(_mm256_madd_epi16(four_columns(a + b, w[b].qs), ones));
                    const __m256 q = _mm256_castsi256_ps(_mm256_madd_epi16(four_columns(a + b, w[b].qs + 32), ones));
                    const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(p, q, 0x88));
                    const __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps(p, q, 0xdd));
                    const __m128i d = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)w[b].d), 0xd8);
                    const __m256 scale = _mm256_mul_ps(_mm256_cvtph_ps(d), _mm256_set1_ps(a[b].d));
                    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(even, odd)), scale, sum);
                }
                _mm256_storeu_ps(s + GROUP * x, in_order(sum));
            }
        }
    }
}
