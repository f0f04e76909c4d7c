/* Counts of the samples of each class at or below each distinct score. The caller sorts between the two functions.
 *
 * A word is the magnitude of a score in the upper bits and the class in the lowest bit. Negative scores have their own part
 * of the words and need no sign bit, so every word has all bits of its score. */
#include "kernels.h"

#ifdef SINGLE
typedef uint32_t word;
#else
typedef uint64_t word;
#endif
enum { SIGN = 8 * sizeof(word) - 1 };

typedef struct {
  const REAL *scores;             /* (samples), no NaN */
  const uint8_t *positive;        /* (samples), 0 or 1 */
  void *words;                    /* (samples) of the size of REAL; afterwards the distinct scores, ascending */
  int32_t *negatives, *positives; /* (samples) each: the samples of a class at or below each distinct score */
  double pairs;                   /* the pairs of a positive and a lower negative, ties by half */
  int64_t samples, below, groups; /* below: the number of negative scores; groups: that of distinct scores */
} sorting_job;

/* The bits of a score without its sign. Those of a negative score are inverted, because its magnitude falls as it rises. */
inline_always word magnitude_of(word bits, word is_negative) { return (bits ^ (0 - is_negative)) & ~((word)1 << SIGN); }

int64_t sorting_job_bytes(void) { return sizeof(sorting_job); }

/* Writes the words of the negative scores, and behind them those of the others. */
void words_to_sort(sorting_job *j, parallel run, int threads) {
  word *words = j->words;
  int64_t below = 0;
  for (int64_t i = 0; i < j->samples; i++) below += j->scores[i] < 0;
  int64_t negative = 0, other = below;
  for (int64_t i = 0; i < j->samples; i++) {
    const REAL score = j->scores[i] + 0; /* turns -0 into 0 */
    word bits;
    memcpy(&bits, &score, sizeof bits);
    const word is_negative = bits >> SIGN;
    /* A branch would be mispredicted for every other score. */
    words[other ^ ((other ^ negative) & -(int64_t)is_negative)] = magnitude_of(bits, is_negative) << 1 | (j->positive[i] != 0);
    negative += is_negative, other += 1 - is_negative;
  }
  j->below = below;
}

/* Counts the samples in both parts of the words, each of which is sorted. */
void counts_of_sorted(sorting_job *j, parallel run, int threads) {
  word *words = j->words;
  int32_t *negatives_to = j->negatives, *positives_to = j->positives, positives = 0;
  const int64_t samples = j->samples, below = j->below;
  int64_t groups = 0;
  for (int64_t i = 0; i < samples; i++) {
    const word own = words[i], is_negative = i < below;
    const int is_last = i + 1 == samples || i + 1 == below || own >> 1 != words[i + 1] >> 1;
    positives += own & 1;
    words[groups] = magnitude_of(own >> 1, is_negative) | is_negative << SIGN;
    positives_to[groups] = positives, negatives_to[groups] = (int32_t)(i + 1) - positives;
    groups += is_last;
  }
  int64_t twice = groups ? (int64_t)positives_to[0] * negatives_to[0] : 0;
  for (int64_t g = 1; g < groups; g++)
    twice += (int64_t)(positives_to[g] - positives_to[g - 1]) * ((int64_t)negatives_to[g] + negatives_to[g - 1]);
  j->pairs = (double)twice / 2, j->groups = groups;
}
