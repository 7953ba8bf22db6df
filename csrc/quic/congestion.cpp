#include "quic/congestion.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <picoquic_internal.h>
#include <stdexcept>

namespace meshllm::quic {

namespace {

constexpr int64_t burst_nanosec = 1'000'000; // what TCP's pacing lets out at once in Linux

struct Roomy : picoquic_congestion_algorithm_t {
    const picoquic_congestion_algorithm_t * base;
};

const picoquic_congestion_algorithm_t * base_of(picoquic_path_t * path) {
    return static_cast<const Roomy *>(path->cnx->congestion_alg)->base;
}

void make_room(picoquic_path_t * path, int64_t bucket_nanosec) {
    path->cwin = std::max<uint64_t>(path->cwin, message_packets * path->send_mtu);
    picoquic_pacing_t & pacing = path->pacing;
    int64_t least_rate_nanosec = static_cast<int64_t>(path->smoothed_rtt) * 1000 / (2 * message_packets);
    pacing.packet_time_nanosec =
        std::clamp<int64_t>(pacing.packet_time_nanosec, 1, std::max<int64_t>(least_rate_nanosec, 1));
    int64_t message_nanosec = message_packets * pacing.packet_time_nanosec;
    pacing.bucket_max = std::max({pacing.bucket_max, message_nanosec, burst_nanosec});
    pacing.bucket_nanosec = std::min<int64_t>(std::max(pacing.bucket_nanosec, bucket_nanosec), pacing.bucket_max);
}

void init(picoquic_path_t * path, const char * option, uint64_t now) {
    base_of(path)->alg_init(path, option, now);
    make_room(path, path->pacing.bucket_nanosec);
}

void notify(picoquic_cnx_t * cnx, picoquic_path_t * path, picoquic_congestion_notification_t what,
            picoquic_per_ack_state_t * ack, uint64_t now) {
    int64_t bucket_nanosec = path->pacing.bucket_nanosec; // which the base cuts to its own idea of a burst
    base_of(path)->alg_notify(cnx, path, what, ack, now);
    make_room(path, bucket_nanosec);
}

} // namespace

const picoquic_congestion_algorithm_t * with_room_for_messages(const std::string & name) {
    // picoquic keeps pointers to them: never freed, since a thread of an engine may outlive the end of main().
    static auto & lock = *new std::mutex;
    static auto & known = *new std::map<std::string, std::unique_ptr<Roomy>>;
    std::lock_guard guard(lock);
    if (known.empty()) {
        picoquic_register_all_congestion_control_algorithms();
    }
    auto & entry = known[name];
    if (!entry) {
        auto * base = picoquic_get_congestion_algorithm(name.c_str());
        if (base == nullptr) {
            known.erase(name);
            throw std::runtime_error("there is no congestion control " + name);
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
