/* Quantities that scores read from the softmax of maps, in one pass over the classes of WIDTH adjacent positions. */
#include "kernels.h"

typedef struct {
  const REAL *z; /* (samples, classes, positions), positions are adjacent in memory */
  REAL *out;     /* (OUTPUTS, samples, positions) */
  int64_t samples, classes, positions, z_sample, z_class;
  atomic_int next;
} softmax_job;

/* The largest logit; and of w = exp(z - top) over all classes but the predicted one: the sum, the sum of w (top - z), the
 * sum of squares, the largest. The last is sum |p - 1 / C| over all classes. */
enum { TOP, ODDS, SPREAD, SQUARES, SECOND, UNIFORM, OUTPUTS };
enum { MOST_CLASSES = 256, PIECE = 2048 };

#ifdef SINGLE
typedef int32_t whole;
#define LOWEST (-104.0f) /* exp is 0 below */
#define ROUNDER 12582912.0f
#define LN2_HIGH 0.693145751953125f
#define LN2_LOW 1.428606765330187e-6f
#define TERMS 7
#define MANTISSA 23
#define BIAS 127
#else
typedef int64_t whole;
#define LOWEST (-746.0)
#define ROUNDER 6755399441055744.0
#define LN2_HIGH 0.693147180369123816490
#define LN2_LOW 1.90821492927058770002e-10
#define TERMS 13
#define MANTISSA 52
#define BIAS 1023
#endif
#define FARTHEST ((REAL)1e4)
typedef whole wholes __attribute__((vector_size(BYTES)));

static const REAL INVERSE_FACTORIALS[] = {1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320,
                                          1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};

inline_always vec filled(REAL value) { return (vec){0} + value; }

/* exp(x) for x <= 0; NaN stays NaN. */
inline_always vec exponential(vec x) {
  x = larger(filled(LOWEST), x);
  vec n = (x * (REAL)1.44269504088896340736 + ROUNDER) - ROUNDER;
  vec r = (x - n * LN2_HIGH) - n * LN2_LOW;
  vec p = filled(INVERSE_FACTORIALS[TERMS]);
#pragma GCC unroll 16
  for (int k = TERMS - 1; k >= 0; k--) p = p * r + INVERSE_FACTORIALS[k];
  /* 2^n in two factors, so that results below the smallest normal number keep their digits. */
  wholes power = __builtin_convertvector(n, wholes), half = power >> 1;
  wholes first = (half + BIAS) << MANTISSA, second = (power - half + BIAS) << MANTISSA;
  return p * (vec)first * (vec)second;
}

/* WIDTH positions: logits `step` apart, results `row` apart. */
inline_always void positions_of(const REAL *z, int64_t step, int classes, REAL *out, int64_t row) {
  vec weights[MOST_CLASSES], top = *(const loose *)z;
  for (int c = 1; c < classes; c++) top = larger(*(const loose *)(z + c * step), top);
  vec odds = {0}, spread = {0}, squares = {0}, second = {0}, uniform = {0};
  wholes seen = {0};
  for (int c = 0; c < classes; c++) {
    vec logit = *(const loose *)(z + c * step), below = top - logit;
    vec weight = exponential(-below);
    weights[c] = weight;
    wholes own = (logit == top) & ~seen; /* the first of equal logits is the predicted class */
    seen |= own;
    weight = (vec)((wholes)weight & ~own);
    odds += weight;
    spread += weight * smaller(filled(FARTHEST), below);
    squares += weight * weight;
    second = larger(weight, second);
  }
  vec size = 1 / (1 + odds), share = filled((REAL)1 / classes);
  for (int c = 0; c < classes; c++) uniform += magnitude(weights[c] * size - share);
  vec results[OUTPUTS] = {top, odds, spread, squares, second, uniform};
  for (int k = 0; k < OUTPUTS; k++) *(loose *)(out + k * row) = results[k];
}

/* The last positions, fewer than WIDTH, padded with copies of the first of them. */
static void rest_of(const REAL *z, int64_t step, int classes, REAL *out, int64_t row, int count) {
  REAL logits[MOST_CLASSES * WIDTH], results[OUTPUTS * WIDTH];
  for (int c = 0; c < classes; c++)
    for (int j = 0; j < WIDTH; j++) logits[c * WIDTH + j] = z[c * step + (j < count ? j : 0)];
  positions_of(logits, WIDTH, classes, results, WIDTH);
  for (int k = 0; k < OUTPUTS; k++) memcpy(out + k * row, results + k * WIDTH, count * sizeof(REAL));
}

