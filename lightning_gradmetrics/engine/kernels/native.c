/* Products of a layer's input and output gradient, reduced in registers: no per-sample weight gradient is written to memory.
 *
 * For each sample n the weight gradient is G[o, r] = sum_p g[o, p] x[row(r) + position(p)], where a row r is an input channel at a
 * kernel offset and p an output position. A tile of ROWS x COLS entries of G stays in registers over all positions and is then
 * added to five running statistics: sum, sum of squares, sum of absolute values, maximum, minimum.
 *
 * Compiled at first use with -DREAL=float -DSINGLE or -DREAL=double; plain C with the vector extensions of gcc and clang.
 */
#if defined(__AVX__)
#include <immintrin.h>
#endif
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#ifndef REAL
#define REAL float
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
#define BLOCK 256      /* positions summed before moving to the next tile, so that g's block stays in the first-level cache */
#define FLUSH 16       /* tiles between moves of the running sums to double precision */
#define BLOCK_TILES 32 /* tiles of rows that share a block of g */
#define inline_always static inline __attribute__((always_inline))

typedef REAL vec __attribute__((vector_size(BYTES), aligned(BYTES)));
typedef REAL loose __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));

enum { SUMS = 0, ALL = 1 };                      /* modes */
enum { IN_PLACE = 0, PLANES = 1, INTERLEAVED = 2 }; /* layouts of the input */
enum { SUM, SQUARE, ABS, MAX, MIN, STATISTICS };

typedef struct {
  vec part[STATISTICS];
  double total[STATISTICS];
  int tiles;
} running;

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

inline_always vec magnitude(vec a) {
  vec out;
  for (int j = 0; j < WIDTH; j++) out[j] = a[j] < 0 ? -a[j] : a[j];
  return out;
}

static void start(running *s) {
  memset(s, 0, sizeof *s);
  s->part[MAX] -= (REAL)INFINITY;
  s->part[MIN] += (REAL)INFINITY;
}

