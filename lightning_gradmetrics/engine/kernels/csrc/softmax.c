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
typedef uint32_t natural;
#define LOWEST (-104.0f) /* exp is 0 below */
#define ROUNDER 12582912.0f
#define LN2_HIGH 0.693145751953125f
#define LN2_LOW 1.428606765330187e-6f
#define DEGREE 6
#define MANTISSA 23
#define BIAS 127
#else
typedef uint64_t natural;
#define LOWEST (-746.0)
#define ROUNDER 6755399441055744.0
#define LN2_HIGH 0.693147180369123816490
#define LN2_LOW 1.90821492927058770002e-10
#define DEGREE 11
#define MANTISSA 52
#define BIAS 1023
#endif
#if defined(__AVX512F__) && defined(SINGLE)
#define scaled _mm512_scalef_ps
#define lanes_equal(a, b) _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ)
#elif defined(__AVX512F__)
#define scaled _mm512_scalef_pd
#define lanes_equal(a, b) _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ)
#endif
#define FARTHEST ((REAL)1e4)
#define LARGEST_SURPRISE ((REAL)745) /* rarer classes have probability 0 in double precision */
typedef whole wholes __attribute__((vector_size(BYTES)));
typedef natural naturals __attribute__((vector_size(BYTES)));

/* The polynomials of this degree whose largest relative error from exp on [-log(2) / 2, log(2) / 2] is smallest, 3.1e-9 and
 * 3.6e-18, among those that are exact to first order at 0. */
#ifdef SINGLE
static const REAL COEFFICIENTS[] = {1,
                                    1,
                                    0.49999993447838350424f,
                                    0.16666520631773323329f,
                                    0.041668388031037608677f,
                                    0.008368716875262359943f,
                                    0.0013814599553094665779f};
#else
static const REAL COEFFICIENTS[] = {1,
                                    1,
                                    0.50000000000000106271,
                                    0.16666666666666412515,
                                    0.041666666666530159082,
                                    0.0083333333334944675334,
                                    0.0013888888943629989842,
                                    0.00019841269506564000929,
                                    0.000024801493099030417868,
                                    2.755758638842914442e-6,
                                    2.7630248336116405948e-7,
                                    2.5000056604513258036e-8};
#endif

inline_always vec filled(REAL value) { return (vec){0} + value; }

