/* Sums of squares of a linear layer's per-sample weight gradients from Gram matrices of rows, read where they are.
 *
 * For each sample, |G|^2 = sum_{p,q} (a_p . a_q) (g_p . g_q) with the rows a_p of the input and g_p of the output
 * gradient. Vectors run along the channels, which are adjacent in memory. Blocks of SIDE x SIDE pairs on and below the
 * diagonal are computed for both matrices and multiplied at once, so that no matrix is stored.
 */
#include "kernels.h"

typedef struct {
  const REAL *a, *g;
  REAL *bias; /* (samples, outputs): receives the sums of g over the positions; may be null */
  double *out; /* (samples, 3): sum, sum of squares, its largest possible value or, if it has few digits, infinity */
  int64_t samples, positions, inputs, outputs; /* at least WIDTH inputs and outputs */
  int64_t a_sample, a_position, g_sample, g_position;
  int64_t with_sums;
  double cancelled; /* a sum of squares below this fraction of its largest value has lost digits */
  atomic_int next, lost; /* lost: the number of samples without digits */
} linear_gram_job;

#if defined(__AVX512F__)
#define SIDE 4
#else
#define SIDE 3
#endif
#define PAIRS (SIDE * SIDE)
#define PANEL_BYTES (512 * 1024) /* rows that stay in the second-level cache while other rows pass */
#define PANEL_BLOCKS 64          /* blocks of a panel at most */
#define CHUNK 1024               /* channels of SIDE rows that stay in the first-level cache */
enum { COLUMNS = 512, TERMS = 64 }; /* columns, and terms of a sum, that are added in single precision */

/* One sample's rows. */
typedef struct {
  const REAL *first;
  int64_t step, channels;
} rows_of;

/* The products of SIDE rows with SIDE rows over the channels from `begin` to `end`; each lane has a part of the sum. */
inline_always void row_products(const REAL *const *left, const REAL *const *right, int64_t begin, int64_t end,
                                vec acc[PAIRS]) {
  static const whole behind[2 * WIDTH] = {[WIDTH... 2 * WIDTH - 1] = -1};
  int64_t c = begin;
#pragma GCC unroll 16
  for (int p = 0; p < PAIRS; p++) acc[p] = (vec){0};
  for (; c + WIDTH <= end; c += WIDTH)
#pragma GCC unroll 4
    for (int k = 0; k < SIDE; k++) {
      const vec other = *(const loose *)(right[k] + c);
#pragma GCC unroll 4
      for (int i = 0; i < SIDE; i++) acc[SIDE * i + k] += *(const loose *)(left[i] + c) * other;
    }
  if (c == end) return;
  const mask fresh = *(const mask *)(behind + end - c); /* of the last WIDTH channels, those that are not added yet */
  c = end - WIDTH;
#pragma GCC unroll 4
  for (int k = 0; k < SIDE; k++) {
    const vec other = (vec)(*(const mask *)(right[k] + c) & fresh);
#pragma GCC unroll 4
    for (int i = 0; i < SIDE; i++) acc[SIDE * i + k] += (vec)(*(const mask *)(left[i] + c) & fresh) * other;
  }
}

/* The sum of the lanes of each vector. */
#if defined(__AVX512F__) && defined(SINGLE)
inline_always vec joined(vec a, vec b, int pairs) {
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  if (pairs == 1) return _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  if (pairs == 2) return (vec)_mm512_unpacklo_pd(c, d) + (vec)_mm512_unpackhi_pd(c, d);
  return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
}

inline_always void lane_sums(vec acc[PAIRS], REAL *sums) {
  vec part[PAIRS];
  memcpy(part, acc, sizeof part);
#pragma GCC unroll 4
  for (int pairs = 1; pairs < PAIRS; pairs *= 2)
#pragma GCC unroll 8
    for (int i = 0; i < PAIRS / pairs; i += 2) part[i / 2] = joined(part[i], part[i + 1], pairs);
  *(loose *)sums = part[0];
}
#else
inline_always void lane_sums(vec acc[PAIRS], REAL *sums) {
  for (int p = 0; p < PAIRS; p++) {
    REAL t[WIDTH];
    memcpy(t, &acc[p], sizeof t);
#pragma GCC unroll 8
    for (int w = WIDTH / 2; w > 0; w /= 2)
      for (int j = 0; j < w; j++) t[j] += t[j + w];
    sums[p] = t[0];
  }
}
#endif

