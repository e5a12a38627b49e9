/* The record codec in C: the same four functions as pycodec.py, with the same results and the same errors.

   Built against the limited API of Python 3.11, so one file serves every later version. Nothing here keeps state between
   calls, and every byte is read behind a comparison with the end of what was given. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { BATCH_OVERHEAD = 61, RECORD_BYTES_MIN = 7, VARINT_BYTES_MAX = 10 };

typedef struct {
    PyObject *corrupt; /* semel.errors.CorruptBatch */
    PyObject *record;  /* semel.types.Record, a NamedTuple */
    newfunc new_tuple; /* tuple.__new__, which makes instances of classes derived from it, too */
} State;

/* --- Decoding --- */

typedef struct {
    const uint8_t *data;
    Py_ssize_t at, size;
    PyObject *corrupt;
} Reader;

static bool refuse(const Reader *reader, const char *what)
{
    PyErr_Format(reader->corrupt, "a record batch cannot be read: %s", what);
    return false;
}

static bool read_byte(Reader *reader, uint8_t *byte)
{
    if (reader->at >= reader->size) {
        return refuse(reader, "it ends within a record");
    }
    *byte = reader->data[reader->at++];
    return true;
}

/* An unsigned varint of up to 64 bits. */
static bool read_varint(Reader *reader, uint64_t *number)
{
    uint8_t byte;
    uint64_t raw = 0;
    for (unsigned shift = 0; shift <= 63; shift += 7) {
        if (!read_byte(reader, &byte)) {
            return false;
        }
        raw |= (uint64_t)(byte & 0x7F) << shift;
        if (byte < 0x80) {
            if (shift == 63 && byte > 1) {
                return refuse(reader, "a varint has more than 64 bits");
            }
            *number = raw;
            return true;
        }
    }
    return refuse(reader, "a varint has more than 10 bytes");
}

static int64_t unzigzag(uint64_t raw)
{
    return (int64_t)(raw >> 1 ^ (~(raw & 1) + 1));
}

/* A length and that many bytes, which lie before `stop`; NULL in `*begin` for the length -1, which stands for None. */
static bool read_field(Reader *reader, Py_ssize_t stop, const char **begin, Py_ssize_t *length)
{
    uint64_t raw;
    if (!read_varint(reader, &raw)) {
        return false;
    }
    if (raw & 1) {
        *begin = NULL;
        *length = 0;
        return raw == 1 || refuse(reader, "a length is negative");
    }
    if (reader->at > stop || raw >> 1 > (uint64_t)(stop - reader->at)) {
        return refuse(reader, "a field runs past the end of its record");
    }
    *begin = (const char *)reader->data + reader->at;
    *length = (Py_ssize_t)(raw >> 1);
    reader->at += *length;
    return true;
}

static PyObject *bytes_or_none(const char *begin, Py_ssize_t length)
{
    if (begin == NULL) {
        return Py_NewRef(Py_None);
    }
    return PyBytes_FromStringAndSize(begin, length);
}

static PyObject *read_bytes(Reader *reader, Py_ssize_t stop)
{
    const char *begin;
    Py_ssize_t length;
    return read_field(reader, stop, &begin, &length) ? bytes_or_none(begin, length) : NULL;
}

static PyObject *read_header(Reader *reader, Py_ssize_t stop)
{
    const char *begin;
    Py_ssize_t length;
    if (!read_field(reader, stop, &begin, &length)) {
        return NULL;
    }
    if (begin == NULL) {
        refuse(reader, "a header has no key");
        return NULL;
    }
    PyObject *value = read_bytes(reader, stop);
    PyObject *name = value == NULL ? NULL : PyUnicode_DecodeUTF8(begin, length, NULL);
    PyObject *header = name == NULL ? NULL : PyTuple_Pack(2, name, value);
    Py_XDECREF(name);
    Py_XDECREF(value);
    return header;
}

static PyObject *read_headers(Reader *reader, Py_ssize_t stop)
{
    uint64_t raw;
    if (reader->at < reader->size && reader->data[reader->at] == 0) {
        reader->at++;
        return PyTuple_New(0);
    }
    if (!read_varint(reader, &raw)) {
        return NULL;
    }
    /* Each header has two bytes or more, and `raw` is twice their number. */
    if (raw & 1 || reader->at > stop || raw > (uint64_t)(stop - reader->at)) {
        refuse(reader, "the number of headers is impossible");
        return NULL;
    }
    Py_ssize_t count = (Py_ssize_t)(raw >> 1);
    PyObject *headers = PyTuple_New(count);
    for (Py_ssize_t number = 0; headers != NULL && number < count; number++) {
        PyObject *header = read_header(reader, stop);
        if (header == NULL || PyTuple_SetItem(headers, number, header) < 0) {
            Py_CLEAR(headers);
        }
    }
    return headers;
}

