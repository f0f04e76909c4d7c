/* Sums of squares of per-sample weight gradients from Gram matrices over positions.
 *
 * For each sample and group, with a position's channels as a vector, |G|^2 = sum_{p,q} (g_p . g_q) sum_e (x_{p,e} .
 * x_{q,e}), where x_{p,e} is the input that kernel entry e meets at output position p; it is zero in the border. Both
 * Gram matrices are symmetric: only tiles on and above the diagonal are computed, and only for the pixels that exist.
 */
#include "kernels.h"

typedef struct {
  const REAL *x, *g;
  double *out; /* (samples, groups, 3): sum, sum of squares, its largest possible value or, if it has few digits, infinity */
  char *scratch;
  int64_t scratch_bytes, samples, groups, channels, columns; /* channels and columns of a group */
  int64_t in[3], out_size[3], kernel[3], stride[3], pad[3], dilation[3];
  int64_t x_sample, x_channel, x_position, g_sample, g_channel, g_position;
  double cancelled;              /* a sum of squares below this fraction of its largest value has lost digits */
  atomic_int next, worker, lost; /* lost: the number of such sums */
} gram_job;

enum { ENTRIES_MAX = 64, GUARD = 4096 }; /* kernel entries at most; bytes that lanes in the border may touch */

static int64_t volume(const int64_t *size) { return size[0] * size[1] * size[2]; }
static int64_t whole_tiles(int64_t count) { return (count + COLS - 1) / COLS * COLS; }

/* Copies `channels` channels of all positions to panels [position / COLS][channel][COLS], zeros past the last position.
 */
static void pack_positions(const REAL *x, int64_t channels, int64_t channel, int64_t count, int64_t position,
                           REAL *to) {
  for (int64_t first = 0; first < count; first += COLS, to += channels * COLS) {
    const int valid = count - first < COLS ? (int)(count - first) : COLS;
    const REAL *from = x + first * position;
    if (valid < COLS) memset(to, 0, sizeof(REAL) * channels * COLS);
    if (channel == 1)
      pack_line(from, position, channels, valid, to, COLS);
    else if (position == 1 && valid == COLS)
      for (int64_t c = 0; c < channels; c++) memcpy(to + c * COLS, from + c * channel, sizeof(REAL) * COLS);
    else
      for (int64_t c = 0; c < channels; c++)
        for (int i = 0; i < valid; i++) to[c * COLS + i] = from[c * channel + i * position];
  }
}

/* Adds a tile on or above the diagonal: rows from `first`, one panel of columns. */
inline_always void gram_tile(const REAL *packed, const int32_t *steps, int64_t channels, int64_t first, int64_t panel,
                             int fresh, REAL *gram, int64_t width) {
  int32_t rows[ROWS];
  vec acc[ROWS][2];
  for (int r = 0; r < ROWS; r++) {
    int64_t row = first + r < width ? first + r : width - RUN + r % RUN;
    rows[r] = (int32_t)(row / COLS * channels * COLS + row % COLS);
    for (int v = 0; v < 2; v++)
      acc[r][v] = fresh ? (vec){0} : *(const vec *)(gram + row * width + panel * COLS + v * WIDTH);
  }
  product(packed, rows, steps, (const vec *)(packed + panel * channels * COLS), (int)channels, acc, IN_RUNS, ROWS);
  for (int r = 0; r < ROWS && first + r < width; r++)
    for (int v = 0; v < 2; v++) *(vec *)(gram + (first + r) * width + panel * COLS + v * WIDTH) = acc[r][v];
}

/* The Gram matrix (width, width) of `count` positions over their channels, on and above the diagonal, and the channels'
 * sums. */
static void gram_matrix(const REAL *x, int64_t channels, int64_t channel, int64_t count, int64_t position, REAL *packed,
                        REAL *gram, double *sums) {
  const int64_t width = whole_tiles(count);
  int32_t steps[BLOCK];
  for (int c = 0; c < BLOCK; c++) steps[c] = c * COLS;
  memset(sums, 0, sizeof(double) * width);
  for (int64_t c = 0; c < channels; c += BLOCK) {
    const int64_t size = channels - c < BLOCK ? channels - c : BLOCK;
    pack_positions(x + c * channel, size, channel, count, position, packed);
    for (int64_t panel = 0; panel < width / COLS; panel++) {
      vec part[2] = {{0}};
      const vec *from = (const vec *)(packed + panel * size * COLS);
      for (int64_t k = 0; k < size; k++) part[0] += from[2 * k], part[1] += from[2 * k + 1];
      for (int v = 0; v < 2; v++)
        for (int i = 0; i < WIDTH; i++) sums[panel * COLS + v * WIDTH + i] += part[v][i];
    }
    for (int64_t first = 0; first < count; first += ROWS)
      for (int64_t panel = first / COLS; panel < width / COLS; panel++)
        gram_tile(packed, steps, size, first, panel, c == 0, gram, width);
  }
}