/* The addresses of SIDE rows; at the edge, the last row replaces missing ones. */
inline_always void addresses(rows_of rows, int64_t first, int64_t count, const REAL **to, int edge) {
#pragma GCC unroll 4
  for (int i = 0; i < SIDE; i++) to[i] = rows.first + (edge && first + i >= count ? count - 1 : first + i) * rows.step;
}

/* What the blocks of a sample add to. */
typedef struct {
  double square[WIDTH], root; /* root: of the largest possible sum of squares */
  double doubtful;            /* part of the root that belongs to rows whose squares may lack digits */
} gram_sums;

/* The sum of squares of a row, given in single precision: in double precision if it is out of range. */
inline_always double exact_square(const REAL *row, int64_t channels, double square) {
  if (in_range(square)) return square;
  if (is_zero(row, channels)) return 0; /* rows of zeros are common; this takes a tenth of the time of the sum */
  square = 0;
  for (int64_t c = 0; c < channels; c++) square += (double)row[c] * row[c];
  return square;
}

/* Adds the pairs of a row with itself to the largest sum of squares. */
inline_always void add_own(const REAL *a, int64_t inputs, double a_square, const REAL *g, int64_t outputs,
                           double g_square, gram_sums *s) {
  const double own = sqrt(exact_square(a, inputs, a_square) * exact_square(g, outputs, g_square));
  s->root += own;
  if (!in_range(a_square) || !in_range(g_square)) s->doubtful += own;
}

/* Adds the pairs of the rows from `i` on and those from `first` to `last`; `edge`: some of them do not exist. */
inline_always void add_blocks(rows_of a, rows_of g, int64_t i, int64_t first, int64_t last, int64_t count, gram_sums *s,
                              int edge) {
  const REAL *left[SIDE], *right[SIDE];
  REAL gram[PANEL_BLOCKS][PAIRS], sums[PAIRS], own[SIDE];
  vec acc[PAIRS];
  addresses(a, i, count, left, edge);
  for (int64_t c = 0; c < a.channels; c += CHUNK)
    for (int64_t k = first; k <= last; k += SIDE) {
      REAL *to = gram[(k - first) / SIDE];
      addresses(a, k, count, right, edge);
      row_products(left, right, c, c + CHUNK < a.channels ? c + CHUNK : a.channels, acc);
      lane_sums(acc, c ? sums : to);
      for (int p = 0; c && p < PAIRS; p++) to[p] += sums[p];
    }
  for (int r = 0; r < SIDE; r++) own[r] = gram[(last - first) / SIDE][r * (SIDE + 1)];
  for (int64_t k = first; edge && k <= last; k += SIDE)
    for (int p = 0; p < PAIRS; p++)
      if (i + p / SIDE >= count || k + p % SIDE >= count) gram[(k - first) / SIDE][p] = 0;
  double g_own[SIDE] = {0};
  addresses(g, i, count, left, edge);
  for (int64_t c = 0; c < g.channels; c += CHUNK)
    for (int64_t k = first; k <= last; k += SIDE) {
      const REAL *from = gram[(k - first) / SIDE];
      vec part[SIDE] = {{0}}; /* independent sums hide the latency of an addition */
      addresses(g, k, count, right, edge);
      row_products(left, right, c, c + CHUNK < g.channels ? c + CHUNK : g.channels, acc);
#pragma GCC unroll 16
      for (int p = 0; p < PAIRS; p++) part[p % SIDE] += from[p] * acc[p];
      for (int r = 1; r < SIDE; r++) part[0] += part[r];
      for (int l = 0; l < WIDTH; l++) s->square[l] += (i == k ? 1 : 2) * (double)part[0][l];
      for (int r = 0; i == k && r < SIDE; r++) g_own[r] += lane_total(acc[r * (SIDE + 1)]);
    }
  addresses(a, i, count, right, edge);
  for (int r = 0; i == last && r < SIDE && i + r < count; r++)
    add_own(right[r], a.channels, own[r], left[r], g.channels, g_own[r], s);
}

