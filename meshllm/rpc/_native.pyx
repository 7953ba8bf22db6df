# distutils: language = c++
"""csrc in Python. Thin: every call that waits or reads releases the GIL, every C++ error becomes one of ours."""

import os

from cython.operator cimport dereference
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport unique_ptr
from libcpp.pair cimport pair
from libcpp.string cimport string
from libcpp.vector cimport vector

from meshllm.errors import GgufError, MeshLlmError, ProtocolError, TransportError
from meshllm.rpc.types import DeviceInfo, GgufInfo, ServerInfo, TensorInfo

cdef extern from *:
    """
    #include "channel/handshake.h"
    #include "gguf/index.h"
    #include "server/device_server.h"
    #include <csignal>

    namespace {

    PyObject * error_classes[4]; // transport, protocol, gguf, other

    // what files and peers call text may be any bytes
    PyObject * text_of(const std::string & bytes) {
        return PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "replace");
    }

    void set_error(PyObject * type, const char * message) {
        if (PyObject * text = text_of(message)) {
            PyErr_SetObject(type, text);
            Py_DECREF(text);
        }
    }

    void raise_error() {
        try {
            throw;
        } catch (const meshllm::channel::TransportError & e) {
            set_error(error_classes[0], e.what());
        } catch (const meshllm::ProtocolError & e) {
            set_error(error_classes[1], e.what());
        } catch (const meshllm::gguf::GgufError & e) {
            set_error(error_classes[2], e.what());
        } catch (const std::bad_alloc &) {
            PyErr_NoMemory();
        } catch (const std::exception & e) {
            set_error(error_classes[3], e.what());
        }
    }

    meshllm::channel::ServerInfo probe_server(const std::string & address, double timeout_s) {
        auto stream = meshllm::channel::Stream::connect(address, timeout_s);
        stream.set_read_timeout(timeout_s);
        return meshllm::channel::introduce(stream, ggml_version());
    }

    std::string fingerprint_text(const meshllm::wire::Fingerprint & f) { return {f.begin(), f.end()}; }

    meshllm::server::ModelFiles model_files(const std::string & fingerprint, const std::vector<std::string> & files) {
        meshllm::server::ModelFiles out{{}, files};
        std::copy_n(fingerprint.begin(), out.fingerprint.size(), out.fingerprint.begin());
        return out;
    }

    PyObject * value_of(const meshllm::gguf::Index::Value & value) {
        if (auto * v = std::get_if<int64_t>(&value)) {
            return PyLong_FromLongLong(*v);
        }
        if (auto * v = std::get_if<uint64_t>(&value)) {
            return PyLong_FromUnsignedLongLong(*v);
        }
        if (auto * v = std::get_if<double>(&value)) {
            return PyFloat_FromDouble(*v);
        }
        if (auto * v = std::get_if<bool>(&value)) {
            return PyBool_FromLong(*v);
        }
        return text_of(std::get<std::string>(value));
    }

    PyObject * metadata_of(const meshllm::gguf::Index & index) {
        PyObject * out = PyDict_New();
        for (const auto & [key, value] : index.metadata()) {
            PyObject * name = out == nullptr ? nullptr : text_of(key);
            PyObject * item = name == nullptr ? nullptr : value_of(value);
            if (item == nullptr || PyDict_SetItem(out, name, item) != 0) {
                Py_CLEAR(out);
            }
            Py_XDECREF(name);
            Py_XDECREF(item);
        }
        return out;
    }

    } // namespace
    """
    ctypedef struct PyObject
    PyObject * error_classes[4]
    void raise_error()
    object metadata_of(const Index &)
    string fingerprint_text(const Fingerprint &)
    ModelFiles model_files(const string &, const vector[string] &)
    ServerInfoC probe_server(const string &, double) except +raise_error nogil

cdef extern from "server/ggml_log.h" namespace "meshllm::server":
    void keep_ggml_errors()

cdef extern from "ggml.h":
    const char * c_ggml_version "ggml_version" ()

cdef extern from "wire/frames.h" namespace "meshllm::wire":
    cppclass Fingerprint:
        pass
    cppclass DeviceInfoC "meshllm::wire::DeviceInfo":
        string name
        string description
        uint32_t type
        uint64_t memory_free
        uint64_t memory_total

cdef extern from "channel/handshake.h" namespace "meshllm::channel":
    cppclass ServerInfoC "meshllm::channel::ServerInfo":
        cbool mesh
        double rtt_s
        vector[DeviceInfoC] devices
        vector[Fingerprint] models

cdef extern from "gguf/index.h" namespace "meshllm::gguf":
    cppclass TensorInfoC "meshllm::gguf::TensorInfo":
        string name
        uint32_t type
        int64_t * ne "ne.data()"
        uint32_t file
        uint64_t offset
        uint64_t size
    cppclass FileInfoC "meshllm::gguf::Index::File":
        uint64_t data_offset
        uint64_t size
    cppclass Index:
        Index()
        vector[TensorInfoC] tensors()
        vector[FileInfoC] file_infos()
    Index open_index "meshllm::gguf::Index::open" (const vector[string] &) except +raise_error nogil
    vector[string] c_split_parts "meshllm::gguf::split_parts" (const string &) except +raise_error nogil

cdef extern from "server/device_server.h" namespace "meshllm::server":
    cppclass ModelFiles:
        pass
    cppclass Options:
        string listen
        vector[string] devices
        vector[ModelFiles] models
        int threads
        uint64_t memory_limit
        cbool allow_remote
    cppclass DeviceServerC "meshllm::server::DeviceServer":
        DeviceServerC(Options) except +raise_error nogil
        const string & address()
        vector[DeviceInfoC] devices()
        vector[pair[const char *, uint64_t]] counters()
        vector[string] take_log()
        void set_models(const vector[ModelFiles] &) except +raise_error nogil
        void stop() nogil
    vector[DeviceInfoC] c_list_devices "meshllm::server::list_devices" () except +raise_error nogil