/* base + delta, which may need more than 64 bits in a batch that nobody sane wrote. */
static PyObject *sum(int64_t base, int64_t delta)
{
    int64_t total;
    if (!__builtin_add_overflow(base, delta, &total)) {
        return PyLong_FromLongLong(total);
    }
    PyObject *left = PyLong_FromLongLong(base), *right = PyLong_FromLongLong(delta), *result = NULL;
    if (left != NULL && right != NULL) {
        result = PyNumber_Add(left, right);
    }
    Py_XDECREF(left);
    Py_XDECREF(right);
    return result;
}

typedef struct {
    int64_t base_offset, base_timestamp;
    PyObject *append_time; /* None, or what every record's timestamp is */
    PyObject *fields;      /* a tuple of one record's fields, which nobody else sees */
    PyObject *args;        /* the arguments of tuple.__new__: it holds `fields` */
    uint64_t last_raw;     /* the timestamp delta of the record before, and `last_timestamp` made of it */
    PyObject *last_timestamp;
    int64_t last_delta;
} Batch;

/* A new reference to the record's timestamp; those of neighbours are often one and the same. */
static PyObject *timestamp_of(Batch *batch, uint64_t raw)
{
    if (batch->append_time != Py_None) {
        return Py_NewRef(batch->append_time);
    }
    if (batch->last_timestamp == NULL || batch->last_raw != raw) {
        Py_XDECREF(batch->last_timestamp);
        batch->last_timestamp = sum(batch->base_timestamp, unzigzag(raw));
        batch->last_raw = raw;
    }
    return Py_XNewRef(batch->last_timestamp);
}

/* Puts `item`, a new reference or NULL with an error set, in its place among the fields. */
static bool put(const Batch *batch, Py_ssize_t field, PyObject *item)
{
    return item != NULL && PyTuple_SetItem(batch->fields, field, item) == 0;
}

/* The fields of the next record. */
static bool read_fields(Reader *reader, Batch *batch)
{
    uint64_t raw, raw_timestamp;
    uint8_t attributes;
    if (!read_varint(reader, &raw)) {
        return false;
    }
    if (raw & 1 || raw >> 1 > (uint64_t)(reader->size - reader->at)) {
        return refuse(reader, "a record runs past the end of its batch");
    }
    Py_ssize_t stop = reader->at + (Py_ssize_t)(raw >> 1);
    if (!read_byte(reader, &attributes) || !read_varint(reader, &raw_timestamp) || !read_varint(reader, &raw)) {
        return false;
    }
    int64_t delta = (int64_t)(raw >> 1);
    if (raw & 1 || delta <= batch->last_delta) {
        return refuse(reader, "offsets do not increase");
    }
    batch->last_delta = delta;
    return put(batch, 2, sum(batch->base_offset, delta)) && put(batch, 3, timestamp_of(batch, raw_timestamp))
        && put(batch, 4, read_bytes(reader, stop)) && put(batch, 5, read_bytes(reader, stop))
        && put(batch, 6, read_headers(reader, stop))
        && (reader->at == stop || refuse(reader, "a record does not end where its length says"));
}

static PyObject *read_record(const State *state, Reader *reader, Batch *batch)
{
    if (!read_fields(reader, batch)) {
        return NULL;
    }
    /* tuple.__new__(Record, fields) copies the fields, so that the next record can have their tuple. */
    PyObject *record = state->new_tuple((PyTypeObject *)state->record, batch->args, NULL);
    if (record != NULL) {
        PyObject_GC_UnTrack(record); /* Bytes, texts and numbers: it is in no cycle, and need not be looked at for one. */
    }
    return record;
}

static PyObject *read_records(const State *state, Reader *reader, Batch *batch, Py_ssize_t count, int64_t last)
{
    PyObject *records = PyList_New(count);
    for (Py_ssize_t number = 0; records != NULL && number < count; number++) {
        PyObject *record = read_record(state, reader, batch);
        if (record == NULL || PyList_SetItem(records, number, record) < 0) {
            Py_CLEAR(records);
        }
    }
    if (records == NULL) {
        return NULL;
    }
    if (reader->at != reader->size) {
        refuse(reader, "bytes are left after its last record");
    } else if (batch->last_delta > last) {
        refuse(reader, "a record's offset lies beyond its batch");
    } else {
        return records;
    }
    Py_DECREF(records);
    return NULL;
}