/* Panels of rows stay in the cache while all rows from the first of them on pass. */
static void all_blocks(rows_of a, rows_of g, int64_t count, gram_sums *s) {
  const int64_t fitting = PANEL_BYTES / (int64_t)sizeof(REAL) / (a.channels + g.channels) / SIDE;
  const int64_t panel = SIDE * (fitting < 4 ? 4 : fitting < PANEL_BLOCKS ? fitting : PANEL_BLOCKS);
  for (int64_t first = 0; first < count; first += panel)
    for (int64_t i = first; i < count; i += SIDE) {
      const int64_t last = i < first + panel ? i : first + panel - SIDE;
      if (i + SIDE > count)
        add_blocks(a, g, i, first, last, count, s, 1);
      else
        add_blocks(a, g, i, first, last, count, s, 0);
    }
}

/* Writes the sums over the rows. */
static void row_sums(rows_of rows, int64_t count, REAL *to) {
  for (int64_t first = 0; first < rows.channels; first += COLUMNS) {
    const int64_t width = rows.channels - first < COLUMNS ? rows.channels - first : COLUMNS;
    double total[COLUMNS] = {0};
    for (int64_t p = 0; p < count; p += TERMS) {
      REAL part[COLUMNS] = {0};
      for (int64_t q = p; q < p + TERMS && q < count; q++)
        for (int64_t c = 0; c < width; c++) part[c] += rows.first[q * rows.step + first + c];
      for (int64_t c = 0; c < width; c++) total[c] += part[c];
    }
    for (int64_t c = 0; c < width; c++) to[first + c] = (REAL)total[c];
  }
}

static double row_total(const REAL *row, int64_t channels) {
  double total = 0;
  vec part = {0};
  int64_t c = 0;
  for (; c + WIDTH <= channels; c += WIDTH) part += *(const loose *)(row + c);
  for (; c < channels; c++) total += row[c];
  return total + lane_total(part);
}

static void sample_square(linear_gram_job *j, int64_t n) {
  const rows_of a = {j->a + n * j->a_sample, j->a_position, j->inputs};
  const rows_of g = {j->g + n * j->g_sample, j->g_position, j->outputs};
  gram_sums s = {{0}};
  double sum = 0, square = 0;
  for (int64_t p = 0; j->with_sums && p < j->positions; p++)
    sum += row_total(a.first + p * a.step, a.channels) * row_total(g.first + p * g.step, g.channels);
  if (j->bias) row_sums(g, j->positions, j->bias + n * j->outputs);
  all_blocks(a, g, j->positions, &s);
  for (int l = 0; l < WIDTH; l++) square += s.square[l];
  const double bound = s.root * s.root;
  const int in_doubt = s.doubtful > DOUBTFUL * s.root || !(bound == 0 || in_range(bound));
  const int is_lost = in_doubt || !(square >= j->cancelled * bound && square < (double)INFINITY);
  if (is_lost) atomic_fetch_add(&j->lost, 1);
  j->out[3 * n] = sum, j->out[3 * n + 1] = square, j->out[3 * n + 2] = is_lost ? (double)INFINITY : bound;
}

static void linear_gram_work(void *data) {
  linear_gram_job *j = data;
  for (int64_t n; (n = atomic_fetch_add(&j->next, 1)) < j->samples;) sample_square(j, n);
}

int64_t linear_gram_job_bytes(void) { return sizeof(linear_gram_job); }

void linear_squares(linear_gram_job *j, parallel run, int threads) {
  atomic_init(&j->lost, 0);
  atomic_init(&j->next, 0);
  run_threads(linear_gram_work, j, run, threads);
}
