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
  int64_t scratch_bytes, samples, channels, blocks, mode, entry_count;
  int64_t size[3], pad[3], out_size[3];
  int64_t x_sample, x_channel, x_step[3], g_sample, g_channel, g_step[3];
  atomic_int next, worker, lost; /* lost: the number of sums of squares out of range, unless g is zero */
} depthwise_job;

/* Copies `valid` channels with a border of zeros to a plane of COLS channels; the other channels are zeros. */
static void pack_plane(const REAL *from, int64_t channel, const int64_t step[3], const int64_t size[3],
                       const int64_t pad[3], int valid, REAL *to) {
  const int64_t d = size[0] + 2 * pad[0], h = size[1] + 2 * pad[1], w = size[2] + 2 * pad[2];
  if (valid < COLS || pad[0] || pad[1] || pad[2]) memset(to, 0, sizeof(REAL) * d * h * w * COLS);
  for (int64_t z = 0; z < size[0]; z++)
    for (int64_t y = 0; y < size[1]; y++) {
      const REAL *line = from + z * step[0] + y * step[1];
      REAL *packed = to + (((z + pad[0]) * h + y + pad[1]) * w + pad[2]) * COLS;
      if (channel == 1)
        for (int64_t i = 0; i < size[2]; i++) memcpy(packed + i * COLS, line + i * step[2], sizeof(REAL) * valid);
      else if (step[2] == 1)
        pack_line(line, channel, size[2], valid, packed, COLS);
      else
        for (int64_t i = 0; i < size[2]; i++)
          for (int c = 0; c < valid; c++) packed[i * COLS + c] = line[c * channel + i * step[2]];
    }
}

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

static void channel_block(depthwise_job *j, int64_t task, char *scratch) {
  static const int64_t none[3] = {0, 0, 0};
  const int64_t n = task / j->blocks, first = task % j->blocks * COLS;
  const int64_t positions = j->out_size[0] * j->out_size[1] * j->out_size[2];
  const int64_t tiles = (j->entry_count + ROWS - 1) / ROWS, each = (j->entry_count + tiles - 1) / tiles;
  const int valid = j->channels - first < COLS ? (int)(j->channels - first) : COLS;
  REAL *g = (REAL *)scratch, *x = g + positions * COLS;
  running s;
  vec acc[ROWS][2];
  start(&s);
  pack_plane(j->x + n * j->x_sample + first * j->x_channel, j->x_channel, j->x_step, j->size, j->pad, valid, x);
  pack_plane(j->g + n * j->g_sample + first * j->g_channel, j->g_channel, j->g_step, j->out_size, none, valid, g);
  for (int64_t e = 0; e < j->entry_count; e += each) {
    const int count = j->entry_count - e < each ? (int)(j->entry_count - e) : (int)each;
    entry_tile(j, x, (const vec *)g, j->entries + e, count, acc);
    if (j->mode == ALL)
      reduce(&s, acc, count, valid, ALL, 0);
    else
      reduce(&s, acc, count, valid, SUMS, 0);
  }
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
  run_threads(depthwise_work, j, run, threads);
}
