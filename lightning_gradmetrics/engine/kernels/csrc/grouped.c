/* Grouped convolutions with few input channels per group: the lanes of a vector are input channels of whole groups.
 *
 * For each sample and block of groups, the input is copied to a plane whose adjacent values are channels. For each pair
 * of output channels of a group, their gradients are repeated for all input channels of their group. ROWS kernel entries
 * of the pair then stay in registers over all positions, and are added to the statistics.
 */
#include "lanes.h"

#define PART 128 /* positions whose input and gradients stay in the first-level cache for all output channels */

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

/* Sets the lanes of a tile behind `used` to zero. They belong to no channel, and are NaN if a gradient is infinite. */
static void clear_rest(vec acc[ROWS][2], int count, int used) {
  for (int r = 0; r < count; r++)
    for (int v = 0; v < 2; v++)
      for (int i = 0; i < WIDTH; i++) acc[r][v][i] = i < used ? acc[r][v][i] : 0;
}

/* Writes the sums over the positions of the gradients of a block's output channels. */
static void block_totals(const lane_job *j, const REAL *g, int64_t step, int64_t outputs, int64_t at) {
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
static void pack_scaling(const lane_job *j) {
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
static void scale_tile(const lane_job *j, int64_t row, int64_t entry, int count, int pair, vec acc[ROWS][2],
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

static void group_block(lane_job *j, int64_t task, char *scratch) {
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
        entry_tile(x, (const loose *)repeated, j->positions + p, length, j->entries + e, count, 0, acc);
        if (p + length < positions) continue;
        if (used < WIDTH) clear_rest(acc, count, used);
        if (j->weight) scale_tile(j, block * outputs + o, e, count, pair, acc, products);
        if (used == WIDTH && pair == 2 && j->mode == ALL)
          reduce(&s, acc, count, WIDTH, ALL, EACH);
        else if (used == WIDTH && pair == 2)
          reduce(&s, acc, count, WIDTH, SUMS, EACH);
        else if (pair == 2)
          reduce(&s, acc, count, used, (int)j->mode, EACH);
        else
          reduce(&s, acc, count, used, (int)j->mode, NARROW);
      }
      for (int v = 0; j->weight && p + length == positions && v < pair; v++)
        write_products(products[v], j->inputs, outputs, groups, j->products + at + o + v);
    }
  }
  finish(&s, j->out + task * STATISTICS);
  const int is_exact = in_range(j->out[task * STATISTICS + SQUARE]) || is_zero(g, positions * step);
  if (!is_exact) atomic_fetch_add(&j->lost, 1);
}

int lane_width(void) { return WIDTH; }

int64_t lane_job_bytes(void) { return sizeof(lane_job); }

/* The memory for an input plane and an output gradient of these sizes, and for the sums of tiles. */
int64_t grouped_scratch_bytes(int64_t plane, int64_t gradient, int64_t tiles) {
  const int64_t entries = WIDTH * plane + gradient + PART * COLS + COLS + tiles * ROWS * COLS;
  return ((int64_t)sizeof(REAL) * entries + 4095) / 4096 * 4096;
}

void grouped(lane_job *j, parallel run, int threads) {
  if (j->weight) pack_scaling(j);
  run_lanes(j, group_block, run, threads);
}
