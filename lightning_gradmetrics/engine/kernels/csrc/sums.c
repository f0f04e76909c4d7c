/* Sums over positions of g and of x g, in one pass: the gradients of a bias and of a norm layer's weight. */
#include "kernels.h"

typedef struct {
  const REAL *x, *g; /* x may be null */
  double *out;       /* (2, samples, channels): sums of g, sums of x g */
  int64_t samples, channels, positions;
  int64_t x_sample, x_channel, x_position, g_sample, g_channel, g_position;
  atomic_int next;
} sum_job;

enum { CHUNK = 512 }; /* terms summed in single precision before they move to double */

/* One channel whose positions are adjacent in memory. */
static void channel_sums(const REAL *x, const REAL *g, int64_t count, double *sum, double *product) {
  *sum = *product = 0;
  for (int64_t p = 0; p < count; p += CHUNK) {
    int size = count - p < CHUNK ? (int)(count - p) : CHUNK, i = 0;
    vec a[4] = {{0}}, b[4] = {{0}};
    for (; i + 4 * WIDTH <= size; i += 4 * WIDTH)
      for (int v = 0; v < 4; v++) {
        vec value = *(const loose *)(g + p + i + v * WIDTH);
        a[v] += value;
        if (x) b[v] += value * *(const loose *)(x + p + i + v * WIDTH);
      }
    a[0] += a[1] + a[2] + a[3], b[0] += b[1] + b[2] + b[3];
    for (int j = 0; j < WIDTH; j++) *sum += a[0][j], *product += b[0][j];
    for (; i < size; i++) {
      *sum += g[p + i];
      if (x) *product += (double)x[p + i] * g[p + i];
    }
  }
}

/* Up to CHUNK channels that are adjacent in memory. */
static void position_sums(const sum_job *j, const REAL *x, const REAL *g, int width, double *sum, double *product) {
  REAL a[CHUNK], b[CHUNK];
  for (int c = 0; c < width; c++) sum[c] = product[c] = 0;
  for (int64_t p = 0; p < j->positions; p += 64) {
    int64_t end = p + 64 < j->positions ? p + 64 : j->positions;
    memset(a, 0, sizeof(REAL) * width);
    memset(b, 0, sizeof(REAL) * width);
    for (int64_t q = p; q < end; q++) {
      const REAL *gq = g + q * j->g_position, *xq = x ? x + q * j->x_position : NULL;
      for (int c = 0; c < width; c++) a[c] += gq[c];
      if (x)
        for (int c = 0; c < width; c++) b[c] += gq[c] * xq[c];
    }
    for (int c = 0; c < width; c++) sum[c] += a[c], product[c] += b[c];
  }
}

static void sum_work(void *data) {
  sum_job *j = data;
  for (int64_t n; (n = atomic_fetch_add(&j->next, 1)) < j->samples;) {
    const REAL *x = j->x ? j->x + n * j->x_sample : NULL, *g = j->g + n * j->g_sample;
    double *sum = j->out + n * j->channels, *product = sum + j->samples * j->channels;
    if (j->g_position == 1 && (!x || j->x_position == 1))
      for (int64_t c = 0; c < j->channels; c++)
        channel_sums(x ? x + c * j->x_channel : NULL, g + c * j->g_channel, j->positions, sum + c, product + c);
    else
      for (int64_t c = 0; c < j->channels; c += CHUNK)
        position_sums(j, x ? x + c : NULL, g + c, j->channels - c < CHUNK ? (int)(j->channels - c) : CHUNK, sum + c,
                      product + c);
  }
}

int64_t sum_job_bytes(void) { return sizeof(sum_job); }

void position_statistics(sum_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  run_threads(sum_work, j, run, threads);
}
