/* The totals over all samples that ranking metrics need, in one pass over the cumulative counts of the distinct scores. */
#include "kernels.h"

typedef struct {
  const void *negatives, *positives; /* (scores) each: the samples of a class at or below each distinct score */
  const double *harmonic;            /* 1 + 1/2 + ... + 1/k for k from 0 to the number of samples */
  double *out;                       /* (TOTALS) */
  int64_t scores, negatives_are_real, positives_are_real; /* double, otherwise int32_t */
} ranking_job;

/* Over all positives: the pairs with a lower negative, ties by half; H[N] - H[k - 1] of the k-th of N samples, averaged
 * over all orders of ties; the precision at the score. Over all negatives: the precision if low scores are flagged. */
enum { PAIRS, RISK, PRECISION, PRECISION_IN, TOTALS };
enum { CHUNK = 1024, LANES = BYTES / (int)sizeof(double) };

typedef double reals __attribute__((vector_size(BYTES), aligned(BYTES)));
typedef double loose_reals __attribute__((vector_size(BYTES), aligned(sizeof(double)), may_alias));

/* Values of one chunk, after the last value of the chunk before. */
typedef struct {
  double negatives[CHUNK + LANES], positives[CHUNK + LANES], harmonic[CHUNK + LANES];
} chunk;

static void load(double *to, const void *from, int64_t is_real, int64_t start, int count) {
  if (is_real)
    memcpy(to, (const double *)from + start, sizeof(double) * count);
  else
    for (int j = 0; j < count; j++) to[j] = ((const int32_t *)from)[start + j];
}

/* A harmonic number, linear between whole numbers. */
inline_always double harmonic_number(const double *table, int is_real, double value) {
  const int64_t whole = (int64_t)value;
  return is_real ? table[whole] + (value - (double)whole) / (double)(whole + 1) : table[whole];
}

inline_always double total_of(reals a) {
  double total = 0;
  for (int j = 0; j < LANES; j++) total += a[j];
  return total;
}

/* The quotient, or 0 where the divisor is 0, as then the dividend is 0 too. */
inline_always reals quotient(reals dividend, reals divisor) {
  typedef int64_t flags __attribute__((vector_size(BYTES)));
  const reals zero = {0}, one = zero + 1;
  return dividend / (divisor + (reals)((flags)(divisor == zero) & (flags)one));
}

static void add_chunk(const chunk *c, int count, double negatives, double positives, double last, double *out) {
  reals pairs = {0}, risk = {0}, precision = {0}, precision_in = {0};
  for (int j = 0; j < count; j += LANES) {
    const reals negatives_below = *(const loose_reals *)(c->negatives + j), positives_below = *(const loose_reals *)(c->positives + j);
    const reals negatives_to = *(const loose_reals *)(c->negatives + j + 1), positives_to = *(const loose_reals *)(c->positives + j + 1);
    const reals start = *(const loose_reals *)(c->harmonic + j), end = *(const loose_reals *)(c->harmonic + j + 1);
    const reals negative = negatives_to - negatives_below, positive = positives_to - positives_below;
    const reals ends = negatives_to + positives_to, hits = positives - positives_below;
    pairs += positive * (negatives_to - negative / 2);
    const reals mean = start + quotient(ends * (end - start), negative + positive) - 1;
    risk += positive * (last - mean);
    precision += positive * quotient(hits, hits + (negatives - negatives_below));
    precision_in += negative * quotient(negatives_to, ends);
  }
  out[PAIRS] += total_of(pairs), out[RISK] += total_of(risk);
  out[PRECISION] += total_of(precision), out[PRECISION_IN] += total_of(precision_in);
}

int64_t ranking_job_bytes(void) { return sizeof(ranking_job); }

void ranking_totals(ranking_job *j, parallel run, int threads) {
  const int is_real = j->negatives_are_real || j->positives_are_real;
  double negatives, positives, out[TOTALS] = {0};
  load(&negatives, j->negatives, j->negatives_are_real, j->scores - 1, 1);
  load(&positives, j->positives, j->positives_are_real, j->scores - 1, 1);
  const double last = harmonic_number(j->harmonic, is_real, negatives + positives);
  chunk c;
  c.negatives[0] = c.positives[0] = c.harmonic[0] = 0;
  for (int64_t start = 0; start < j->scores; start += CHUNK) {
    const int count = j->scores - start < CHUNK ? (int)(j->scores - start) : CHUNK;
    load(c.negatives + 1, j->negatives, j->negatives_are_real, start, count);
    load(c.positives + 1, j->positives, j->positives_are_real, start, count);
    for (int k = 1; k <= count; k++) c.harmonic[k] = harmonic_number(j->harmonic, is_real, c.negatives[k] + c.positives[k]);
    for (int k = count + 1; k < count + LANES; k++) { /* missing scores have no samples */
      c.negatives[k] = c.negatives[count], c.positives[k] = c.positives[count], c.harmonic[k] = c.harmonic[count];
    }
    add_chunk(&c, count, negatives, positives, last, out);
    c.negatives[0] = c.negatives[count], c.positives[0] = c.positives[count], c.harmonic[0] = c.harmonic[count];
  }
  memcpy(j->out, out, sizeof out);
}
