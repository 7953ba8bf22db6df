// What a device server has done since it started, for the console and for tests.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

namespace meshllm::server {

struct Counters {
    std::atomic<uint64_t> sessions_total{0}, sessions_open{0}, frames_received{0}, replies_sent{0}, bytes_received{0},
        bytes_sent{0}, graphs_received{0}, graph_bytes_received{0}, graphs_computed{0}, data_bytes_received{0},
        weight_bytes_local{0}, pushes_sent{0}, push_bytes_sent{0}, pushes_received{0}, push_bytes_received{0},
        compute_ns{0}, errors{0};

    std::vector<std::pair<const char *, uint64_t>> snapshot() const {
        return {{"sessions_total", sessions_total},
                {"sessions_open", sessions_open},
                {"frames_received", frames_received},
                {"replies_sent", replies_sent},
                {"bytes_received", bytes_received},
                {"bytes_sent", bytes_sent},
                {"graphs_received", graphs_received},
                {"graph_bytes_received", graph_bytes_received},
                {"graphs_computed", graphs_computed},
                {"data_bytes_received", data_bytes_received},
                {"weight_bytes_local", weight_bytes_local},
                {"pushes_sent", pushes_sent},
                {"push_bytes_sent", push_bytes_sent},
                {"pushes_received", pushes_received},
                {"push_bytes_received", push_bytes_received},
                {"compute_ns", compute_ns},
                {"errors", errors}};
    }
};

} // namespace meshllm::server
