# distutils: language = c++
"""csrc/quic in Python. Thin: no call waits, and none holds the GIL while it takes a lock."""

import socket
from typing import NamedTuple

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from meshllm.errors import TransportError

cdef extern from *:
    """
    #include "quic/endpoint.h"
    #include <algorithm>
    #include <arpa/inet.h>
    #include <system_error>

    namespace {

    PyObject * transport_error;

    // A socket's error becomes an OSError with its number, all else a TransportError.
    void raise_quic_error() {
        try {
            throw;
        } catch (const std::system_error & e) {
            errno = e.code().value();
            PyErr_SetFromErrno(PyExc_OSError);
        } catch (const std::bad_alloc &) {
            PyErr_NoMemory();
        } catch (const std::exception & e) {
            PyErr_SetString(transport_error, e.what());
        }
    }

    meshllm::quic::Identity identity_of(const std::string & key, const std::string & certificate) {
        meshllm::quic::Identity out{};
        std::copy_n(key.begin(), std::min(key.size(), out.private_key.size()), out.private_key.begin());
        out.certificate.assign(certificate.begin(), certificate.end());
        return out;
    }

    // `host` is numeric; an IPv4 address in an IPv6 socket is in its mapped form
    uint64_t dial(meshllm::quic::Endpoint & endpoint, const std::string & host, uint16_t port, uint32_t scope) {
        sockaddr_storage out{};
        if (endpoint.v6()) {
            auto & address = reinterpret_cast<sockaddr_in6 &>(out);
            address.sin6_family = AF_INET6;
            address.sin6_port = htons(port);
            address.sin6_scope_id = scope;
            inet_pton(AF_INET6, host.c_str(), &address.sin6_addr);
        } else {
            auto & address = reinterpret_cast<sockaddr_in &>(out);
            address.sin_family = AF_INET;
            address.sin_port = htons(port);
            inet_pton(AF_INET, host.c_str(), &address.sin_addr);
        }
        return endpoint.dial(out);
    }

    int event_number(const meshllm::quic::Event & event) { return static_cast<int>(event.type); }

    bool write_bytes(meshllm::quic::Endpoint & endpoint, uint64_t stream, const char * data, size_t size) {
        return endpoint.write(stream, {reinterpret_cast<const uint8_t *>(data), size});
    }

    } // namespace
    """
    ctypedef struct PyObject
    PyObject * transport_error
    void raise_quic_error()
    Identity identity_of(const string &, const string &)
    uint64_t dial(EndpointC &, const string &, uint16_t, uint32_t) nogil
    int event_number(const EventC &)
    cbool write_bytes(EndpointC &, uint64_t, const char *, size_t) except +raise_quic_error nogil

cdef extern from "quic/endpoint.h" namespace "meshllm::quic":
    cppclass Identity:
        pass
    cppclass EventC "meshllm::quic::Event":
        uint64_t link
        uint64_t stream
        uint8_t kind
        cbool dialled
        string peer_id
        string reason
    cppclass LinkStateC "meshllm::quic::LinkState":
        uint64_t rtt_us
        uint64_t bytes_sent
        uint64_t bytes_received
        uint32_t n_streams
        string peer_address
    cppclass Config:
        uint16_t port
        string alpn
        Identity identity
        string congestion_control
        uint32_t max_kinds
        uint64_t idle_timeout_us
        uint64_t handshake_timeout_us
        uint64_t keep_alive_us
    cppclass EndpointC "meshllm::quic::Endpoint":
        EndpointC(const Config &) except +raise_quic_error nogil
        uint16_t port()
        cbool v6()
        int event_fd()
        vector[EventC] take_events() nogil
        void close(uint64_t, const string &, cbool) nogil
        LinkStateC state(uint64_t) nogil
        uint64_t open(uint64_t, uint8_t) nogil
        vector[uint8_t] read(uint64_t, size_t, cbool &) except +raise_quic_error nogil
        void finish(uint64_t) nogil
        void abort(uint64_t) nogil
        void splice(uint64_t, int) nogil
        void release(uint64_t) nogil
        void stop() nogil

transport_error = <PyObject *> TransportError

# Event::Type, in its order
LINKED, CLOSED, OPENED, READABLE, WRITABLE, SPLICED = range(6)


class Event(NamedTuple):
    """`kind`, `dialled`, `peer_id` and `reason` belong to some types of events only; see csrc/quic/shared.h."""

    type: int
    link: int
    stream: int
    kind: int
    dialled: bool
    peer_id: str
    reason: str


