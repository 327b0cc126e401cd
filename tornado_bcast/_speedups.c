/* Two inner loops in C, of which the package has the same in Python for where this was not built:
 *
 * - `send_each` of direct.py, the fan-out: the system call, and next to nothing beside it.
 * - `take_whole` of frames.py, what most clients send: messages in one frame each. All rules are in Python;
 *   whatever is not such a frame is left to it.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <errno.h>
#include <string.h>
#include <sys/socket.h>

/* Append (number, object) to the list. Takes the reference to the object, which may be NULL. */
static int
append(PyObject *list, Py_ssize_t number, PyObject *object)
{
    PyObject *pair = object == NULL ? NULL : Py_BuildValue("nN", number, object);
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

/* XOR with the repeated mask (RFC 6455, section 5.3), eight bytes at a time. */
static void
unmask(char *to, const char *from, Py_ssize_t size, const char *mask)
{
    unsigned long long wide, eight;
    Py_ssize_t at = 0;

    memcpy(&wide, mask, 4);
    memcpy((char *)&wide + 4, mask, 4);
    for (; at + 8 <= size; at += 8) {
        memcpy(&eight, from + at, 8);
        eight ^= wide;
        memcpy(to + at, &eight, 8);
    }
    for (; at < size; at++)
        to[at] = from[at] ^ mask[at & 3];
}

/* The length of the header of a masked message in one frame, and that of its payload; 0: it is something else,
 * or not all here.
 */
static Py_ssize_t
whole(const unsigned char *from, Py_ssize_t left, Py_ssize_t limit, Py_ssize_t *size)
{
    Py_ssize_t header = 6;

    if (left < header || (from[0] != 0x81 && from[0] != 0x82) || !(from[1] & 0x80))
        return 0;
    *size = from[1] & 0x7F;
    if (*size == 127)
        return 0;
    if (*size == 126) {
        header = 8;
        *size = from[2] << 8 | from[3];
    }
    return *size > limit || left - header < *size ? 0 : header;
}

static PyObject *
take_whole(PyObject *module, PyObject *arguments)
{
    const char *data;
    Py_ssize_t end, position, limit, header, size;
    PyObject *messages;

    (void)module;
    if (!PyArg_ParseTuple(arguments, "y#nn", &data, &end, &position, &limit))
        return NULL;
    messages = PyList_New(0);
    while (messages != NULL && position >= 0
           && (header = whole((const unsigned char *)data + position, end - position, limit, &size)) != 0) {
        PyObject *payload = PyBytes_FromStringAndSize(NULL, size);

        if (payload != NULL) {
            unmask(PyBytes_AsString(payload), data + position + header, size, data + position + header - 4);
            if (append(messages, data[position] & 0x0F, payload) < 0)
                Py_CLEAR(messages);
        } else {
            Py_CLEAR(messages);
        }
        position += header + size;
    }
    return messages == NULL ? NULL : Py_BuildValue("Nn", messages, position);
}

static PyMethodDef methods[] = {
    {"send_each", send_each, METH_VARARGS, "See direct.py."},
    {"take_whole", take_whole, METH_VARARGS, "See frames.py."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_speedups", NULL, 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC
PyInit__speedups(void)
{
    return PyModule_Create(&definition);
}
