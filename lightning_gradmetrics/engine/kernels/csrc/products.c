/* Products of a layer's input and output gradient, reduced in registers: no per-sample weight gradient is written to
 * memory.
 *
 * For each sample n the weight gradient is G[o, r] = sum_p g[o, p] x[row(r) + position(p)]. A row r is an input channel
 * at a kernel offset, p an output position. A tile of ROWS x COLS entries of G stays in registers over all positions
 * and is then added to five running statistics: sum, sum of squares, sum of absolute values, maximum, minimum.
 *
 * For a layer whose output is scaled, G[o, .] is also multiplied by the scale of o. Its product with the weight, before
 * the scale, is the sum over the positions of g[o] times the layer's output without its bias.
 */
#include "kernels.h"

#define BLOCK_TILES 32     /* tiles of rows that share a block of g */
#define LINE 64            /* bytes of a cache line */
#define AHEAD (512 * 1024) /* largest number of bytes of a sample that is fetched while one before it is computed */

enum { IN_PLACE = 0, PLANES = 1, INTERLEAVED = 2 }; /* layouts of the input */

typedef struct {
  const REAL *x, *g;
  double *out;                     /* (samples, groups, pieces, STATISTICS) */
  char *scratch;                   /* workers x scratch_bytes */
  const int32_t *rows, *positions; /* rows: padded to a multiple of ROWS with valid offsets */
  const REAL *scale, *weight;      /* (groups, columns) and (groups, columns, channels, entries); null if not scaled */
  REAL *packed;                    /* memory for the same as (groups, padded columns) and (groups, rows, padded columns) */
  double *products, *totals;       /* (samples, groups, columns): sums over rows of weight and G, over positions of g */
  REAL *bias;                      /* likewise the latter sums; null if not wanted */
  int64_t scratch_bytes, samples, groups, pieces, mode, threads;
  int64_t row_count, columns; /* input channels of a group times kernel entries; output channels of a group */
  int64_t channels, layout, in[3], pad[3], out_size[3];
  int64_t x_sample, x_channel, x_step[3], g_sample, g_channel, g_step[3];
  atomic_int next, worker, lost; /* lost: the number of sums of squares out of range, unless g is zero */
} product_job;

/* Copies a line, which may be so short that a call of memcpy would take longer. */
inline_always void copy_line(const REAL *from, int64_t count, REAL *to) {
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) memcpy(to + i, from + i, sizeof(REAL) * WIDTH);
#pragma GCC unroll 8
  for (int part = WIDTH / 2; part > 0; part /= 2)
    if (i + part <= count) {
      memcpy(to + i, from + i, sizeof(REAL) * part);
      i += part;
    }
}

/* Copies one group's input with a border of zeros: to channel planes or, if channels are adjacent in memory, to
 * planes of ROWS channels each. The zeros are written unless they are there. */
static void pack_input(const product_job *j, const REAL *x, REAL *to, int has_zeros) {
  const int64_t d = j->in[0], h = j->in[1], w = j->in[2];
  const int64_t dp = d + 2 * j->pad[0], hp = h + 2 * j->pad[1], wp = w + 2 * j->pad[2];
  const int64_t lanes = j->layout == INTERLEAVED ? ROWS : 1, planes = (j->channels + lanes - 1) / lanes;
  const int64_t plane = dp * hp * wp;
  if (!has_zeros && (plane != d * h * w || planes * lanes != j->channels)) memset(to, 0, sizeof(REAL) * planes * lanes * plane);
  for (int64_t z = 0; z < d; z++)
    for (int64_t y = 0; y < h; y++)
      for (int64_t i = 0; lanes > 1 && i < w; i++) { /* all channels of a pixel, in the order of the memory */
        const REAL *from = x + z * j->x_step[0] + y * j->x_step[1] + i * j->x_step[2];
        REAL *pixel = to + (((z + j->pad[0]) * hp + y + j->pad[1]) * wp + j->pad[2] + i) * ROWS;
        int64_t c = 0;
        for (; c + ROWS <= j->channels; c += ROWS) memcpy(pixel + c * plane, from + c, sizeof(REAL) * ROWS);
        for (int64_t k = 0; c + k < j->channels; k++) pixel[c * plane + k] = from[c + k];
      }
  for (int64_t c = 0; lanes == 1 && c < planes; c++)
    for (int64_t z = 0; z < d; z++)
      for (int64_t y = 0; y < h; y++) {
        const REAL *from = x + c * j->x_channel + z * j->x_step[0] + y * j->x_step[1];
        REAL *line = to + ((c * dp + z + j->pad[0]) * hp + y + j->pad[1]) * wp + j->pad[2];
        if (j->x_step[2] == 1)
          copy_line(from, w, line);
        else
          for (int64_t i = 0; i < w; i++) line[i] = from[i * j->x_step[2]];
      }
}

