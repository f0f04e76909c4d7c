/* The backward pass of a group norm: the gradients of bias, weight and input, from sums over the positions of each channel.
 *
 * With normalised input x^ = (x - mean) scale, and means over a group of channels, the gradient of the input is
 * scale (w g - mean(w g) - x^ mean(w g x^)). Both means are sums of the channels' gradients of bias and weight.
 */
#include "kernels.h"

typedef struct {
  const REAL *x, *g;         /* (samples, groups, channels, positions), dense */
  const REAL *mean, *scale;  /* (samples, groups) */
  const REAL *weight;        /* (groups, channels) */
  REAL *rows;                /* (2, samples, groups, channels): gradients of bias and weight */
  REAL *product;             /* the gradient of the input, with the shape of x; may be null */
  int64_t samples, groups, channels, positions; /* channels of a group */
  atomic_int next;
} group_norm_job;

enum { CHUNK = 512 }; /* terms summed in single precision before they move to double */

/* The sums of g and of g (x - mean) over the positions of a channel. */
inline_always void channel_sums(const REAL *x, const REAL *g, int64_t positions, REAL mean, double sums[2]) {
  sums[0] = sums[1] = 0;
  for (int64_t p = 0; p < positions; p += CHUNK) {
    const int64_t end = p + CHUNK < positions ? p + CHUNK : positions;
    int64_t i = p;
    vec a[4] = {{0}}, b[4] = {{0}};
    for (; i + 4 * WIDTH <= end; i += 4 * WIDTH)
      for (int v = 0; v < 4; v++) {
        const vec value = *(const loose *)(g + i + v * WIDTH);
        a[v] += value;
        b[v] += value * (*(const loose *)(x + i + v * WIDTH) - mean);
      }
    sums[0] += lane_total(a[0] + a[1] + a[2] + a[3]), sums[1] += lane_total(b[0] + b[1] + b[2] + b[3]);
    for (; i < end; i++) sums[0] += g[i], sums[1] += (double)(x[i] - mean) * g[i];
  }
}

static void group_gradients(const group_norm_job *j, int64_t task) {
  const int64_t channels = j->channels, positions = j->positions, first = task * channels;
  const REAL *weight = j->weight + task % j->groups * channels;
  const REAL *x = j->x + first * positions, *g = j->g + first * positions;
  const REAL mean = j->mean[task], scale = j->scale[task];
  REAL *rows = j->rows + first;
  double total = 0, product = 0;
  for (int64_t c = 0; c < channels; c++) {
    double sums[2];
    channel_sums(x + c * positions, g + c * positions, positions, mean, sums);
    rows[c] = (REAL)sums[0];
    rows[c + j->samples * j->groups * channels] = (REAL)(sums[1] * scale);
    total += weight[c] * sums[0], product += weight[c] * sums[1] * scale;
  }
  if (!j->product) return;
  const double count = (double)(channels * positions);
  const REAL slope = (REAL)(-scale * (double)scale * product / count), shift = (REAL)(-scale * total / count);
  REAL *to = j->product + first * positions;
  for (int64_t c = 0; c < channels; c++) {
    const REAL factor = scale * weight[c];
#pragma GCC ivdep
    for (int64_t p = c * positions; p < (c + 1) * positions; p++) to[p] = g[p] * factor + ((x[p] - mean) * slope + shift);
  }
}

static void group_norm_work(void *data) {
  group_norm_job *j = data;
  for (int64_t task; (task = atomic_fetch_add(&j->next, 1)) < j->samples * j->groups;) group_gradients(j, task);
}

int64_t group_norm_job_bytes(void) { return sizeof(group_norm_job); }

void group_norm_gradients(group_norm_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  run_threads(group_norm_work, j, run, threads);
}
