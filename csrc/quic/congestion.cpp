#include "quic/congestion.h"

#include "quic/picoquic_internals.h"

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

namespace meshllm::quic {

namespace {

/// An algorithm of picoquic's, wrapped.
struct Roomy : picoquic_congestion_algorithm_t {
    const picoquic_congestion_algorithm_t * base;
};

const picoquic_congestion_algorithm_t * base_of(const picoquic_path_t * path) {
    return static_cast<const Roomy *>(congestion_algorithm(path))->base;
}

void init(picoquic_path_t * path, const char * option, uint64_t now) {
    base_of(path)->alg_init(path, option, now);
    ensure_burst(path, message_packets, pacing_bucket_nanosec(path));
}

void notify(picoquic_cnx_t * cnx, picoquic_path_t * path, picoquic_congestion_notification_t notification,
            picoquic_per_ack_state_t * ack, uint64_t now) {
    const int64_t bucket_nanosec = pacing_bucket_nanosec(path); // the base cuts it to its own idea of a burst
    base_of(path)->alg_notify(cnx, path, notification, ack, now);
    ensure_burst(path, message_packets, bucket_nanosec);
}

} // namespace

const picoquic_congestion_algorithm_t * with_room_for_messages(const std::string & name) {
    // picoquic keeps pointers to them: never freed, since the thread of an endpoint may outlive main().
    static auto & mutex = *new std::mutex;
    static auto & known = *new std::map<std::string, std::unique_ptr<Roomy>>;
    std::lock_guard lock(mutex);
    if (known.empty()) {
        picoquic_register_all_congestion_control_algorithms();
    }
    auto & entry = known[name];
    if (!entry) {
        const auto * base = picoquic_get_congestion_algorithm(name.c_str());
        if (base == nullptr) {
            known.erase(name);
            throw std::runtime_error("unknown congestion control: " + name);
        }
        entry = std::make_unique<Roomy>();
        static_cast<picoquic_congestion_algorithm_t &>(*entry) = *base;
        entry->base = base;
        entry->alg_init = init;
        entry->alg_notify = notify;
    }
    return entry.get();
}

} // namespace meshllm::quic