/* exp(x) for x <= 0; NaN stays NaN. */
inline_always vec exponential(vec x) {
  x = larger(filled(LOWEST), x);
  const vec shifted = x * (REAL)1.44269504088896340736 + ROUNDER, n = shifted - ROUNDER;
  const vec r = (x - n * LN2_HIGH) - n * LN2_LOW;
  /* Even and odd powers apart: two short chains of operations that depend on each other instead of a long one. */
  const vec square = r * r;
  vec even = filled(COEFFICIENTS[DEGREE / 2 * 2]), odd = filled(COEFFICIENTS[(DEGREE - 1) / 2 * 2 + 1]);
#pragma GCC unroll 8
  for (int k = DEGREE / 2 * 2 - 2; k >= 2; k -= 2) even = even * square + COEFFICIENTS[k];
#pragma GCC unroll 8
  for (int k = (DEGREE - 1) / 2 * 2 - 1; k >= 1; k -= 2) odd = odd * square + COEFFICIENTS[k];
  const vec p = 1 + (odd * r + even * square); /* the one last, so that it is rounded once */
  /* 2^n in two factors, so that results below the smallest normal number keep their digits. */
#if defined(__AVX512F__)
  return scaled(p, n);
#else
  const naturals power = (naturals)shifted - (naturals)filled(ROUNDER) + 2 * BIAS, half = power >> 1;
  return p * (vec)(half << MANTISSA) * (vec)((power - half) << MANTISSA);
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

/* -- samples: the classes are contiguous, in REAL or, if `narrow`, in float -- */

typedef struct {
  const void *z; /* (samples, classes) */
  REAL *out;     /* (ROW_OUTPUTS, samples) with roots, otherwise (OUTPUTS, samples) */
  int64_t samples, classes, z_sample, narrow, with_roots;
  atomic_int next;
} softmax_row_job;

enum { MOST_ROW_CLASSES = 16384, ROW_OUTPUTS = OUTPUTS + 1 }; /* and the sum of the square roots of w */
typedef float narrows __attribute__((vector_size(WIDTH * sizeof(float)), aligned(sizeof(float)), may_alias));

inline_always REAL lanes_total(vec a) {
  REAL t[WIDTH];
  for (int j = 0; j < WIDTH; j++) t[j] = a[j];
#pragma GCC unroll 8
  for (int w = WIDTH / 2; w > 0; w /= 2)
    for (int j = 0; j < w; j++) t[j] += t[j + w];
  return t[0];
}

inline_always REAL lanes_largest(vec a) {
  REAL largest = a[0];
  for (int j = 1; j < WIDTH; j++) largest = a[j] > largest ? a[j] : largest;
  return largest;
}

/* Copies a row of logits; returns the number of vectors. The lanes behind the last class get weight zero. */
inline_always int row_of_logits(const void *z, int classes, int narrow, vec *row) {
  const int count = classes / WIDTH, rest = classes % WIDTH;
  if (narrow)
    for (int k = 0; k < count; k++) row[k] = __builtin_convertvector(*(const narrows *)((const float *)z + k * WIDTH), vec);
  else
    memcpy(row, z, sizeof(vec) * count);
  if (!rest) return count;
  REAL last[WIDTH];
  for (int j = 0; j < WIDTH; j++) last[j] = -(REAL)INFINITY;
  for (int j = 0; j < rest; j++)
    last[j] = narrow ? (REAL)((const float *)z)[count * WIDTH + j] : ((const REAL *)z)[count * WIDTH + j];
  memcpy(row + count, last, sizeof last);
  return count + 1;
}

inline_always wholes lane_numbers(void) {
  wholes numbers;
  for (int j = 0; j < WIDTH; j++) numbers[j] = j;
  return numbers;
}

/* The vector with 0 behind its first lanes. */
inline_always vec first_lanes(vec a, int count) { return (vec)((wholes)a & (wholes)(lane_numbers() < count)); }

/* The first class whose logit is the largest one, `top`; the last class if none is, as a logit is NaN. */
inline_always int first_class_of(const vec *row, int count, int classes, REAL top) {
#ifdef lanes_equal
  for (int k = 0; k < count; k++) {
    const unsigned lanes = lanes_equal(row[k], filled(top));
    if (lanes) return k * WIDTH + __builtin_ctz(lanes);
  }
  return classes - 1;
#else
  const vec none = filled((REAL)classes);
  vec number = __builtin_convertvector(lane_numbers(), vec), first = none;
  for (int k = 0; k < count; k++, number += WIDTH) {
    const wholes is_top = row[k] == top;
    first = smaller((vec)(((wholes)number & is_top) | ((wholes)none & ~is_top)), first);
  }
  const int own = (int)-lanes_largest(-first);
  return own < classes ? own : classes - 1;
#endif
}

inline_always REAL largest_logit(const vec *row, int count) {
  vec highest = filled(-(REAL)INFINITY);
  for (int k = 0; k < count; k++) highest = larger(row[k], highest);
  return lanes_largest(highest);
}

/* Sums over the classes; two of each hide the latency of additions. */
typedef struct {
  vec odds, spread, squares, second, uniform, slope, roots;
} row_sums;

inline_always void add_weights(row_sums *s, vec weight, vec below) {
  s->odds += weight;
  s->spread += weight * below;
  s->squares += weight * weight;
  s->second = larger(weight, s->second);
}

/* `lanes` is the number of lanes with a class. */
inline_always void add_probabilities(row_sums *s, vec probability, vec below, REAL mean, REAL share, int lanes) {
  const vec rise = probability * (mean - below), distance = magnitude(probability - share);
  s->slope += rise * rise;
  s->uniform += lanes < WIDTH ? first_lanes(distance, lanes) : distance;
}

/* With roots, the weights are squares of exponentials of half the logits. */
inline_always void softmax_row(const void *z, int classes, int narrow, REAL *out, int64_t step, const int with_roots) {
  vec row[MOST_ROW_CLASSES / WIDTH + 1], weights[MOST_ROW_CLASSES / WIDTH + 1];
  row_sums sums[2] = {{{0}}};
  int k, count = row_of_logits(z, classes, narrow, row);
  const REAL top = largest_logit(row, count);
  const int own = first_class_of(row, count, classes, top);
  ((REAL *)row)[own] = -(REAL)INFINITY; /* the first sums are over the other classes */
  for (k = 0; k < count; k++) {
    const vec below = smaller(filled(FARTHEST), top - row[k]);
    const vec exponent = exponential(below * (with_roots ? (REAL)-0.5 : (REAL)-1));
    row[k] = below;
    weights[k] = with_roots ? exponent * exponent : exponent;
    if (with_roots) sums->roots += (vec)((wholes)exponent & (wholes)(below < LARGEST_SURPRISE));
  }
  for (k = 0; k + 1 < count; k += 2) {
    add_weights(sums, weights[k], row[k]);
    add_weights(sums + 1, weights[k + 1], row[k + 1]);
  }
  if (k < count) add_weights(sums, weights[k], row[k]);
  ((REAL *)row)[own] = 0, ((REAL *)weights)[own] = 1;
  const REAL against = lanes_total(sums[0].odds + sums[1].odds) + (top - top); /* NaN if the top is infinite */
  const REAL size = 1 / (1 + against), share = (REAL)1 / classes;
  const REAL around = lanes_total(sums[0].spread + sums[1].spread), mean = around * size;
  for (k = 0; k + 2 < count; k += 2) {
    add_probabilities(sums, weights[k] * size, row[k], mean, share, WIDTH);
    add_probabilities(sums + 1, weights[k + 1] * size, row[k + 1], mean, share, WIDTH);
  }
  for (; k < count; k++) add_probabilities(sums, weights[k] * size, row[k], mean, share, classes - k * WIDTH);
  const REAL results[ROW_OUTPUTS] = {top,
                                     against,
                                     around,
                                     lanes_total(sums[0].squares + sums[1].squares),
                                     lanes_largest(larger(sums[0].second, sums[1].second)),
                                     lanes_total(sums[0].uniform + sums[1].uniform),
                                     lanes_total(sums[0].slope + sums[1].slope),
                                     lanes_total(sums->roots)};
  for (k = 0; k < (with_roots ? ROW_OUTPUTS : OUTPUTS); k++) out[k * step] = results[k];
}

inline_always const void *row_start(const void *z, int64_t first, int64_t narrow) {
  return narrow ? (const void *)((const float *)z + first) : (const void *)((const REAL *)z + first);
}

static void softmax_row_work(void *data) {
  softmax_row_job *j = data;
  for (int64_t n; (n = atomic_fetch_add(&j->next, 1)) < j->samples;) {
    const void *z = row_start(j->z, n * j->z_sample, j->narrow);
    if (j->with_roots)
      softmax_row(z, (int)j->classes, (int)j->narrow, j->out + n, j->samples, 1);
    else
      softmax_row(z, (int)j->classes, (int)j->narrow, j->out + n, j->samples, 0);
  }
}

int64_t softmax_row_job_bytes(void) { return sizeof(softmax_row_job); }

void softmax_rows(softmax_row_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  run_threads(softmax_row_work, j, run, threads);
}

/* -- samples: sums of p^a (1 - p)^b over all classes but the predicted one, with the results of softmax_rows known -- */

typedef struct {
  const void *z;                   /* (samples, classes) */
  const REAL *top, *odds, *second; /* (samples) each; the second largest probability */
  REAL *out;                       /* (samples) */
  double power, complement;        /* a and b */
  int64_t samples, classes, z_sample, narrow;
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

/* How (1 - p)^b is computed: not at all, as b is zero; by its series in p, for b <= 1, with 10 terms for p < 1/64 and 17 for
 * p < 1/8; by the logarithm. */
enum { NONE, LOGARITHM, SHORT_SERIES = 10, SERIES = 17 };

/* t^m by repeated multiplication. */
inline_always vec whole_power(vec t, int m) {
  vec result = filled(1);
  for (; m; m >>= 1, t *= t)
    if (m & 1) result *= t;
  return result;
}

/* p^a (1 - p)^b for p = exp(-surprise). With a = 1 / m, p is the m-th power of p^a. */
inline_always vec power_of_one(vec surprise, REAL a, REAL b, int m, const REAL *series, const int form) {
  const vec limited = smaller(filled(FARTHEST), surprise);
  vec term;
  if (form == LOGARITHM)
    term = exponential(b * log_complement(smaller(filled((REAL)0.5), exponential(-limited)), 18) - a * limited);
  else
    term = exponential(-a * limited);
  if (form >= SHORT_SERIES) {
    const vec p = m ? whole_power(term, m) : exponential(-limited), square = p * p;
    vec last = filled(series[form - 1]), other = filled(series[form - 2]);
#pragma GCC unroll 8
    for (int k = form - 3; k >= 0; k -= 2) last = last * square + series[k];
#pragma GCC unroll 8
    for (int k = form - 4; k >= 0; k -= 2) other = other * square + series[k];
    term *= form % 2 ? last + other * p : other + last * p;
  }
  return (vec)((wholes)term & (wholes)(surprise < LARGEST_SURPRISE));
}

/* The sum over all classes of a row; those with logit -infinity add nothing. */
inline_always REAL sum_of_powers(const vec *row, int count, const softmax_power_job *j, REAL top, REAL least, int m,
                                 const REAL *series, const int form) {
  const REAL a = (REAL)j->power, b = (REAL)j->complement;
  vec total = {0};
  for (int k = 0; k < count; k++) total += power_of_one(top - row[k] + least, a, b, m, series, form);
  return lanes_total(total);
}

static REAL powers_of_row(const void *z, const softmax_power_job *j, int64_t n, int m, const REAL *series) {
  vec row[MOST_ROW_CLASSES / WIDTH + 1];
  const int count = row_of_logits(z, (int)j->classes, (int)j->narrow, row);
  const REAL top = j->top[n], least = (REAL)log1p((double)j->odds[n]);
  ((REAL *)row)[first_class_of(row, count, (int)j->classes, top)] = -(REAL)INFINITY;
  if (j->complement == 0) return sum_of_powers(row, count, j, top, least, 0, series, NONE);
  if (j->second[n] < (REAL)1 / 64 && j->complement <= 1)
    return sum_of_powers(row, count, j, top, least, m, series, SHORT_SERIES);
  if (j->second[n] < (REAL)1 / 8 && j->complement <= 1)
    return sum_of_powers(row, count, j, top, least, m, series, SERIES);
  return sum_of_powers(row, count, j, top, least, m, series, LOGARITHM);
}

static void softmax_power_work(void *data) {
  softmax_power_job *j = data;
  REAL series[SERIES];
  double coefficient = 1;
  for (int k = 0; k < SERIES; k++) {
    series[k] = (REAL)coefficient;
    coefficient *= (k - j->complement) / (k + 1);
  }
  const int inverse = (int)(1 / j->power + 0.5), m = inverse <= 16 && inverse * j->power == 1 ? inverse : 0;
  for (int64_t n; (n = atomic_fetch_add(&j->next, 1)) < j->samples;)
    j->out[n] = powers_of_row(row_start(j->z, n * j->z_sample, j->narrow), j, n, m, series);
}

int64_t softmax_power_job_bytes(void) { return sizeof(softmax_power_job); }

void softmax_powers(softmax_power_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  run_threads(softmax_power_work, j, run, threads);
}
