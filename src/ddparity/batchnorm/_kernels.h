/* The kernels for one element type `T`; _fused.c includes this file once for each type. A sum over at most BLOCK
 * elements, which are in the cache, is computed in T. These sums are added in double, so a large mean or a large number
 * of samples does not reduce the precision. */

#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define NAME(name) CONCAT(name, SUFFIX)

/* Add a block of `n` elements, given by its mean and sum of squared deviations, to a channel's moments of `seen`
 * elements. Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
 * variances", 1979. */
static inline void NAME(merge)(double *mean, double *m2, double seen, double n, double block_mean, double block_m2)
{
    double delta = block_mean - *mean, share = n / (seen + n);
    *mean += delta * share;
    *m2 += block_m2 + delta * delta * seen * share;
}

/* Compute the moments of channels first..last-1 of planes x[n][c][m]. Each block is read twice, the second time from
 * the cache. The first read gives the block's mean, from a sum around the channel's first element. The second read sums
 * deviations from this mean, which do not cancel. */
CLONES static void NAME(moments_planes)(
    const T *x, ssize_t N, ssize_t C, ssize_t M, ssize_t first, ssize_t last, double *mean, double *m2)
{
    ssize_t columns = M < BLOCK ? M : BLOCK, rows = BLOCK / columns;
    T shift[TILE], centre[TILE], sums[TILE], squares[TILE];
    for (ssize_t c = first; c < last; c++) {
        mean[c] = m2[c] = 0;
        shift[c - first] = N ? x[c * M] : 0;
    }
    for (ssize_t n0 = 0; n0 < N; n0 += rows) {
        ssize_t n1 = n0 + rows < N ? n0 + rows : N;
        for (ssize_t m0 = 0; m0 < M; m0 += columns) {
            ssize_t size = m0 + columns < M ? columns : M - m0;
            for (ssize_t k = 0; k < last - first; k++)
                sums[k] = squares[k] = 0;
            for (ssize_t n = n0; n < n1; n++)
                for (ssize_t c = first; c < last; c++) {
                    const T *run = x + (n * C + c) * M + m0, from = shift[c - first];
                    T sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (ssize_t m = 0; m < size; m++)
                        sum += run[m] - from;
                    sums[c - first] += sum;
                }
            T count = (T)((n1 - n0) * size);
            for (ssize_t k = 0; k < last - first; k++) {
                centre[k] = shift[k] + sums[k] / count;
                sums[k] = 0;
            }
            for (ssize_t n = n0; n < n1; n++)
                for (ssize_t c = first; c < last; c++) {
                    const T *run = x + (n * C + c) * M + m0, from = centre[c - first];
                    T sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
                    for (ssize_t m = 0; m < size; m++) {
                        T d = run[m] - from;
                        sum += d;
                        square += d * d;
                    }
                    sums[c - first] += sum;
                    squares[c - first] += square;
                }
            double seen = (double)n0 * M + (double)(n1 - n0) * m0, n = (double)(n1 - n0) * size;
            for (ssize_t k = 0; k < last - first; k++) {
                double delta = (double)sums[k] / n; /* from the rounded centre to the block's mean */
                NAME(merge)(mean + first + k, m2 + first + k, seen, n, (double)centre[k] + delta,
                            (double)squares[k] - n * delta * delta);
            }
        }
    }
}

/* Copy each channel's value to each of its M columns, in place. */
static inline void NAME(spread)(T *values, ssize_t channels, ssize_t M)
{
    if (M > 1)
        for (ssize_t c = channels - 1; c >= 0; c--) {
            T value = values[c];
            for (ssize_t m = 0; m < M; m++)
                values[c * M + m] = value;
        }
}

/* Sum each channel's M columns, in place. */
static inline void NAME(fold)(T *values, ssize_t channels, ssize_t M)
{
    if (M > 1)
        for (ssize_t c = 0; c < channels; c++) {
            T sum = 0;
            for (ssize_t m = 0; m < M; m++)
                sum += values[c * M + m];
            values[c] = sum;
        }
}

