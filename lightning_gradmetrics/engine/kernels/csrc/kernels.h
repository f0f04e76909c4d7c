/* Vector types, running statistics and tiles of products, which all kernels share.
 *
 * Compiled at first use with -DREAL=float -DSINGLE or -DREAL=double; plain C with the vector extensions of gcc and
 * clang.
 */
#ifndef LIGHTNING_GRADMETRICS_KERNELS_H
#define LIGHTNING_GRADMETRICS_KERNELS_H

#if defined(__AVX__)
#include <immintrin.h>
#endif
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#ifndef REAL
#define REAL float
#define SINGLE
#endif
#if defined(__AVX512F__)
#define BYTES 64
#define ROWS 12
#elif defined(__AVX__)
#define BYTES 32
#define ROWS 6
#else
#define BYTES 16
#define ROWS 6
#endif
#define WIDTH (BYTES / (int)sizeof(REAL))
#define COLS (2 * WIDTH)
#define BLOCK 256 /* positions summed per tile before the next tile: g's block stays in the first-level cache */
#define FLUSH 16  /* tiles between moves of the running sums to double precision */
#define inline_always static inline __attribute__((always_inline))

typedef REAL vec __attribute__((vector_size(BYTES), aligned(BYTES)));
typedef REAL loose __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));

#ifdef SINGLE
typedef int32_t whole;
#else
typedef int64_t whole;
#endif
typedef whole mask __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));

#ifdef SINGLE
#define LEAST 1e-28     /* smaller sums of squares may lack entries whose squares vanish in single precision */
#define VANISHING 1e-36 /* smaller sums of squares have few digits */
#else
#define LEAST 0
#define VANISHING 0
#endif
#define DOUBTFUL 1e-7 /* fraction of the largest value of a Gram sum that rows with vanishing squares may have */

/* Whether a sum of squares has all digits. */
#define in_range(square) ((square) >= LEAST && (square) < (double)INFINITY)

/* Whether all values are zero. */
inline_always int is_zero(const REAL *x, int64_t count) {
  int differs = 0;
  for (int64_t i = 0; i < count; i++) differs |= x[i] != 0;
  return !differs;
}

enum { SUMS = 0, ALL = 1 }; /* modes: sum and sum of squares only, or all five statistics */
enum { SUM, SQUARE, ABS, MAX, MIN, STATISTICS };

/* GOMP_parallel of the OpenMP runtime that torch uses: both share one pool of threads. */
typedef void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

static void run_threads(void (*work)(void *), void *job, parallel run, int threads) {
  if (threads == 1 || !run)
    work(job);
  else
    run(work, job, (unsigned)threads, 0);
}

typedef struct {
  vec part[STATISTICS];
  double total[STATISTICS];
  int tiles;
} running;

/* The larger, or smaller, of two values in each lane; b where one is NaN. */
#if defined(__AVX512F__) && defined(SINGLE)
#define larger _mm512_max_ps
#define smaller _mm512_min_ps
#elif defined(__AVX512F__)
#define larger _mm512_max_pd
#define smaller _mm512_min_pd
#elif defined(__AVX__) && defined(SINGLE)
#define larger _mm256_max_ps
#define smaller _mm256_min_ps
#elif defined(__AVX__)
#define larger _mm256_max_pd
#define smaller _mm256_min_pd
#else
inline_always vec larger(vec a, vec b) {
  vec out;
  for (int j = 0; j < WIDTH; j++) out[j] = a[j] > b[j] ? a[j] : b[j];
  return out;
}

inline_always vec smaller(vec a, vec b) {
  vec out;
  for (int j = 0; j < WIDTH; j++) out[j] = a[j] < b[j] ? a[j] : b[j];
  return out;
}
#endif

#if defined(__AVX512F__) && defined(SINGLE)
#define magnitude _mm512_abs_ps
#elif defined(__AVX512F__)
#define magnitude _mm512_abs_pd
#else
inline_always vec magnitude(vec a) { return larger(a, -a); }
#endif

static void start(running *s) {
  memset(s, 0, sizeof *s);
  s->part[MAX] -= (REAL)INFINITY;
  s->part[MIN] += (REAL)INFINITY;
}

/* The sum of all lanes in double precision, and the extremes of lanes that are no NaN. */
#if defined(__AVX512F__) && defined(SINGLE)
inline_always double lane_total(vec a) {
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
  return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a)), _mm512_cvtps_pd(upper)));
}
#define largest_lane _mm512_reduce_max_ps
#define smallest_lane _mm512_reduce_min_ps
#else
inline_always double lane_total(vec a) {
  double t[WIDTH];
  for (int j = 0; j < WIDTH; j++) t[j] = a[j];
#pragma GCC unroll 8
  for (int w = WIDTH / 2; w > 0; w /= 2)
    for (int j = 0; j < w; j++) t[j] += t[j + w];
  return t[0];
}

