// Indices that a graph reads from memory: where they come from, and whether they are in range.
#pragma once

#include <ggml.h>

#include <string>
#include <vector>

namespace meshllm::server {

/// Indices whose values are known only at run time; each must lie in [0, limit).
struct IndexCheck {
    const ggml_tensor * ids; // I32 or I64
    int64_t limit;
    int after; // how many nodes of the graph are computed before the check; 0: a client has written the values
};

/// For a graph whose nodes have all passed check_op: traces where its indices come from, and makes sure that nothing
/// overwrites them before they are used. Sets `checks` to those that have to be read in each run, in order of `after`.
/// Empty when the graph is safe, else the reason in one line.
std::string check_graph(const ggml_cgraph * graph, std::vector<IndexCheck> & checks);

/// Reads the indices from their device. Empty when all are in range, else the reason in one line.
std::string check_indices(const std::vector<IndexCheck> & checks);

} // namespace meshllm::server
