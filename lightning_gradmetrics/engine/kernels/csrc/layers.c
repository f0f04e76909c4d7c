/* The gradients of two layers of small models: the rows of an embedding, and the weight of a batch norm without positions. */
#include "kernels.h"

typedef struct {
  const int64_t *indices; /* (samples, positions) */
  const REAL *g;          /* (samples, positions, width) */
  REAL *rows;             /* (samples, positions + 1, width): the last row, and those of repeated indices, are zero */
  int64_t samples, positions, width, g_sample, g_position, padding;
} lookup_job;

typedef struct {
  const REAL *x, *g;           /* (samples, channels) */
  const REAL *mean, *variance; /* (channels) */
  REAL *out;                   /* (samples, channels) */
  double eps;
  int64_t samples, channels, x_sample, g_sample;
} norm_job;

enum { CHANNELS = 256 }; /* channels whose factors are computed at a time */

int64_t lookup_job_bytes(void) { return sizeof(lookup_job); }

int64_t norm_job_bytes(void) { return sizeof(norm_job); }

/* Adds the gradients of equal indices of a sample at the position of the first one. */
void looked_up_rows(lookup_job *j, parallel run, int threads) {
  const int64_t width = j->width, positions = j->positions;
  for (int64_t n = 0; n < j->samples; n++) {
    const int64_t *indices = j->indices + n * positions;
    REAL *rows = j->rows + n * (positions + 1) * width;
    memset(rows, 0, sizeof(REAL) * width * (positions + 1));
    for (int64_t t = 0; t < positions; t++) {
      if (indices[t] == j->padding) continue;
      int64_t first = 0;
      while (indices[first] != indices[t]) first++;
      const REAL *g = j->g + n * j->g_sample + t * j->g_position;
      REAL *row = rows + first * width;
      for (int64_t c = 0; c < width; c++) row[c] += g[c];
    }
  }
}

/* (x - mean) / sqrt(variance + eps) * g */
void norm_weight_rows(norm_job *j, parallel run, int threads) {
  for (int64_t start = 0; start < j->channels; start += CHANNELS) {
    const int64_t count = j->channels - start < CHANNELS ? j->channels - start : CHANNELS;
    const REAL *mean = j->mean + start;
    REAL scale[CHANNELS];
    for (int64_t c = 0; c < count; c++) scale[c] = (REAL)(1 / sqrt(j->variance[start + c] + j->eps));
    for (int64_t n = 0; n < j->samples; n++) {
      const REAL *x = j->x + n * j->x_sample + start, *g = j->g + n * j->g_sample + start;
      REAL *out = j->out + n * j->channels + start;
      for (int64_t c = 0; c < count; c++) out[c] = (x[c] - mean[c]) * scale[c] * g[c];
    }
  }
}
