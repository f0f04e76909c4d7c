/* Statistics of the rows of one matrix, and of the rows of many small ones, in one pass over them. */
#include "kernels.h"

typedef struct {
  const REAL *x;
  double *out; /* (samples, pieces, STATISTICS) */
  int64_t samples, pieces, columns, x_sample, mode;
  atomic_int next;
} row_job;

/* Entries [first, last) of one row. */
inline_always void stretch(const REAL *x, int64_t count, running *s, int mode) {
  vec acc[ROWS][2];
  for (; count >= ROWS * COLS; x += ROWS * COLS, count -= ROWS * COLS) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < 2; v++) acc[r][v] = *(const loose *)(x + r * COLS + v * WIDTH);
    reduce(s, acc, ROWS, COLS, mode, WIDE);
  }
  for (; count > 0; x += COLS, count -= COLS) {
    int valid = count < COLS ? (int)count : COLS;
    memset(acc, 0, sizeof(vec) * 2);
    memcpy(acc, x, sizeof(REAL) * valid);
    reduce(s, acc, 1, valid, mode, WIDE);
  }
}

/* Computes a sum of squares in double precision if squares in single precision have overflowed or may have vanished. */
static void check_square(const REAL *x, int64_t count, double *out) {
  if (in_range(out[SQUARE])) return;
  double square = 0;
  for (int64_t i = 0; i < count; i++) square += (double)x[i] * x[i];
  out[SQUARE] = square;
}

static void row_work(void *data) {
  row_job *j = data;
  const int64_t each = (j->columns + j->pieces - 1) / j->pieces;
  for (int64_t task; (task = atomic_fetch_add(&j->next, 1)) < j->samples * j->pieces;) {
    const int64_t first = task % j->pieces * each, last = first + each < j->columns ? first + each : j->columns;
    const REAL *x = j->x + task / j->pieces * j->x_sample + first;
    running s;
    start(&s);
    if (j->mode == ALL)
      stretch(x, last - first, &s, ALL);
    else
      stretch(x, last - first, &s, SUMS);
    finish(&s, j->out + task * STATISTICS);
    check_square(x, last - first, j->out + task * STATISTICS);
  }
}

int64_t row_job_bytes(void) { return sizeof(row_job); }

void row_statistics(row_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  run_threads(row_work, j, run, threads);
}

/* -- many small matrices -- */

typedef struct {
  const REAL *const *x;                 /* (segments): matrices with a row for each sample */
  const int64_t *columns, *step;        /* (segments) */
  const int64_t *left, *right;          /* (outputs): the segments of an outer product; right < 0: of left alone */
  const double *const *known;           /* (parameters, STATISTICS): statistics computed before, with a value for each sample, or NULL */
  const int64_t *known_step;            /* likewise; left = -1 - i means those of parameter i */
  const double *undo;                   /* (samples): factors of the entries, or NULL */
  double *out;                          /* (STATISTICS, outputs + 1, samples): the last over all outputs; with `merged` only that one */
  int64_t samples, segments, outputs, mode, merged;
  atomic_int next;
} segment_job;

enum { SHORT = 256, BLOCK_OF_SAMPLES = 16 };

/* A row of at most SHORT entries: one sum per lane is precise enough. */
inline_always void short_row(const REAL *x, int64_t count, double *out, int mode) {
  vec sum = {0}, square = {0}, absolute = {0}, high, low, a, filled;
  high = low = sum + x[0];
  for (int64_t i = 0; i < count; i += WIDTH) {
    if (i + WIDTH <= count) {
      a = filled = *(const loose *)(x + i);
    } else {
      REAL tail[2][WIDTH];
      for (int k = 0; k < WIDTH; k++) tail[0][k] = 0, tail[1][k] = x[0];
      for (int k = 0; i + k < count; k++) tail[0][k] = tail[1][k] = x[i + k];
      memcpy(&a, tail[0], sizeof a), memcpy(&filled, tail[1], sizeof filled);
    }
    sum += a;
    square += a * a;
    if (mode == ALL) {
      absolute += magnitude(a);
      high = larger(filled, high);
      low = smaller(filled, low);
    }
  }
  out[SUM] = lane_total(sum), out[SQUARE] = lane_total(square);
  if (mode != ALL) return;
  out[ABS] = lane_total(absolute);
  out[MAX] = largest_lane(high), out[MIN] = smallest_lane(low);
  if (isnan(out[SQUARE])) out[MAX] = out[MIN] = NAN; /* comparisons drop NaN */
}

static void unchecked_row(const REAL *x, int64_t count, double *out, int mode) {
  if (count <= SHORT) {
    if (mode == ALL)
      short_row(x, count, out, ALL);
    else
      short_row(x, count, out, SUMS);
    return;
  }
  running s;
  start(&s);
  if (mode == ALL)
    stretch(x, count, &s, ALL);
  else
    stretch(x, count, &s, SUMS);
  finish(&s, out);
}

static void segment_row(const REAL *x, int64_t count, double *out, int mode) {
  unchecked_row(x, count, out, mode);
  check_square(x, count, out);
}

