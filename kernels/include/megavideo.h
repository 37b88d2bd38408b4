/* The C interface of libmegavideo: CUDA kernels behind plain functions.
 *
 * Every function takes device pointers and a stream (NULL is the default one), starts its kernels
 * and returns at once: 0, or a cudaError_t. Arguments outside the stated limits give
 * MEGAVIDEO_INVALID. Nothing is allocated, no pointer is kept.
 */
#ifndef MEGAVIDEO_H
#define MEGAVIDEO_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default) /* the library hides all else */

/* Changes whenever a function or a structure of this file does; the caller compares. */
#define MEGAVIDEO_ABI 2
int megavideo_abi(void);

/* What a status that is not 0 means. */
const char *megavideo_error_text(int status);

enum { MEGAVIDEO_INVALID = 1 }; /* cudaErrorInvalidValue */

enum { MEGAVIDEO_BFLOAT16 = 0, MEGAVIDEO_FLOAT16 = 1 };

/* Places per tile of an interval layout (megavideo/layout/intervals.py). */
enum { MEGAVIDEO_TILE = 64 };

/* Distances in elements between samples, slots, parts (query, key, value) and heads. The elements of
 * a head are contiguous, and every row starts at a multiple of 16 bytes. */
typedef struct {
  int64_t sample, slot, part, head;
} MegavideoStrides;

/* Attention of V image slots over T text slots, as far as they are real, and over one interval of
 * image places each. Places are the image slots in another order, padded to N (intervals.py).
 *
 * B samples, H heads of D elements; `element` is the type of everything that is not int or float.
 */
typedef struct {
  int32_t element;
  int32_t batch, heads, head_size; /* B, H <= 65535, D = 64 or 128 */
  int32_t image_slots, text_slots; /* V, T >= 1 */
  int32_t places;                  /* N, a multiple of MEGAVIDEO_TILE; N + T <= 65472 */
  int32_t dropout;                 /* a probability is zeroed with chance dropout / 256; < 256 */
  uint64_t seed;                   /* of the dropout: the backward pass needs the forward's */

  const int32_t *slots;      /* [N] image slot at a place, -1 is padding */
  const int32_t *begin, *end; /* [N] the query at a place sees places begin <= p < end */
  const int32_t *bounds;     /* [N/64, 4] per tile: least begin, greatest end, and the reverse */
  const int32_t *seen_by;    /* [N/64, 2] query tiles first <= t < last that see a key tile */
  const int64_t *text_length; /* [B] real slots at the end of the T, at least 1 */

  const void *image_qkv; /* [B, V, 3, H, D] */
  const void *text_kv;   /* [B, T, 2, H, D] */
  MegavideoStrides image, text;
  void *out;  /* [B, V, H, D], contiguous: written forward, read backward */
  float *lse; /* [B, H, V], natural logarithm of the sum of exp(score): likewise */

  /* Only used backward. */
  const void *grad_out; /* [B, V, H, D], contiguous */
  float *delta;         /* [B, H, V], scratch */
  void *grad_image;     /* [B, V, 3, H, D], contiguous, all of it written */
  void *grad_text;      /* [B, T, 2, H, D], contiguous, all of it written; NULL if not needed */

  /* NULL: two passes, whose gradients are the same, bit by bit, from run to run. Otherwise scratch of
   * megavideo_interval_workspace() bytes, at a multiple of 16: one pass adds up gradients of queries
   * there, in whatever order, and saves two products of seven. */
  float *workspace;
} MegavideoIntervalAttention;

int megavideo_interval_forward(const MegavideoIntervalAttention *problem, void *stream);

/* Bytes of `workspace` for a problem, from its sizes; 0 if they are outside the limits. */
int64_t megavideo_interval_workspace(const MegavideoIntervalAttention *problem);

int megavideo_interval_backward(const MegavideoIntervalAttention *problem, void *stream);

/* A grid of keys, each the cell of equally many queries along each axis. A query sees the window
 * around its cell as far as it exists; causal: up to its cell in raster order. */
typedef struct {
  int32_t rows, columns; /* K = rows * columns; they divide those of the queries */
  int32_t window_rows, window_columns, causal; /* odd, odd, 0 or 1 */
  const void *kv;                              /* [B, K, 2, H, D] */
  MegavideoStrides strides;                    /* of kv */
  void *grad_kv; /* [B, K, 2, H, D], contiguous, all of it written; NULL if not needed */
} MegavideoKeyGrid;

/* Attention of a grid of Q queries over one or two grids of keys and over T text slots, as far as
 * they are real: one softmax over all that a query sees. */
typedef struct {
  int32_t element;
  int32_t batch, heads, head_size; /* as above */
  int32_t rows, columns;           /* Q = rows * columns; each of all grids at most 192 */
  int32_t text_slots;              /* T, 0..1536; without text, text_length is not read */
  int32_t num_grids;               /* 1 or 2 */
  int32_t dropout;                 /* as above */
  uint64_t seed;

  const int64_t *text_length; /* [B], at least 1 */
  const void *query;          /* [B, Q, H, D] */
  MegavideoStrides query_strides;
  const void *text_kv; /* [B, T, 2, H, D] */
  MegavideoStrides text_strides;
  MegavideoKeyGrid grids[2];
  void *out;  /* [B, Q, H, D], contiguous: written forward, read backward */
  float *lse; /* [B, H, Q]: likewise */

  /* Only used backward. */
  const void *grad_out; /* [B, Q, H, D], contiguous */
  float *delta;         /* [B, H, Q], scratch */
  void *grad_query;     /* [B, Q, H, D], contiguous, all of it written */
  void *grad_text;      /* [B, T, 2, H, D], contiguous, all of it written; NULL if not needed */
} MegavideoNeighbourhoodAttention;

int megavideo_neighbourhood_forward(const MegavideoNeighbourhoodAttention *problem, void *stream);

/* Gradients are the same, bit by bit, from run to run. */
int megavideo_neighbourhood_backward(const MegavideoNeighbourhoodAttention *problem, void *stream);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
