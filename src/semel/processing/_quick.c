/* The inner loop of a processor in C: decode, call the handler, take its effects, for records with nothing special about them.

   Whatever is special is left to `handling.py`, which can do everything: see `semel.processing.quick`. Nothing here keeps
   state between calls. Built against the limited API of Python 3.11. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdbool.h>

enum { RECORD_OVERHEAD = 32, HEADER_OVERHEAD = 8, EFFECTS_MAX = 1000, REPR_MAX = 80 };

typedef struct {
    PyObject *input;     /* topics.InputRecord, a NamedTuple */
    PyObject *produce;   /* effects.Produce */
    PyObject *generator; /* types.GeneratorType */
    PyObject *topic, *key, *value, *headers, *popleft; /* names of attributes */
    PyObject *before, *between, *after;                /* names of failpoints */
    newfunc new_tuple;   /* tuple.__new__, which makes instances of classes derived from it, too */
} State;

/* One call of `run`. Everything but `popleft`, `args`, `effects` and `made` is borrowed from the caller. */
typedef struct {
    const State *state;
    PyObject *pending, *topic, *partition, *handler, *key_kind, *decode;
    PyObject *plans, *counts, *outputs, *monotonic, *now_ms;
    PyObject *reached; /* called with the name of each failpoint that is passed; None when nobody watches */
    PyObject *header, *place, *offsets, *numbers; /* for the history, see `marked`; NULL when there is none */
    double until;
    long long position, records_max, bytes_max, output_bytes_max;
    PyObject *popleft;
    PyObject *args;    /* of tuple.__new__: one tuple, the fields of InputRecord */
    PyObject *fields;  /* which is this one */
    PyObject *effects; /* of the record at hand */
    PyObject *made;    /* lists of outputs, each followed by what it is to get when the record is through */
    PyObject *last;    /* the last record that is through, our own reference */
    long long count, bytes;
    bool is_handlers; /* whether the exception that is set is the handler's */
} Run;

/* What came of a step. An exception is set with FAILED and with nothing else. */
typedef enum { FAILED = -1, SPECIAL = 0, DONE = 1 } Outcome;

/* Something did not work that the other way will try again and tell about: only what nobody may catch goes on. */
static Outcome special(void)
{
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) {
        return FAILED;
    }
    PyErr_Clear();
    return SPECIAL;
}

/* Pass a failpoint; false with an exception set when it raises. */
static bool reach(const Run *run, PyObject *name)
{
    if (run->reached == Py_None) {
        return true;
    }
    PyObject *done = PyObject_CallFunctionObjArgs(run->reached, name, NULL);
    Py_XDECREF(done);
    return done != NULL;
}

static bool is_same(PyObject *one, PyObject *other)
{
    int same = one == other ? 1 : PyObject_RichCompareBool(one, other, Py_EQ);
    if (same < 0) {
        PyErr_Clear();
    }
    return same == 1;
}

/* --- In --- */

/* Bytes as the input's topic declares them; NULL with or without an error set when they cannot be read here. */
static PyObject *decoded(PyObject *kind, PyObject *data)
{
    char *begin;
    Py_ssize_t length;
    if (data == Py_None || kind == (PyObject *)&PyBytes_Type) {
        return Py_NewRef(data);
    }
    if (kind != (PyObject *)&PyUnicode_Type) {
        return PyObject_CallFunctionObjArgs(kind, data, NULL);
    }
    return PyBytes_AsStringAndSize(data, &begin, &length) < 0 ? NULL : PyUnicode_DecodeUTF8(begin, length, NULL);
}

static bool put(const Run *run, Py_ssize_t field, PyObject *item)
{
    return item != NULL && PyTuple_SetItem(run->fields, field, item) == 0;
}

/* What the handler sees of a record; NULL when it cannot be made here. */
static PyObject *input_of(const Run *run, PyObject *record)
{
    if (!put(run, 0, decoded(run->key_kind, PyTuple_GetItem(record, 4)))
        || !put(run, 1, decoded(run->decode, PyTuple_GetItem(record, 5)))
        || !put(run, 2, Py_NewRef(PyTuple_GetItem(record, 6))) || !put(run, 5, Py_NewRef(PyTuple_GetItem(record, 2)))
        || !put(run, 6, Py_NewRef(PyTuple_GetItem(record, 3)))) {
        return NULL;
    }
    return run->state->new_tuple((PyTypeObject *)run->state->input, run->args, NULL);
}