PyDoc_STRVAR(decode_doc,
"decode(buffer, start, stop, count, base_offset, base_timestamp, append_time, last_offset_delta, topic, partition)\n--\n\n"
"The `count` records that are encoded in `buffer[start:stop]`: see `semel.wire.pycodec.decode`.");

static PyObject *decode(PyObject *module, PyObject *args)
{
    const State *state = PyModule_GetState(module);
    PyObject *buffer, *append_time, *topic, *partition;
    Py_ssize_t start, stop;
    long long count, base_offset, base_timestamp, last;
    if (!PyArg_ParseTuple(args, "OnnLLLOLUO:decode", &buffer, &start, &stop, &count, &base_offset, &base_timestamp,
                          &append_time, &last, &topic, &partition)) {
        return NULL;
    }
    Py_buffer view;
    if (PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE) < 0) {
        return NULL;
    }
    PyObject *records = NULL;
    if (start < 0 || stop < start || stop > view.len) {
        PyErr_SetString(PyExc_ValueError, "the records do not lie in the buffer");
    } else if (count < 0 || count > (stop - start) / RECORD_BYTES_MIN) {
        PyErr_Format(state->corrupt, "a record batch cannot be read: %lld records cannot be in %zd bytes", count,
                     stop - start);
    } else {
        Reader reader = {(const uint8_t *)view.buf + start, 0, stop - start, state->corrupt};
        Batch batch = {base_offset, base_timestamp, append_time, NULL, NULL, 0, NULL, -1};
        batch.fields = Py_BuildValue("OOOOOOO", topic, partition, Py_None, Py_None, Py_None, Py_None, Py_None);
        batch.args = Py_BuildValue("(N)", batch.fields);
        if (batch.args != NULL) {
            records = read_records(state, &reader, &batch, (Py_ssize_t)count, last);
        }
        Py_XDECREF(batch.args);
        Py_XDECREF(batch.last_timestamp);
    }
    PyBuffer_Release(&view);
    return records;
}

/* --- Encoding --- */

typedef struct {
    uint8_t *data;
    size_t size, capacity;
} Bytes;

static bool reserve(Bytes *bytes, size_t more)
{
    if (more <= bytes->capacity - bytes->size) {
        return true;
    }
    size_t capacity = bytes->capacity + bytes->capacity / 2;
    if (capacity < bytes->size + more) {
        capacity = bytes->size + more;
    }
    uint8_t *data = capacity > PY_SSIZE_T_MAX ? NULL : PyMem_Realloc(bytes->data, capacity);
    if (data == NULL) {
        PyErr_NoMemory();
        return false;
    }
    bytes->data = data;
    bytes->capacity = capacity;
    return true;
}

static uint64_t zigzag(int64_t number)
{
    return (uint64_t)number << 1 ^ (number < 0 ? UINT64_MAX : 0);
}

static size_t varint_size(int64_t number)
{
    size_t size = 1;
    for (uint64_t rest = zigzag(number) >> 7; rest != 0; rest >>= 7) {
        size++;
    }
    return size;
}

static uint8_t *put_varint(uint8_t *at, int64_t number)
{
    uint64_t rest = zigzag(number);
    while (rest > 0x7F) {
        *at++ = (uint8_t)(rest & 0x7F) | 0x80;
        rest >>= 7;
    }
    *at++ = (uint8_t)rest;
    return at;
}

typedef struct {
    const char *data;
    Py_ssize_t length; /* -1 for None */
} Field;

static uint8_t *put_field(uint8_t *at, Field field)
{
    at = put_varint(at, field.length);
    if (field.length > 0) {
        memcpy(at, field.data, (size_t)field.length);
        at += field.length;
    }
    return at;
}

static size_t field_size(Field field)
{
    return varint_size(field.length) + (field.length > 0 ? (size_t)field.length : 0);
}

/* The bytes of an object that lives longer than the field. */
static bool get_field(PyObject *object, Field *field)
{
    if (object == Py_None) {
        *field = (Field){NULL, -1};
        return true;
    }
    char *data;
    if (!PyBytes_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "keys and values are bytes or None");
        return false;
    }
    if (PyBytes_AsStringAndSize(object, &data, &field->length) < 0) {
        return false;
    }
    field->data = data;
    return true;
}

