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
    reduce(s, acc, ROWS, COLS, mode);
  }
  for (; count > 0; x += COLS, count -= COLS) {
    int valid = count < COLS ? (int)count : COLS;
    memset(acc, 0, sizeof(vec) * 2);
    memcpy(acc, x, sizeof(REAL) * valid);
    reduce(s, acc, 1, valid, mode);
  }
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
  const double *undo;                   /* (samples): factors of the entries, or NULL */
  double *out;                          /* (STATISTICS, samples, outputs) */
  double *merged;                       /* (STATISTICS, samples): over all outputs, or NULL */
  int64_t samples, segments, outputs, mode;
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
  REAL h[WIDTH], l[WIDTH];
  memcpy(h, &high, sizeof h), memcpy(l, &low, sizeof l);
#pragma GCC unroll 8
  for (int w = WIDTH / 2; w > 0; w /= 2)
    for (int k = 0; k < w; k++) {
      h[k] = h[k] > h[k + w] ? h[k] : h[k + w];
      l[k] = l[k] < l[k + w] ? l[k] : l[k + w];
    }
  out[MAX] = h[0], out[MIN] = l[0];
  if (isnan(out[SQUARE])) out[MAX] = out[MIN] = NAN; /* comparisons drop NaN */
}

static void segment_row(const REAL *x, int64_t count, double *out, int mode) {
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

/* The statistics of an outer product are products of the factors' statistics. */
static void product_row(const double *a, const double *b, double *out, int mode) {
  out[SUM] = a[SUM] * b[SUM], out[SQUARE] = a[SQUARE] * b[SQUARE];
  if (mode != ALL) return;
  out[ABS] = a[ABS] * b[ABS];
  const double ends[4] = {a[MAX] * b[MAX], a[MAX] * b[MIN], a[MIN] * b[MAX], a[MIN] * b[MIN]};
  out[MAX] = out[MIN] = ends[0];
  for (int k = 1; k < 4; k++) {
    if (ends[k] > out[MAX] || isnan(ends[k])) out[MAX] = ends[k];
    if (ends[k] < out[MIN] || isnan(ends[k])) out[MIN] = ends[k];
  }
}

/* Adds the statistics of more entries to those of others. */
inline_always void merge(double *all, const double *more, int kept) {
  all[SUM] += more[SUM], all[SQUARE] += more[SQUARE];
  if (kept <= ABS) return;
  all[ABS] += more[ABS];
  if (more[MAX] > all[MAX] || isnan(more[MAX])) all[MAX] = more[MAX];
  if (more[MIN] < all[MIN] || isnan(more[MIN])) all[MIN] = more[MIN];
}

static void segment_work(void *data) {
  segment_job *j = data;
  const int64_t blocks = (j->samples + BLOCK_OF_SAMPLES - 1) / BLOCK_OF_SAMPLES;
  const int kept = j->mode == ALL ? STATISTICS : ABS;
  double found[j->segments][STATISTICS], entry[STATISTICS], scaled[STATISTICS] = {0}, all[STATISTICS] = {0};
  for (int64_t block; (block = atomic_fetch_add(&j->next, 1)) < blocks;) {
    const int64_t end = (block + 1) * BLOCK_OF_SAMPLES < j->samples ? (block + 1) * BLOCK_OF_SAMPLES : j->samples;
    for (int64_t n = block * BLOCK_OF_SAMPLES; n < end; n++) {
      const double factor = j->undo ? j->undo[n] : 1;
      for (int64_t s = 0; s < j->segments; s++)
        segment_row(j->x[s] + n * j->step[s], j->columns[s], found[s], (int)j->mode);
      for (int64_t o = 0; o < j->outputs; o++) {
        const double *value = found[j->left[o]];
        if (j->right[o] >= 0) product_row(value, found[j->right[o]], entry, (int)j->mode), value = entry;
        for (int k = 0; k < kept; k++) {
          scaled[k] = k == SQUARE ? value[k] * factor * factor : value[k] * factor;
          j->out[(k * j->samples + n) * j->outputs + o] = scaled[k];
        }
        if (o)
          merge(all, scaled, kept);
        else
          memcpy(all, scaled, sizeof all);
      }
      for (int k = 0; j->merged && k < kept; k++) j->merged[k * j->samples + n] = all[k];
    }
  }
}

int64_t segment_job_bytes(void) { return sizeof(segment_job); }

void segment_statistics(segment_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  run_threads(segment_work, j, run, threads);
}