static void softmax_work(void *data) {
  softmax_job *j = data;
  int64_t pieces = (j->positions + PIECE - 1) / PIECE, row = j->samples * j->positions;
  for (int64_t task; (task = atomic_fetch_add(&j->next, 1)) < j->samples * pieces;) {
    int64_t n = task / pieces, p = task % pieces * PIECE;
    int64_t end = p + PIECE < j->positions ? p + PIECE : j->positions;
    const REAL *z = j->z + n * j->z_sample;
    REAL *out = j->out + n * j->positions;
    for (; p + WIDTH <= end; p += WIDTH) positions_of(z + p, j->z_class, (int)j->classes, out + p, row);
    if (p < end) rest_of(z + p, j->z_class, (int)j->classes, out + p, row, (int)(end - p));
  }
}

int64_t softmax_job_bytes(void) { return sizeof(softmax_job); }

void softmax_maps(softmax_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  run_threads(softmax_work, j, run, threads);
}

/* -- samples: the classes are contiguous -- */

typedef struct {
  const REAL *z; /* (samples, classes) */
  REAL *out;     /* (OUTPUTS, samples) */
  int64_t samples, classes, z_sample;
  atomic_int next;
} softmax_row_job;

enum { MOST_ROW_CLASSES = 16384 };

inline_always REAL lanes_total(vec a) {
  REAL total = 0;
  for (int j = 0; j < WIDTH; j++) total += a[j];
  return total;
}

inline_always REAL lanes_largest(vec a) {
  REAL largest = a[0];
  for (int j = 1; j < WIDTH; j++) largest = a[j] > largest ? a[j] : largest;
  return largest;
}

/* The logits from class c on; missing ones have weight zero. */
inline_always vec logits_from(const REAL *z, int c, int classes) {
  if (c + WIDTH <= classes) return *(const loose *)(z + c);
  vec tail = filled(-(REAL)INFINITY);
  memcpy(&tail, z + c, sizeof(REAL) * (classes - c));
  return tail;
}

static void softmax_row(const REAL *z, int classes, REAL *out, int64_t row) {
  vec weights[MOST_ROW_CLASSES / WIDTH + 1], highest = filled(-(REAL)INFINITY);
  for (int c = 0; c < classes; c += WIDTH) highest = larger(logits_from(z, c, classes), highest);
  const REAL top = lanes_largest(highest);
  int own = 0; /* the first of equal logits is the predicted class */
  while (own < classes - 1 && z[own] != top) own++;
  vec odds = {0}, spread = {0}, squares = {0}, second = {0}, uniform = {0};
  for (int c = 0; c < classes; c += WIDTH) {
    vec below = top - logits_from(z, c, classes), weight = exponential(-below);
    weights[c / WIDTH] = weight;
    if (own >= c && own < c + WIDTH) weight[own - c] *= 0; /* NaN stays NaN */
    odds += weight;
    spread += weight * smaller(filled(FARTHEST), below);
    squares += weight * weight;
    second = larger(weight, second);
  }
  const REAL against = lanes_total(odds), size = 1 / (1 + against), share = (REAL)1 / classes;
  int c = 0;
  for (; c + WIDTH <= classes; c += WIDTH) uniform += magnitude(weights[c / WIDTH] * size - share);
  REAL distance = lanes_total(uniform);
  for (int j = 0; c + j < classes; j++) {
    const REAL difference = weights[c / WIDTH][j] * size - share;
    distance += difference < 0 ? -difference : difference;
  }
  const REAL results[OUTPUTS] = {top, against, lanes_total(spread), lanes_total(squares), lanes_largest(second), distance};
  for (int k = 0; k < OUTPUTS; k++) out[k * row] = results[k];
}

static void softmax_row_work(void *data) {
  softmax_row_job *j = data;
  for (int64_t n; (n = atomic_fetch_add(&j->next, 1)) < j->samples;)
    softmax_row(j->z + n * j->z_sample, (int)j->classes, j->out + n, j->samples);
}

int64_t softmax_row_job_bytes(void) { return sizeof(softmax_row_job); }

void softmax_rows(softmax_row_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  run_threads(softmax_row_work, j, run, threads);
}
