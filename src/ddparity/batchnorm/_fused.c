/* The fused kernels of the batch norm on the CPU. torch's operators read the input more often than is necessary.
 *
 * The caller passes a tensor as its address (`data_ptr`) and its sizes, and keeps the tensor alive. The code does not
 * use torch's headers, so one build works with every version of torch. `is_double`: 1 for float64, 0 for float32.
 *
 * x, y, dy and dx are planes (N, C, M), or rows (N, C) with M = 1. weight, bias, their gradients and the running
 * statistics each have their own `is_double`; the address 0 means that the tensor does not exist. All other values of a
 * channel are float64.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#define BLOCK 4096 /* elements that are summed in the input's type; they stay in the cache between two reads */
#define ROWS 64    /* samples in a block of columns */
/* A plane with at most SHORT elements is handled as columns, one for each element. A loop over such a plane would spend
 * most of its time at its two ends. */
#define SHORT (BLOCK / ROWS)
#define TILE 256   /* columns that are handled together: TILE * ROWS elements stay in the cache */
#define CHUNK 4096 /* elements of a channel that one thread handles at a time, in columns */
#define END(number, size, all) (((number) + 1) * (size) < (all) ? ((number) + 1) * (size) : (all))

/* Return how many channels are handled together. Long planes are grouped too: the memory is slow for short runs. */
static ssize_t tile_of(ssize_t M)
{
    if (M <= SHORT)
        return TILE / M;
    ssize_t tile = BLOCK / M;
    return tile < 1 ? 1 : tile > 16 ? 16 : tile;
}

/* Return the number of chunks of N samples; at least 1. */
static ssize_t chunks_of(ssize_t N, ssize_t chunk) { return N > chunk ? (N + chunk - 1) / chunk : 1; }

/* One value for each channel, as float32 or float64. `data` is NULL if there are no values. */
struct values {
    int is_double;
    const void *data;
};

static inline double value_at(struct values values, ssize_t c, double default_value)
{
    if (!values.data)
        return default_value;
    return values.is_double ? ((const double *)values.data)[c] : (double)((const float *)values.data)[c];
}

#define T float
#define SUFFIX _float
#include "_kernels.h"
#undef T
#undef SUFFIX
#define T double
#define SUFFIX _double
#include "_kernels.h"
#undef T
#undef SUFFIX

/* Combine the moments of W ranks, each [mean (C), sum of squared deviations (C), count], weighted by their counts.
 * Write [mean (C), 1/sqrt(biased variance + eps) (C), unbiased variance (C), total count] to `stats`. If there are no
 * samples, mean, variance and total count are 0. */
static void join_moments(const double *gathered, ssize_t W, ssize_t C, double eps, double *stats)
{
    double *mean = stats, *invstd = stats + C, *unbiased = stats + 2 * C, total = 0;
    ssize_t width = 2 * C + 1;
    for (ssize_t w = 0; w < W; w++)
        total += gathered[w * width + 2 * C];
    for (ssize_t c = 0; c < C; c++)
        mean[c] = invstd[c] = 0;
    for (ssize_t w = 0; w < W; w++) {
        double share = total > 0 ? gathered[w * width + 2 * C] / total : 0;
        for (ssize_t c = 0; c < C; c++)
            mean[c] += gathered[w * width + c] * share;
    }
    for (ssize_t w = 0; w < W; w++) {
        double count = gathered[w * width + 2 * C];
        for (ssize_t c = 0; c < C; c++) {
            double delta = gathered[w * width + c] - mean[c];
            invstd[c] += gathered[w * width + C + c] + count * delta * delta;
        }
    }
    for (ssize_t c = 0; c < C; c++) {
        double m2 = invstd[c];
        unbiased[c] = m2 / (total > 1 ? total - 1 : 1);
        invstd[c] = 1 / sqrt(m2 / (total > 0 ? total : 1) + eps);
    }
    stats[3 * C] = total;
}

static void store(int is_double, void *out, ssize_t c, double value)
{
    if (is_double)
        ((double *)out)[c] = value;
    else
        ((float *)out)[c] = (float)value;
}

/* Update running statistics: running += momentum * (batch - running). */
static void update_running(struct values running, const double *batch, ssize_t C, double momentum)
{
    for (ssize_t c = 0; c < C; c++) {
        double old = value_at(running, c, 0);
        store(running.is_double, (void *)running.data, c, old + momentum * (batch[c] - old));
    }
}