static bool append_header(Bytes *tail, PyObject *header)
{
    Field name, value;
    PyObject *pair = PySequence_Tuple(header);
    if (pair == NULL) {
        return false;
    }
    bool done = false;
    if (PyTuple_Size(pair) != 2) {
        PyErr_SetString(PyExc_ValueError, "a header is a key and a value");
    } else if (!PyUnicode_Check(PyTuple_GetItem(pair, 0))) {
        PyErr_SetString(PyExc_TypeError, "the key of a header is a str");
    } else if ((name.data = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(pair, 0), &name.length)) != NULL
               && get_field(PyTuple_GetItem(pair, 1), &value)
               && reserve(tail, field_size(name) + field_size(value))) {
        uint8_t *end = put_field(put_field(tail->data + tail->size, name), value);
        tail->size = (size_t)(end - tail->data);
        done = true;
    }
    Py_DECREF(pair);
    return done;
}

/* The end of a record, into `tail`: the number of its headers and the headers. */
static bool encode_headers(Bytes *tail, PyObject *headers)
{
    Py_ssize_t count = PySequence_Size(headers);
    tail->size = 0;
    if (count < 0 || !reserve(tail, VARINT_BYTES_MAX)) {
        return false;
    }
    tail->size = (size_t)(put_varint(tail->data, count) - tail->data);
    for (Py_ssize_t number = 0; number < count; number++) {
        PyObject *header = PySequence_GetItem(headers, number);
        bool done = header != NULL && append_header(tail, header);
        Py_XDECREF(header);
        if (!done) {
            return false;
        }
    }
    return true;
}

typedef struct {
    int64_t timestamp_delta, offset_delta;
    Field key, value;
    const Bytes *tail;
    size_t inner; /* bytes after the length in front */
} Encoding;

/* Sets `inner`; returns the bytes of the whole record. */
static size_t measure(Encoding *record)
{
    record->inner = 1 + varint_size(record->timestamp_delta) + varint_size(record->offset_delta)
        + field_size(record->key) + field_size(record->value) + record->tail->size;
    return varint_size((int64_t)record->inner) + record->inner;
}

static uint8_t *put_record(uint8_t *at, const Encoding *record)
{
    at = put_varint(at, (int64_t)record->inner);
    *at++ = 0;
    at = put_varint(at, record->timestamp_delta);
    at = put_varint(at, record->offset_delta);
    at = put_field(put_field(at, record->key), record->value);
    memcpy(at, record->tail->data, record->tail->size);
    return at + record->tail->size;
}

static bool get_int64(PyObject *object, int64_t *number)
{
    int overflow;
    long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow) {
        PyErr_SetString(PyExc_ValueError, "timestamps and their differences must fit in 64 bits");
        return false;
    }
    *number = value;
    return value != -1 || !PyErr_Occurred();
}

PyDoc_STRVAR(encode_record_doc,
"encode_record(timestamp_delta, offset_delta, key, value, headers)\n--\n\n"
"One record with its length in front: see `semel.wire.pycodec.encode_record`.");

static PyObject *encode_record(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    Bytes tail = {NULL, 0, 0};
    Encoding record = {.tail = &tail};
    PyObject *result = NULL;
    if (count != 5) {
        PyErr_SetString(PyExc_TypeError, "encode_record takes 5 arguments");
    } else if (get_int64(args[0], &record.timestamp_delta) && get_int64(args[1], &record.offset_delta)
               && get_field(args[2], &record.key) && get_field(args[3], &record.value)
               && encode_headers(&tail, args[4])) {
        result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)measure(&record));
        if (result != NULL) {
            put_record((uint8_t *)PyBytes_AsString(result), &record);
        }
    }
    PyMem_Free(tail.data);
    return result;
}

/* --- Keys to partitions --- */