/* The kernel entries that are not in the border at output position p, line by line of the kernel. An entry is its
 * row of the input's Gram matrix, moved so that q's own offset finds x_{p,e} . x_{q,e}, and the lanes of a line of q
 * that are not in the border. */
typedef struct {
  const REAL *row[ENTRIES_MAX];
  const mask *inside[ENTRIES_MAX];
  int64_t z[ENTRIES_MAX], y[ENTRIES_MAX]; /* of each line of the kernel */
  int end[ENTRIES_MAX], lines;
  double square, sum; /* over the entries, of x_{p,e} . x_{p,e} and of the channels' sums */
} entry_list;

/* The index on one axis of the input that output position p meets at kernel entry e, or -1 in the border. */
inline_always int64_t input_index(const gram_job *j, int axis, int64_t p, int64_t e) {
  const int64_t at = p * j->stride[axis] + e * j->dilation[axis] - j->pad[axis];
  return at < 0 || at >= j->in[axis] ? -1 : at;
}

inline_always int64_t chunks(const gram_job *j) { return (j->out_size[2] + WIDTH - 1) / WIDTH; }

static void list_entries(const gram_job *j, const int64_t p[3], const REAL *k, const double *sums, const mask *inside,
                         entry_list *to) {
  const int64_t width = whole_tiles(volume(j->in));
  int count = 0;
  to->lines = 0, to->square = to->sum = 0;
  for (int64_t a = 0; a < j->kernel[0]; a++)
    for (int64_t b = 0; b < j->kernel[1]; b++) {
      const int64_t z = input_index(j, 0, p[0], a), y = input_index(j, 1, p[1], b);
      if (z < 0 || y < 0) continue;
      const int64_t dz = a * j->dilation[0] - j->pad[0], dy = b * j->dilation[1] - j->pad[1];
      for (int64_t c = 0; c < j->kernel[2]; c++) {
        const int64_t x = input_index(j, 2, p[2], c), u = (z * j->in[1] + y) * j->in[2] + x;
        if (x < 0) continue;
        to->row[count] = k + u * width + (dz * j->in[1] + dy) * j->in[2] + c * j->dilation[2] - j->pad[2];
        to->inside[count++] = inside + c * chunks(j);
        to->square += k[u * width + u];
        to->sum += sums[u];
      }
      to->z[to->lines] = dz, to->y[to->lines] = dy, to->end[to->lines++] = count;
    }
}

/* Adds sum_{q > p} (g_p . g_q) sum_e (x_{p,e} . x_{q,e}) for the q of one line, from `first` on, to the lanes of
 * `part`. */
inline_always void line_pairs(const gram_job *j, const entry_list *e, int64_t z, int64_t y, int64_t first,
                              const REAL *g, const mask *line, int64_t step, vec *part) {
  static const whole from_on[2 * WIDTH] = {[WIDTH... 2 * WIDTH - 1] = -1};
  const int64_t at = (z * j->in[1] + y) * j->in[2];
  for (int64_t c = first / WIDTH; c < chunks(j); c++) {
    vec met = {0};
    for (int l = 0, i = 0; l < e->lines; i = e->end[l++]) {
      if ((uint64_t)(z + e->z[l]) >= (uint64_t)j->in[0] || (uint64_t)(y + e->y[l]) >= (uint64_t)j->in[1]) continue;
      for (; i < e->end[l]; i++) {
        const REAL *from = e->row[i] + at + c * WIDTH * step;
        const mask inside = e->inside[i][c];
        vec value;
        if (step == 1)
          value = *(const loose *)from;
        else
          for (int n = 0; n < WIDTH; n++) value[n] = inside[n] ? from[n * step] : 0;
        met += (vec)((mask)value & inside);
      }
    }
    const int64_t before = first < c * WIDTH ? 0 : first - c * WIDTH;
    vec product = met * *(const loose *)(g + c * WIDTH);
    *part += (vec)((mask)product & line[c] & *(const mask *)(from_on + WIDTH - before));
  }
}

/* Adds the same for all q > p. */
inline_always void all_pairs(const gram_job *j, const entry_list *e, const int64_t p[3], const REAL *g,
                             const mask *line, int64_t step, vec *part) {
  for (int64_t z = p[0]; z < j->out_size[0]; z++)
    for (int64_t y = z == p[0] ? p[1] : 0; y < j->out_size[1]; y++) {
      const int64_t first = z == p[0] && y == p[1] ? p[2] + 1 : 0;
      line_pairs(j, e, z * j->stride[0], y * j->stride[1], first, g + (z * j->out_size[1] + y) * j->out_size[2], line,
                 step, part);
    }
}