/* --- Out --- */

static PyObject *key_bytes(PyObject *kind, PyObject *key)
{
    if (kind == (PyObject *)&PyUnicode_Type && (PyObject *)Py_TYPE(key) == kind) {
        return PyUnicode_AsUTF8String(key);
    }
    return (PyObject *)Py_TYPE(key) == kind && PyBytes_Check(key) ? Py_NewRef(key) : NULL;
}

static PyObject *value_bytes(PyObject *kind, PyObject *encode, PyObject *value)
{
    if (value == Py_None) {
        return Py_NewRef(value);
    }
    if ((PyObject *)Py_TYPE(value) != kind) {
        return NULL;
    }
    return PyBytes_Check(value) ? Py_NewRef(value) : PyObject_CallFunctionObjArgs(encode, value, NULL);
}

/* The list that collects a topic's outputs. */
static PyObject *outputs_of(const Run *run, PyObject *name)
{
    PyObject *list = PyDict_GetItemWithError(run->outputs, name);
    if (list != NULL || PyErr_Occurred()) {
        return Py_XNewRef(list);
    }
    list = PyList_New(0);
    if (list != NULL && PyDict_SetItem(run->outputs, name, list) < 0) {
        Py_CLEAR(list);
    }
    return list;
}

/* Remember an output of the record at hand. `plan` is (name, type of keys, type of values, function for values). */
static Outcome make(Run *run, PyObject *plan, PyObject *key, PyObject *value, long long *bytes)
{
    PyObject *name = PyTuple_GetItem(plan, 0), *output = NULL, *list = NULL;
    PyObject *key_data = key_bytes(PyTuple_GetItem(plan, 1), key);
    PyObject *data = key_data == NULL ? NULL : value_bytes(PyTuple_GetItem(plan, 2), PyTuple_GetItem(plan, 3), value);
    Outcome outcome = SPECIAL;
    if (data != NULL && (data == Py_None || PyBytes_Check(data))
        && PyDict_GetItemWithError(run->counts, name) != NULL) {
        long long size = RECORD_OVERHEAD + PyBytes_Size(key_data) + (data == Py_None ? 0 : PyBytes_Size(data));
        if (size <= run->output_bytes_max) {
            output = Py_BuildValue("OOOO()", Py_None, key_data, data, run->now_ms);
            if (output != NULL) {
                PyObject_GC_UnTrack(output); /* Bytes, numbers, texts: it is in no cycle, and not looked at for one. */
            }
            list = output == NULL ? NULL : outputs_of(run, name);
            if (list != NULL && PyList_Append(run->made, list) == 0 && PyList_Append(run->made, output) == 0) {
                *bytes += size;
                outcome = DONE;
            } else {
                outcome = FAILED;
            }
        }
    }
    Py_XDECREF(output);
    Py_XDECREF(list);
    Py_XDECREF(data);
    Py_XDECREF(key_data);
    return outcome == SPECIAL ? special() : outcome;
}

static Outcome take_effect(Run *run, PyObject *effect, long long *bytes)
{
    const State *state = run->state;
    if ((PyObject *)Py_TYPE(effect) != state->produce || PyList_Size(run->effects) > EFFECTS_MAX) {
        return SPECIAL;
    }
    PyObject *topic = PyObject_GetAttr(effect, state->topic), *key = PyObject_GetAttr(effect, state->key);
    PyObject *value = PyObject_GetAttr(effect, state->value), *headers = PyObject_GetAttr(effect, state->headers);
    PyObject *plan = topic == NULL ? NULL : PyDict_GetItemWithError(run->plans, topic);
    Outcome outcome = SPECIAL;
    if (plan != NULL && key != NULL && value != NULL && headers != NULL && PyTuple_Check(headers)
        && PyTuple_Size(headers) == 0 && PyTuple_Check(plan) && PyTuple_Size(plan) == 4) {
        outcome = make(run, plan, key, value, bytes);
    }
    Py_XDECREF(topic);
    Py_XDECREF(key);
    Py_XDECREF(value);
    Py_XDECREF(headers);
    return outcome == SPECIAL ? special() : outcome;
}