static void flush(running *s) {
  for (int k = SUM; k <= ABS; k++) {
    for (int j = 0; j < WIDTH; j++) s->total[k] += s->part[k][j];
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

/* Adds a tile of G to the running statistics. `valid` counts the tile's columns that exist; the others hold zeros. */
inline_always void reduce(running *s, vec acc[ROWS][2], int rows, int valid, int mode) {
  /* Two chains of each statistic hide the latency of its instruction. */
  vec sum[2] = {{0}}, square[2] = {{0}}, absolute[2] = {{0}}, high[2], low[2];
  high[0] = high[1] = s->part[MAX], low[0] = low[1] = s->part[MIN];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < 2; v++) {
      vec a = acc[r][v];
      sum[v] += a;
      square[v] += a * a;
      if (mode == ALL) {
        absolute[v] += magnitude(a);
        if (valid < COLS)
          for (int j = 0; j < WIDTH; j++) a[j] = v * WIDTH + j < valid ? a[j] : acc[r][0][0];
        high[v] = larger(a, high[v]);
        low[v] = smaller(a, low[v]);
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

/* acc[r][.] += sum_p x[row r + position p] g[p, .] */
inline_always void product(const REAL *x, const int32_t *rows, const int32_t *positions, const vec *g, int count, vec acc[ROWS][2]) {
  const REAL *row[ROWS];
  for (int r = 0; r < ROWS; r++) row[r] = x + rows[r];
  for (int p = 0; p < count; p++) {
    int64_t at = positions[p];
    vec g0 = g[2 * p], g1 = g[2 * p + 1];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
      REAL value = row[r][at];
      acc[r][0] += value * g0;
      acc[r][1] += value * g1;
    }
  }
}

typedef struct {
  const REAL *x, *g;
  double *out;                 /* (samples, groups, pieces, STATISTICS) */
  char *scratch;               /* workers x scratch_bytes */
  const int32_t *rows, *positions; /* rows: padded to a multiple of ROWS with valid offsets */
  int64_t scratch_bytes, samples, groups, pieces, mode;
  int64_t row_count, columns;  /* input channels of a group times kernel entries; output channels of a group */
  int64_t channels, layout, in[3], pad[3], out_size[3];
  int64_t x_sample, x_channel, x_step[3], g_sample, g_channel, g_step[3];
  atomic_int next, worker;
} job;

/* Copies one group's input with a border of zeros: to channel planes, or, where neighbours in memory are channels, to planes of
 * ROWS channels each. */
static void pack_input(const job *j, const REAL *x, REAL *to) {
  const int64_t d = j->in[0], h = j->in[1], w = j->in[2];
  const int64_t dp = d + 2 * j->pad[0], hp = h + 2 * j->pad[1], wp = w + 2 * j->pad[2];
  const int64_t lanes = j->layout == INTERLEAVED ? ROWS : 1, planes = (j->channels + lanes - 1) / lanes;
  if (dp * hp * wp != d * h * w || planes * lanes != j->channels) memset(to, 0, sizeof(REAL) * planes * lanes * dp * hp * wp);
  for (int64_t c = 0; c < planes; c++)
    for (int64_t z = 0; z < d; z++)
      for (int64_t y = 0; y < h; y++) {
        const REAL *from = x + c * lanes * j->x_channel + z * j->x_step[0] + y * j->x_step[1];
        REAL *line = to + (((c * dp + z + j->pad[0]) * hp + y + j->pad[1]) * wp + j->pad[2]) * lanes;
        if (lanes == 1 && j->x_step[2] == 1)
          memcpy(line, from, sizeof(REAL) * w);
        else if (lanes == 1)
          for (int64_t i = 0; i < w; i++) line[i] = from[i * j->x_step[2]];
        else if ((c + 1) * ROWS <= j->channels)
          for (int64_t i = 0; i < w; i++) memcpy(line + i * ROWS, from + i * j->x_step[2], sizeof(REAL) * ROWS);
        else
          for (int64_t i = 0; i < w; i++) memcpy(line + i * ROWS, from + i * j->x_step[2], sizeof(REAL) * (j->channels % ROWS));
      }
}

#if defined(__AVX__) && defined(SINGLE)
/* Eight columns of eight positions each, from rows of positions to rows of columns. */
inline_always void transpose(const REAL *from, int64_t step, REAL *to) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(from + i * step);
  for (int i = 0; i < 8; i += 2) b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; k++) {
      a[i + 2 * k] = _mm256_shuffle_ps(b[i + k], b[i + k + 2], 0x44);
      a[i + 2 * k + 1] = _mm256_shuffle_ps(b[i + k], b[i + k + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(to + i * COLS, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * COLS, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
#define TRANSPOSED 8
#else
#define TRANSPOSED 1
inline_always void transpose(const REAL *from, int64_t step, REAL *to) { *to = *from; }
#endif

/* A line of positions of some columns, neighbours in memory, to rows of COLS. */
static void pack_line(const REAL *from, int64_t step, int64_t width, int columns, REAL *to) {
  int c = 0;
  for (; c + TRANSPOSED <= columns; c += TRANSPOSED) {
    int64_t i = 0;
    for (; i + TRANSPOSED <= width; i += TRANSPOSED) transpose(from + c * step + i, step, to + i * COLS + c);
    for (; i < width; i++)
      for (int k = c; k < c + TRANSPOSED; k++) to[i * COLS + k] = from[k * step + i];
  }
  for (; c < columns; c++)
    for (int64_t i = 0; i < width; i++) to[i * COLS + c] = from[c * step + i];
}

/* Copies output gradients to panels [column / COLS][position][COLS], zeros past the last column. */
static void pack_gradient(const job *j, const REAL *g, int64_t columns, REAL *to) {
  int64_t h = j->out_size[1], w = j->out_size[2];
  const int64_t count = j->out_size[0] * h * w, joined = j->g_step[2] == 1 && j->g_step[1] == w;
  if (joined) w *= h, h = 1;
  for (int64_t first = 0; first < columns; first += COLS, to += count * COLS) {
    int valid = columns - first < COLS ? (int)(columns - first) : COLS;
    if (valid < COLS) memset(to, 0, sizeof(REAL) * count * COLS);
    REAL *line = to;
    for (int64_t z = 0; z < j->out_size[0]; z++)
      for (int64_t y = 0; y < h; y++, line += w * COLS) {
        const REAL *from = g + first * j->g_channel + z * j->g_step[0] + y * j->g_step[1];
        if (j->g_step[2] == 1)
          pack_line(from, j->g_channel, w, valid, line);
        else if (j->g_channel == 1 && valid == COLS)
          for (int64_t i = 0; i < w; i++) memcpy(line + i * COLS, from + i * j->g_step[2], sizeof(REAL) * COLS);
        else
          for (int64_t i = 0; i < w; i++)
            for (int c = 0; c < valid; c++) line[i * COLS + c] = from[c * j->g_channel + i * j->g_step[2]];
      }
  }
}

/* All tiles of one panel of columns and one block of rows. */
inline_always void panel(const job *j, const REAL *x, const vec *g, int64_t begin, int64_t end, int valid, vec *buffer, running *s, int mode) {
  const int64_t count = j->out_size[0] * j->out_size[1] * j->out_size[2];
  for (int64_t p = 0; p < count; p += BLOCK) {
    int size = count - p < BLOCK ? (int)(count - p) : BLOCK, last = p + BLOCK >= count;
    vec(*stored)[ROWS][2] = (vec(*)[ROWS][2])buffer;
    for (int64_t r = begin; r < end; r += ROWS, stored++) {
      vec acc[ROWS][2];
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < 2; v++) acc[i][v] = p ? (*stored)[i][v] : (vec){0};
      product(x, j->rows + r, j->positions + p, g + 2 * p, size, acc);
      if (!last)
        memcpy(stored, acc, sizeof acc);
      else if (valid == COLS && end - r >= ROWS)
        reduce(s, acc, ROWS, COLS, mode);
      else
        reduce(s, acc, end - r < ROWS ? (int)(end - r) : ROWS, valid, mode);
    }
  }
}

static void piece(job *j, int64_t task, char *scratch) {
  const int64_t part = task % j->pieces, group = task / j->pieces % j->groups, n = task / j->pieces / j->groups;
  const int64_t count = j->out_size[0] * j->out_size[1] * j->out_size[2];
  const int64_t panels = (j->columns + COLS - 1) / COLS, each = (panels + j->pieces - 1) / j->pieces;
  const int64_t first = part * each * COLS, last = (part + 1) * each * COLS < j->columns ? (part + 1) * each * COLS : j->columns;
  running s;
  start(&s);
  vec *buffer = (vec *)scratch;
  REAL *g = (REAL *)(buffer + BLOCK_TILES * ROWS * 2);
  const REAL *x = j->x + n * j->x_sample + group * j->channels * j->x_channel;
  if (first < last) {
    if (j->layout != IN_PLACE) {
      REAL *packed = g + each * COLS * count;
      pack_input(j, x, packed);
      x = packed;
    }
    pack_gradient(j, j->g + n * j->g_sample + (group * j->columns + first) * j->g_channel, last - first, g);
  }
  for (int64_t r = 0; r < j->row_count; r += BLOCK_TILES * ROWS)
    for (int64_t c = first; c < last; c += COLS) {
      int64_t end = r + BLOCK_TILES * ROWS < j->row_count ? r + BLOCK_TILES * ROWS : j->row_count;
      int valid = last - c < COLS ? (int)(last - c) : COLS;
      const vec *block = (const vec *)(g + (c - first) * count);
      if (j->mode == ALL)
        panel(j, x, block, r, end, valid, buffer, &s, ALL);
      else
        panel(j, x, block, r, end, valid, buffer, &s, SUMS);
    }
  finish(&s, j->out + task * STATISTICS);
}

static void work(void *data) {
  job *j = data;
  char *scratch = j->scratch + atomic_fetch_add(&j->worker, 1) * j->scratch_bytes;
  const int64_t tasks = j->samples * j->groups * j->pieces;
  for (int64_t task; (task = atomic_fetch_add(&j->next, 1)) < tasks;) piece(j, task, scratch);
}

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

typedef struct {
  const REAL *x, *g;    /* x may be null */
  double *out;          /* (2, samples, channels): sums of g, sums of x g */
  int64_t samples, channels, positions;
  int64_t x_sample, x_channel, x_position, g_sample, g_channel, g_position;
  atomic_int next;
} sum_job;

enum { CHUNK = 512 }; /* terms summed in single precision before they move to double */

/* One channel whose positions are neighbours in memory. */
static void channel_sums(const REAL *x, const REAL *g, int64_t count, double *sum, double *product) {
  *sum = *product = 0;
  for (int64_t p = 0; p < count; p += CHUNK) {
    int size = count - p < CHUNK ? (int)(count - p) : CHUNK, i = 0;
    vec a[4] = {{0}}, b[4] = {{0}};
    for (; i + 4 * WIDTH <= size; i += 4 * WIDTH)
      for (int v = 0; v < 4; v++) {
        vec value = *(const loose *)(g + p + i + v * WIDTH);
        a[v] += value;
        if (x) b[v] += value * *(const loose *)(x + p + i + v * WIDTH);
      }
    a[0] += a[1] + a[2] + a[3], b[0] += b[1] + b[2] + b[3];
    for (int j = 0; j < WIDTH; j++) *sum += a[0][j], *product += b[0][j];
    for (; i < size; i++) {
      *sum += g[p + i];
      if (x) *product += (double)x[p + i] * g[p + i];
    }
  }
}

/* Up to CHUNK channels that are neighbours in memory. */
static void position_sums(const sum_job *j, const REAL *x, const REAL *g, int width, double *sum, double *product) {
  REAL a[CHUNK], b[CHUNK];
  for (int c = 0; c < width; c++) sum[c] = product[c] = 0;
  for (int64_t p = 0; p < j->positions; p += 64) {
    int64_t end = p + 64 < j->positions ? p + 64 : j->positions;
    memset(a, 0, sizeof(REAL) * width);
    memset(b, 0, sizeof(REAL) * width);
    for (int64_t q = p; q < end; q++) {
      const REAL *gq = g + q * j->g_position, *xq = x ? x + q * j->x_position : NULL;
      for (int c = 0; c < width; c++) a[c] += gq[c];
      if (x)
        for (int c = 0; c < width; c++) b[c] += gq[c] * xq[c];
    }
    for (int c = 0; c < width; c++) sum[c] += a[c], product[c] += b[c];
  }
}

static void sum_work(void *data) {
  sum_job *j = data;
  for (int64_t n; (n = atomic_fetch_add(&j->next, 1)) < j->samples;) {
    const REAL *x = j->x ? j->x + n * j->x_sample : NULL, *g = j->g + n * j->g_sample;
    double *sum = j->out + n * j->channels, *product = sum + j->samples * j->channels;
    if (j->g_position == 1 && (!x || j->x_position == 1))
      for (int64_t c = 0; c < j->channels; c++)
        channel_sums(x ? x + c * j->x_channel : NULL, g + c * j->g_channel, j->positions, sum + c, product + c);
    else
      for (int64_t c = 0; c < j->channels; c += CHUNK)
        position_sums(j, x ? x + c : NULL, g + c, j->channels - c < CHUNK ? (int)(j->channels - c) : CHUNK, sum + c, product + c);
  }
}

int tile_rows(void) { return ROWS; }
int tile_columns(void) { return COLS; }
int64_t scratch_bytes(int64_t panels, int64_t positions, int64_t input) {
  int64_t bytes = sizeof(vec) * BLOCK_TILES * ROWS * 2 + sizeof(REAL) * (panels * COLS * positions + input);
  return (bytes + 4095) / 4096 * 4096;
}

typedef void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

void row_statistics(row_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  if (threads == 1 || !run)
    row_work(j);
  else
    run(row_work, j, (unsigned)threads, 0);
}

void position_statistics(sum_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  if (threads == 1 || !run)
    sum_work(j);
  else
    run(sum_work, j, (unsigned)threads, 0);
}

/* `run` is the GOMP_parallel of the OpenMP runtime that torch uses, so that both share one pool of threads. */
void products(job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  atomic_init(&j->worker, 0);
  if (threads == 1 || !run)
    work(j);
  else
    run(work, j, (unsigned)threads, 0);
}

#include "gram.c"
