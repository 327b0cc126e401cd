/* The innermost loop of the fan-out in C: `send_each` of direct.py, which stands in where this was not built.
 * It has the system call, and next to nothing beside it.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <errno.h>
#include <sys/socket.h>

/* Append (index, sent) to the list. Takes the reference to `sent`, which may be NULL. */
static int
append(PyObject *list, Py_ssize_t index, PyObject *sent)
{
    PyObject *pair = sent == NULL ? NULL : Py_BuildValue("nN", index, sent);
    int failed = pair == NULL ? -1 : PyList_Append(list, pair);

    Py_XDECREF(pair);
    return failed;
}

static PyObject *
send_all(const Py_buffer *descriptors, const Py_buffer *slots, const char *data, Py_ssize_t size)
{
    const int *descriptor = descriptors->buf;
    const int *slot = slots->buf;
    Py_ssize_t known = descriptors->len / (Py_ssize_t)sizeof(int);
    Py_ssize_t count = slots->len / (Py_ssize_t)sizeof(int);
    PyObject *rest = PyList_New(0);

    for (Py_ssize_t index = 0; rest != NULL && index < count; index++) {
        ssize_t sent = -1;
        int failed = 0;

        if (slot[index] < 0 || slot[index] >= known || descriptor[slot[index]] < 0) {
            failed = append(rest, index, Py_NewRef(Py_None));
        } else {
            do {
                sent = send(descriptor[slot[index]], data, (size_t)size, MSG_DONTWAIT | MSG_NOSIGNAL);
            } while (sent < 0 && errno == EINTR);
            if (sent != size)
                failed = append(rest, index, PyLong_FromSsize_t(sent < 0 ? -errno : sent));
        }
        if (failed < 0)
            Py_CLEAR(rest);
    }
    return rest;
}

static PyObject *
send_each(PyObject *module, PyObject *arguments)
{
    Py_buffer descriptors, slots;
    const char *data;
    Py_ssize_t size;
    PyObject *rest;

    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*y*y#", &descriptors, &slots, &data, &size))
        return NULL;
    rest = send_all(&descriptors, &slots, data, size);
    PyBuffer_Release(&descriptors);
    PyBuffer_Release(&slots);
    return rest;
}

static PyMethodDef methods[] = {
    {"send_each", send_each, METH_VARARGS, "See direct.py."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_direct", NULL, 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC
PyInit__direct(void)
{
    return PyModule_Create(&definition);
}