class LinkState(NamedTuple):
    """Without a sample the RTT is 0; an unknown link has an empty address, else "host:port"."""

    rtt_us: int
    bytes_sent: int
    bytes_received: int
    n_streams: int
    peer_address: str


cdef class Endpoint:
    """One UDP port and the thread that serves it; see csrc/quic/endpoint.h.

    `key` is an Ed25519 seed of 32 bytes, `certificate` the DER that carries its public key; a stream whose first byte is
    `max_kinds` or more is refused. Times in seconds. Raises OSError of the socket, TransportError.
    """

    cdef unique_ptr[EndpointC] _endpoint

    def __init__(
        self,
        uint16_t port,
        bytes key,
        bytes certificate,
        str alpn,
        uint32_t max_kinds,
        *,
        str congestion_control,
        double idle_timeout_s,
        double handshake_timeout_s,
        double keep_alive_s,
    ):
        cdef Config config
        config.port = port
        config.alpn = alpn.encode()
        config.identity = identity_of(key, certificate)
        config.congestion_control = congestion_control.encode()
        config.max_kinds = max_kinds
        config.idle_timeout_us = <uint64_t>(idle_timeout_s * 1e6)
        config.handshake_timeout_us = <uint64_t>(handshake_timeout_s * 1e6)
        config.keep_alive_us = <uint64_t>(keep_alive_s * 1e6)
        with nogil:
            self._endpoint.reset(new EndpointC(config))

    def __dealloc__(self):
        with nogil:
            self._endpoint.reset()

    @property
    def port(self):
        return self._endpoint.get().port()

    @property
    def family(self):
        """Of the addresses that dial() takes."""
        return socket.AF_INET6 if self._endpoint.get().v6() else socket.AF_INET

    def fileno(self):
        """Readable when take_events() has something."""
        return self._endpoint.get().event_fd()

    def take_events(self):
        cdef vector[EventC] events
        with nogil:
            events = self._endpoint.get().take_events()
        return [
            Event(
                event_number(e), e.link, e.stream, e.kind, e.dialled, e.peer_id.decode(), e.reason.decode(errors="replace")
            )
            for e in events
        ]

    def dial(self, host, uint16_t port, uint32_t scope=0):
        """A link to a numeric address of `family`."""
        cdef string address = host.encode()
        cdef uint64_t link
        with nogil:
            link = dial(self._endpoint.get()[0], address, port, scope)
        return link

    def close_link(self, uint64_t link, str reason, cbool at_once):
        cdef string text = reason.encode()
        with nogil:
            self._endpoint.get().close(link, text, at_once)

    def state(self, uint64_t link):
        cdef LinkStateC s
        with nogil:
            s = self._endpoint.get().state(link)
        return LinkState(s.rtt_us, s.bytes_sent, s.bytes_received, s.n_streams, s.peer_address.decode())

    def open(self, uint64_t link, uint8_t kind):
        """A stream, or 0 when the link is closed."""
        cdef uint64_t stream
        with nogil:
            stream = self._endpoint.get().open(link, kind)
        return stream

    def write(self, uint64_t stream, bytes data):
        """True when many bytes wait to be sent: a WRITABLE event follows when few do. Raises TransportError."""
        cdef const char * begin = data
        cdef size_t size = len(data)
        cdef cbool full
        with nogil:
            full = write_bytes(self._endpoint.get()[0], stream, begin, size)
        return full

    def read(self, uint64_t stream, size_t limit):
        """(bytes, whether that was the end); without bytes before the end a READABLE event follows. Raises TransportError."""
        cdef vector[uint8_t] data
        cdef cbool ended = False
        with nogil:
            data = self._endpoint.get().read(stream, limit, ended)
        return PyBytes_FromStringAndSize(<const char *> data.data(), <Py_ssize_t> data.size()), ended

    def finish(self, uint64_t stream):
        with nogil:
            self._endpoint.get().finish(stream)

    def abort(self, uint64_t stream):
        with nogil:
            self._endpoint.get().abort(stream)

    def splice(self, uint64_t stream, int fd):
        """Takes the descriptor of a connected socket; a SPLICED event follows at the end."""
        with nogil:
            self._endpoint.get().splice(stream, fd)

    def release(self, uint64_t stream):
        with nogil:
            self._endpoint.get().release(stream)

    def stop(self):
        """Closes all links, which takes some milliseconds."""
        with nogil:
            self._endpoint.get().stop()
