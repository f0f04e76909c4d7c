/* The gradients of the cross-entropy with respect to a few logits, scaled by a power of two per sample. */
#include "kernels.h"

typedef struct {
  const REAL *logits;
  const int64_t *labels; /* (samples), or NULL for the class of the largest logit */
  REAL *gradient;        /* (samples, classes) */
  double *undo;          /* (samples): the factors that undo the scale */
  int64_t samples, classes, step, ignored;
  int unusual; /* set if a logit is not finite or a label is not a class; the results are then undefined */
} residual_job;

/* softmax(z) - e_c, whose entry c is minus the sum of the others: computing 1 - p would lose precision. */
static int residual_row(const REAL *z, int64_t classes, int64_t label, REAL *g, double *undo) {
  int64_t top = 0;
  for (int64_t c = 0; c < classes; c++) {
    if (!isfinite(z[c])) return 0;
    if (z[c] > z[top]) top = c;
  }
  const int64_t chosen = label < 0 ? top : label;
  double own = 0, others = 0;
  for (int64_t c = 0; c < classes; c++) {
    const double weight = exp((double)z[c] - z[top]);
    g[c] = (REAL)weight;
    *(c == chosen ? &own : &others) += weight;
  }
  const double total = own + others;
  for (int64_t c = 0; c < classes; c++) g[c] = (REAL)(g[c] / total);
  g[chosen] = -(REAL)(others / total);
  int exponent = 0;
  if (g[chosen] != 0) frexp(g[chosen], &exponent);
  const double scale = ldexp(1, -exponent);
  for (int64_t c = 0; c < classes; c++) g[c] = (REAL)(g[c] * scale);
  *undo = 1 / scale;
  return 1;
}

int64_t residual_job_bytes(void) { return sizeof(residual_job); }

void class_residuals(residual_job *j, parallel run, int threads) {
  j->unusual = 0;
  for (int64_t n = 0; n < j->samples && !j->unusual; n++) {
    REAL *g = j->gradient + n * j->classes;
    const int64_t label = j->labels ? j->labels[n] : -1;
    if (j->labels && label == j->ignored) {
      memset(g, 0, sizeof(REAL) * j->classes);
      j->undo[n] = 1;
    } else if ((j->labels && (label < 0 || label >= j->classes)) ||
               !residual_row(j->logits + n * j->step, j->classes, label, g, j->undo + n)) {
      j->unusual = 1;
    }
  }
}