inline_always REAL largest_lane(vec a) {
  REAL t[WIDTH];
  memcpy(t, &a, sizeof t);
#pragma GCC unroll 8
  for (int w = WIDTH / 2; w > 0; w /= 2)
    for (int j = 0; j < w; j++) t[j] = t[j] > t[j + w] ? t[j] : t[j + w];
  return t[0];
}

inline_always REAL smallest_lane(vec a) { return -largest_lane(-a); }
#endif

static void flush(running *s) {
  for (int k = SUM; k <= ABS; k++) {
    s->total[k] += lane_total(s->part[k]);
    memset(&s->part[k], 0, sizeof(vec));
  }
  s->tiles = 0;
}

static void finish(running *s, double *out) {
  flush(s);
  double high = -INFINITY, low = INFINITY;
  for (int j = 0; j < WIDTH; j++) {
    if (s->part[MAX][j] > high) high = s->part[MAX][j];
    if (s->part[MIN][j] < low) low = s->part[MIN][j];
  }
  /* Comparisons drop NaN; the sum of squares is NaN exactly if an entry is. */
  if (isnan(s->total[SQUARE])) high = low = NAN;
  s->total[MAX] = high;
  s->total[MIN] = low;
  memcpy(out, s->total, sizeof s->total);
}

/* How the columns of a tile fill its vectors: both one after the other, only the first one, or each of them alike. */
enum { WIDE = 0, NARROW = 1, EACH = 2 };

/* Adds a tile of G to the running statistics. `valid` counts the columns that exist, of each vector if both are filled alike; the
 * others hold zeros. */
inline_always void reduce(running *s, vec acc[ROWS][2], int rows, int valid, int mode, int filling) {
  /* Two chains of each statistic hide the latency of its instruction. */
  vec sum[2] = {{0}}, square[2] = {{0}}, absolute[2] = {{0}}, high[2], low[2];
  high[0] = high[1] = s->part[MAX], low[0] = low[1] = s->part[MIN];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < (filling == NARROW ? 1 : 2); v++) {
      const int chain = filling == NARROW ? r % 2 : v, before = filling == WIDE ? v * WIDTH : 0;
      vec a = acc[r][v];
      sum[chain] += a;
      square[chain] += a * a;
      if (mode == ALL) {
        absolute[chain] += magnitude(a);
        if (valid < (filling == WIDE ? COLS : WIDTH))
          for (int j = 0; j < WIDTH; j++) a[j] = before + j < valid ? a[j] : acc[r][0][0];
        high[chain] = larger(a, high[chain]);
        low[chain] = smaller(a, low[chain]);
      }
    }
  s->part[SUM] += sum[0] + sum[1];
  s->part[SQUARE] += square[0] + square[1];
  if (mode == ALL) {
    s->part[ABS] += absolute[0] + absolute[1];
    s->part[MAX] = larger(high[0], high[1]);
    s->part[MIN] = smaller(low[0], low[1]);
  }
  if (++s->tiles == FLUSH) flush(s);
}

/* Rows of a tile, in the input at each position. If the channels of the input are interleaved, the tile consists of RUNS runs of
 * rows that are adjacent in memory, so that RUNS addresses are enough: ROWS addresses do not fit into the registers. */
#define RUNS 3
#define RUN (ROWS / RUNS)
enum { SCATTERED = 0, IN_RUNS = 1 };

/* The address of a row at a position, from those of all rows or of all runs. */
inline_always const REAL *row_at(const REAL *const *start, int r, int64_t position, int runs) {
  return runs ? start[r / RUN] + position + r % RUN : start[r] + position;
}

inline_always void row_starts(const REAL *x, const int32_t *rows, const REAL **start, int runs) {
  for (int r = 0; r < (runs ? RUNS : ROWS); r++) start[r] = x + rows[runs ? r * RUN : r];
}

/* acc[r][.] += sum_p x[row r + position p] g[p, .] for the first `used` rows */
inline_always void product(const REAL *x, const int32_t *rows, const int32_t *positions, const vec *g, int count,
                           vec acc[ROWS][2], int runs, int used) {
  const REAL *start[ROWS];
  row_starts(x, rows, start, runs);
  for (int p = 0; p < count; p++) {
    const int64_t at = positions[p];
    const vec g0 = g[2 * p], g1 = g[2 * p + 1];
#pragma GCC unroll 16
    for (int r = 0; r < used; r++) {
      const REAL value = *row_at(start, r, at, runs);
      acc[r][0] += value * g0;
      acc[r][1] += value * g1;
    }
  }
}