/* Convert the arguments to integers. Return -1 with an exception set if that fails. */
static int parse_integers(PyObject *const *args, Py_ssize_t given, Py_ssize_t expected, ssize_t *out)
{
    if (given != expected) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, given);
        return -1;
    }
    for (Py_ssize_t k = 0; k < given; k++) {
        out[k] = PyLong_AsSsize_t(args[k]);
        if (out[k] == -1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

/* Run a kernel without the GIL, for the element type that the first argument gives. */
#define RUN(call_float, call_double)                                                                                  \
    int failed;                                                                                                       \
    Py_BEGIN_ALLOW_THREADS failed = a[0] ? call_double : call_float;                                                  \
    Py_END_ALLOW_THREADS return failed ? PyErr_NoMemory() : Py_NewRef(Py_None)
#define D(k) ((double *)a[k])
#define F(k) ((float *)a[k])
#define V(k) ((struct values){(int)a[k], (const void *)a[(k) + 1]})

static PyObject *moments(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[7];
    if (parse_integers(args, n, 7, a))
        return NULL;
    double *payload = D(5);
    ssize_t C = a[3];
    payload[2 * C] = (double)a[2] * (double)a[4];
    RUN(moments_float(F(1), a[2], C, a[4], payload, payload + C, (int)a[6]),
        moments_double(D(1), a[2], C, a[4], payload, payload + C, (int)a[6]));
}

static PyObject *normalise(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[12];
    if (parse_integers(args, n, 12, a))
        return NULL;
    const double *stats = D(6);
    ssize_t C = a[4];
    RUN(normalise_float(F(1), F(2), a[3], C, a[5], stats, stats + C, V(7), V(9), (int)a[11]),
        normalise_double(D(1), D(2), a[3], C, a[5], stats, stats + C, V(7), V(9), (int)a[11]));
}

static PyObject *backward_sums(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[9];
    if (parse_integers(args, n, 9, a))
        return NULL;
    double *sums = D(7);
    ssize_t C = a[4];
    RUN(backward_sums_float(F(1), F(2), a[3], C, a[5], D(6), sums, sums + C, (int)a[8]),
        backward_sums_double(D(1), D(2), a[3], C, a[5], D(6), sums, sums + C, (int)a[8]));
}

static PyObject *backward_input(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[13];
    if (parse_integers(args, n, 13, a))
        return NULL;
    const double *stats = D(7), *parts = D(10);
    ssize_t C = a[5];
    RUN(backward_input_float(F(1), F(2), F(3), a[4], C, a[6], stats, V(8), parts, a[11], (int)a[12]),
        backward_input_double(D(1), D(2), D(3), a[4], C, a[6], stats, V(8), parts, a[11], (int)a[12]));
}

/* Compute the gradients of weight and bias, in their own types. */
static PyObject *parameter_gradients(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[7];
    if (parse_integers(args, n, 7, a))
        return NULL;
    const double *stats = D(1), *sums = D(2);
    ssize_t C = a[0];
    for (ssize_t c = 0; c < C; c++) {
        store((int)a[3], (void *)a[4], c, sums[C + c] * stats[C + c]);
        store((int)a[5], (void *)a[6], c, sums[c]);
    }
    Py_RETURN_NONE;
}

static PyObject *join(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[4];
    double eps = n == 5 ? PyFloat_AsDouble(args[4]) : 0;
    if (PyErr_Occurred() || parse_integers(args, n - 1, 4, a))
        return NULL;
    join_moments(D(0), a[1], a[2], eps, D(3));
    Py_RETURN_NONE;
}

/* Update the running mean and variance. An empty batch changes nothing. */
static PyObject *update(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[6];
    double momentum = n == 7 ? PyFloat_AsDouble(args[6]) : 0;
    if (PyErr_Occurred() || parse_integers(args, n - 1, 6, a))
        return NULL;
    const double *stats = D(5);
    ssize_t C = a[4];
    if (stats[3 * C] < 1)
        momentum = 0;
    update_running(V(0), stats, C, momentum);
    update_running(V(2), stats + 2 * C, C, momentum);
    Py_RETURN_NONE;
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
static PyMethodDef methods[] = {METHOD(moments), METHOD(join), METHOD(update), METHOD(normalise), METHOD(backward_sums),
                                METHOD(backward_input), METHOD(parameter_gradients), {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_fused", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__fused(void) { return PyModule_Create(&module); }
