/* Quantities that scores read from the softmax of maps, in one pass over the classes of WIDTH adjacent positions. */
#include "kernels.h"

typedef struct {
  const REAL *z; /* (samples, classes, positions), positions are adjacent in memory */
  REAL *out;     /* (OUTPUTS, samples, positions) */
  int64_t samples, classes, positions, z_sample, z_class;
  atomic_int next;
} softmax_job;

/* The largest logit; and of w = exp(z - top) over all classes but the predicted one: the sum, the sum of w (top - z), the
 * sum of squares, the largest. Over all classes: sum |p - 1 / C| and the sum of the squares of p (log p + entropy), the
 * gradient of the negative entropy. */
enum { TOP, ODDS, SPREAD, SQUARES, SECOND, UNIFORM, SLOPE, OUTPUTS };
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
#if defined(__AVX512F__) && defined(SINGLE)
#define scaled _mm512_scalef_ps
#elif defined(__AVX512F__)
#define scaled _mm512_scalef_pd
#endif
#define FARTHEST ((REAL)1e4)
#define LARGEST_SURPRISE ((REAL)745) /* rarer classes have probability 0 in double precision */
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
#if defined(__AVX512F__)
  return scaled(p, n);
#else
  wholes power = __builtin_convertvector(n, wholes), half = power >> 1;
  wholes first = (half + BIAS) << MANTISSA, second = (power - half + BIAS) << MANTISSA;
  return p * (vec)first * (vec)second;
#endif
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
  vec size = 1 / (1 + odds), share = filled((REAL)1 / classes), mean = spread * size, slope = {0};
  for (int c = 0; c < classes; c++) {
    vec probability = weights[c] * size;
    vec rise = probability * (mean - smaller(filled(FARTHEST), top - *(const loose *)(z + c * step)));
    uniform += magnitude(probability - share);
    slope += rise * rise;
  }
  vec results[OUTPUTS] = {top, odds, spread, squares, second, uniform, slope};
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

inline_always wholes lane_numbers(void) {
  wholes numbers;
  for (int j = 0; j < WIDTH; j++) numbers[j] = j;
  return numbers;
}

/* The vector with 0 in one of its lanes; unchanged if it has no such lane. */
inline_always vec without_lane(vec a, int lane) { return (vec)((wholes)a & (wholes)(lane_numbers() != lane)); }

/* The vector with 0 behind its first lanes. */
inline_always vec first_lanes(vec a, int count) { return (vec)((wholes)a & (wholes)(lane_numbers() < count)); }

/* The first class with the largest logit. */
inline_always int predicted_class(const REAL *z, int classes, REAL top) {
  vec number = __builtin_convertvector(lane_numbers(), vec), first = filled((REAL)classes);
  for (int c = 0; c < classes; c += WIDTH, number += WIDTH) {
    const wholes is_top = logits_from(z, c, classes) == top;
    first = smaller((vec)(((wholes)number & is_top) | ((wholes)filled((REAL)classes) & ~is_top)), first);
  }
  const int own = (int)-lanes_largest(-first);
  return own < classes ? own : classes - 1;
}

static void softmax_row(const REAL *z, int classes, REAL *out, int64_t row) {
  vec weights[MOST_ROW_CLASSES / WIDTH + 1], highest = filled(-(REAL)INFINITY);
  for (int c = 0; c < classes; c += WIDTH) highest = larger(logits_from(z, c, classes), highest);
  const REAL top = lanes_largest(highest);
  const int own = predicted_class(z, classes, top);
  vec odds = {0}, spread = {0}, squares = {0}, second = {0}, uniform = {0};
  for (int c = 0; c < classes; c += WIDTH) {
    vec below = top - logits_from(z, c, classes), weight = exponential(-below);
    weights[c / WIDTH] = weight;
    weight = without_lane(weight, own - c);
    odds += weight;
    spread += weight * smaller(filled(FARTHEST), below);
    squares += weight * weight;
    second = larger(weight, second);
  }
  const REAL against = lanes_total(odds) + (top - top); /* NaN if the top is infinite */
  const REAL size = 1 / (1 + against), share = (REAL)1 / classes;
  const REAL around = lanes_total(spread), mean = around * size;
  vec slope = {0};
  for (int c = 0; c < classes; c += WIDTH) {
    vec probability = weights[c / WIDTH] * size, difference = magnitude(probability - share);
    vec rise = probability * (mean - smaller(filled(FARTHEST), top - logits_from(z, c, classes)));
    uniform += c + WIDTH <= classes ? difference : first_lanes(difference, classes - c);
    slope += rise * rise;
  }
  const REAL results[OUTPUTS] = {
      top, against, around, lanes_total(squares), lanes_largest(second), lanes_total(uniform), lanes_total(slope)};
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

/* -- samples: sums of p^a (1 - p)^b over all classes but the predicted one, with the results of softmax_rows known -- */

typedef struct {
  const REAL *z, *top, *odds, *second; /* (samples, classes), and (samples) each; the second largest probability */
  REAL *out;                           /* (samples) */
  double power, complement;            /* a and b */
  int64_t samples, classes, z_sample;
  atomic_int next;
} softmax_power_job;

/* log(1 - p) for 0 <= p <= 1/2 as -2 artanh(p / (2 - p)), whose series needs few terms for p < 1/8. */
inline_always vec log_complement(vec p, const int terms) {
  const vec s = p / (2 - p), square = s * s;
  vec series = filled((REAL)1 / (2 * terms - 1));
#pragma GCC unroll 18
  for (int k = terms - 2; k >= 0; k--) series = series * square + (REAL)1 / (2 * k + 1);
  return -2 * s * series;
}

/* The sum of p^a (1 - p)^b; b is zero if there are no terms of the logarithm. */
inline_always REAL sum_of_powers(const REAL *z, const softmax_power_job *j, REAL top, REAL least, const int terms) {
  const int classes = (int)j->classes, own = predicted_class(z, classes, top);
  const REAL a = (REAL)j->power, b = (REAL)j->complement;
  vec total = {0};
  for (int c = 0; c < classes; c += WIDTH) {
    const vec surprise = top - logits_from(z, c, classes) + least, limited = smaller(filled(FARTHEST), surprise);
    vec exponent = -a * limited;
    if (terms) exponent += b * log_complement(smaller(filled((REAL)0.5), exponential(-limited)), terms);
    vec term = (vec)((wholes)exponential(exponent) & (wholes)(surprise < LARGEST_SURPRISE));
    total += without_lane(term, own - c);
  }
  return lanes_total(total);
}

static REAL powers_of_row(const REAL *z, const softmax_power_job *j, int64_t n) {
  const REAL top = j->top[n], least = (REAL)log1p((double)j->odds[n]);
  if (j->complement == 0) return sum_of_powers(z, j, top, least, 0);
  if (j->second[n] < (REAL)1 / 8) return sum_of_powers(z, j, top, least, 7);
  return sum_of_powers(z, j, top, least, 18);
}

static void softmax_power_work(void *data) {
  softmax_power_job *j = data;
  for (int64_t n; (n = atomic_fetch_add(&j->next, 1)) < j->samples;)
    j->out[n] = powers_of_row(j->z + n * j->z_sample, j, n);
}

int64_t softmax_power_job_bytes(void) { return sizeof(softmax_power_job); }

void softmax_powers(softmax_power_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  run_threads(softmax_power_work, j, run, threads);
}
