/* The layer's passes over memory, fused: torch's operators read the input more often than the mathematics asks for.
 *
 * Tensors come as addresses (`data_ptr`) with their sizes, so nothing of torch is compiled in and one build serves every
 * version. `wide`: 1 for float64, 0 for float32. x, y, dy and dx are planes (N, C, M), or rows (N, C) where M is 1;
 * weight and bias are float64 or 0 for none, as are all statistics. The caller holds the tensors.
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
#define TILE 128   /* channels at most that are handled together */
#define ROWS 64    /* of a block of rows; TILE * ROWS elements stay in the cache */
#define CHUNK 4096 /* rows that one thread takes at a time */

/* Channels whose planes are read together: short runs of memory are slow to come. */
static ssize_t tile_of(ssize_t M)
{
    ssize_t tile = BLOCK / M;
    return tile < 1 ? 1 : tile > 16 ? 16 : tile;
}

static ssize_t chunks_of(ssize_t rows) { return rows > CHUNK ? (rows + CHUNK - 1) / CHUNK : 1; }

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

/* Moves running statistics, float32 or float64, towards those of the batch. */
static void move_running(int wide, void *running, const double *target, ssize_t C, double part)
{
    for (ssize_t c = 0; c < C; c++)
        if (wide)
            ((double *)running)[c] += part * (target[c] - ((double *)running)[c]);
        else
            ((float *)running)[c] = (float)(((float *)running)[c] + part * (target[c] - ((float *)running)[c]));
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

static PyObject *moments(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[8];
    if (numbers(args, n, 8, a))
        return NULL;
    RUN(moments_float(F(1), a[2], a[3], a[4], D(5), D(6), (int)a[7]),
        moments_double(D(1), a[2], a[3], a[4], D(5), D(6), (int)a[7]));
}

static PyObject *normalise(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[11];
    if (numbers(args, n, 11, a))
        return NULL;
    RUN(normalise_float(F(1), F(2), a[3], a[4], a[5], D(6), D(7), D(8), D(9), (int)a[10]),
        normalise_double(D(1), D(2), a[3], a[4], a[5], D(6), D(7), D(8), D(9), (int)a[10]));
}

static PyObject *backward_sums(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[10];
    if (numbers(args, n, 10, a))
        return NULL;
    RUN(backward_sums_float(F(1), F(2), a[3], a[4], a[5], D(6), D(7), D(8), (int)a[9]),
        backward_sums_double(D(1), D(2), a[3], a[4], a[5], D(6), D(7), D(8), (int)a[9]));
}

static PyObject *backward_input(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[14];
    if (numbers(args, n, 14, a))
        return NULL;
    double total = *D(12);
    RUN(backward_input_float(F(1), F(2), F(3), a[4], a[5], a[6], D(7), D(8), D(9), D(10), D(11), total, (int)a[13]),
        backward_input_double(D(1), D(2), D(3), a[4], a[5], a[6], D(7), D(8), D(9), D(10), D(11), total, (int)a[13]));
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

static PyObject *move(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    ssize_t a[4];
    double part = n == 5 ? PyFloat_AsDouble(args[4]) : 0;
    if (PyErr_Occurred() || numbers(args, n - 1, 4, a))
        return NULL;
    move_running((int)a[0], (void *)a[1], D(2), a[3], part);
    Py_RETURN_NONE;
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
static PyMethodDef methods[] = {METHOD(moments), METHOD(join), METHOD(move), METHOD(normalise), METHOD(backward_sums),
                                METHOD(backward_input), {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_fused", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__fused(void) { return PyModule_Create(&module); }
