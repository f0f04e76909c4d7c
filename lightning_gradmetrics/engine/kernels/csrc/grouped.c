/* Grouped convolutions with few input channels per group: the lanes of a vector are input channels of whole groups.
 *
 * For each sample and block of groups, the input is copied to a plane whose adjacent values are channels. For each pair
 * of output channels of a group, their gradients are repeated for all input channels of their group. ROWS kernel entries
 * of the pair then stay in registers over all positions, and are added to the statistics.
 */
#include "kernels.h"

#define PART 128 /* positions whose input and gradients stay in the first-level cache for all output channels */

typedef struct {
  const REAL *x, *g;
  double *out;                        /* (samples, blocks, STATISTICS) */
  char *scratch;                      /* workers x scratch_bytes */
  const int32_t *entries, *positions; /* offsets of kernel entries and output positions in the padded input */
  const REAL *scale, *weight; /* (groups x outputs) and (groups x outputs, inputs, entries); null if not scaled */
  REAL *packed;               /* memory for the same in the order of the lanes */
  double *products, *totals;  /* (samples, groups x outputs): sums of weight and gradient, and of g over positions */
  REAL *bias;                 /* likewise the latter sums; null if not wanted */
  int64_t scratch_bytes, samples, groups, inputs, outputs, blocks, mode, entry_count; /* inputs and outputs of a group */
  int64_t size[3], pad[3], out_size[3];
  int64_t x_sample, x_channel, x_step[3], g_sample, g_channel, g_step[3];
  atomic_int next, worker, lost; /* lost: the number of sums of squares out of range, unless g is zero */
} grouped_job;

static int64_t position_count(const grouped_job *j) { return j->out_size[0] * j->out_size[1] * j->out_size[2]; }

/* The output channels of a block, rounded up to whole vectors. */
static int64_t block_outputs(int64_t inputs, int64_t outputs) {
  return (WIDTH / inputs * outputs + WIDTH - 1) / WIDTH * WIDTH;
}

#if defined(__AVX512F__) && defined(SINGLE)
typedef __m512i order;
#define permuted _mm512_permutexvar_ps
#elif defined(__AVX512F__)
typedef __m512i order;
#define permuted _mm512_permutexvar_pd
#elif defined(__AVX2__) && defined(SINGLE)
typedef __m256i order;
#define permuted(places, a) _mm256_permutevar8x32_ps(a, places)
#endif

/* Repeats the gradients of two output channels of each group for the input channels of the group, at `count` positions.
 * `g` has `step` values per position. A vector may be written past its group, because what follows it is written later. */
static void repeat_gradients(const REAL *g, int64_t step, int64_t count, int64_t inputs, int64_t outputs, int64_t output,
                             int groups, REAL *restrict to) {
  const int pair = outputs - output < 2 ? 1 : 2;
#ifdef permuted
  if (step == WIDTH) { /* all output channels of the block are in one vector */
    whole places[2][WIDTH] = {{0}};
    for (int i = 0; i < groups * inputs; i++)
      for (int v = 0; v < pair; v++) places[v][i] = i / inputs * outputs + output + v;
    order first, second;
    memcpy(&first, places[0], sizeof first), memcpy(&second, places[pair - 1], sizeof second);
    for (int64_t p = 0; p < count; p++) {
      const vec all = *(const loose *)(g + p * WIDTH);
      *(loose *)(to + 2 * p * WIDTH) = permuted(first, all), *(loose *)(to + 2 * p * WIDTH + WIDTH) = permuted(second, all);
    }
    return;
  }
#endif
  for (int64_t p = 0; p < count; p++)
    for (int v = 0; v < 2; v++) {
      const REAL *from = g + p * step + output + (v < pair ? v : 0);
      REAL *at = to + (2 * p + v) * WIDTH;
      for (int q = 0; q < groups; q++) *(loose *)(at + q * inputs) = (vec){0} + from[q * outputs];
    }
}

