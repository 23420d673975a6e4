/* Launches of one call, one after the other: what launching.py prepares, with the addresses of some tensors.

   launch(function, launches, count, table, places, number, stream, even, tensors) -> code

   function: cuLaunchKernelEx.  launches: of each its configuration, kernel and pointers to arguments; those of
   addresses lead into the table.  tensors: what has `data_ptr`, or addresses; the last ones are rooms, in which
   further addresses of the table are: of each of `number` places, which of the tensors, and how far behind.
   even: of so many of the first, whether each has to begin at 16 bytes.  code: 0, or the driver's error, or -1
   where one does not begin so, and nothing was launched.

   Triton's own launcher takes some forty objects apart for every kernel. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pthread.h>
#include <stdint.h>

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} Configuration; /* CUlaunchConfig */

typedef struct {
  Configuration *configuration;
  void *function;
  void **arguments;
} Launch;

typedef struct {
  int64_t tensor, behind;
} Place;

typedef int (*Function)(const Configuration *, void *, void **, void **);

/* tables are written by one thread at a time; the driver copies what it reads before a launch returns */
static pthread_mutex_t writing = PTHREAD_MUTEX_INITIALIZER;
static PyObject *data_ptr;

enum { FUNCTION, LAUNCHES, COUNT, TABLE, PLACES, NUMBER, STREAM, EVEN, TENSORS, ARGUMENTS };
enum { MOST = 512, ALIGNED = 16 };

static uint64_t address_of(PyObject *x) {
  if (PyLong_Check(x))
    return PyLong_AsUnsignedLongLong(x);
  PyObject *found = PyObject_CallMethodNoArgs(x, data_ptr);
  if (!found)
    return 0;
  uint64_t address = PyLong_AsUnsignedLongLong(found);
  Py_DECREF(found);
  return address;
}

static PyObject *launch(PyObject *self, PyObject *const *args, Py_ssize_t number_of_args) {
  uint64_t numbers[TENSORS], at[MOST], all = 0;
  if (number_of_args != ARGUMENTS || !PyTuple_Check(args[TENSORS]) ||
      PyTuple_GET_SIZE(args[TENSORS]) > MOST) {
    PyErr_SetString(PyExc_TypeError, "launch: expected eight numbers and a tuple of tensors");
    return NULL;
  }
  for (int i = 0; i < TENSORS; i++)
    numbers[i] = PyLong_AsUnsignedLongLong(args[i]);
  Py_ssize_t tensors = PyTuple_GET_SIZE(args[TENSORS]);
  for (Py_ssize_t i = 0; i < tensors; i++) {
    at[i] = address_of(PyTuple_GET_ITEM(args[TENSORS], i));
    if (i < (Py_ssize_t)numbers[EVEN])
      all |= at[i];
  }
  if (PyErr_Occurred())
    return NULL;
  if (all % ALIGNED)
    return PyLong_FromLong(-1);

  Function function = (Function)numbers[FUNCTION];
  Launch *launches = (Launch *)numbers[LAUNCHES];
  uint64_t *table = (uint64_t *)numbers[TABLE];
  Place *places = (Place *)numbers[PLACES];
  int code = 0;
  Py_BEGIN_ALLOW_THREADS;
  pthread_mutex_lock(&writing);
  for (Py_ssize_t i = 0; i < tensors; i++)
    table[i] = at[i];
  for (uint64_t i = 0; i < numbers[NUMBER]; i++)
    table[tensors + i] = at[places[i].tensor] + places[i].behind;
  for (uint64_t i = 0; i < numbers[COUNT] && !code; i++) {
    launches[i].configuration->stream = (void *)numbers[STREAM];
    code = function(launches[i].configuration, launches[i].function, launches[i].arguments, NULL);
  }
  pthread_mutex_unlock(&writing);
  Py_END_ALLOW_THREADS;
  return PyLong_FromLong(code);
}

static PyMethodDef methods[] = {
    {"launch", (PyCFunction)(void (*)(void))launch, METH_FASTCALL, "Launches of one call."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "hsgen_launching", NULL, -1, methods};

PyMODINIT_FUNC PyInit_hsgen_launching(void) {
  data_ptr = PyUnicode_InternFromString("data_ptr");
  return data_ptr ? PyModule_Create(&module) : NULL;
}
