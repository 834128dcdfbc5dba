/* The kernels for one element type `T`, included once for each. Sums run in T over at most BLOCK elements, which lie in
 * the cache, and in double from there on, so that neither the mean nor the number of samples costs digits. */

#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define NAME(name) CONCAT(name, SUFFIX)

/* Adds a block of `n` elements with this mean and sum of squared deviations to a channel's moments: Chan, Golub and
 * LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979. */
static inline void NAME(merge)(double *mean, double *m2, double seen, double n, double block_mean, double block_m2)
{
    double delta = block_mean - *mean, share = n / (seen + n);
    *mean += delta * share;
    *m2 += block_m2 + delta * delta * seen * share;
}

/* Planes x[n][c][m]: the moments of channels first..last-1. Two passes a block, the second from the cache: the sum
 * around the channel's first element gives the block's mean, and deviations from that cannot cancel. */
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
                double off = (double)sums[k] / n; /* of the block's mean from its rounded centre */
                NAME(merge)(mean + first + k, m2 + first + k, seen, n, (double)centre[k] + off,
                            (double)squares[k] - n * off * off);
            }
        }
    }
}

/* Rows x[r][c]: the moments of channels first..last-1 over the rows from..to-1. */
CLONES static void NAME(moments_rows)(const T *x, ssize_t C, ssize_t from, ssize_t to, ssize_t first, ssize_t last,
                                      double *mean, double *m2)
{
    T shift[TILE], centre[TILE], sums[TILE], squares[TILE];
    ssize_t width = last - first;
    for (ssize_t k = 0; k < width; k++) {
        mean[k] = m2[k] = 0;
        shift[k] = from < to ? x[from * C + first + k] : 0;
    }
    for (ssize_t r0 = from; r0 < to; r0 += ROWS) {
        ssize_t r1 = r0 + ROWS < to ? r0 + ROWS : to;
        for (ssize_t k = 0; k < width; k++)
            sums[k] = squares[k] = 0;
        for (ssize_t r = r0; r < r1; r++) {
            const T *run = x + r * C + first;
#pragma omp simd
            for (ssize_t k = 0; k < width; k++)
                sums[k] += run[k] - shift[k];
        }
        T count = (T)(r1 - r0);
        for (ssize_t k = 0; k < width; k++) {
            centre[k] = shift[k] + sums[k] / count;
            sums[k] = 0;
        }
        for (ssize_t r = r0; r < r1; r++) {
            const T *run = x + r * C + first;
#pragma omp simd
            for (ssize_t k = 0; k < width; k++) {
                T d = run[k] - centre[k];
                sums[k] += d;
                squares[k] += d * d;
            }
        }
        double seen = (double)(r0 - from), n = (double)(r1 - r0);
        for (ssize_t k = 0; k < width; k++) {
            double off = (double)sums[k] / n;
            NAME(merge)(mean + k, m2 + k, seen, n, (double)centre[k] + off, (double)squares[k] - n * off * off);
        }
    }
}

/* y = (x - mean) * scale + shift over one run. The mean comes in two parts, high and low: where it is large against the
 * deviation, its rounding alone would cost digits. */
CLONES static void NAME(normalise_plane)(const T *x, T *y, ssize_t M, T high, T low, T scale, T shift)
{
#pragma omp simd
    for (ssize_t m = 0; m < M; m++)
        y[m] = (x[m] - high - low) * scale + shift;
}

CLONES static void NAME(normalise_rows)(const T *x, T *y, ssize_t C, ssize_t from, ssize_t to, const T *high,
                                        const T *low, const T *scale, const T *shift)
{
    for (ssize_t r = from; r < to; r++) {
        const T *in = x + r * C;
        T *out = y + r * C;
#pragma omp simd
        for (ssize_t c = 0; c < C; c++)
            out[c] = (in[c] - high[c] - low[c]) * scale[c] + shift[c];
    }
}

/* The backward's two sums of channels first..last-1: of dy, and of dy * (x - mean). */
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

