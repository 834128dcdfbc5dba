/* The layer's passes over memory, fused: torch's operators read the input more often than the mathematics asks for.
 *
 * Tensors come as addresses (`data_ptr`) with their sizes, so nothing of torch is compiled in and one build serves every
 * version. `wide`: 1 for float64, 0 for float32. x, y, dy and dx are planes (N, C, M), or rows (N, C) where M is 1;
 * weight, bias, their gradients and running statistics come with a `wide` of their own (the address is 0 for none), all
 * other numbers of channels are float64. The caller holds the tensors.
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

#define BLOCK 4096 /* elements that are summed in the input's own type, and stay in the cache between two reads */
#define ROWS 64    /* samples of a block of columns */
#define SHORT (BLOCK / ROWS) /* elements of a plane up to which each of them is a column, or most time goes into ends */
#define TILE 256   /* columns that are handled together; TILE * ROWS elements stay in the cache */
#define CHUNK 4096 /* elements of a channel that one thread takes at a time, in columns */
#define END(number, size, all) (((number) + 1) * (size) < (all) ? ((number) + 1) * (size) : (all))

/* Channels that are handled together; of long planes too, since short runs of memory are slow to come. */
static ssize_t tile_of(ssize_t M)
{
    if (M <= SHORT)
        return TILE / M;
    ssize_t tile = BLOCK / M;
    return tile < 1 ? 1 : tile > 16 ? 16 : tile;
}

static ssize_t chunks_of(ssize_t N, ssize_t chunk) { return N > chunk ? (N + chunk - 1) / chunk : 1; }

/* Values of the channels, float32 or float64, or none. */
struct values {
    int wide;
    const void *at;
};

static inline double at(struct values values, ssize_t c, double otherwise)
{
    if (!values.at)
        return otherwise;
    return values.wide ? ((const double *)values.at)[c] : (double)((const float *)values.at)[c];
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

/* Joins the ranks' moments [mean (C), sum of squared deviations (C), count], weighted by counts. `stats` gets
 * [mean (C), 1/sqrt(biased variance + eps) (C), unbiased variance (C), total count]; zeros for no samples at all. */
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
            double off = gathered[w * width + c] - mean[c];
            invstd[c] += gathered[w * width + C + c] + count * off * off;
        }
    }
    for (ssize_t c = 0; c < C; c++) {
        double m2 = invstd[c];
        unbiased[c] = m2 / (total > 1 ? total - 1 : 1);
        invstd[c] = 1 / sqrt(m2 / (total > 0 ? total : 1) + eps);
    }
    stats[3 * C] = total;
}

static void fill(int wide, void *out, ssize_t c, double value)
{
    if (wide)
        ((double *)out)[c] = value;
    else
        ((float *)out)[c] = (float)value;
}

/* Moves running statistics towards those of the batch. */
static void move_running(struct values running, const double *target, ssize_t C, double part)
{
    for (ssize_t c = 0; c < C; c++) {
        double now = at(running, c, 0);
        fill(running.wide, (void *)running.at, c, now + part * (target[c] - now));
    }
}

static int numbers(PyObject *const *args, Py_ssize_t given, Py_ssize_t expected, ssize_t *out)
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
    if (numbers(args, n, 7, a))
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
    if (numbers(args, n, 12, a))
        return NULL;
    const double *stats = D(6);
    ssize_t C = a[4];
    RUN(normalise_float(F(1), F(2), a[3], C, a[5], stats, stats + C, V(7), V(9), (int)a[11]),
        normalise_double(D(1), D(2), a[3], C, a[5], stats, stats + C, V(7), V(9), (int)a[11]));
}

static PyObject *backward_sums(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[9];
    if (numbers(args, n, 9, a))
        return NULL;
    double *sums = D(7);
    ssize_t C = a[4];
    RUN(backward_sums_float(F(1), F(2), a[3], C, a[5], D(6), sums, sums + C, (int)a[8]),
        backward_sums_double(D(1), D(2), a[3], C, a[5], D(6), sums, sums + C, (int)a[8]));
}

static PyObject *backward_input(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[13];
    if (numbers(args, n, 13, a))
        return NULL;
    const double *stats = D(7), *parts = D(10);
    ssize_t C = a[5];
    RUN(backward_input_float(F(1), F(2), F(3), a[4], C, a[6], stats, V(8), parts, a[11], (int)a[12]),
        backward_input_double(D(1), D(2), D(3), a[4], C, a[6], stats, V(8), parts, a[11], (int)a[12]));
}

/* Of weight and bias, in their own types. */
static PyObject *parameter_gradients(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[7];
    if (numbers(args, n, 7, a))
        return NULL;
    const double *stats = D(1), *sums = D(2);
    ssize_t C = a[0];
    for (ssize_t c = 0; c < C; c++) {
        fill((int)a[3], (void *)a[4], c, sums[C + c] * stats[C + c]);
        fill((int)a[5], (void *)a[6], c, sums[c]);
    }
    Py_RETURN_NONE;
}

static PyObject *join(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[4];
    double eps = n == 5 ? PyFloat_AsDouble(args[4]) : 0;
    if (PyErr_Occurred() || numbers(args, n - 1, 4, a))
        return NULL;
    join_moments(D(0), a[1], a[2], eps, D(3));
    Py_RETURN_NONE;
}

/* An empty batch moves nothing. */
static PyObject *move(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[6];
    double part = n == 7 ? PyFloat_AsDouble(args[6]) : 0;
    if (PyErr_Occurred() || numbers(args, n - 1, 6, a))
        return NULL;
    const double *stats = D(5);
    ssize_t C = a[4];
    if (stats[3 * C] < 1)
        part = 0;
    move_running(V(0), stats, C, part);
    move_running(V(2), stats + 2 * C, C, part);
    Py_RETURN_NONE;
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
static PyMethodDef methods[] = {METHOD(moments), METHOD(join), METHOD(move), METHOD(normalise), METHOD(backward_sums),
                                METHOD(backward_input), METHOD(parameter_gradients), {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_fused", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__fused(void) { return PyModule_Create(&module); }
