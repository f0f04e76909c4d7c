/* Convolutions whose channels are the lanes of a vector: what the kernels of depthwise and of grouped ones share. */
#ifndef LIGHTNING_GRADMETRICS_LANES_H
#define LIGHTNING_GRADMETRICS_LANES_H

#include "kernels.h"

typedef struct {
  const REAL *x, *g;
  double *out;                        /* (samples, blocks, STATISTICS) */
  char *scratch;                      /* workers x scratch_bytes */
  const int32_t *entries, *positions; /* offsets of kernel entries and output positions in the padded input */
  const REAL *scale, *weight; /* (groups x outputs) and (groups x outputs, inputs, entries); null if not scaled */
  REAL *packed;               /* memory for the same in the order of the lanes */
  double *products, *totals;  /* (samples, groups x outputs): sums of weight and gradient, and of g over positions */
  REAL *bias;                 /* likewise the latter sums; null if not wanted */
  int64_t scratch_bytes, samples, groups, inputs, outputs, blocks, mode, entry_count; /* inputs and outputs of a group */
  int64_t size[3], pad[3], out_size[3];
  int64_t x_sample, x_channel, x_step[3], g_sample, g_channel, g_step[3];
  atomic_int next, worker, lost; /* lost: the number of sums of squares out of range, unless g is zero */
} lane_job;

/* Computes one block of groups of a sample. */
typedef void (*lane_block)(lane_job *j, int64_t task, char *scratch);

typedef struct {
  lane_job *job;
  lane_block block;
} lane_work;

static void work_on_lanes(void *data) {
  const lane_work *w = data;
  lane_job *j = w->job;
  char *scratch = j->scratch + atomic_fetch_add(&j->worker, 1) * j->scratch_bytes;
  const int64_t tasks = j->samples * j->blocks;
  for (int64_t task; (task = atomic_fetch_add(&j->next, 1)) < tasks;) w->block(j, task, scratch);
}

static void run_lanes(lane_job *j, lane_block block, parallel run, int threads) {
  lane_work w = {j, block};
  atomic_init(&j->next, 0);
  atomic_init(&j->worker, 0);
  atomic_init(&j->lost, 0);
  run_threads(work_on_lanes, &w, run, threads);
}

inline_always int64_t position_count(const lane_job *j) { return j->out_size[0] * j->out_size[1] * j->out_size[2]; }

/* acc[r][v] += sum_p g[p][v] x[entry r + position p][v], channel by channel, for `count` entries; a constant once inlined.
 * `apart` is 1 if each vector has its own input, and 0 if both have the first one. */
inline_always void lanes(const REAL *x, const loose *g, const int32_t *positions, int64_t length, const int32_t *entries,
                         int count, int apart, vec acc[ROWS][2]) {
  const REAL *row[ROWS];
  vec sum[ROWS][2];
#pragma GCC unroll 16
  for (int r = 0; r < count; r++) row[r] = x + entries[r], sum[r][0] = acc[r][0], sum[r][1] = acc[r][1];
  for (int64_t p = 0; p < length; p++) {
    const int64_t at = positions[p];
    const vec g0 = g[2 * p], g1 = g[2 * p + 1];
#pragma GCC unroll 16
    for (int r = 0; r < count; r++) {
      const vec *value = (const vec *)(row[r] + at);
      sum[r][0] += g0 * value[0];
      sum[r][1] += g1 * value[apart];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < count; r++) acc[r][0] = sum[r][0], acc[r][1] = sum[r][1];
}

/* The same for any number of entries up to ROWS. */
inline_always void entry_tile(const REAL *x, const loose *g, const int32_t *positions, int64_t length,
                              const int32_t *entries, int count, int apart, vec acc[ROWS][2]) {
#define CASE(N)                                             \
  case N:                                                   \
    lanes(x, g, positions, length, entries, N, apart, acc); \
    break;
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
#undef CASE
}

#endif