/* A generator that came to its end must not have returned anything: a processor's effects are yielded. */
static Outcome check_answer(PyObject *answer)
{
    if (answer == Py_None) {
        return DONE;
    }
    PyObject *text = PyObject_Repr(answer);
    PyObject *cut = text == NULL ? NULL : PyUnicode_Substring(text, 0, REPR_MAX);
    if (cut != NULL) {
        PyErr_Format(PyExc_TypeError, "the handler returned %U, which is not an effect", cut);
    }
    Py_XDECREF(text);
    Py_XDECREF(cut);
    return FAILED;
}

/* Take what the handler's call gave. After SPECIAL `effects` has all that the generator has yielded. */
static Outcome take_result(Run *run, PyObject *result, long long *bytes)
{
    if (result == Py_None) {
        return DONE;
    }
    if ((PyObject *)Py_TYPE(result) != run->state->generator) {
        return SPECIAL;
    }
    for (;;) {
        PyObject *effect = NULL;
        PySendResult sent = PyIter_Send(result, Py_None, &effect);
        Outcome outcome = FAILED;
        if (sent == PYGEN_RETURN) {
            outcome = check_answer(effect);
        } else if (sent == PYGEN_NEXT && PyList_Append(run->effects, effect) == 0) {
            outcome = take_effect(run, effect, bytes);
            if (outcome == DONE && !reach(run, run->state->between)) {
                outcome = FAILED;
            }
        }
        Py_XDECREF(effect);
        if (sent != PYGEN_NEXT || outcome != DONE) {
            return outcome;
        }
    }
}

/* --- The loop --- */

/* An output with the header that says where it comes from: see `history.PROOF`. */
static PyObject *marked(const Run *run, PyObject *output, long long offset, Py_ssize_t number, Py_ssize_t total,
                        long long *bytes)
{
    char which[64];
    PyOS_snprintf(which, sizeof which, "%lld|%zd|%zd", offset, number, total);
    PyObject *proof = PyBytes_FromFormat("%s%s", PyBytes_AsString(run->place), which);
    if (proof == NULL) {
        return NULL;
    }
    *bytes += 4 * PyUnicode_GetLength(run->header) + PyBytes_Size(proof) + HEADER_OVERHEAD;
    return Py_BuildValue("OOOO((ON))", PyTuple_GetItem(output, 0), PyTuple_GetItem(output, 1),
                         PyTuple_GetItem(output, 2), PyTuple_GetItem(output, 3), run->header, proof);
}

/* Have the history know of the record at hand and of its outputs, and these of it. */
static bool tell_history(Run *run, long long offset, long long *bytes)
{
    Py_ssize_t total = PyList_Size(run->made) / 2;
    for (Py_ssize_t number = 0; number < total; number++) {
        PyObject *output = marked(run, PyList_GetItem(run->made, 2 * number + 1), offset, number, total, bytes);
        if (output == NULL || PyList_SetItem(run->made, 2 * number + 1, output) < 0) {
            return false;
        }
    }
    PyObject *at = PyLong_FromLongLong(offset), *count = PyLong_FromSsize_t(total);
    bool done = at != NULL && count != NULL && PyList_Append(run->offsets, at) == 0
        && PyList_Append(run->numbers, count) == 0;
    Py_XDECREF(at);
    Py_XDECREF(count);
    return done;
}

/* The record is through: the unit gets its outputs, and it is taken off. */
static Outcome pass(Run *run, PyObject *record, long long offset, long long bytes)
{
    if (run->header != NULL && !tell_history(run, offset, &bytes)) {
        return FAILED;
    }
    for (Py_ssize_t at = 0; at + 1 < PyList_Size(run->made); at += 2) {
        if (PyList_Append(PyList_GetItem(run->made, at), PyList_GetItem(run->made, at + 1)) < 0) {
            return FAILED;
        }
    }
    PyObject *taken = PyObject_CallNoArgs(run->popleft);
    if (taken == NULL) {
        return FAILED;
    }
    Py_DECREF(taken);
    for (Py_ssize_t field = 4; field <= 5; field++) {
        PyObject *data = PyTuple_GetItem(record, field);
        bytes += PyBytes_Check(data) ? PyBytes_Size(data) : 0;
    }
    Py_XDECREF(run->last);
    run->last = Py_NewRef(record);
    run->position = offset + 1;
    run->bytes += bytes;
    run->count++;
    return DONE;
}

