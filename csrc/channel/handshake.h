// The client's first frames on a stream; used by the backend, by a stage towards its peer and by probes.
#pragma once

#include "channel/stream.h"
#include "wire/frames.h"

namespace meshllm::channel {

/// Writes a request without payload limits of its own.
void send(Stream & stream, wire::Command command, wire::ByteView head, wire::ByteView body = {});

/// Reads a reply of at most `limit` bytes. Throws ProtocolError with the peer's text when it is an error.
wire::Bytes receive(Stream & stream, uint64_t limit = wire::max_data_payload);

/// send and receive.
wire::Bytes call(Stream & stream, wire::Command command, wire::ByteView payload);

/// HELLO of ggml-rpc 7.0. True when the server announces our extensions. Throws ProtocolError for another version.
bool stock_hello(Stream & stream);

/// What a server says of itself.
struct ServerInfo {
    bool mesh = false; // else a stock ggml-rpc-server: no key, no models, one graph
    wire::Key session_key{};
    uint32_t graph_slots = 1;
    std::vector<wire::DeviceInfo> devices;
    std::vector<wire::Fingerprint> models;
};

/// All hellos of a fresh stream. Throws ProtocolError in words when the ggml versions differ.
ServerInfo introduce(Stream & stream, const std::string & ggml_version);

} // namespace meshllm::channel