/* Copies the output gradients of some columns to rows of `lanes` values, one row per position, with zeros behind them. */
inline_always void pack_panel(const product_job *j, const REAL *g, int valid, REAL *to, int lanes) {
  int64_t h = j->out_size[1], w = j->out_size[2];
  const int64_t count = j->out_size[0] * h * w, joined = j->g_step[2] == 1 && j->g_step[1] == w;
  if (joined) w *= h, h = 1;
  if (valid < lanes) memset(to, 0, sizeof(REAL) * count * lanes);
  for (int64_t z = 0; z < j->out_size[0]; z++)
    for (int64_t y = 0; y < h; y++, to += w * lanes) {
      const REAL *from = g + z * j->g_step[0] + y * j->g_step[1];
      if (j->g_step[2] == 1)
        pack_line(from, j->g_channel, w, valid, to, lanes);
      else if (j->g_channel == 1 && valid == lanes)
        for (int64_t i = 0; i < w; i++) memcpy(to + i * lanes, from + i * j->g_step[2], sizeof(REAL) * lanes);
      else
        for (int64_t i = 0; i < w; i++)
          for (int c = 0; c < valid; c++) to[i * lanes + c] = from[c * j->g_channel + i * j->g_step[2]];
    }
}

/* Whether the output gradients of the columns already have the order of a packed panel. */
static int is_panel(const product_job *j, const REAL *g, int64_t columns) {
  const int64_t h = j->out_size[1], w = j->out_size[2], *step = j->g_step;
  const int has_rows = step[2] == columns && (h == 1 || step[1] == w * columns) &&
                       (j->out_size[0] == 1 || step[0] == h * w * columns);
  return (columns == COLS || columns == WIDTH) && j->g_channel == 1 && has_rows && (uintptr_t)g % BYTES == 0;
}

/* Copies the output gradients of whole panels whose columns are adjacent in memory, in the order of the memory. */
static void pack_panels(const product_job *j, const REAL *g, int64_t panels, REAL *to) {
  const int64_t count = j->out_size[0] * j->out_size[1] * j->out_size[2];
  for (int64_t z = 0; z < j->out_size[0]; z++)
    for (int64_t y = 0; y < j->out_size[1]; y++)
      for (int64_t i = 0; i < j->out_size[2]; i++, to += COLS) {
        const REAL *from = g + z * j->g_step[0] + y * j->g_step[1] + i * j->g_step[2];
        for (int64_t c = 0; c < panels; c++) memcpy(to + c * count * COLS, from + c * COLS, sizeof(REAL) * COLS);
      }
}

/* Copies output gradients to panels [column / COLS][position][COLS]; a last panel of one vector gets rows of one. */
static void pack_gradient(const product_job *j, const REAL *g, int64_t columns, REAL *to) {
  const int64_t count = j->out_size[0] * j->out_size[1] * j->out_size[2];
  if (j->g_channel == 1) {
    const int64_t panels = columns / COLS;
    pack_panels(j, g, panels, to);
    g += panels * COLS, columns -= panels * COLS, to += panels * COLS * count;
  }
  for (int64_t first = 0; first < columns; first += COLS, to += count * COLS) {
    const REAL *from = g + first * j->g_channel;
    if (columns - first <= WIDTH)
      pack_panel(j, from, (int)(columns - first), to, WIDTH);
    else
      pack_panel(j, from, columns - first < COLS ? (int)(columns - first) : COLS, to, COLS);
  }
}

/* What a panel of a scaled layer needs; weight is null if the layer is not scaled. */
typedef struct {
  const REAL *weight;
  const vec *scale;
  int64_t step;
  double *products;
} scaling;

