// The client's first frames on a stream, for the backend, for a stage that connects to its peer, and for probes.
#pragma once

#include "channel/stream.h"
#include "wire/frames.h"

namespace meshllm::channel {

/// Writes a request; the caller checks the size of its payload.
void send(Stream & stream, wire::Command command, wire::ByteView head, wire::ByteView body = {});

/// Reads a reply of at most `limit` bytes. Throws ProtocolError with the peer's text when it is an error.
wire::Bytes receive(Stream & stream, uint64_t limit = wire::max_data_payload);

/// send and receive.
wire::Bytes call(Stream & stream, wire::Command command, wire::ByteView payload);

/// HELLO of ggml-rpc 7.0. True when the server announces our extensions. Throws ProtocolError for another version.
bool stock_hello(Stream & stream);

/// What a server announces.
struct ServerInfo {
    bool mesh = false;    // else a stock ggml-rpc-server: no key, no models, one graph
    uint16_t version = 0; // of the extensions
    double rtt_s = 0;     // of one request and its reply, as measured once
    wire::Key session_key{};
    uint32_t graph_slots = 1;
    std::vector<wire::DeviceInfo> devices;
    std::vector<wire::Fingerprint> models;
};

/// All hellos of a new stream. Throws ProtocolError, with one line for the user, when the ggml versions differ.
ServerInfo introduce(Stream & stream, const std::string & ggml_version);

} // namespace meshllm::channel