error_classes[0] = <PyObject *> TransportError
error_classes[1] = <PyObject *> ProtocolError
error_classes[2] = <PyObject *> GgufError
error_classes[3] = <PyObject *> MeshLlmError
keep_ggml_errors()

cdef dict _type_names = {0: "CPU", 1: "GPU", 2: "IGPU", 3: "ACCEL"}  # enum ggml_backend_dev_type


cdef tuple _devices(vector[DeviceInfoC] infos, dict type_names):
    return tuple([
        DeviceInfo(
            info.name.decode(errors="replace"),
            info.description.decode(errors="replace"),
            type_names.get(info.type, "unknown"),
            info.memory_free,
            info.memory_total,
        )
        for info in infos
    ])


cdef vector[string] _strings(texts):
    cdef vector[string] out
    for text in texts:
        out.push_back(text.encode())
    return out


cdef vector[string] _paths(files):
    cdef vector[string] out
    for path in files:
        out.push_back(os.fsencode(path))
    return out


def ggml_version():
    """The version of ggml that both ends of a channel must share."""
    return c_ggml_version().decode()


def list_devices():
    """All ggml devices of this machine."""
    cdef vector[DeviceInfoC] infos
    with nogil:
        infos = c_list_devices()
    return _devices(infos, _type_names)


def probe(address, double timeout_s):
    """Asks the device server at `address` (HOST:PORT or unix:/path) what it has.

    Raises TransportError when nothing answers within `timeout_s` seconds, ProtocolError when it does not fit us.
    """
    cdef string where = address.encode()
    cdef ServerInfoC info
    with nogil:
        info = probe_server(where, timeout_s)
    models = frozenset([fingerprint_text(model).hex() for model in info.models])
    kind, types = ("mesh", _type_names) if info.mesh else ("stock", {})
    return ServerInfo(kind, _devices(info.devices, types), models, info.rtt_s)


def read_gguf(files):
    """The index of a model whose files are `files`, in order.

    Raises GgufError, one line, for what is missing, truncated, no GGUF or not all parts of one model.
    """
    files = tuple(files)
    cdef vector[string] paths = _paths(files)
    cdef Index index
    with nogil:
        index = open_index(paths)
    tensors = tuple([
        TensorInfo(
            t.name.decode(errors="replace"), t.type, (t.ne[0], t.ne[1], t.ne[2], t.ne[3]), t.file, t.offset, t.size
        )
        for t in index.tensors()
    ])
    metadata = metadata_of(index)
    infos = index.file_infos()
    return GgufInfo(
        files,
        tuple([info.data_offset for info in infos]),
        tuple([info.size for info in infos]),
        tensors,
        metadata,
    )


def split_parts(path):
    """All files of the split model of which `path` is a part, in order; [path] for others.

    Raises GgufError when a part is missing.
    """
    cdef string c_path = os.fsencode(path)
    cdef vector[string] parts
    with nogil:
        parts = c_split_parts(c_path)
    return [os.fsdecode(<bytes> part) for part in parts]


cdef vector[ModelFiles] _models(models) except *:
    cdef vector[ModelFiles] out
    for model_fingerprint, files in models:
        if len(model_fingerprint) != 32:
            raise ValueError("a fingerprint has 32 bytes")
        out.push_back(model_files(model_fingerprint, _paths(files)))
    return out


cdef class DeviceServer:
    """Serves this machine's devices to hosts, in threads of its own.

    `listen` is HOST:PORT (port 0 for a free one) or unix:/path; other than loopback only with `allow_remote`, since the
    channel is not encrypted. `devices` are ggml names, all GPUs or else the CPU when empty; `models` pairs of a
    fingerprint and the files it belongs to. `memory_limit_bytes` is for each device, 0 for what it has. Raises a
    MeshLlmError when it cannot start.
    """

    cdef unique_ptr[DeviceServerC] _server

    def __init__(
        self, listen, devices=(), models=(), *, int threads=0, uint64_t memory_limit_bytes=0, cbool allow_remote=False
    ):
        cdef Options options
        options.listen = listen.encode()
        options.devices = _strings(devices)
        options.models = _models(models)
        options.threads = threads
        options.memory_limit = memory_limit_bytes
        options.allow_remote = allow_remote
        with nogil:
            self._server.reset(new DeviceServerC(options))

    def __dealloc__(self):
        with nogil:
            self._server.reset()

    @property
    def address(self):
        """The address to connect to."""
        return dereference(self._server).address().decode()

    @property
    def devices(self):
        """The devices that are served, with the memory that is free now."""
        return _devices(dereference(self._server).devices(), _type_names)

    def counters(self):
        """What was done since the start; `memory_used` in bytes is now."""
        return {item.first.decode(): item.second for item in dereference(self._server).counters()}

    def set_models(self, models):
        """The models whose weights may be asked for from now on, as at the start. Raises GgufError."""
        cdef vector[ModelFiles] replaced = _models(models)
        with nogil:
            dereference(self._server).set_models(replaced)

    def take_log(self):
        """The lines logged since the last call."""
        return [line.decode(errors="replace") for line in dereference(self._server).take_log()]

    def stop(self):
        """Ends all sessions; returns when their memory is free."""
        with nogil:
            dereference(self._server).stop()