static int64_t padded_columns(const product_job *j) { return (j->columns + COLS - 1) / COLS * COLS; }

/* Copies the scale, and the weight behind it, to the order of the panels and rows. */
static void pack_scaling(const product_job *j) {
  const int64_t step = padded_columns(j), rows = j->row_count, entries = rows / j->channels;
  REAL part[BLOCK * TRANSPOSED], *weight = j->packed + j->groups * step;
  if (step > j->columns) memset(j->packed, 0, sizeof(REAL) * j->groups * (1 + rows) * step);
  for (int64_t group = 0; group < j->groups; group++, weight += rows * step) {
    memcpy(j->packed + group * step, j->scale + group * j->columns, sizeof(REAL) * j->columns);
    for (int64_t c = 0; c < j->columns; c += TRANSPOSED) {
      const int valid = j->columns - c < TRANSPOSED ? (int)(j->columns - c) : TRANSPOSED;
      const REAL *from = j->weight + (group * j->columns + c) * rows;
      for (int64_t first = 0; first < rows; first += BLOCK) {
        const int64_t count = rows - first < BLOCK ? rows - first : BLOCK;
        pack_line(from + first, rows, count, valid, part, TRANSPOSED);
        for (int64_t i = 0; i < count; i++) { /* rows are entries of interleaved channels, or channels and their entries */
          const int64_t r = first + i, row = j->layout == INTERLEAVED ? r % entries * j->channels + r / entries : r;
          REAL *to = weight + row * step + c;
          if (valid == TRANSPOSED)
            memcpy(to, part + i * TRANSPOSED, sizeof(REAL) * TRANSPOSED);
          else
            for (int k = 0; k < valid; k++) to[k] = part[i * TRANSPOSED + k];
        }
      }
    }
  }
}

/* Adds the products of a tile and the weight to `sums`, and multiplies the tile by the scale. */
inline_always void scale_tile(const REAL *weight, int64_t step, const vec *scale, int rows, int vectors, vec acc[ROWS][2],
                              vec sums[2]) {
  for (int i = 0; i < rows; i++)
    for (int v = 0; v < vectors; v++) sums[v] += acc[i][v] * *(const loose *)(weight + i * step + v * WIDTH);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < vectors; v++) acc[i][v] *= scale[v];
}

/* Computes the sums of a panel's columns. */
static void panel_totals(const vec *g, int64_t count, int narrow, double total[COLS]) {
  memset(total, 0, sizeof(double) * COLS);
  for (int64_t p = 0; p < count; p += BLOCK) {
    const int64_t end = p + BLOCK < count ? p + BLOCK : count;
    vec sums[2] = {{0}};
    for (int64_t q = p; q < end; q++) {
      sums[0] += g[narrow ? q : 2 * q];
      if (!narrow) sums[1] += g[2 * q + 1];
    }
    for (int c = 0; c < COLS; c++) total[c] += sums[c / WIDTH][c % WIDTH];
  }
}

/* Memory of a later sample that goes to the second-level cache, some lines with each tile of this one. */
typedef struct {
  const char *next[2], *end[2];
  int64_t step;
} fetching;

inline_always void fetch(fetching *f) {
  const int part = f->next[0] >= f->end[0];
  for (int64_t i = 0; i < f->step && f->next[part] < f->end[part]; i++, f->next[part] += LINE)
    __builtin_prefetch(f->next[part], 0, 2);
}