CLONES static void NAME(sums_rows)(const T *dy, const T *x, ssize_t C, ssize_t from, ssize_t to, ssize_t first,
                                   ssize_t last, const T *high, const T *low, double *sum_dy, double *sum_dy_xmu)
{
    T sums[TILE], products[TILE];
    ssize_t width = last - first;
    for (ssize_t k = 0; k < width; k++)
        sum_dy[k] = sum_dy_xmu[k] = 0;
    for (ssize_t r0 = from; r0 < to; r0 += ROWS) {
        ssize_t r1 = r0 + ROWS < to ? r0 + ROWS : to;
        for (ssize_t k = 0; k < width; k++)
            sums[k] = products[k] = 0;
        for (ssize_t r = r0; r < r1; r++) {
            const T *d = dy + r * C + first, *in = x + r * C + first;
#pragma omp simd
            for (ssize_t k = 0; k < width; k++) {
                sums[k] += d[k];
                products[k] += d[k] * (in[k] - high[first + k] - low[first + k]);
            }
        }
        for (ssize_t k = 0; k < width; k++) {
            sum_dy[k] += sums[k];
            sum_dy_xmu[k] += products[k];
        }
    }
}

/* dx = dy * scale + (x - mean) * slope + shift. */
CLONES static void NAME(input_plane)(
    const T *dy, const T *x, T *dx, ssize_t M, T high, T low, T scale, T slope, T shift)
{
#pragma omp simd
    for (ssize_t m = 0; m < M; m++)
        dx[m] = dy[m] * scale + ((x[m] - high - low) * slope + shift);
}

CLONES static void NAME(input_rows)(const T *dy, const T *x, T *dx, ssize_t C, ssize_t from, ssize_t to, const T *high,
                                    const T *low, const T *scale, const T *slope, const T *shift)
{
    for (ssize_t r = from; r < to; r++) {
        const T *d = dy + r * C, *in = x + r * C;
        T *out = dx + r * C;
#pragma omp simd
        for (ssize_t c = 0; c < C; c++)
            out[c] = d[c] * scale[c] + ((in[c] - high[c] - low[c]) * slope[c] + shift[c]);
    }
}

/* --- the four passes, shared out over the threads; what a sum consists of does not depend on their number --- */

static int NAME(moments)(const T *x, ssize_t N, ssize_t C, ssize_t M, double *mean, double *m2, int threads)
{
    if (M > 1) {
        ssize_t tile = tile_of(M), tiles = (C + tile - 1) / tile;
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (ssize_t t = 0; t < tiles; t++)
            NAME(moments_planes)(x, N, C, M, t * tile, (t + 1) * tile < C ? (t + 1) * tile : C, mean, m2);
        return 0;
    }
    ssize_t chunks = chunks_of(N), tiles = (C + TILE - 1) / TILE;
    double *parts = malloc(2 * chunks * C * sizeof(double));
    if (!parts)
        return -1;
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
    for (ssize_t k = 0; k < chunks; k++)
        for (ssize_t t = 0; t < tiles; t++) {
            ssize_t to = (k + 1) * CHUNK < N ? (k + 1) * CHUNK : N, last = (t + 1) * TILE < C ? (t + 1) * TILE : C;
            double *part = parts + 2 * k * C + t * TILE;
            NAME(moments_rows)(x, C, k * CHUNK, to, t * TILE, last, part, part + C);
        }
    memcpy(mean, parts, C * sizeof(double));
    memcpy(m2, parts + C, C * sizeof(double));
    for (ssize_t k = 1; k < chunks; k++) {
        double n = (double)((k + 1) * CHUNK < N ? CHUNK : N - k * CHUNK);
        for (ssize_t c = 0; c < C; c++)
            NAME(merge)(mean + c, m2 + c, (double)(k * CHUNK), n, parts[2 * k * C + c], parts[(2 * k + 1) * C + c]);
    }
    free(parts);
    return 0;
}

/* Splits each mean in two; `space` has room for `parts` arrays of C. */
static T *NAME(split)(const double *mean, ssize_t C, int parts)
{
    T *space = malloc((C ? C : 1) * parts * sizeof(T));
    if (space)
        for (ssize_t c = 0; c < C; c++) {
            space[c] = (T)mean[c];
            space[C + c] = (T)(mean[c] - (double)space[c]);
        }
    return space;
}