/* Compute the moments of samples from..to-1, in columns. It is for short planes and for rows, which are planes of one
 * element. */
CLONES static void NAME(moments_columns)(const T *x, ssize_t C, ssize_t M, ssize_t from, ssize_t to, ssize_t first,
                                         ssize_t last, double *mean, double *m2)
{
    T first_value[TILE], shift[TILE], centre[TILE], sums[TILE], squares[TILE];
    ssize_t channels = last - first, width = channels * M;
    for (ssize_t c = 0; c < channels; c++) {
        mean[c] = m2[c] = 0;
        first_value[c] = shift[c] = from < to ? x[(from * C + first + c) * M] : 0;
    }
    NAME(spread)(shift, channels, M);
    for (ssize_t r0 = from; r0 < to; r0 += ROWS) {
        ssize_t r1 = r0 + ROWS < to ? r0 + ROWS : to;
        for (ssize_t k = 0; k < width; k++)
            sums[k] = squares[k] = 0;
        for (ssize_t r = r0; r < r1; r++) {
            const T *run = x + (r * C + first) * M;
#pragma omp simd
            for (ssize_t k = 0; k < width; k++)
                sums[k] += run[k] - shift[k];
        }
        NAME(fold)(sums, channels, M);
        T count = (T)((r1 - r0) * M);
        for (ssize_t c = 0; c < channels; c++)
            centre[c] = first_value[c] + sums[c] / count;
        NAME(spread)(centre, channels, M);
        for (ssize_t k = 0; k < width; k++)
            sums[k] = 0;
        for (ssize_t r = r0; r < r1; r++) {
            const T *run = x + (r * C + first) * M;
#pragma omp simd
            for (ssize_t k = 0; k < width; k++) {
                T d = run[k] - centre[k];
                sums[k] += d;
                squares[k] += d * d;
            }
        }
        NAME(fold)(sums, channels, M);
        NAME(fold)(squares, channels, M);
        double seen = (double)(r0 - from) * M, n = (double)(r1 - r0) * M;
        for (ssize_t c = 0; c < channels; c++) {
            double delta = (double)sums[c] / n; /* from the rounded centre to the block's mean */
            NAME(merge)(mean + c, m2 + c, seen, n, (double)centre[c * M] + delta,
                        (double)squares[c] - n * delta * delta);
        }
    }
}

/* The factors and summands of each channel. The mean is stored in two parts, high and low: the rounding of one part
 * alone would reduce the precision if the mean is much larger than the deviation. */
struct NAME(affine) {
    T *high, *low, *scale, *slope, *shift;
};

/* Copy the values of channels first..last-1, each to its M columns. */
static inline void NAME(load_columns)(T *columns, const T *values, ssize_t first, ssize_t last, ssize_t M)
{
    memcpy(columns, values + first, (last - first) * sizeof(T));
    NAME(spread)(columns, last - first, M);
}

/* Compute y = (x - mean) * scale + shift for one plane. */
CLONES static void NAME(normalise_plane)(const T *x, T *y, ssize_t M, T high, T low, T scale, T shift)
{
#pragma omp simd
    for (ssize_t m = 0; m < M; m++)
        y[m] = (x[m] - high - low) * scale + shift;
}

/* The same for samples from..to-1 of channels first..last-1, in columns. */
CLONES static void NAME(normalise_columns)(const T *x, T *y, ssize_t C, ssize_t M, ssize_t from, ssize_t to,
                                           ssize_t first, ssize_t last, const struct NAME(affine) *terms)
{
    T high[TILE], low[TILE], scale[TILE], shift[TILE];
    ssize_t width = (last - first) * M;
    NAME(load_columns)(high, terms->high, first, last, M);
    NAME(load_columns)(low, terms->low, first, last, M);
    NAME(load_columns)(scale, terms->scale, first, last, M);
    NAME(load_columns)(shift, terms->shift, first, last, M);
    for (ssize_t r = from; r < to; r++) {
        const T *in = x + (r * C + first) * M;
        T *out = y + (r * C + first) * M;
#pragma omp simd
        for (ssize_t k = 0; k < width; k++)
            out[k] = (in[k] - high[k] - low[k]) * scale[k] + shift[k];
    }
}

