// A whole session fed with arbitrary commands: whatever a client sends, the server neither crashes nor keeps memory.
#include "server/session.h"

#include <algorithm>
#include <cstdlib>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>

using namespace meshllm;

namespace {

server::Shared & shared() {
    static server::Shared * s = [] {
        auto * out = new server::Shared;
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        out->devices.push_back(std::make_unique<server::Device>(cpu, 1, 8 << 20));
        out->loader = std::make_unique<server::Loader>(1, out->counters);
        out->peer_address = [](const std::string &) { return std::nullopt; };
        out->log = [](const std::string &) {};
        ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        return out;
    }();
    return *s;
}

void add_frame(wire::Bytes & out, wire::Command command, wire::ByteView payload) {
    wire::Writer w(out);
    w.put(command);
    w.put(uint64_t(payload.size()));
    w.bytes(payload);
}

/// A copy between parts of the buffers that the session has, or next to them.
wire::CopyBytes some_copy(wire::ByteView input) {
    const auto at = [&](size_t i) { return uint64_t(i < input.size() ? input[i] : 0); };
    return {{at(0) % 4, at(1) * 32, at(2) * 32}, at(3) % 4, at(4) * 32};
}

/// The input as commands: | command | length | payload |. A length of 255 makes the frame lie about its size.
wire::Bytes script(wire::ByteView input) {
    wire::Bytes out;
    const uint8_t no_rdma[wire::stock_caps_size] = {};
    add_frame(out, wire::Command::hello, no_rdma);
    wire::MeshHello hello;
    hello.ggml_version = ggml_version();
    const uint8_t kind = input.empty() ? 0 : input[0] % 4; // 0: a stock client
    hello.version = kind == 1 ? 1 : wire::mesh_version;
    if (kind != 0) {
        add_frame(out, wire::Command::mesh_hello, wire::encode(hello));
    }
    add_frame(out, wire::Command::alloc_buffer, wire::view_of(wire::AllocRequest{0, 4096}));
    if (kind == 3) { // a graph of nothing is computed: what is refused from now on leaves the session alive
        wire::Bytes put;
        wire::Writer(put).put(uint32_t(0));
        wire::encode_graph({}, put);
        add_frame(out, wire::Command::graph_put, put);
        add_frame(out, wire::Command::graph_run, wire::view_of(wire::GraphRun{0, 0}));
    }
    add_frame(out, wire::Command::alloc_buffer, wire::view_of(wire::AllocRequest{0, 512}));
    while (input.size() >= 3) {
        if (input[0] >= 240) { // what a random payload would hardly ever be
            const bool copy = input[0] % 2 == 0;
            const wire::CopyBytes bytes = some_copy(input.subspan(1));
            add_frame(out, copy ? wire::Command::copy_bytes : wire::Command::recover,
                      copy ? wire::view_of(bytes) : wire::ByteView{});
            input = input.subspan(std::min<size_t>(input.size(), 6));
            continue;
        }
        const auto command = static_cast<wire::Command>(input[0] % 82);
        const size_t length = std::min<size_t>(input[1] | (input[2] & 3) << 8, input.size() - 3);
        const bool lie = input[2] == 255;
        wire::Writer w(out);
        w.put(command);
        w.put(lie ? ~uint64_t(0) / (input[1] + 1u) : uint64_t(length));
        w.bytes(input.subspan(3, length));
        input = input.subspan(3 + length);
    }
    return out;
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    int ends[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0) {
        return 0;
    }
    channel::Stream ours{channel::Fd(ends[0])};
    channel::Stream theirs{channel::Fd(ends[1])};
    const wire::Bytes bytes = script({data, size});
    std::thread reader([&] {
        uint8_t waste[4096];
        while (::recv(ends[0], waste, sizeof(waste), 0) > 0) {
        }
    });
    std::thread writer([&] {
        try {
            ours.write_all(bytes);
        } catch (const channel::TransportError &) {
        }
        ::shutdown(ends[0], SHUT_WR);
    });
    {
        wire::Key key{};
        server::Session(shared(), theirs, key).run();
    }
    theirs.shutdown();
    writer.join();
    reader.join();
    if (shared().devices[0]->used() != 0) {
        std::abort(); // memory of a client that is gone
    }
    return 0;
}