/* One record. `*rest` is what the caller gets after SPECIAL: False, or (effects, what is left of the call). */
static Outcome work_on(Run *run, PyObject *record, long long offset, PyObject **rest)
{
    long long bytes = 0;
    PyObject *input = input_of(run, record);
    if (input == NULL) {
        *rest = Py_NewRef(Py_False);
        return special();
    }
    if (!reach(run, run->state->before)) {
        Py_DECREF(input);
        return FAILED;
    }
    run->is_handlers = true;
    PyObject *result = PyObject_CallFunctionObjArgs(run->handler, input, NULL);
    Py_DECREF(input);
    if (result == NULL || PyList_SetSlice(run->made, 0, PyList_Size(run->made), NULL) < 0
        || PyList_SetSlice(run->effects, 0, PyList_Size(run->effects), NULL) < 0) {
        Py_XDECREF(result);
        return FAILED;
    }
    Outcome outcome = take_result(run, result, &bytes);
    if (outcome == SPECIAL) {
        *rest = PyTuple_Pack(2, run->effects, result);
        outcome = *rest == NULL ? FAILED : SPECIAL;
    } else if (outcome == DONE) {
        run->is_handlers = false;
        outcome = reach(run, run->state->after) ? pass(run, record, offset, bytes) : FAILED;
    }
    Py_DECREF(result);
    return outcome;
}

/* Whether it is time to stop; -1 with an error. */
static int is_late(const Run *run)
{
    PyObject *now = PyObject_CallNoArgs(run->monotonic);
    double seconds = now == NULL ? -1.0 : PyFloat_AsDouble(now);
    Py_XDECREF(now);
    return PyErr_Occurred() ? -1 : seconds >= run->until;
}

static Outcome work(Run *run, PyObject **rest)
{
    Outcome outcome = DONE;
    while (outcome == DONE && run->count < run->records_max && run->bytes < run->bytes_max) {
        Py_ssize_t left = PySequence_Size(run->pending);
        PyObject *record = left > 0 ? PySequence_GetItem(run->pending, 0) : NULL;
        if (record == NULL) {
            return left == 0 ? DONE : FAILED;
        }
        bool is_ours = PyTuple_Check(record) && PyTuple_Size(record) == 7
            && is_same(PyTuple_GetItem(record, 0), run->topic) && is_same(PyTuple_GetItem(record, 1), run->partition);
        long long offset = is_ours ? PyLong_AsLongLong(PyTuple_GetItem(record, 2)) : -1;
        if (offset < run->position) { /* Another partition's, or one to pass over: the caller looks at it. */
            PyErr_Clear();
            Py_DECREF(record);
            return DONE;
        }
        outcome = work_on(run, record, offset, rest);
        Py_DECREF(record);
        int late = outcome == DONE ? is_late(run) : 0;
        if (late != 0) {
            return late < 0 ? FAILED : DONE;
        }
    }
    return outcome;
}

/* Tell the caller how far we came, whatever else we tell. */
static bool tell(const Run *run, PyObject *progress)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *told = Py_BuildValue("[LLLOO]", run->count, run->position, run->bytes, run->last ? run->last : Py_None,
                                   run->is_handlers && type != NULL ? Py_True : Py_False);
    bool done = told != NULL && PyList_SetSlice(progress, 0, PyList_Size(progress), told) == 0;
    Py_XDECREF(told);
    if (done || type != NULL) {
        PyErr_Restore(type, value, traceback);
    }
    return done;
}

PyDoc_STRVAR(run_doc,
"run(pending, topic, partition, position, input_plan, plans, counts, outputs, bounds, reached, proof, progress)\n--\n\n"
"Work on the first records of `pending`: see `semel.processing.quick`.");

