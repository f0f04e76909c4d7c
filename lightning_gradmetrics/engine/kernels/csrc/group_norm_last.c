/* A group norm of images whose channels are adjacent in memory, forward and backward.
 *
 * The variance is that of differences to a centre close to the mean. E[x^2] - E[x]^2 would cancel if the mean is much larger than the
 * deviation. The gradients are those of group_norm.c.
 */
#include "kernels.h"

typedef struct {
  const REAL *x, *g;          /* (samples, positions, channels); g may be null: the forward pass */
  const REAL *weight, *bias;  /* (channels) */
  double *mean, *scale;       /* (samples, groups) */
  REAL *rows;                 /* (2, samples, channels): gradients of bias and weight */
  REAL *y;                    /* the output, or the gradient of the input, with the shape of x; may be null with g */
  double eps;
  int64_t samples, groups, channels, positions; /* all channels */
  atomic_int next;
} group_norm_last_job;

enum { WIDEST = 2048 }; /* channels at most */
enum { VECTORS = 4, LANES = VECTORS * WIDTH };
enum { FARTHEST = 4 }; /* largest ratio of a squared distance between centre and mean to the variance */
enum { CHUNK = 128 }; /* rows summed in single precision before they move to double */

/* Columns of a sample: each lane has one channel in all rows. A row contains several positions if there are few channels. */
typedef struct {
  int64_t first, rows, step;
  int width;
} block;

static block block_at(const group_norm_last_job *j, int64_t first) {
  const int64_t channels = j->channels, positions = j->positions;
  if (channels < LANES && LANES % channels == 0 && positions * channels % LANES == 0)
    return (block){0, positions * channels / LANES, LANES, LANES};
  return (block){first, positions, channels, channels - first < LANES ? (int)(channels - first) : LANES};
}

/* Sums over the rows of f and of f (x - centre), where f is g, or x - centre without g. */
inline_always void vector_sums(const REAL *x, const REAL *g, const block *b, const REAL *centre, double sums[2][LANES]) {
  memset(sums, 0, sizeof(double) * 2 * LANES);
  for (int64_t start = 0; start < b->rows; start += CHUNK) {
    const int64_t end = start + CHUNK < b->rows ? start + CHUNK : b->rows;
    vec one[VECTORS] = {{0}}, two[VECTORS] = {{0}};
    for (int64_t r = start; r < end; r++)
      for (int v = 0; v < VECTORS; v++) {
        const int64_t at = r * b->step + v * WIDTH;
        const vec value = *(const loose *)(x + at) - *(const loose *)(centre + v * WIDTH);
        const vec factor = g ? (vec) * (const loose *)(g + at) : value;
        one[v] += factor;
        two[v] += factor * value;
      }
    for (int l = 0; l < LANES; l++) sums[0][l] += one[l / WIDTH][l % WIDTH], sums[1][l] += two[l / WIDTH][l % WIDTH];
  }
}

static void lane_sums(const REAL *x, const REAL *g, const block *b, const REAL *centre, double sums[2][LANES]) {
  if (b->width == LANES) {
    if (g) vector_sums(x, g, b, centre, sums);
    else vector_sums(x, NULL, b, centre, sums);
    return;
  }
  memset(sums, 0, sizeof(double) * 2 * LANES);
  for (int64_t r = 0; r < b->rows; r++)
    for (int l = 0; l < b->width; l++) {
      const REAL value = x[r * b->step + l] - centre[l], factor = g ? g[r * b->step + l] : value;
      sums[0][l] += factor, sums[1][l] += (double)factor * value;
    }
}

/* The sums of each channel of a sample, about centres that all channels of a group share. */
static void channel_sums(const group_norm_last_job *j, const REAL *x, const REAL *g, const REAL *centres,
                         double *one, double *two) {
  const int64_t channels = j->channels, each = channels / j->groups;
  memset(one, 0, sizeof(double) * channels), memset(two, 0, sizeof(double) * channels);
  for (int64_t first = 0; first < channels; first += LANES) {
    const block b = block_at(j, first);
    REAL centre[LANES];
    double sums[2][LANES];
    for (int l = 0; l < b.width; l++) centre[l] = centres[(b.first + l) % channels / each];
    lane_sums(x + b.first, g ? g + b.first : NULL, &b, centre, sums);
    for (int l = 0; l < b.width; l++) one[(b.first + l) % channels] += sums[0][l], two[(b.first + l) % channels] += sums[1][l];
  }
}

/* y = (x - centre) slope + shift, plus g factor if there is a g; `shifts` and `factors` have one entry per channel. */
inline_always void affine_rows(const REAL *x, const REAL *g, REAL *y, const block *b, int width, const REAL *centre,
                               const REAL *slope, const REAL *shift, const REAL *factor) {
  for (int64_t r = 0; r < b->rows; r++)
#pragma GCC ivdep
    for (int l = 0; l < width; l++) {
      const int64_t at = r * b->step + l;
      const REAL value = (x[at] - centre[l]) * slope[l] + shift[l];
      y[at] = g ? value + g[at] * factor[l] : value;
    }
}