/* Compute the two sums of the backward for channels first..last-1: of dy, and of dy * (x - mean). */
CLONES static void NAME(sums_planes)(const T *dy, const T *x, ssize_t N, ssize_t C, ssize_t M, ssize_t first,
                                     ssize_t last, const T *high, const T *low, double *sum_dy, double *sum_dy_xmu)
{
    for (ssize_t c = first; c < last; c++)
        sum_dy[c] = sum_dy_xmu[c] = 0;
    for (ssize_t n = 0; n < N; n++)
        for (ssize_t c = first; c < last; c++)
            for (ssize_t m0 = 0; m0 < M; m0 += BLOCK) {
                ssize_t at = (n * C + c) * M, m1 = m0 + BLOCK < M ? m0 + BLOCK : M;
                T sum = 0, product = 0, h = high[c], l = low[c];
#pragma omp simd reduction(+ : sum, product)
                for (ssize_t m = m0; m < m1; m++) {
                    sum += dy[at + m];
                    product += dy[at + m] * (x[at + m] - h - l);
                }
                sum_dy[c] += sum;
                sum_dy_xmu[c] += product;
            }
}

/* The same for samples from..to-1, in columns. */
CLONES static void NAME(sums_columns)(const T *dy, const T *x, ssize_t C, ssize_t M, ssize_t from, ssize_t to,
                                      ssize_t first, ssize_t last, const struct NAME(affine) *terms, double *sum_dy,
                                      double *sum_dy_xmu)
{
    T high[TILE], low[TILE], sums[TILE], products[TILE];
    ssize_t channels = last - first, width = channels * M;
    NAME(load_columns)(high, terms->high, first, last, M);
    NAME(load_columns)(low, terms->low, first, last, M);
    for (ssize_t c = 0; c < channels; c++)
        sum_dy[c] = sum_dy_xmu[c] = 0;
    for (ssize_t r0 = from; r0 < to; r0 += ROWS) {
        ssize_t r1 = r0 + ROWS < to ? r0 + ROWS : to;
        for (ssize_t k = 0; k < width; k++)
            sums[k] = products[k] = 0;
        for (ssize_t r = r0; r < r1; r++) {
            const T *d = dy + (r * C + first) * M, *in = x + (r * C + first) * M;
#pragma omp simd
            for (ssize_t k = 0; k < width; k++) {
                sums[k] += d[k];
                products[k] += d[k] * (in[k] - high[k] - low[k]);
            }
        }
        NAME(fold)(sums, channels, M);
        NAME(fold)(products, channels, M);
        for (ssize_t c = 0; c < channels; c++) {
            sum_dy[c] += sums[c];
            sum_dy_xmu[c] += products[c];
        }
    }
}

/* Compute dx = dy * scale + (x - mean) * slope + shift for one plane. */
CLONES static void NAME(input_plane)(
    const T *dy, const T *x, T *dx, ssize_t M, T high, T low, T scale, T slope, T shift)
{
#pragma omp simd
    for (ssize_t m = 0; m < M; m++)
        dx[m] = dy[m] * scale + ((x[m] - high - low) * slope + shift);
}