/* All tiles of one panel of columns and one block of rows. The columns of a narrow panel fill one vector. */
inline_always void panel(const product_job *j, const REAL *x, const vec *g, int64_t begin, int64_t end, int valid,
                         vec *buffer, running *s, const scaling *scaled, fetching *later, int mode, int narrow, int runs) {
  const int64_t count = j->out_size[0] * j->out_size[1] * j->out_size[2];
  vec sums[2] = {{0}};
  for (int64_t p = 0; p < count; p += BLOCK) {
    int size = count - p < BLOCK ? (int)(count - p) : BLOCK, last = p + BLOCK >= count;
    vec(*stored)[ROWS][2] = (vec(*)[ROWS][2])buffer;
    for (int64_t r = begin; r < end; r += ROWS, stored++) {
      vec acc[ROWS][2];
      fetch(later);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < 2; v++) acc[i][v] = p ? (*stored)[i][v] : (vec){0};
      if (narrow)
        narrow_product(x, j->rows + r, j->positions + p, g + p, size, acc, runs);
      else if (runs && end - r <= RUN)
        product(x, j->rows + r, j->positions + p, g + 2 * p, size, acc, runs, RUN);
      else
        product(x, j->rows + r, j->positions + p, g + 2 * p, size, acc, runs, ROWS);
      if (!last) {
        memcpy(stored, acc, sizeof acc);
        continue;
      }
#pragma GCC unroll 16
      for (int i = 0; narrow && i < ROWS; i++) acc[i][0] += acc[i][1], acc[i][1] = (vec){0};
      if (scaled->weight)
        scale_tile(scaled->weight + r * scaled->step, scaled->step, scaled->scale, end - r < ROWS ? (int)(end - r) : ROWS,
                   narrow ? 1 : 2, acc, sums);
      if (valid == (narrow ? WIDTH : COLS) && end - r >= ROWS)
        reduce(s, acc, ROWS, narrow ? WIDTH : COLS, mode, narrow ? NARROW : WIDE);
      else
        reduce(s, acc, end - r < ROWS ? (int)(end - r) : ROWS, valid, mode, narrow ? NARROW : WIDE);
    }
  }
  for (int c = 0; scaled->weight && c < valid; c++) scaled->products[c] += sums[c / WIDTH][c % WIDTH];
}

/* The same, compiled for each mode, width and order of rows. */
static void any_panel(const product_job *j, const REAL *x, const vec *g, int64_t begin, int64_t end, int valid, vec *buffer,
                      running *s, const scaling *scaled, fetching *later) {
  const int narrow = valid <= WIDTH, runs = j->layout == INTERLEAVED && j->channels % RUN == 0;
#define CASE(mode, narrow, runs)                                                     \
  case 4 * mode + 2 * narrow + runs:                                                 \
    panel(j, x, g, begin, end, valid, buffer, s, scaled, later, mode, narrow, runs); \
    break;
  switch (4 * (int)j->mode + 2 * narrow + runs) {
    CASE(SUMS, 0, SCATTERED)
    CASE(SUMS, 0, IN_RUNS)
    CASE(SUMS, 1, SCATTERED)
    CASE(SUMS, 1, IN_RUNS)
    CASE(ALL, 0, SCATTERED)
    CASE(ALL, 0, IN_RUNS)
    CASE(ALL, 1, SCATTERED)
    CASE(ALL, 1, IN_RUNS)
  }
#undef CASE
}

/* The scaling of the panel that begins at a column. */
static scaling scaling_of(const product_job *j, int64_t n, int64_t group, int64_t column) {
  scaling found = {0};
  if (!j->weight) return found;
  const int64_t step = padded_columns(j);
  found.weight = j->packed + (j->groups + group * j->row_count) * step + column;
  found.scale = (const vec *)(j->packed + group * step + column);
  found.step = step;
  found.products = j->products + (n * j->groups + group) * j->columns + column;
  return found;
}

/* What to fetch during a task: the operands of the task that this thread probably takes next. */
static fetching fetched_during(const product_job *j, int64_t task, int64_t panels) {
  fetching found = {0};
  const int64_t n = task / j->pieces / j->groups, later = (task + j->threads) / j->pieces / j->groups;
  const int64_t count = j->out_size[0] * j->out_size[1] * j->out_size[2], blocks = (count + BLOCK - 1) / BLOCK;
  const int64_t x_bytes = sizeof(REAL) * j->groups * j->channels * j->in[0] * j->in[1] * j->in[2];
  const int64_t g_bytes = sizeof(REAL) * j->groups * j->columns * count;
  if (later == n || later >= j->samples || x_bytes == 0 || x_bytes + g_bytes > AHEAD) return found;
  const int64_t tiles = (j->row_count + ROWS - 1) / ROWS * panels * blocks * j->pieces * j->groups;
  found.next[0] = (const char *)(j->x + later * j->x_sample), found.end[0] = found.next[0] + x_bytes;
  found.next[1] = (const char *)(j->g + later * j->g_sample), found.end[1] = found.next[1] + g_bytes;
  found.step = (x_bytes + g_bytes) / LINE / tiles + 1;
  return found;
}