/* Whether the square of a row that is not zero has few digits. */
inline_always int vanishes(double square, double sum) { return square < VANISHING && (square != 0 || sum != 0); }

/* `masks` has room for those of each kernel entry of a line, and of the line itself. */
static void combine(const gram_job *j, const REAL *k, const double *x_sums, const REAL *g, const double *g_sums,
                    mask *masks, double *out) {
  const int64_t width = whole_tiles(volume(j->out_size)), h = j->out_size[1], w = j->out_size[2];
  mask *line = masks + j->kernel[2] * chunks(j);
  entry_list entries;
  int64_t p[3];
  double sum = 0, square = 0, bound = 0, doubtful = 0;
  for (int64_t q = 0; q < chunks(j) * WIDTH; q++) {
    line[q / WIDTH][q % WIDTH] = q < w ? -1 : 0;
    for (int64_t e = 0; e < j->kernel[2]; e++)
      masks[e * chunks(j) + q / WIDTH][q % WIDTH] = q < w && input_index(j, 2, q, e) >= 0 ? -1 : 0;
  }
  for (p[0] = 0; p[0] < j->out_size[0]; p[0]++)
    for (p[1] = 0; p[1] < h; p[1]++)
      for (p[2] = 0; p[2] < w; p[2]++, g += width) {
        const int64_t number = (p[0] * h + p[1]) * w + p[2];
        vec part = {0};
        list_entries(j, p, k, x_sums, masks, &entries);
        if (j->stride[2] == 1)
          all_pairs(j, &entries, p, g, line, 1, &part);
        else
          all_pairs(j, &entries, p, g, line, j->stride[2], &part);
        for (int i = 0; i < WIDTH; i++) square += 2 * (double)part[i];
        const double own = entries.square * g[number];
        square += own;
        bound += sqrt(own < 0 ? 0 : own);
        if (vanishes(entries.square, entries.sum) || vanishes(g[number], g_sums[number]))
          doubtful += sqrt(fmax(entries.square, VANISHING) * fmax(g[number], VANISHING));
        sum += entries.sum * g_sums[number];
      }
  const int has_digits = doubtful <= DOUBTFUL * bound && square < (double)INFINITY;
  out[0] = sum, out[1] = square, out[2] = has_digits ? bound * bound : (double)INFINITY;
}

static void gram_piece(gram_job *j, int64_t task, char *scratch) {
  const int64_t n = task / j->groups, group = task % j->groups, pixels = volume(j->in), positions = volume(j->out_size);
  const int64_t k_width = whole_tiles(pixels), g_width = whole_tiles(positions);
  REAL *k = (REAL *)(scratch + GUARD), *g = k + k_width * k_width, *packed = g + g_width * g_width;
  mask *masks = (mask *)(packed + BLOCK * (k_width > g_width ? k_width : g_width));
  double *x_sums = (double *)(masks + (j->kernel[2] + 1) * chunks(j)), *g_sums = x_sums + k_width;
  const REAL *x = j->x + n * j->x_sample + group * j->channels * j->x_channel;
  gram_matrix(x, j->channels, j->x_channel, pixels, j->x_position, packed, k, x_sums);
  gram_matrix(j->g + n * j->g_sample + group * j->columns * j->g_channel, j->columns, j->g_channel, positions,
              j->g_position, packed, g, g_sums);
  double *out = j->out + 3 * task;
  combine(j, k, x_sums, g, g_sums, masks, out);
  const int has_digits = out[2] == 0 ? out[0] == 0 : in_range(out[2]);
  if (out[1] < j->cancelled * out[2] || !has_digits) atomic_fetch_add(&j->lost, 1);
}

static void gram_work(void *data) {
  gram_job *j = data;
  char *scratch = j->scratch + atomic_fetch_add(&j->worker, 1) * j->scratch_bytes;
  for (int64_t task; (task = atomic_fetch_add(&j->next, 1)) < j->samples * j->groups;) gram_piece(j, task, scratch);
}

int64_t gram_scratch_bytes(int64_t pixels, int64_t positions, int64_t masks) {
  const int64_t a = whole_tiles(pixels), b = whole_tiles(positions);
  const int64_t bytes =
      sizeof(REAL) * (a * a + b * b + BLOCK * (a > b ? a : b) + masks * WIDTH) + sizeof(double) * (a + b) + 2 * GUARD;
  return (bytes + 4095) / 4096 * 4096;
}

int64_t gram_job_bytes(void) { return sizeof(gram_job); }

void squares(gram_job *j, parallel run, int threads) {
  atomic_init(&j->lost, 0);
  atomic_init(&j->next, 0);
  atomic_init(&j->worker, 0);
  run_threads(gram_work, j, run, threads);
}