/* The same for samples from..to-1 of channels first..last-1, in columns. */
CLONES static void NAME(input_columns)(const T *dy, const T *x, T *dx, ssize_t C, ssize_t M, ssize_t from, ssize_t to,
                                       ssize_t first, ssize_t last, const struct NAME(affine) *terms)
{
    T high[TILE], low[TILE], scale[TILE], slope[TILE], shift[TILE];
    ssize_t width = (last - first) * M;
    NAME(load_columns)(high, terms->high, first, last, M);
    NAME(load_columns)(low, terms->low, first, last, M);
    NAME(load_columns)(scale, terms->scale, first, last, M);
    NAME(load_columns)(slope, terms->slope, first, last, M);
    NAME(load_columns)(shift, terms->shift, first, last, M);
    for (ssize_t r = from; r < to; r++) {
        const T *d = dy + (r * C + first) * M, *in = x + (r * C + first) * M;
        T *out = dx + (r * C + first) * M;
#pragma omp simd
        for (ssize_t k = 0; k < width; k++)
            out[k] = d[k] * scale[k] + ((in[k] - high[k] - low[k]) * slope[k] + shift[k]);
    }
}

/* --- The four kernels, divided among the threads. The parts of a sum do not depend on the number of threads. --- */

static int NAME(moments)(const T *x, ssize_t N, ssize_t C, ssize_t M, double *mean, double *m2, int threads)
{
    ssize_t tile = tile_of(M), tiles = (C + tile - 1) / tile;
    if (M > SHORT) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (ssize_t t = 0; t < tiles; t++)
            NAME(moments_planes)(x, N, C, M, t * tile, END(t, tile, C), mean, m2);
        return 0;
    }
    ssize_t chunk = CHUNK / M, chunks = chunks_of(N, chunk);
    double *parts = malloc(2 * chunks * C * sizeof(double));
    if (!parts)
        return -1;
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
    for (ssize_t k = 0; k < chunks; k++)
        for (ssize_t t = 0; t < tiles; t++) {
            double *part = parts + 2 * k * C + t * tile;
            NAME(moments_columns)(x, C, M, k * chunk, END(k, chunk, N), t * tile, END(t, tile, C), part, part + C);
        }
    memcpy(mean, parts, C * sizeof(double));
    memcpy(m2, parts + C, C * sizeof(double));
    for (ssize_t k = 1; k < chunks; k++) {
        double n = (double)(END(k, chunk, N) - k * chunk) * M;
        for (ssize_t c = 0; c < C; c++)
            NAME(merge)(mean + c, m2 + c, (double)(k * chunk) * M, n, parts[2 * k * C + c], parts[(2 * k + 1) * C + c]);
    }
    free(parts);
    return 0;
}

/* Allocate the terms and fill in the mean. The caller frees `high`, which is NULL if the allocation failed. */
static struct NAME(affine) NAME(affine_terms)(ssize_t C, const double *mean)
{
    T *space = malloc((C ? C : 1) * 5 * sizeof(T));
    struct NAME(affine) terms = {space, space + C, space + 2 * C, space + 3 * C, space + 4 * C};
    for (ssize_t c = 0; space && c < C; c++) {
        terms.high[c] = (T)mean[c];
        terms.low[c] = (T)(mean[c] - (double)terms.high[c]);
    }
    return terms;
}

static int NAME(normalise)(const T *x, T *y, ssize_t N, ssize_t C, ssize_t M, const double *mean, const double *invstd,
                           struct values weight, struct values bias, int threads)
{
    struct NAME(affine) terms = NAME(affine_terms)(C, mean);
    if (!terms.high)
        return -1;
    for (ssize_t c = 0; c < C; c++) {
        terms.scale[c] = (T)(value_at(weight, c, 1) * invstd[c]);
        terms.shift[c] = (T)value_at(bias, c, 0);
    }
    if (M > SHORT) {
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
        for (ssize_t n = 0; n < N; n++)
            for (ssize_t c = 0; c < C; c++)
                NAME(normalise_plane)(x + (n * C + c) * M, y + (n * C + c) * M, M, terms.high[c], terms.low[c],
                                      terms.scale[c], terms.shift[c]);
    } else {
        ssize_t tile = tile_of(M), tiles = (C + tile - 1) / tile, chunk = CHUNK / M, chunks = chunks_of(N, chunk);
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
        for (ssize_t k = 0; k < chunks; k++)
            for (ssize_t t = 0; t < tiles; t++)
                NAME(normalise_columns)(x, y, C, M, k * chunk, END(k, chunk, N), t * tile, END(t, tile, C), &terms);
    }
    free(terms.high);
    return 0;
}