static void piece(product_job *j, int64_t task, char *scratch, int *has_zeros) {
  const int64_t part = task % j->pieces, group = task / j->pieces % j->groups, n = task / j->pieces / j->groups;
  const int64_t count = j->out_size[0] * j->out_size[1] * j->out_size[2];
  const int64_t panels = (j->columns + COLS - 1) / COLS, each = (panels + j->pieces - 1) / j->pieces;
  const int64_t first = part * each * COLS,
                last = (part + 1) * each * COLS < j->columns ? (part + 1) * each * COLS : j->columns;
  running s;
  start(&s);
  fetching later = fetched_during(j, task, each);
  vec *buffer = (vec *)scratch;
  const REAL *g = (const REAL *)(buffer + BLOCK_TILES * ROWS * 2);
  const REAL *x = j->x + n * j->x_sample + group * j->channels * j->x_channel;
  if (first < last) {
    if (j->layout != IN_PLACE) {
      REAL *packed = (REAL *)g + each * COLS * count;
      pack_input(j, x, packed, *has_zeros);
      *has_zeros = 1;
      x = packed;
    }
    const REAL *from = j->g + n * j->g_sample + (group * j->columns + first) * j->g_channel;
    if (is_panel(j, from, last - first))
      g = from;
    else
      pack_gradient(j, from, last - first, (REAL *)g);
  }
  for (int64_t c = first; (j->totals || j->bias) && c < last; c += COLS) {
    const int valid = last - c < COLS ? (int)(last - c) : COLS;
    const int64_t at = (n * j->groups + group) * j->columns + c;
    double total[COLS];
    panel_totals((const vec *)(g + (c - first) * count), count, valid <= WIDTH, total);
    for (int k = 0; j->totals && k < valid; k++) j->totals[at + k] = total[k];
    for (int k = 0; j->bias && k < valid; k++) j->bias[at + k] = (REAL)total[k];
  }
  for (int64_t r = 0; r < j->row_count; r += BLOCK_TILES * ROWS)
    for (int64_t c = first; c < last; c += COLS) {
      int64_t end = r + BLOCK_TILES * ROWS < j->row_count ? r + BLOCK_TILES * ROWS : j->row_count;
      int valid = last - c < COLS ? (int)(last - c) : COLS;
      const vec *block = (const vec *)(g + (c - first) * count);
      const scaling scaled = scaling_of(j, n, group, c);
      any_panel(j, x, block, r, end, valid, buffer, &s, &scaled, &later);
    }
  finish(&s, j->out + task * STATISTICS);
  const int64_t rest = (last - first) % COLS, behind = rest > WIDTH ? COLS : rest ? WIDTH : 0;
  const int is_exact = first >= last || in_range(j->out[task * STATISTICS + SQUARE]) ||
                       is_zero(g, (last - first - rest + behind) * count);
  if (!is_exact) atomic_fetch_add(&j->lost, 1);
}

static void work(void *data) {
  product_job *j = data;
  char *scratch = j->scratch + atomic_fetch_add(&j->worker, 1) * j->scratch_bytes;
  const int64_t tasks = j->samples * j->groups * j->pieces;
  int has_zeros = 0; /* whether this worker's packed input has its border, which no later sample changes */
  for (int64_t task; (task = atomic_fetch_add(&j->next, 1)) < tasks;) piece(j, task, scratch, &has_zeros);
}

int tile_rows(void) { return ROWS; }
int tile_columns(void) { return COLS; }
int64_t product_job_bytes(void) { return sizeof(product_job); }
int64_t scratch_bytes(int64_t panels, int64_t positions, int64_t input) {
  int64_t bytes = sizeof(vec) * BLOCK_TILES * ROWS * 2 + sizeof(REAL) * (panels * COLS * positions + input);
  return (bytes + 4095) / 4096 * 4096;
}

void products(product_job *j, parallel run, int threads) {
  atomic_init(&j->next, 0);
  atomic_init(&j->worker, 0);
  atomic_init(&j->lost, 0);
  if (j->weight) pack_scaling(j);
  run_threads(work, j, run, threads);
}