/* The same for tiles of one vector: acc[r][0] sums the even positions and acc[r][1] the odd ones. */
inline_always void narrow_product(const REAL *x, const int32_t *rows, const int32_t *positions, const vec *g, int count,
                                  vec acc[ROWS][2], int runs) {
  const REAL *start[ROWS];
  row_starts(x, rows, start, runs);
  for (int p = 0; p + 1 < count; p += 2) {
    const int64_t even = positions[p], odd = positions[p + 1];
    const vec g0 = g[p], g1 = g[p + 1];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
      acc[r][0] += *row_at(start, r, even, runs) * g0;
      acc[r][1] += *row_at(start, r, odd, runs) * g1;
    }
  }
  if (count % 2)
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) acc[r][0] += *row_at(start, r, positions[count - 1], runs) * g[count - 1];
}

#if defined(__AVX__) && defined(SINGLE)
/* Eight columns of eight positions each, from rows of positions to rows of columns. */
inline_always void transpose(const REAL *from, int64_t step, REAL *to, int lanes) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(from + i * step);
  for (int i = 0; i < 8; i += 2)
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; k++) {
      a[i + 2 * k] = _mm256_shuffle_ps(b[i + k], b[i + k + 2], 0x44);
      a[i + 2 * k + 1] = _mm256_shuffle_ps(b[i + k], b[i + k + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(to + i * lanes, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * lanes, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
#define TRANSPOSED 8
#else
#define TRANSPOSED 1
inline_always void transpose(const REAL *from, int64_t step, REAL *to, int lanes) { *to = *from; }
#endif

/* Copies a line of positions of some columns, adjacent in memory, to rows of `lanes` values. */
inline_always void pack_line(const REAL *from, int64_t step, int64_t width, int columns, REAL *to, int lanes) {
  int c = 0;
  for (; c + TRANSPOSED <= columns; c += TRANSPOSED) {
    int64_t i = 0;
    for (; i + TRANSPOSED <= width; i += TRANSPOSED)
      transpose(from + c * step + i, step, to + i * lanes + c, lanes);
    for (; i < width; i++)
      for (int k = c; k < c + TRANSPOSED; k++) to[i * lanes + k] = from[k * step + i];
  }
  for (; c < columns; c++)
    for (int64_t i = 0; i < width; i++) to[i * lanes + c] = from[c * step + i];
}

/* Copies `valid` channels with a border of zeros to a plane of `lanes` channels; the other channels are zeros. */
inline_always void pack_plane(const REAL *from, int64_t channel, const int64_t step[3], const int64_t size[3],
                              const int64_t pad[3], int valid, REAL *to, int lanes) {
  const int64_t d = size[0] + 2 * pad[0], h = size[1] + 2 * pad[1], w = size[2] + 2 * pad[2], lines = size[0] * size[1];
  const int is_joined = step[2] == 1 && (size[1] == 1 || step[1] == size[2]) &&
                        (size[0] == 1 || step[0] == size[1] * size[2]);
  const int joins = TRANSPOSED > 1 && is_joined && channel != 1 && size[2] % TRANSPOSED;
  if (valid < lanes || (!joins && (pad[0] || pad[1] || pad[2]))) memset(to, 0, sizeof(REAL) * d * h * w * lanes);
  if (joins) { /* all lines at once, because short lines are slow, and then each to its place, from the last one on */
    const int64_t bytes = sizeof(REAL) * size[2] * lanes;
    REAL *behind = to + d * h * w * lanes;
    pack_line(from, channel, lines * size[2], valid, to, lanes);
    for (int64_t k = lines - 1; k >= 0 && (pad[0] || pad[1] || pad[2]); k--) {
      REAL *place = to + (((k / size[1] + pad[0]) * h + k % size[1] + pad[1]) * w + pad[2]) * lanes;
      memmove(place, to + k * size[2] * lanes, bytes);
      memset(place + size[2] * lanes, 0, sizeof(REAL) * (behind - place - size[2] * lanes));
      behind = place;
      if (k == 0) memset(to, 0, sizeof(REAL) * (place - to));
    }
    return;
  }
  for (int64_t z = 0; z < size[0]; z++)
    for (int64_t y = 0; y < size[1]; y++) {
      const REAL *line = from + z * step[0] + y * step[1];
      REAL *packed = to + (((z + pad[0]) * h + y + pad[1]) * w + pad[2]) * lanes;
      if (channel == 1 && valid == lanes)
        for (int64_t i = 0; i < size[2]; i++) memcpy(packed + i * lanes, line + i * step[2], sizeof(REAL) * lanes);
      else if (channel == 1)
        for (int64_t i = 0; i < size[2]; i++) memcpy(packed + i * lanes, line + i * step[2], sizeof(REAL) * valid);
      else if (step[2] == 1)
        pack_line(line, channel, size[2], valid, packed, lanes);
      else
        for (int64_t i = 0; i < size[2]; i++)
          for (int c = 0; c < valid; c++) packed[i * lanes + c] = line[c * channel + i * step[2]];
    }
}

#endif