static int NAME(normalise)(const T *x, T *y, ssize_t N, ssize_t C, ssize_t M, const double *mean, const double *invstd,
                           const double *weight, const double *bias, int threads)
{
    T *high = NAME(split)(mean, C, 4), *low = high + C, *scale = low + C, *shift = scale + C;
    if (!high)
        return -1;
    for (ssize_t c = 0; c < C; c++) {
        scale[c] = (T)(weight ? weight[c] * invstd[c] : invstd[c]);
        shift[c] = (T)(bias ? bias[c] : 0);
    }
    if (M > 1) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (ssize_t p = 0; p < N * C; p++)
            NAME(normalise_plane)(x + p * M, y + p * M, M, high[p % C], low[p % C], scale[p % C], shift[p % C]);
    } else {
        ssize_t chunks = chunks_of(N);
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (ssize_t k = 0; k < chunks; k++)
            NAME(normalise_rows)(x, y, C, k * CHUNK, (k + 1) * CHUNK < N ? (k + 1) * CHUNK : N, high, low, scale, shift);
    }
    free(high);
    return 0;
}

static int NAME(backward_sums)(const T *dy, const T *x, ssize_t N, ssize_t C, ssize_t M, const double *mean,
                               double *sum_dy, double *sum_dy_xmu, int threads)
{
    T *high = NAME(split)(mean, C, 2), *low = high + C;
    if (!high)
        return -1;
    if (M > 1) {
        ssize_t tile = tile_of(M), tiles = (C + tile - 1) / tile;
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (ssize_t t = 0; t < tiles; t++)
            NAME(sums_planes)(dy, x, N, C, M, t * tile, (t + 1) * tile < C ? (t + 1) * tile : C, high, low, sum_dy,
                              sum_dy_xmu);
        free(high);
        return 0;
    }
    ssize_t chunks = chunks_of(N), tiles = (C + TILE - 1) / TILE;
    double *parts = malloc(2 * chunks * C * sizeof(double));
    if (!parts) {
        free(high);
        return -1;
    }
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
    for (ssize_t k = 0; k < chunks; k++)
        for (ssize_t t = 0; t < tiles; t++) {
            ssize_t to = (k + 1) * CHUNK < N ? (k + 1) * CHUNK : N, last = (t + 1) * TILE < C ? (t + 1) * TILE : C;
            double *part = parts + 2 * k * C + t * TILE;
            NAME(sums_rows)(dy, x, C, k * CHUNK, to, t * TILE, last, high, low, part, part + C);
        }
    memcpy(sum_dy, parts, C * sizeof(double));
    memcpy(sum_dy_xmu, parts + C, C * sizeof(double));
    for (ssize_t k = 1; k < chunks; k++)
        for (ssize_t c = 0; c < C; c++) {
            sum_dy[c] += parts[2 * k * C + c];
            sum_dy_xmu[c] += parts[(2 * k + 1) * C + c];
        }
    free(parts);
    free(high);
    return 0;
}

static int NAME(backward_input)(const T *dy, const T *x, T *dx, ssize_t N, ssize_t C, ssize_t M, const double *mean,
                                const double *invstd, const double *weight, const double *sum_dy,
                                const double *sum_dy_xmu, double total, int threads)
{
    T *high = NAME(split)(mean, C, 5), *low = high + C, *scale = low + C, *slope = scale + C, *shift = slope + C;
    if (!high)
        return -1;
    for (ssize_t c = 0; c < C; c++) {
        double a = weight ? weight[c] * invstd[c] : invstd[c];
        scale[c] = (T)a;
        slope[c] = (T)(-a * invstd[c] * invstd[c] * sum_dy_xmu[c] / total);
        shift[c] = (T)(-a * sum_dy[c] / total);
    }
    if (M > 1) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (ssize_t p = 0; p < N * C; p++) {
            ssize_t c = p % C;
            NAME(input_plane)(dy + p * M, x + p * M, dx + p * M, M, high[c], low[c], scale[c], slope[c], shift[c]);
        }
    } else {
        ssize_t chunks = chunks_of(N);
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (ssize_t k = 0; k < chunks; k++)
            NAME(input_rows)(dy, x, dx, C, k * CHUNK, (k + 1) * CHUNK < N ? (k + 1) * CHUNK : N, high, low, scale,
                             slope, shift);
    }
    free(high);
    return 0;
}

#undef NAME
#undef CONCAT
#undef CONCAT_