static uint32_t murmur2_of(const uint8_t *data, size_t length)
{
    const uint32_t m = 0x5BD1E995;
    uint32_t h = 0x9747B28C ^ (uint32_t)length;
    for (; length >= 4; data += 4, length -= 4) {
        uint32_t k = (uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 | (uint32_t)data[3] << 24;
        k *= m;
        k ^= k >> 24;
        h = h * m ^ k * m;
    }
    if (length > 0) {
        for (size_t number = 0; number < length; number++) {
            h ^= (uint32_t)data[number] << 8 * number;
        }
        h *= m;
    }
    h ^= h >> 13;
    h *= m;
    return h ^ h >> 15;
}

static bool get_key(PyObject *object, Field *key)
{
    if (PyBytes_Check(object)) {
        return get_field(object, key);
    }
    PyErr_SetString(PyExc_TypeError, "a key that decides a partition is bytes");
    return false;
}

static long long partition_of(Field key, long long partitions)
{
    return (murmur2_of((const uint8_t *)key.data, (size_t)key.length) & 0x7FFFFFFF) % partitions;
}

PyDoc_STRVAR(murmur2_doc, "murmur2(key)\n--\n\nMurmurHash2 with Kafka's seed, as an unsigned 32-bit number.");

static PyObject *murmur2(PyObject *module, PyObject *key)
{
    (void)module;
    Field field;
    if (!get_key(key, &field)) {
        return NULL;
    }
    return PyLong_FromUnsignedLong(murmur2_of((const uint8_t *)field.data, (size_t)field.length));
}

PyDoc_STRVAR(partition_doc, "partition(key, partitions)\n--\n\nThe partition (from 0) of a record with this key.");

static PyObject *partition(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    Field key;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "partition takes 2 arguments");
        return NULL;
    }
    long long partitions = PyLong_AsLongLong(args[1]);
    if ((partitions == -1 && PyErr_Occurred()) || !get_key(args[0], &key)) {
        return NULL;
    }
    if (partitions < 1) {
        PyErr_SetString(PyExc_ValueError, "partitions are counted from 1");
        return NULL;
    }
    return PyLong_FromLongLong(partition_of(key, partitions));
}

/* --- Many records at once --- */

typedef struct {
    long long partition, count;
    int64_t base_timestamp, max_timestamp;
    Bytes body;
} Output;

typedef struct {
    Output *items;
    Py_ssize_t count, capacity;
    int32_t *latest;      /* by partition: the number of its last output, from 1 */
    long long partitions;
    size_t limit;
    Bytes tail;
} Outputs;

static void free_outputs(Outputs *outputs)
{
    for (Py_ssize_t number = 0; number < outputs->count; number++) {
        PyMem_Free(outputs->items[number].body.data);
    }
    PyMem_Free(outputs->items);
    PyMem_Free(outputs->latest);
    PyMem_Free(outputs->tail.data);
}

static Output *add_output(Outputs *outputs, long long partition, int64_t timestamp)
{
    if (outputs->count == outputs->capacity) {
        Py_ssize_t capacity = outputs->capacity * 2 + 8;
        Output *items = PyMem_Realloc(outputs->items, (size_t)capacity * sizeof(Output));
        if (items == NULL || capacity > INT32_MAX) {
            outputs->items = items == NULL ? outputs->items : items;
            PyErr_NoMemory();
            return NULL;
        }
        outputs->items = items;
        outputs->capacity = capacity;
    }
    Output *output = &outputs->items[outputs->count++];
    *output = (Output){partition, 0, timestamp, timestamp, {NULL, 0, 0}};
    outputs->latest[partition] = (int32_t)outputs->count;
    return output;
}

static bool find_partition(const Outputs *outputs, PyObject *given, Field key, long long *partition)
{
    if (given == Py_None) {
        if (key.length < 0) {
            PyErr_SetString(PyExc_ValueError, "a record without a key needs a partition");
            return false;
        }
        *partition = partition_of(key, outputs->partitions);
        return true;
    }
    int overflow;
    *partition = PyLong_AsLongLongAndOverflow(given, &overflow);
    if (*partition == -1 && !overflow && PyErr_Occurred()) {
        return false;
    }
    if (overflow || *partition < 0 || *partition >= outputs->partitions) {
        PyErr_Format(PyExc_ValueError, "there is no partition %S among %lld", given, outputs->partitions);
        return false;
    }
    return true;
}

