/* Statistics of the rows of a matrix, in one pass over them. */
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
