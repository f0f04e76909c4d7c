/* The totals over all samples that ranking metrics need, for several tasks and many resamples, in one pass over the cells.
 *
 * A cell is a set of neighbouring scores. A group is the samples of some classes that a task counts on one side, with one
 * weight. The sums of a group are whole numbers and therefore exact; the weights are applied to the sums. */
#include "kernels.h"

typedef struct {
  const double *counts;      /* (entries, resamples): the samples of one class in one cell */
  const double *harmonic;    /* (harmonics): 1 + 1/2 + ... + 1/k */
  const int32_t *cells;      /* (cell_count + 1): the first entry of each cell, of the entries in ascending order of cells */
  const int32_t *rows;       /* the row in `counts` of each entry */
  const int32_t *classes;    /* the class of each entry */
  const int32_t *of_class;   /* (class_count + 1): the first place in `groups` of each class */
  const int32_t *groups;     /* the groups of each class */
  const int32_t *sides;      /* (2 task_count + 1): the first group of the negatives and of the positives of each task */
  const int32_t *wanted;     /* (task_count): the sum of the flags below */
  const double *weights;     /* the weight of each group */
  double *out;               /* (task_count, RESAMPLED, resamples) */
  void *scratch;             /* of the size `resampled_scratch_bytes` */
  double rate;               /* the true-positive rate */
  int64_t resamples, cell_count, class_count, task_count, harmonics;
} resampled_job;

enum { RISK = 1, PRECISION = 2, PRECISION_IN = 4 };
enum { LANES = BYTES / (int)sizeof(double) };

typedef double reals __attribute__((vector_size(BYTES), aligned(BYTES)));
typedef int64_t flags __attribute__((vector_size(BYTES), aligned(BYTES)));
typedef double loose_reals __attribute__((vector_size(BYTES), aligned(sizeof(double)), may_alias));

/* The totals of one task and LANES resamples, as ranking.c defines the first four; FLAGGED: the negatives at or above the
 * highest threshold that flags the wanted share of the positives. */
enum { PAIRS, RISKS, PRECISIONS, PRECISIONS_IN, FLAGGED, NEGATIVES, POSITIVES, RESAMPLED };

typedef struct {
  reals total[RESAMPLED];
  reals negatives_to, positives_to, harmonic, last, spare; /* harmonic: of the samples so far, if `is_known` */
  reals missing;                                           /* 1 until the threshold is passed */
  int is_known, is_weighted, is_far;                       /* is_far: the table is too short for some resamples */
  int touched;                                             /* 1 by negatives, 2 by positives of this cell */
} task_state;

static inline reals larger_of(reals a, double least) {
  const reals other = (reals){0} + least;
  const flags is_less = a < other;
  return (reals)((is_less & (flags)other) | (~is_less & (flags)a));
}

/* A harmonic number beyond the table, which has 1,024 or more, by its asymptotic expansion: exact up to rounding. */
static double far_harmonic(double n) {
  const double inverse = 1 / n, square = inverse * inverse;
  return log(n) + 0.57721566490153286 + inverse / 2 - square * (1.0 / 12 - square * (1.0 / 120 - square / 252));
}

/* Harmonic numbers, linear between whole numbers. */
inline_always reals harmonic_numbers(const resampled_job *j, const task_state *t, reals value) {
  const flags whole = __builtin_convertvector(value, flags);
  const double *table = j->harmonic;
  reals out;
  if (t->is_far)
    for (int l = 0; l < LANES; l++) out[l] = whole[l] < j->harmonics ? table[whole[l]] : far_harmonic((double)whole[l]);
  else
    for (int l = 0; l < LANES; l++) out[l] = table[whole[l]];
  if (!t->is_weighted) return out;
  const reals floors = __builtin_convertvector(whole, reals);
  return out + (value - floors) / (floors + 1);
}

static const double TINY = 2.2250738585072014e-308;

inline_always void add_cell(const resampled_job *j, task_state *t, int wanted, reals negatives_to, reals positives_to) {
  const reals negatives_below = t->negatives_to, positives_below = t->positives_to;
  const reals positive = positives_to - positives_below, ends = negatives_to + positives_to;
  const int has_negative = t->touched & 1, has_positive = t->touched & 2;
  reals negative = {0};
  if (has_negative) negative = negatives_to - negatives_below;
  if (has_positive) {
    t->total[PAIRS] += positive * (negatives_below + negative / 2);
    const reals false_here = t->total[NEGATIVES] - negatives_below;
    if (wanted & PRECISION) {
      const reals hits = t->total[POSITIVES] - positives_below;
      t->total[PRECISIONS] += positive * (hits / larger_of(hits + false_here, TINY));
    }
    if (wanted & RISK) {
      const reals start = t->is_known ? t->harmonic : harmonic_numbers(j, t, negatives_below + positives_below);
      const reals end = harmonic_numbers(j, t, ends);
      reals above = ends * (end - start); /* the mean over the cell, times its positives; a cell of positives only has no other */
      if (has_negative) above = above * positive / larger_of(negative + positive, TINY);
      t->total[RISKS] += positive * (t->last - start + 1) - above;
      t->harmonic = end;
    }
    const flags is_missing = t->missing > 0, is_passed = positives_to > t->spare;
    t->total[FLAGGED] = (reals)((is_missing & (flags)false_here) | (~is_missing & (flags)t->total[FLAGGED]));
    t->missing = (reals)(~is_passed & (flags)t->missing);
  }
  if (has_negative && wanted & PRECISION_IN) t->total[PRECISIONS_IN] += negative * (negatives_to / larger_of(ends, TINY));
  t->is_known = has_positive != 0;
  t->negatives_to = negatives_to, t->positives_to = positives_to;
}

