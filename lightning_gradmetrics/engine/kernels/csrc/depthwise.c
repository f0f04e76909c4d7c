/* Depthwise convolutions: one filter per channel, so the lanes of a vector are channels.
 *
 * For each sample and block of COLS channels, input and output gradient are copied to planes whose adjacent values are
 * channels. ROWS kernel entries of the block stay in registers over all positions and are then added to the statistics.
 */
#include "lanes.h"

/* Copies the scale to (blocks, COLS), and the weight behind it to (blocks, entries, COLS). */
static void pack_scaling(const lane_job *j) {
  memset(j->packed, 0, sizeof(REAL) * j->blocks * (1 + j->entry_count) * COLS);
  memcpy(j->packed, j->scale, sizeof(REAL) * j->groups);
  REAL *to = j->packed + j->blocks * COLS;
  for (int64_t first = 0; first < j->groups; first += COLS, to += j->entry_count * COLS) {
    const int valid = j->groups - first < COLS ? (int)(j->groups - first) : COLS;
    pack_line(j->weight + first * j->entry_count, j->entry_count, j->entry_count, valid, to, COLS);
  }
}

/* Adds the products of a tile and the weight to `sums`, and multiplies the tile by the scale. */
static void scale_entries(const loose *weight, const loose *scale, int count, vec acc[ROWS][2], vec sums[2]) {
  for (int r = 0; r < count; r++)
    for (int v = 0; v < 2; v++) sums[v] += acc[r][v] * weight[2 * r + v], acc[r][v] *= scale[v];
}

/* Writes the sums over the positions of the output gradients. */
static void channel_totals(const vec *g, int64_t positions, int valid, double *to) {
  double total[COLS] = {0};
  for (int64_t p = 0; p < positions; p += BLOCK) {
    const int64_t end = p + BLOCK < positions ? p + BLOCK : positions;
    vec sums[2] = {{0}};
    for (int64_t q = p; q < end; q++) sums[0] += g[2 * q], sums[1] += g[2 * q + 1];
    for (int c = 0; c < COLS; c++) total[c] += sums[c / WIDTH][c % WIDTH];
  }
  memcpy(to, total, sizeof(double) * valid);
}

static void channel_block(lane_job *j, int64_t task, char *scratch) {
  static const int64_t none[3] = {0, 0, 0};
  const int64_t n = task / j->blocks, first = task % j->blocks * COLS;
  const int64_t positions = position_count(j);
  const int64_t tiles = (j->entry_count + ROWS - 1) / ROWS, each = (j->entry_count + tiles - 1) / tiles;
  const int valid = j->groups - first < COLS ? (int)(j->groups - first) : COLS;
  REAL *g = (REAL *)scratch, *x = g + positions * COLS;
  running s;
  vec acc[ROWS][2], products[2] = {{0}};
  start(&s);
  pack_plane(j->x + n * j->x_sample + first * j->x_channel, j->x_channel, j->x_step, j->size, j->pad, valid, x, COLS);
  pack_plane(j->g + n * j->g_sample + first * j->g_channel, j->g_channel, j->g_step, j->out_size, none, valid, g, COLS);
  if (j->totals) channel_totals((const vec *)g, positions, valid, j->totals + n * j->groups + first);
  for (int64_t e = 0; e < j->entry_count; e += each) {
    const int count = j->entry_count - e < each ? (int)(j->entry_count - e) : (int)each;
    memset(acc, 0, sizeof acc);
    entry_tile(x, (const loose *)g, j->positions, positions, j->entries + e, count, 1, acc);
    if (j->weight)
      scale_entries((const loose *)(j->packed + (j->blocks + task % j->blocks * j->entry_count + e) * COLS),
                    (const loose *)(j->packed + first), count, acc, products);
    if (j->mode == ALL)
      reduce(&s, acc, count, valid, ALL, WIDE);
    else
      reduce(&s, acc, count, valid, SUMS, WIDE);
  }
  for (int c = 0; j->weight && c < valid; c++) j->products[n * j->groups + first + c] = products[c / WIDTH][c % WIDTH];
  finish(&s, j->out + task * STATISTICS);
  const int is_exact = in_range(j->out[task * STATISTICS + SQUARE]) || is_zero(g, positions * COLS);
  if (!is_exact) atomic_fetch_add(&j->lost, 1);
}

int64_t depthwise_scratch_bytes(int64_t plane, int64_t positions, int64_t unused) {
  return ((int64_t)sizeof(REAL) * COLS * (plane + positions) + 4095) / 4096 * 4096;
}

void depthwise(lane_job *j, parallel run, int threads) {
  if (j->weight) pack_scaling(j);
  run_lanes(j, channel_block, run, threads);
}
