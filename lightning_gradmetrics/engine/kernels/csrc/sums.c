/* Sums over positions of g and of x g, in one pass: the gradients of a bias and of a norm layer's weight.
 *
 * For a batch norm with running statistics the pass also returns the gradient of its input, g times a factor per channel.
 */
#include "kernels.h"

typedef struct {
  const REAL *x, *g;                    /* x may be null */
  double *out;                          /* (2, samples, channels): sums of g, sums of x g; null if rows are wanted */
  REAL *rows;                           /* (2, samples, channels): the same, where x is normalised if there is a mean */
  REAL *scaled;                         /* the gradient of the input of a batch norm, with the strides of g; may be null */
  const REAL *mean, *variance, *weight; /* (channels) */
  double eps;
  int64_t samples, channels, positions;
  int64_t x_sample, x_channel, x_position, g_sample, g_channel, g_position;
  int64_t normalised; /* whether x is normalised over the channels of each position, as in a layer norm */
  atomic_int next;
} sum_job;

enum { WIDEST = 4096 }; /* channels of a layer norm at most */
enum { CHUNK = 512 };   /* terms summed in single precision before they move to double */

/* Writes the sums of some channels from `first` on; the loop over them uses vectors, since roots and quotients are slow. */
inline_always void store(const sum_job *j, int64_t n, int64_t first, int width, const double *sum, const double *product) {
  const int64_t at = n * j->channels + first, second = at + j->samples * j->channels;
  if (j->out) {
    memcpy(j->out + at, sum, sizeof(double) * width), memcpy(j->out + second, product, sizeof(double) * width);
    return;
  }
  for (int c = 0; c < width; c++) j->rows[at + c] = (REAL)sum[c];
  for (int c = 0; j->x && !j->mean && c < width; c++) j->rows[second + c] = (REAL)product[c];
#pragma GCC ivdep
  for (int c = 0; j->x && j->mean && c < width; c++)
    j->rows[second + c] = (REAL)((product[c] - sum[c] * j->mean[first + c]) / sqrt(j->variance[first + c] + j->eps));
}

/* The factor of g in the gradient of the input of a batch norm. */
inline_always REAL factor_of(const sum_job *j, int64_t c) { return (REAL)(j->weight[c] / sqrt(j->variance[c] + j->eps)); }

/* One channel whose positions are adjacent in memory. */
inline_always void channel_sums(const sum_job *j, int64_t n, int64_t c, const REAL *x, const REAL *g, REAL *scaled) {
  const REAL factor = scaled ? factor_of(j, c) : 1;
  double sum = 0, product = 0;
  for (int64_t p = 0; p < j->positions; p += CHUNK) {
    int size = j->positions - p < CHUNK ? (int)(j->positions - p) : CHUNK, i = 0;
    vec a[4] = {{0}}, b[4] = {{0}};
    for (; i + 4 * WIDTH <= size; i += 4 * WIDTH)
      for (int v = 0; v < 4; v++) {
        vec value = *(const loose *)(g + p + i + v * WIDTH);
        a[v] += value;
        if (x) b[v] += value * *(const loose *)(x + p + i + v * WIDTH);
        if (scaled) *(loose *)(scaled + p + i + v * WIDTH) = value * factor;
      }
    a[0] += a[1] + a[2] + a[3], b[0] += b[1] + b[2] + b[3];
    sum += lane_total(a[0]), product += lane_total(b[0]);
    for (; i < size; i++) {
      sum += g[p + i];
      if (x) product += (double)x[p + i] * g[p + i];
      if (scaled) scaled[p + i] = g[p + i] * factor;
    }
  }
  store(j, n, c, 1, &sum, &product);
}

/* Up to CHUNK channels from `first` on, which are adjacent in memory. */
inline_always void position_sums(const sum_job *j, int64_t n, int64_t first, int width, const REAL *x, const REAL *g,
                                 REAL *scaled) {
  REAL a[CHUNK], b[CHUNK], factor[CHUNK];
  double sum[CHUNK], product[CHUNK];
  for (int c = 0; c < width; c++) sum[c] = product[c] = 0, factor[c] = scaled ? factor_of(j, first + c) : 1;
  for (int64_t p = 0; p < j->positions; p += 64) {
    int64_t end = p + 64 < j->positions ? p + 64 : j->positions;
    memset(a, 0, sizeof(REAL) * width);
    memset(b, 0, sizeof(REAL) * width);
    for (int64_t q = p; q < end; q++) {
      const REAL *gq = g + q * j->g_position, *xq = x ? x + q * j->x_position : NULL;
      REAL *sq = scaled ? scaled + q * j->g_position : NULL;
#pragma GCC ivdep
      for (int c = 0; c < width; c++) {
        a[c] += gq[c];
        if (x) b[c] += gq[c] * xq[c];
        if (scaled) sq[c] = gq[c] * factor[c];
      }
    }
    for (int c = 0; c < width; c++) sum[c] += a[c], product[c] += b[c];
  }
  store(j, n, first, width, sum, product);
}