static int NAME(backward_sums)(const T *dy, const T *x, ssize_t N, ssize_t C, ssize_t M, const double *mean,
                               double *sum_dy, double *sum_dy_xmu, int threads)
{
    struct NAME(affine) terms = NAME(affine_terms)(C, mean);
    if (!terms.high)
        return -1;
    ssize_t tile = tile_of(M), tiles = (C + tile - 1) / tile;
    if (M > SHORT) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (ssize_t t = 0; t < tiles; t++)
            NAME(sums_planes)(dy, x, N, C, M, t * tile, END(t, tile, C), terms.high, terms.low, sum_dy, sum_dy_xmu);
        free(terms.high);
        return 0;
    }
    ssize_t chunk = CHUNK / M, chunks = chunks_of(N, chunk);
    double *parts = malloc(2 * chunks * C * sizeof(double));
    if (!parts) {
        free(terms.high);
        return -1;
    }
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
    for (ssize_t k = 0; k < chunks; k++)
        for (ssize_t t = 0; t < tiles; t++) {
            double *part = parts + 2 * k * C + t * tile;
            NAME(sums_columns)(dy, x, C, M, k * chunk, END(k, chunk, N), t * tile, END(t, tile, C), &terms, part,
                               part + C);
        }
    memcpy(sum_dy, parts, C * sizeof(double));
    memcpy(sum_dy_xmu, parts + C, C * sizeof(double));
    for (ssize_t k = 1; k < chunks; k++)
        for (ssize_t c = 0; c < C; c++) {
            sum_dy[c] += parts[2 * k * C + c];
            sum_dy_xmu[c] += parts[(2 * k + 1) * C + c];
        }
    free(parts);
    free(terms.high);
    return 0;
}

/* `parts`: `count` rows, each [sum of dy (C), sum of dy * (x - mean) (C)]. The function adds the rows. */
static int NAME(backward_input)(const T *dy, const T *x, T *dx, ssize_t N, ssize_t C, ssize_t M, const double *stats,
                                struct values weight, const double *parts, ssize_t count, int threads)
{
    const double *invstd = stats + C, total = stats[3 * C];
    struct NAME(affine) terms = NAME(affine_terms)(C, stats);
    if (!terms.high)
        return -1;
    for (ssize_t c = 0; c < C; c++) {
        double a = value_at(weight, c, 1) * invstd[c], sum_dy = 0, sum_dy_xmu = 0;
        for (ssize_t p = 0; p < count; p++) {
            sum_dy += parts[2 * p * C + c];
            sum_dy_xmu += parts[(2 * p + 1) * C + c];
        }
        terms.scale[c] = (T)a;
        terms.slope[c] = (T)(-a * invstd[c] * invstd[c] * sum_dy_xmu / total);
        terms.shift[c] = (T)(-a * sum_dy / total);
    }
    if (M > SHORT) {
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
        for (ssize_t n = 0; n < N; n++)
            for (ssize_t c = 0; c < C; c++) {
                ssize_t p = (n * C + c) * M;
                NAME(input_plane)(dy + p, x + p, dx + p, M, terms.high[c], terms.low[c], terms.scale[c], terms.slope[c],
                                  terms.shift[c]);
            }
    } else {
        ssize_t tile = tile_of(M), tiles = (C + tile - 1) / tile, chunk = CHUNK / M, chunks = chunks_of(N, chunk);
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
        for (ssize_t k = 0; k < chunks; k++)
            for (ssize_t t = 0; t < tiles; t++)
                NAME(input_columns)(dy, x, dx, C, M, k * chunk, END(k, chunk, N), t * tile, END(t, tile, C), &terms);
    }
    free(terms.high);
    return 0;
}

#undef NAME
#undef CONCAT
#undef CONCAT_
