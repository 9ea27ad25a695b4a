/* The names that llama.cpp calls, and whose products they are.
 *
 * A library that is loaded before llama.cpp, and offers a function by the same name, is asked first: so the dynamic
 * linker finds these here. llama.cpp's own remain within its library; q4_kernel.py finds them there.
 */
#include "q4_formats.h"

static product *gemm = mobilevlm_gemm_q4_0, *gemv = mobilevlm_gemv_q4_0;
unsigned mobilevlm_q4_0_calls; /* how often llama.cpp called; threads may lose counts */

/* Whose products are used from now on; not while one is running. */
void mobilevlm_q4_0_use(product *new_gemm, product *new_gemv) {
    gemm = new_gemm;
    gemv = new_gemv;
}

static void count(void) {
    const unsigned calls = __atomic_load_n(&mobilevlm_q4_0_calls, __ATOMIC_RELAXED);
    __atomic_store_n(&mobilevlm_q4_0_calls, calls + 1, __ATOMIC_RELAXED);
}

void ggml_gemm_q4_0_8x8_q8_0(int n, float *s, size_t bs, const void *vx, const void *vy, int nr, int nc) {
    count();
    gemm(n, s, bs, vx, vy, nr, nc);
}

void ggml_gemv_q4_0_8x8_q8_0(int n, float *s, size_t bs, const void *vx, const void *vy, int nr, int nc) {
    count();
    gemv(n, s, bs, vx, vy, nr, nc);
}