/* The weighted sum of the groups from one place to another. */
inline_always reals weighted(const resampled_job *j, const reals *sums, int32_t from, int32_t to) {
  reals total = {0};
  for (int32_t g = from; g < to; g++) total += j->weights[g] * sums[g];
  return total;
}

inline_always reals counts_at(const resampled_job *j, int32_t entry, int64_t lane, int lanes) {
  const double *from = j->counts + j->rows[entry] * j->resamples + lane;
  if (lanes == LANES) return *(const loose_reals *)from;
  reals out = {0};
  for (int k = 0; k < lanes; k++) out[k] = from[k];
  return out;
}

static void begin(const resampled_job *j, task_state *tasks, reals *sums, int64_t lane, int lanes) {
  const int32_t group_count = j->sides[2 * j->task_count];
  for (int32_t g = 0; g < group_count; g++) sums[g] = (reals){0};
  for (int32_t e = 0; e < j->cells[j->cell_count]; e++) {
    const reals here = counts_at(j, e, lane, lanes);
    for (int32_t m = j->of_class[j->classes[e]]; m < j->of_class[j->classes[e] + 1]; m++) sums[j->groups[m]] += here;
  }
  for (int64_t k = 0; k < j->task_count; k++) {
    const int32_t *side = j->sides + 2 * k;
    task_state *t = tasks + k;
    memset(t, 0, sizeof *t);
    t->total[NEGATIVES] = weighted(j, sums, side[0], side[1]);
    t->total[POSITIVES] = weighted(j, sums, side[1], side[2]);
    for (int32_t g = side[0]; g < side[2]; g++) t->is_weighted |= j->weights[g] != 1;
    t->spare = t->total[POSITIVES] * (1 - j->rate * (1 - 8 * 2.220446049250313e-16));
    t->missing = (reals){0} + 1;
    const reals samples = t->total[NEGATIVES] + t->total[POSITIVES];
    for (int l = 0; l < LANES; l++) t->is_far |= samples[l] >= (double)j->harmonics;
    t->last = harmonic_numbers(j, t, samples);
    t->is_known = 1; /* the harmonic number of 0 is 0 */
  }
  for (int32_t g = 0; g < group_count; g++) sums[g] = (reals){0};
}

static void pass(const resampled_job *j, task_state *tasks, reals *sums, int32_t *touched, const int32_t *task_of, int64_t lane, int lanes) {
  for (int64_t c = 0; c < j->cell_count; c++) {
    int count = 0;
    for (int32_t e = j->cells[c]; e < j->cells[c + 1]; e++) {
      const reals here = counts_at(j, e, lane, lanes);
      for (int32_t m = j->of_class[j->classes[e]]; m < j->of_class[j->classes[e] + 1]; m++) {
        const int32_t g = j->groups[m], k = task_of[g];
        sums[g] += here;
        if (!tasks[k].touched) touched[count++] = k;
        tasks[k].touched |= g < j->sides[2 * k + 1] ? 1 : 2;
      }
    }
    for (int i = 0; i < count; i++) {
      const int32_t k = touched[i], *side = j->sides + 2 * k;
      task_state *t = tasks + k;
      const reals negatives_to = t->touched & 1 ? weighted(j, sums, side[0], side[1]) : t->negatives_to;
      const reals positives_to = t->touched & 2 ? weighted(j, sums, side[1], side[2]) : t->positives_to;
      add_cell(j, t, j->wanted[k], negatives_to, positives_to);
      t->touched = 0;
    }
  }
}

int64_t resampled_job_bytes(void) { return sizeof(resampled_job); }

int64_t resampled_scratch_bytes(int64_t tasks, int64_t groups, int64_t unused) {
  return tasks * (sizeof(task_state) + sizeof(int32_t)) + groups * (sizeof(reals) + sizeof(int32_t)) + BYTES;
}

void resampled_totals(resampled_job *j, parallel run, int threads) {
  const int32_t group_count = j->sides[2 * j->task_count];
  task_state *tasks = (task_state *)(((uintptr_t)j->scratch + BYTES - 1) / BYTES * BYTES);
  reals *sums = (reals *)(tasks + j->task_count);
  int32_t *touched = (int32_t *)(sums + group_count), *task_of = touched + j->task_count;
  for (int32_t k = 0; k < j->task_count; k++)
    for (int32_t g = j->sides[2 * k]; g < j->sides[2 * k + 2]; g++) task_of[g] = k;
  for (int64_t lane = 0; lane < j->resamples; lane += LANES) {
    const int lanes = j->resamples - lane < LANES ? (int)(j->resamples - lane) : LANES;
    begin(j, tasks, sums, lane, lanes);
    pass(j, tasks, sums, touched, task_of, lane, lanes);
    for (int64_t k = 0; k < j->task_count; k++)
      for (int s = 0; s < RESAMPLED; s++)
        for (int l = 0; l < lanes; l++) j->out[(k * RESAMPLED + s) * j->resamples + lane + l] = tasks[k].total[s][l];
  }
}