/* A block of samples: each statistic of all of them is adjacent in memory. */
typedef double block_of[STATISTICS][BLOCK_OF_SAMPLES];

/* Replaces extremes by those of more values; NaN remains. */
inline_always void widen(block_of all, const double *high, const double *low) {
  for (int n = 0; n < BLOCK_OF_SAMPLES; n++) {
    all[MAX][n] = (high[n] > all[MAX][n]) | (high[n] != high[n]) ? high[n] : all[MAX][n];
    all[MIN][n] = (low[n] < all[MIN][n]) | (low[n] != low[n]) ? low[n] : all[MIN][n];
  }
}

/* The statistics of outer products are products of the factors' statistics. */
static void product_block(const block_of a, const block_of b, block_of out, int mode) {
  for (int k = SUM; k <= (mode == ALL ? ABS : SQUARE); k++)
    for (int n = 0; n < BLOCK_OF_SAMPLES; n++) out[k][n] = a[k][n] * b[k][n];
  if (mode != ALL) return;
  double end[BLOCK_OF_SAMPLES];
  for (int n = 0; n < BLOCK_OF_SAMPLES; n++) out[MAX][n] = out[MIN][n] = a[MAX][n] * b[MAX][n];
  for (int k = 1; k < 4; k++) {
    for (int n = 0; n < BLOCK_OF_SAMPLES; n++) end[n] = a[k & 1 ? MIN : MAX][n] * b[k & 2 ? MIN : MAX][n];
    widen(out, end, end);
  }
}

/* Removes the scale of each sample, and adds the statistics to those of other entries. */
static void scale_block(block_of value, const double *factor, block_of all, int mode) {
  for (int k = SUM; k < (mode == ALL ? STATISTICS : ABS); k++)
    for (int n = 0; n < BLOCK_OF_SAMPLES; n++) value[k][n] *= k == SQUARE ? factor[n] * factor[n] : factor[n];
  for (int k = SUM; k <= (mode == ALL ? ABS : SQUARE); k++)
    for (int n = 0; n < BLOCK_OF_SAMPLES; n++) all[k][n] += value[k][n];
  if (mode == ALL) widen(all, value[MAX], value[MIN]);
}

/* The statistics of one parameter that were computed before. */
static void known_block(const double *const *known, const int64_t *step, int64_t first, int count, block_of out) {
  memset(out, 0, sizeof(block_of));
  for (int k = 0; k < STATISTICS; k++)
    for (int n = 0; known[k] && n < count; n++) out[k][n] = known[k][(first + n) * step[k]];
}

static void segment_work(void *data) {
  segment_job *j = data;
  const int64_t blocks = (j->samples + BLOCK_OF_SAMPLES - 1) / BLOCK_OF_SAMPLES, rows = j->outputs + 1;
  const int kept = j->mode == ALL ? STATISTICS : ABS;
  block_of found[j->segments], value, all;
  double row[STATISTICS], factor[BLOCK_OF_SAMPLES] = {0};
  memset(found, 0, sizeof found);
  for (int64_t block; (block = atomic_fetch_add(&j->next, 1)) < blocks;) {
    const int64_t first = block * BLOCK_OF_SAMPLES, rest = j->samples - first;
    const int count = rest < BLOCK_OF_SAMPLES ? (int)rest : BLOCK_OF_SAMPLES;
    for (int n = 0; n < count; n++) factor[n] = j->undo ? j->undo[first + n] : 1;
    for (int64_t s = 0; s < j->segments; s++)
      for (int n = 0; n < count; n++) {
        segment_row(j->x[s] + (first + n) * j->step[s], j->columns[s], row, (int)j->mode);
        for (int k = 0; k < kept; k++) found[s][k][n] = row[k];
      }
    memset(all, 0, sizeof all);
    for (int n = 0; n < BLOCK_OF_SAMPLES; n++) all[MAX][n] = -INFINITY, all[MIN][n] = INFINITY;
    for (int64_t o = 0; o < rows; o++) {
      if (o == j->outputs)
        memcpy(value, all, sizeof all);
      else {
        const int64_t before = -1 - j->left[o];
        if (before >= 0)
          known_block(j->known + before * STATISTICS, j->known_step + before * STATISTICS, first, count, value);
        else if (j->right[o] >= 0)
          product_block(found[j->left[o]], found[j->right[o]], value, (int)j->mode);
        else
          memcpy(value, found[j->left[o]], sizeof value);
        scale_block(value, factor, all, (int)j->mode);
      }
      for (int k = 0; k < kept && !j->merged; k++)
        memcpy(j->out + (k * rows + o) * j->samples + first, value[k], sizeof(double) * count);
    }
    for (int k = 0; k < kept && j->merged; k++) memcpy(j->out + k * j->samples + first, all[k], sizeof(double) * count);
  }
}

int64_t segment_job_bytes(void) { return sizeof(segment_job); }

void segment_statistics(segment_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  run_threads(segment_work, j, run, threads);
}