static bool add_record(Outputs *outputs, PyObject *item)
{
    Encoding record = {.tail = &outputs->tail};
    int64_t timestamp;
    long long partition;
    if (!PyTuple_Check(item) || PyTuple_Size(item) != 5) {
        PyErr_SetString(PyExc_TypeError, "a record is a tuple of partition, key, value, timestamp and headers");
        return false;
    }
    if (!get_field(PyTuple_GetItem(item, 1), &record.key) || !get_field(PyTuple_GetItem(item, 2), &record.value)
        || !get_int64(PyTuple_GetItem(item, 3), &timestamp)
        || !encode_headers(&outputs->tail, PyTuple_GetItem(item, 4))
        || !find_partition(outputs, PyTuple_GetItem(item, 0), record.key, &partition)) {
        return false;
    }
    int32_t latest = outputs->latest[partition];
    Output *output = latest == 0 ? NULL : &outputs->items[latest - 1];
    size_t size = 0;
    if (output != NULL) {
        record.offset_delta = output->count;
        if (__builtin_sub_overflow(timestamp, output->base_timestamp, &record.timestamp_delta)) {
            PyErr_SetString(PyExc_ValueError, "timestamps and their differences must fit in 64 bits");
            return false;
        }
        size = measure(&record);
    }
    if (output == NULL || BATCH_OVERHEAD + output->body.size + size > outputs->limit) {
        record.offset_delta = record.timestamp_delta = 0;
        size = measure(&record);
        output = add_output(outputs, partition, timestamp);
    }
    if (output == NULL || !reserve(&output->body, size)) {
        return false;
    }
    put_record(output->body.data + output->body.size, &record);
    output->body.size += size;
    output->count++;
    if (timestamp > output->max_timestamp) {
        output->max_timestamp = timestamp;
    }
    return true;
}

static bool add_records(Outputs *outputs, PyObject *records)
{
    /* Headers may be any sequence, whose code runs in here: the list is asked anew for its size and its items. */
    for (Py_ssize_t number = 0; number < PyList_Size(records); number++) {
        PyObject *item = Py_NewRef(PyList_GetItem(records, number));
        bool done = add_record(outputs, item);
        Py_DECREF(item);
        if (!done) {
            return false;
        }
    }
    return true;
}

static PyObject *taken(const Outputs *outputs)
{
    PyObject *list = PyList_New(outputs->count);
    for (Py_ssize_t number = 0; list != NULL && number < outputs->count; number++) {
        const Output *output = &outputs->items[number];
        PyObject *item = Py_BuildValue("LLLLy#", output->partition, output->count, (long long)output->base_timestamp,
                                       (long long)output->max_timestamp, (const char *)output->body.data,
                                       (Py_ssize_t)output->body.size);
        if (item == NULL || PyList_SetItem(list, number, item) < 0) {
            Py_CLEAR(list);
        }
    }
    return list;
}

PyDoc_STRVAR(encode_doc,
"encode(records, partitions, limit)\n--\n\n"
"Many records of one topic as bodies of batches: see `semel.wire.pycodec.encode`.");

static PyObject *encode(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *records, *result = NULL;
    int partitions;
    Py_ssize_t limit;
    if (!PyArg_ParseTuple(args, "O!in:encode", &PyList_Type, &records, &partitions, &limit)) {
        return NULL;
    }
    if (partitions < 1 || limit < 0) {
        PyErr_SetString(PyExc_ValueError, "partitions are counted from 1, bytes from 0");
        return NULL;
    }
    Outputs outputs = {NULL, 0, 0, PyMem_Calloc((size_t)partitions, sizeof(int32_t)), partitions, (size_t)limit,
                       {NULL, 0, 0}};
    if (outputs.latest == NULL) {
        return PyErr_NoMemory();
    }
    if (add_records(&outputs, records)) {
        result = taken(&outputs);
    }
    free_outputs(&outputs);
    return result;
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
    state->corrupt = imported("semel.errors", "CorruptBatch");
    state->record = imported("semel.types", "Record");
    state->new_tuple = (newfunc)PyType_GetSlot(&PyTuple_Type, Py_tp_new);
    return state->corrupt == NULL || state->record == NULL || state->new_tuple == NULL ? -1 : 0;
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);
    Py_VISIT(state->corrupt);
    Py_VISIT(state->record);
    return 0;
}

static int clear(PyObject *module)
{
    State *state = PyModule_GetState(module);
    Py_CLEAR(state->corrupt);
    Py_CLEAR(state->record);
    return 0;
}

static PyMethodDef functions[] = {
    {"decode", decode, METH_VARARGS, decode_doc},
    {"encode", encode, METH_VARARGS, encode_doc},
    {"encode_record", (PyCFunction)(void (*)(void))encode_record, METH_FASTCALL, encode_record_doc},
    {"partition", (PyCFunction)(void (*)(void))partition, METH_FASTCALL, partition_doc},
    {"murmur2", murmur2, METH_O, murmur2_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, start}, {0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "semel.wire._codec",
    .m_size = sizeof(State),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
};

PyMODINIT_FUNC PyInit__codec(void)
{
    return PyModuleDef_Init(&definition);
}