static void affine(const group_norm_last_job *j, const REAL *x, const REAL *g, REAL *y, const REAL *centres,
                   const REAL *slopes, const REAL *shifts, const REAL *factors) {
  const int64_t channels = j->channels, each = channels / j->groups;
  for (int64_t first = 0; first < channels; first += LANES) {
    const block b = block_at(j, first);
    REAL centre[LANES], slope[LANES], shift[LANES], factor[LANES];
    for (int l = 0; l < b.width; l++) {
      const int64_t c = (b.first + l) % channels;
      centre[l] = centres[c / each], slope[l] = slopes[c], shift[l] = shifts[c], factor[l] = g ? factors[c] : 0;
    }
    const REAL *from = x + b.first, *gradient = g ? g + b.first : NULL;
    if (b.width == LANES && g)
      affine_rows(from, gradient, y + b.first, &b, LANES, centre, slope, shift, factor);
    else if (b.width == LANES)
      affine_rows(from, NULL, y + b.first, &b, LANES, centre, slope, shift, factor);
    else
      affine_rows(from, gradient, y + b.first, &b, b.width, centre, slope, shift, factor);
  }
}

/* The mean of each group at the first position: close to the mean of all positions, unless that position is unusual. */
static void first_centres(const group_norm_last_job *j, const REAL *x, REAL *centres) {
  const int64_t each = j->channels / j->groups;
  for (int64_t k = 0; k < j->groups; k++) {
    double total = 0;
    for (int64_t c = k * each; c < (k + 1) * each; c++) total += x[c];
    centres[k] = (REAL)(total / (double)each);
  }
}

/* The mean and the variance of each group, from sums about centres. Returns whether the centres were close enough: otherwise the
 * variance has lost digits, and the centres become the means. */
static int group_moments(const group_norm_last_job *j, const REAL *x, REAL *centres, double *rest, double *variance) {
  const int64_t each = j->channels / j->groups;
  const double count = (double)(each * j->positions);
  double one[WIDEST], two[WIDEST];
  int close = 1;
  channel_sums(j, x, NULL, centres, one, two);
  for (int64_t k = 0; k < j->groups; k++) {
    double total = 0, square = 0;
    for (int64_t c = k * each; c < (k + 1) * each; c++) total += one[c], square += two[c];
    rest[k] = total / count, variance[k] = square / count - rest[k] * rest[k];
    if (rest[k] * rest[k] > FARTHEST * variance[k]) close = 0;
  }
  for (int64_t k = 0; !close && k < j->groups; k++) centres[k] = (REAL)(centres[k] + rest[k]);
  return close;
}

static void forward(const group_norm_last_job *j, int64_t n) {
  const int64_t channels = j->channels, each = channels / j->groups;
  const REAL *x = j->x + n * j->positions * channels;
  double rest[WIDEST], variance[WIDEST];
  REAL centres[WIDEST], slopes[WIDEST], shifts[WIDEST];
  first_centres(j, x, centres);
  if (!group_moments(j, x, centres, rest, variance)) group_moments(j, x, centres, rest, variance);
  for (int64_t k = 0; k < j->groups; k++) {
    const double scale = 1 / sqrt(variance[k] + j->eps);
    j->mean[n * j->groups + k] = centres[k] + rest[k], j->scale[n * j->groups + k] = scale;
    for (int64_t c = k * each; c < (k + 1) * each; c++)
      slopes[c] = (REAL)(scale * j->weight[c]), shifts[c] = (REAL)(j->bias[c] - rest[k] * scale * j->weight[c]);
  }
  affine(j, x, NULL, j->y + n * j->positions * channels, centres, slopes, shifts, NULL);
}

static void backward(const group_norm_last_job *j, int64_t n) {
  const int64_t channels = j->channels, each = channels / j->groups;
  const double count = (double)(each * j->positions);
  const REAL *x = j->x + n * j->positions * channels, *g = j->g + n * j->positions * channels;
  REAL *bias_row = j->rows + n * channels, *weight_row = bias_row + j->samples * channels;
  double one[WIDEST], two[WIDEST];
  REAL centres[WIDEST], slopes[WIDEST], shifts[WIDEST], factors[WIDEST];
  for (int64_t k = 0; k < j->groups; k++) centres[k] = (REAL)j->mean[n * j->groups + k];
  channel_sums(j, x, g, centres, one, two);
  for (int64_t k = 0; k < j->groups; k++) {
    const double scale = j->scale[n * j->groups + k], rest = j->mean[n * j->groups + k] - centres[k];
    double total = 0, product = 0;
    for (int64_t c = k * each; c < (k + 1) * each; c++) {
      const double normalised = (two[c] - rest * one[c]) * scale;
      bias_row[c] = (REAL)one[c], weight_row[c] = (REAL)normalised;
      total += j->weight[c] * one[c], product += j->weight[c] * normalised;
    }
    const double slope = -scale * scale * product / count, shift = -scale * total / count - rest * slope;
    for (int64_t c = k * each; c < (k + 1) * each; c++)
      slopes[c] = (REAL)slope, shifts[c] = (REAL)shift, factors[c] = (REAL)(scale * j->weight[c]);
  }
  if (j->y) affine(j, x, g, j->y + n * j->positions * channels, centres, slopes, shifts, factors);
}

static void last_work(void *data) {
  group_norm_last_job *j = data;
  for (int64_t n; (n = atomic_fetch_add(&j->next, 1)) < j->samples;) j->g ? backward(j, n) : forward(j, n);
}

int64_t group_norm_last_job_bytes(void) { return sizeof(group_norm_last_job); }

void group_norm_last(group_norm_last_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  run_threads(last_work, j, run, threads);
}