static PyObject *run(PyObject *module, PyObject *args)
{
    Run run = {.state = PyModule_GetState(module)};
    PyObject *progress, *proof, *rest = NULL;
    if (!PyArg_ParseTuple(args, "OUO!L(OOO)O!O!O!(OdLLLO)OO!O!:run", &run.pending, &run.topic, &PyLong_Type, &run.partition,
                          &run.position, &run.handler, &run.key_kind, &run.decode, &PyDict_Type, &run.plans,
                          &PyDict_Type, &run.counts, &PyDict_Type, &run.outputs, &run.monotonic, &run.until,
                          &run.records_max, &run.bytes_max, &run.output_bytes_max, &run.now_ms, &run.reached,
                          &PyTuple_Type, &proof, &PyList_Type, &progress)
        || (PyTuple_Size(proof) != 0
            && !PyArg_ParseTuple(proof, "USO!O!", &run.header, &run.place, &PyList_Type, &run.offsets, &PyList_Type,
                                 &run.numbers))) {
        return NULL;
    }
    Outcome outcome = FAILED;
    run.fields = Py_BuildValue("OOOOOOO", Py_None, Py_None, Py_None, run.topic, run.partition, Py_None, Py_None);
    run.args = Py_BuildValue("(N)", run.fields);
    run.effects = PyList_New(0);
    run.made = PyList_New(0);
    run.popleft = PyObject_GetAttr(run.pending, run.state->popleft);
    if (run.args != NULL && run.effects != NULL && run.made != NULL && run.popleft != NULL) {
        outcome = work(&run, &rest);
    }
    if (!tell(&run, progress)) {
        outcome = FAILED;
    }
    Py_XDECREF(run.args);
    Py_XDECREF(run.effects);
    Py_XDECREF(run.made);
    Py_XDECREF(run.popleft);
    Py_XDECREF(run.last);
    if (outcome == SPECIAL) {
        return rest;
    }
    Py_XDECREF(rest);
    return outcome == FAILED ? NULL : Py_NewRef(Py_None);
}

/* --- The module --- */

static PyObject *imported(const char *module, const char *name)
{
    PyObject *found = PyImport_ImportModule(module);
    PyObject *value = found == NULL ? NULL : PyObject_GetAttrString(found, name);
    Py_XDECREF(found);
    return value;
}

static int start(PyObject *module)
{
    State *state = PyModule_GetState(module);
    state->input = imported("semel.processing.topics", "InputRecord");
    state->produce = imported("semel.processing.effects", "Produce");
    state->generator = imported("types", "GeneratorType");
    state->topic = PyUnicode_InternFromString("topic");
    state->key = PyUnicode_InternFromString("key");
    state->value = PyUnicode_InternFromString("value");
    state->headers = PyUnicode_InternFromString("headers");
    state->popleft = PyUnicode_InternFromString("popleft");
    state->before = PyUnicode_InternFromString("handler.before");
    state->between = PyUnicode_InternFromString("handler.between_effects");
    state->after = PyUnicode_InternFromString("handler.after");
    state->new_tuple = (newfunc)PyType_GetSlot(&PyTuple_Type, Py_tp_new);
    bool done = state->input && state->produce && state->generator && state->topic && state->key && state->value
        && state->headers && state->popleft && state->before && state->between && state->after && state->new_tuple;
    return done ? 0 : -1;
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);
    Py_VISIT(state->input);
    Py_VISIT(state->produce);
    Py_VISIT(state->generator);
    return 0;
}

static int clear(PyObject *module)
{
    State *state = PyModule_GetState(module);
    Py_CLEAR(state->input);
    Py_CLEAR(state->produce);
    Py_CLEAR(state->generator);
    Py_CLEAR(state->topic);
    Py_CLEAR(state->key);
    Py_CLEAR(state->value);
    Py_CLEAR(state->headers);
    Py_CLEAR(state->popleft);
    Py_CLEAR(state->before);
    Py_CLEAR(state->between);
    Py_CLEAR(state->after);
    return 0;
}

static PyMethodDef functions[] = {{"run", run, METH_VARARGS, run_doc}, {NULL, NULL, 0, NULL}};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, start}, {0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "semel.processing._quick",
    .m_size = sizeof(State),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
};

PyMODINIT_FUNC PyInit__quick(void)
{
    return PyModuleDef_Init(&definition);
}