/* acc[r][v] += sum_p g[p][v] x[entry r + position p], channel by channel, for `count` entries; a constant once inlined. */
inline_always void lanes(const REAL *x, const loose *g, const int32_t *positions, int64_t length, const int32_t *entries,
                         int count, vec acc[ROWS][2]) {
  const REAL *row[ROWS];
  vec sum[ROWS][2];
#pragma GCC unroll 16
  for (int r = 0; r < count; r++) row[r] = x + entries[r], sum[r][0] = acc[r][0], sum[r][1] = acc[r][1];
  for (int64_t p = 0; p < length; p++) {
    const int64_t at = positions[p];
    const vec g0 = g[2 * p], g1 = g[2 * p + 1];
#pragma GCC unroll 16
    for (int r = 0; r < count; r++) {
      const vec value = *(const vec *)(row[r] + at);
      sum[r][0] += g0 * value;
      sum[r][1] += g1 * value;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < count; r++) acc[r][0] = sum[r][0], acc[r][1] = sum[r][1];
}

#define CASE(N)                                                                                                        \
  case N:                                                                                                              \
    lanes(x, g, positions, length, entries, N, acc);                                                                               \
    break;

/* The same for any number of entries up to ROWS. */
static void entry_tile(const REAL *x, const loose *g, const int32_t *positions, int64_t length, const int32_t *entries,
                       int count, vec acc[ROWS][2]) {
  switch (count) {
    CASE(1)
    CASE(2)
    CASE(3)
    CASE(4)
    CASE(5)
    CASE(6)
#if ROWS > 6
    CASE(7)
    CASE(8)
    CASE(9)
    CASE(10)
    CASE(11)
    CASE(12)
#endif
  }
}

/* Sets the lanes behind `used` to a value. */
inline_always vec with_rest(vec a, int used, REAL rest) {
  for (int i = 0; i < WIDTH; i++) a[i] = i < used ? a[i] : rest;
  return a;
}

/* Adds a tile to the statistics. `used` lanes of `pair` vectors exist. */
inline_always void add_tile(running *s, vec acc[ROWS][2], int count, int used, int pair, int mode) {
  vec sum[2] = {{0}}, square[2] = {{0}}, absolute[2] = {{0}}, high[2], low[2];
  high[0] = high[1] = s->part[MAX], low[0] = low[1] = s->part[MIN];
  for (int r = 0; r < count; r++)
#pragma GCC unroll 2
    for (int v = 0; v < pair; v++) { /* one chain of each statistic for each vector */
      const vec a = used < WIDTH ? with_rest(acc[r][v], used, 0) : acc[r][v];
      sum[v] += a;
      square[v] += a * a;
      if (mode == ALL) {
        const vec b = used < WIDTH ? with_rest(a, used, a[0]) : a;
        absolute[v] += magnitude(a);
        high[v] = larger(b, high[v]);
        low[v] = smaller(b, low[v]);
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

/* Writes the sums over the positions of the gradients of a block's output channels. */
static void block_totals(const grouped_job *j, const REAL *g, int64_t step, int64_t outputs, int64_t at) {
  const int64_t positions = position_count(j);
  for (int64_t first = 0; first < outputs; first += WIDTH) {
    double total[WIDTH] = {0};
    for (int64_t p = 0; p < positions; p += BLOCK) {
      const int64_t end = p + BLOCK < positions ? p + BLOCK : positions;
      vec sum = {0};
      for (int64_t q = p; q < end; q++) sum += *(const vec *)(g + q * step + first);
      for (int i = 0; i < WIDTH; i++) total[i] += sum[i];
    }
    for (int i = 0; i < WIDTH && first + i < outputs; i++) {
      if (j->totals) j->totals[at + first + i] = total[i];
      if (j->bias) j->bias[at + first + i] = (REAL)total[i];
    }
  }
}

/* Copies the scale to (blocks, outputs, WIDTH), and the weight behind it to (blocks, outputs, entries, WIDTH). */
static void pack_scaling(const grouped_job *j) {
  const int64_t each_block = WIDTH / j->inputs, rows = j->blocks * j->outputs, entries = j->entry_count;
  memset(j->packed, 0, sizeof(REAL) * rows * (1 + entries) * WIDTH);
  for (int64_t c = 0; c < j->groups * j->outputs; c++) {
    const int64_t group = c / j->outputs, row = group / each_block * j->outputs + c % j->outputs;
    const int64_t lane = group % each_block * j->inputs;
    for (int i = 0; i < j->inputs; i++) j->packed[row * WIDTH + lane + i] = j->scale[c];
    REAL *to = j->packed + (rows + row * entries) * WIDTH + lane;
    pack_line(j->weight + c * j->inputs * entries, entries, entries, (int)j->inputs, to, WIDTH);
  }
}

/* Multiplies a tile by the scale of its output channels, and adds its products with the weight to `sums`. `row` is the
 * number of the tile's first output channel in the order of the blocks. */
static void scale_tile(const grouped_job *j, int64_t row, int64_t entry, int count, int pair, vec acc[ROWS][2],
                       vec sums[2]) {
  const loose *packed = (const loose *)j->packed, *weights = packed + j->blocks * j->outputs;
  for (int v = 0; v < pair; v++) {
    const loose *weight = weights + (row + v) * j->entry_count + entry;
    const vec scale = packed[row + v];
    for (int r = 0; r < count; r++) sums[v] += acc[r][v] * weight[r], acc[r][v] *= scale;
  }
}

/* Writes the sums of the weight and the gradient of an output channel of each group. */
static void write_products(const vec sums, int64_t inputs, int64_t outputs, int groups, double *to) {
  for (int q = 0; q < groups; q++) {
    double sum = 0;
    for (int i = 0; i < inputs; i++) sum += sums[q * inputs + i];
    to[q * outputs] = sum;
  }
}

static void group_block(grouped_job *j, int64_t task, char *scratch) {
  static const int64_t none[3] = {0, 0, 0};
  const int64_t n = task / j->blocks, block = task % j->blocks, each_block = WIDTH / j->inputs, outputs = j->outputs;
  const int64_t first = block * each_block, positions = position_count(j), step = block_outputs(j->inputs, outputs);
  const int groups = (int)(j->groups - first < each_block ? j->groups - first : each_block);
  const int used = groups * (int)j->inputs;
  const int64_t tiles = (j->entry_count + ROWS - 1) / ROWS, each = (j->entry_count + tiles - 1) / tiles;
  const int64_t at = (n * j->groups + first) * outputs;
  REAL *g = (REAL *)scratch, *repeated = g + positions * step, *sums = repeated + PART * COLS + COLS;
  REAL *x = sums + (outputs + 1) / 2 * tiles * ROWS * COLS;
  running s;
  start(&s);
  pack_plane(j->x + n * j->x_sample + first * j->inputs * j->x_channel, j->x_channel, j->x_step, j->size, j->pad, used, x, WIDTH);
  pack_plane(j->g + n * j->g_sample + first * outputs * j->g_channel, j->g_channel, j->g_step, j->out_size, none,
             groups * (int)outputs, g, (int)step);
  if (j->totals || j->bias) block_totals(j, g, step, groups * outputs, at);
  for (int64_t p = 0; p < positions; p += PART) {
    const int64_t length = positions - p < PART ? positions - p : PART;
    vec(*acc)[2] = (vec(*)[2])sums;
    for (int64_t o = 0; o < outputs; o += 2) {
      const int pair = outputs - o < 2 ? 1 : 2;
      vec products[2] = {{0}};
      repeat_gradients(g + p * step, step, length, j->inputs, outputs, o, groups, repeated);
      for (int64_t e = 0; e < j->entry_count; e += each, acc += ROWS) {
        const int count = j->entry_count - e < each ? (int)(j->entry_count - e) : (int)each;
        if (p == 0) memset(acc, 0, sizeof(vec) * 2 * ROWS);
        entry_tile(x, (const loose *)repeated, j->positions + p, length, j->entries + e, count, acc);
        if (p + length < positions) continue;
        if (j->weight) scale_tile(j, block * outputs + o, e, count, pair, acc, products);
        if (used == WIDTH && pair == 2 && j->mode == ALL)
          add_tile(&s, acc, count, WIDTH, 2, ALL);
        else if (used == WIDTH && pair == 2)
          add_tile(&s, acc, count, WIDTH, 2, SUMS);
        else if (pair == 2)
          add_tile(&s, acc, count, used, 2, (int)j->mode);
        else
          add_tile(&s, acc, count, used, 1, (int)j->mode);
      }
      for (int v = 0; j->weight && p + length == positions && v < pair; v++)
        write_products(products[v], j->inputs, outputs, groups, j->products + at + o + v);
    }
  }
  finish(&s, j->out + task * STATISTICS);
  const int is_exact = in_range(j->out[task * STATISTICS + SQUARE]) || is_zero(g, positions * step);
  if (!is_exact) atomic_fetch_add(&j->lost, 1);
}

static void grouped_work(void *data) {
  grouped_job *j = data;
  char *scratch = j->scratch + atomic_fetch_add(&j->worker, 1) * j->scratch_bytes;
  const int64_t tasks = j->samples * j->blocks;
  for (int64_t task; (task = atomic_fetch_add(&j->next, 1)) < tasks;) group_block(j, task, scratch);
}

int lane_width(void) { return WIDTH; }

int64_t grouped_job_bytes(void) { return sizeof(grouped_job); }

/* The memory for an input plane and an output gradient of these sizes, and for the sums of tiles. */
int64_t grouped_scratch_bytes(int64_t plane, int64_t gradient, int64_t tiles) {
  const int64_t entries = WIDTH * plane + gradient + PART * COLS + COLS + tiles * ROWS * COLS;
  return ((int64_t)sizeof(REAL) * entries + 4095) / 4096 * 4096;
}

void grouped(grouped_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  atomic_init(&j->worker, 0);
  atomic_init(&j->lost, 0);
  if (j->weight) pack_scaling(j);
  run_threads(grouped_work, j, run, threads);
}
