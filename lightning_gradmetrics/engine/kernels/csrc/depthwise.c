/* Depthwise convolutions: one filter per channel, so the lanes of a vector are channels.
 *
 * For each sample and block of COLS channels, input and output gradient are copied to planes whose adjacent values are
 * channels. ROWS kernel entries of the block stay in registers over all positions and are then added to the statistics.
 */
#include "kernels.h"

typedef struct {
  const REAL *x, *g;
  double *out;                        /* (samples, blocks, STATISTICS) */
  char *scratch;                      /* workers x scratch_bytes */
  const int32_t *entries, *positions; /* offsets of kernel entries and output positions in the padded input */
  const REAL *scale, *weight;         /* (channels) and (channels, entries); null if not scaled */
  REAL *packed;                       /* memory for the same in the order of the lanes */
  double *products, *totals;          /* (samples, channels): sums of weight and gradient, and of g over positions */
  int64_t scratch_bytes, samples, channels, blocks, mode, entry_count;
  int64_t size[3], pad[3], out_size[3];
  int64_t x_sample, x_channel, x_step[3], g_sample, g_channel, g_step[3];
  atomic_int next, worker, lost; /* lost: the number of sums of squares out of range, unless g is zero */
} depthwise_job;

/* acc[r] = sum_p g[p] x[entry r + position p], channel by channel, for `count` entries; a constant once inlined. */
inline_always void lanes(const depthwise_job *j, const REAL *x, const vec *g, const int32_t *entries, int count,
                         vec acc[ROWS][2]) {
  const int64_t positions = j->out_size[0] * j->out_size[1] * j->out_size[2];
  const REAL *row[ROWS];
  vec sum[ROWS][2];
#pragma GCC unroll 16
  for (int r = 0; r < count; r++) row[r] = x + entries[r], sum[r][0] = sum[r][1] = (vec){0};
  for (int64_t p = 0; p < positions; p++) {
    const int64_t at = j->positions[p];
    const vec g0 = g[2 * p], g1 = g[2 * p + 1];
#pragma GCC unroll 16
    for (int r = 0; r < count; r++) {
      const vec *value = (const vec *)(row[r] + at);
      sum[r][0] += g0 * value[0];
      sum[r][1] += g1 * value[1];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < count; r++) acc[r][0] = sum[r][0], acc[r][1] = sum[r][1];
}

#define CASE(N)                                                                                                        \
  case N:                                                                                                              \
    lanes(j, x, g, entries, N, acc);                                                                                   \
    break;

/* The same for any number of entries up to ROWS. */
static void entry_tile(const depthwise_job *j, const REAL *x, const vec *g, const int32_t *entries, int count,
                       vec acc[ROWS][2]) {
  switch (count) {
    CASE(1)
    CASE(2)
    CASE(3)
    CASE(4)
    CASE(5)
    CASE(6)
#if ROWS > 6
    CASE(7)
    CASE(8)
    CASE(9)
    CASE(10)
    CASE(11)
    CASE(12)
#endif
  }
}

/* Copies the scale to (blocks, COLS), and the weight behind it to (blocks, entries, COLS). */
static void pack_scaling(const depthwise_job *j) {
  memset(j->packed, 0, sizeof(REAL) * j->blocks * (1 + j->entry_count) * COLS);
  memcpy(j->packed, j->scale, sizeof(REAL) * j->channels);
  REAL *to = j->packed + j->blocks * COLS;
  for (int64_t first = 0; first < j->channels; first += COLS, to += j->entry_count * COLS) {
    const int valid = j->channels - first < COLS ? (int)(j->channels - first) : COLS;
    pack_line(j->weight + first * j->entry_count, j->entry_count, j->entry_count, valid, to, COLS);
  }
}

/* Adds the products of a tile and the weight to `sums`, and multiplies the tile by the scale. */
static void scale_entries(const loose *weight, const loose *scale, int count, vec acc[ROWS][2], vec sums[2]) {
  for (int r = 0; r < count; r++)
    for (int v = 0; v < 2; v++) sums[v] += acc[r][v] * weight[2 * r + v], acc[r][v] *= scale[v];
}

/* Writes the sums over the positions of the output gradients. */
static void channel_totals(const vec *g, int64_t positions, int valid, double *to) {
  double total[COLS] = {0};
  for (int64_t p = 0; p < positions; p += BLOCK) {
    const int64_t end = p + BLOCK < positions ? p + BLOCK : positions;
    vec sums[2] = {{0}};
    for (int64_t q = p; q < end; q++) sums[0] += g[2 * q], sums[1] += g[2 * q + 1];
    for (int c = 0; c < COLS; c++) total[c] += sums[c / WIDTH][c % WIDTH];
  }
  memcpy(to, total, sizeof(double) * valid);
}

static void channel_block(depthwise_job *j, int64_t task, char *scratch) {
  static const int64_t none[3] = {0, 0, 0};
  const int64_t n = task / j->blocks, first = task % j->blocks * COLS;
  const int64_t positions = j->out_size[0] * j->out_size[1] * j->out_size[2];
  const int64_t tiles = (j->entry_count + ROWS - 1) / ROWS, each = (j->entry_count + tiles - 1) / tiles;
  const int valid = j->channels - first < COLS ? (int)(j->channels - first) : COLS;
  REAL *g = (REAL *)scratch, *x = g + positions * COLS;
  running s;
  vec acc[ROWS][2], products[2] = {{0}};
  start(&s);
  pack_plane(j->x + n * j->x_sample + first * j->x_channel, j->x_channel, j->x_step, j->size, j->pad, valid, x, COLS);
  pack_plane(j->g + n * j->g_sample + first * j->g_channel, j->g_channel, j->g_step, j->out_size, none, valid, g, COLS);
  if (j->totals) channel_totals((const vec *)g, positions, valid, j->totals + n * j->channels + first);
  for (int64_t e = 0; e < j->entry_count; e += each) {
    const int count = j->entry_count - e < each ? (int)(j->entry_count - e) : (int)each;
    entry_tile(j, x, (const vec *)g, j->entries + e, count, acc);
    if (j->weight)
      scale_entries((const loose *)(j->packed + (j->blocks + task % j->blocks * j->entry_count + e) * COLS),
                    (const loose *)(j->packed + first), count, acc, products);
    if (j->mode == ALL)
      reduce(&s, acc, count, valid, ALL, 0);
    else
      reduce(&s, acc, count, valid, SUMS, 0);
  }
  for (int c = 0; j->weight && c < valid; c++) j->products[n * j->channels + first + c] = products[c / WIDTH][c % WIDTH];
  finish(&s, j->out + task * STATISTICS);
  const int is_exact = in_range(j->out[task * STATISTICS + SQUARE]) || is_zero(g, positions * COLS);
  if (!is_exact) atomic_fetch_add(&j->lost, 1);
}

static void depthwise_work(void *data) {
  depthwise_job *j = data;
  char *scratch = j->scratch + atomic_fetch_add(&j->worker, 1) * j->scratch_bytes;
  const int64_t tasks = j->samples * j->blocks;
  for (int64_t task; (task = atomic_fetch_add(&j->next, 1)) < tasks;) channel_block(j, task, scratch);
}

int64_t depthwise_job_bytes(void) { return sizeof(depthwise_job); }

int64_t depthwise_scratch_bytes(int64_t plane, int64_t positions, int64_t spare) {
  return ((int64_t)sizeof(REAL) * COLS * (plane + positions) + spare + 4095) / 4096 * 4096;
}

void depthwise(depthwise_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  atomic_init(&j->worker, 0);
  atomic_init(&j->lost, 0);
  if (j->weight) pack_scaling(j);
  run_threads(depthwise_work, j, run, threads);
}