/* All channels of a sample; the compiler makes one version for each of the operands that may be null. */
inline_always void sample_sums(const sum_job *j, int64_t n, const REAL *x, const REAL *g, REAL *scaled) {
  if (j->g_position == 1 && (!x || j->x_position == 1))
    for (int64_t c = 0; c < j->channels; c++)
      channel_sums(j, n, c, x ? x + c * j->x_channel : NULL, g + c * j->g_channel, scaled ? scaled + c * j->g_channel : NULL);
  else
    for (int64_t c = 0; c < j->channels; c += CHUNK)
      position_sums(j, n, c, j->channels - c < CHUNK ? (int)(j->channels - c) : CHUNK, x ? x + c : NULL, g + c,
                    scaled ? scaled + c : NULL);
}

/* The sum of (x - shift) or, if `squared`, of its square over the channels of a position. */
inline_always double row_sum(const REAL *x, int64_t count, REAL shift, int squared) {
  vec part[4] = {{0}};
  int64_t c = 0;
  for (; c + 4 * WIDTH <= count; c += 4 * WIDTH)
    for (int v = 0; v < 4; v++) {
      const vec value = *(const loose *)(x + c + v * WIDTH) - shift;
      part[v] += squared ? value * value : value;
    }
  for (; c + WIDTH <= count; c += WIDTH) {
    const vec value = *(const loose *)(x + c) - shift;
    part[0] += squared ? value * value : value;
  }
  part[0] += part[1] + part[2] + part[3];
  double sum = lane_total(part[0]);
  for (; c < count; c++) sum += squared ? (double)(x[c] - shift) * (x[c] - shift) : x[c] - shift;
  return sum;
}

/* All channels of a sample, which are adjacent in memory, for a layer norm. */
static void normalised_sums(const sum_job *j, int64_t n, const REAL *x, const REAL *g) {
  const int64_t width = j->channels;
  REAL a[WIDEST], b[WIDEST];
  double sum[WIDEST], product[WIDEST];
  for (int64_t c = 0; c < width; c++) sum[c] = product[c] = 0;
  for (int64_t p = 0; p < j->positions; p += 64) {
    const int64_t end = p + 64 < j->positions ? p + 64 : j->positions;
    memset(a, 0, sizeof(REAL) * width);
    memset(b, 0, sizeof(REAL) * width);
    for (int64_t q = p; q < end; q++) {
      const REAL *gq = g + q * j->g_position, *xq = x + q * j->x_position;
      const REAL mean = (REAL)(row_sum(xq, width, 0, 0) / width);
      const REAL scale = (REAL)(1 / sqrt(row_sum(xq, width, mean, 1) / width + j->eps));
#pragma GCC ivdep
      for (int64_t c = 0; c < width; c++) {
        a[c] += gq[c];
        b[c] += gq[c] * ((xq[c] - mean) * scale);
      }
    }
    for (int64_t c = 0; c < width; c++) sum[c] += a[c], product[c] += b[c];
  }
  store(j, n, 0, (int)width, sum, product);
}

static void sum_work(void *data) {
  sum_job *j = data;
  for (int64_t n; (n = atomic_fetch_add(&j->next, 1)) < j->samples;) {
    const REAL *x = j->x + n * j->x_sample, *g = j->g + n * j->g_sample;
    REAL *scaled = j->scaled + n * j->g_sample;
    if (j->normalised)
      normalised_sums(j, n, x, g);
    else if (j->scaled)
      sample_sums(j, n, x, g, scaled);
    else if (j->x)
      sample_sums(j, n, x, g, NULL);
    else
      sample_sums(j, n, NULL, g, NULL);
  }
}

int64_t sum_job_bytes(void) { return sizeof(sum_job); }

void position_statistics(sum_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  run_threads(sum_work, j, run, threads);
}
