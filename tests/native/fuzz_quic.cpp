// Two endpoints, of which one is attacked: by raw datagrams, by any frames in packets that decrypt, and by calls
// in any order. The first byte of an input says which.
#include "quic/endpoint.h"

#include <arpa/inet.h>
#include <cstdlib>
#include <cstring>
#include <future>
#include <openssl/evp.h>
#include <openssl/x509.h>
#include <picoquic_internal.h> // the attacker forges packets
#include <thread>
#include <unistd.h>

namespace meshllm::quic {

struct EndpointTesting {
    /// In the endpoint's thread, and waits for it.
    static void run(Endpoint & endpoint, const std::function<void()> & work) {
        std::promise<void> done;
        endpoint.post([&] {
            work();
            done.set_value();
        });
        done.get_future().wait();
    }
    static void post(Endpoint & endpoint, std::function<void()> work) { endpoint.post(std::move(work)); }
    static picoquic_cnx_t * connection(Endpoint & endpoint, uint64_t link) {
        const auto found = endpoint.live_.find(link);
        return found == endpoint.live_.end() || found->second->closed() ? nullptr : found->second->cnx();
    }
};

} // namespace meshllm::quic

namespace {

using namespace meshllm::quic;
using Input = std::span<const uint8_t>;

Config config() {
    Config out;
    EVP_PKEY * key = EVP_PKEY_Q_keygen(nullptr, nullptr, "ED25519");
    size_t size = out.identity.private_key.size();
    EVP_PKEY_get_raw_private_key(key, out.identity.private_key.data(), &size);
    X509 * certificate = X509_new();
    X509_set_version(certificate, 2);
    X509_gmtime_adj(X509_getm_notBefore(certificate), 0);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 86400);
    X509_set_pubkey(certificate, key);
    X509_sign(certificate, key, nullptr);
    uint8_t * der = nullptr;
    int length = i2d_X509(certificate, &der);
    out.identity.certificate.assign(der, der + length);
    OPENSSL_free(der);
    X509_free(certificate);
    EVP_PKEY_free(key);
    out.alpn = "mesh-llm/1";
    out.max_kinds = 5;
    out.idle_timeout_us = out.handshake_timeout_us = out.keep_alive_us = 2'000'000;
    return out;
}

struct Pair {
    Endpoint victim{config()}, attacker{config()};
    uint64_t link = 0;
    std::vector<uint64_t> streams; // of both; the victim's are those that were opened to it
    std::vector<uint64_t> accepted;
    int raw = socket(AF_INET, SOCK_DGRAM, 0);

    sockaddr_in6 address() {
        sockaddr_in6 out{};
        out.sin6_family = AF_INET6;
        out.sin6_port = htons(victim.port());
        inet_pton(AF_INET6, "::ffff:127.0.0.1", &out.sin6_addr);
        return out;
    }

    void take_events() {
        attacker.take_events();
        for (const auto & event : victim.take_events()) {
            if (event.type == Event::Type::opened) {
                accepted.push_back(event.stream);
            }
        }
    }

    /// A link that is up, a new one when the last has been closed.
    bool linked() {
        for (int attempt = 0; attempt < 400; attempt++) {
            take_events();
            bool up = false, there = false;
            EndpointTesting::run(attacker, [&] {
                auto * cnx = EndpointTesting::connection(attacker, link);
                there = cnx != nullptr;
                up = there && picoquic_get_cnx_state(cnx) == picoquic_state_ready;
            });
            if (up) {
                return true;
            }
            if (!there) {
                sockaddr_storage to{};
                const auto v6 = address();
                std::memcpy(&to, &v6, sizeof(v6));
                link = attacker.dial(to);
            }
            usleep(500);
        }
        return false; // the handshakes of links that are still closing are in the way
    }

    void datagram(Input data) {
        sockaddr_in to{};
        to.sin_family = AF_INET;
        to.sin_port = htons(victim.port());
        inet_pton(AF_INET, "127.0.0.1", &to.sin_addr);
        sendto(raw, data.data(), data.size(), 0, reinterpret_cast<sockaddr *>(&to), sizeof(to));
    }

    /// The attacker's own state is not to follow from frames that picoquic did not make: it would free, for one, a
    /// connection id in use when the peer acknowledges that it was retired.
    void forget_frames(uint64_t first_packet) {
        auto * cnx = EndpointTesting::connection(attacker, link);
        if (cnx == nullptr) {
            return;
        }
        while (cnx->first_misc_frame != nullptr) {
            picoquic_delete_misc_or_dg(&cnx->first_misc_frame, &cnx->last_misc_frame, cnx->first_misc_frame);
        }
        auto * packet = cnx->pkt_ctx[picoquic_packet_context_application].pending_first;
        for (; packet != nullptr; packet = packet->packet_next) {
            if (packet->sequence_number >= first_packet) {
                std::memset(packet->bytes + packet->offset, picoquic_frame_type_padding,
                            packet->length - packet->offset);
            }
        }
    }

    void frames(Input data) {
        if (!linked() || data.empty()) {
            return;
        }
        EndpointTesting::run(attacker, [&] {
            if (auto * cnx = EndpointTesting::connection(attacker, link)) {
                const uint64_t first = cnx->pkt_ctx[picoquic_packet_context_application].send_sequence;
                picoquic_queue_misc_frame(cnx, data.data(), std::min<size_t>(data.size(), 1100), 0,
                                          picoquic_packet_context_application);
                picoquic_reinsert_by_wake_time(cnx->quic, cnx, picoquic_get_quic_time(cnx->quic));
                // After they are sent, and before it can read an acknowledgement of them.
                EndpointTesting::post(attacker, [this, first] { forget_frames(first); });
            }
        });
        usleep(200);
    }

    void call(Endpoint & endpoint, std::vector<uint64_t> & known, uint8_t what, uint8_t amount) {
        static const Bytes zeros(1 << 20);
        const uint64_t stream = known.empty() ? 0 : known[amount % known.size()];
        bool ended = false;
        switch (what % 8) {
        case 0:
            known.push_back(endpoint.open(link, amount % 7));
            break;
        case 1:
        case 2:
            endpoint.write(stream, Input(zeros).first(size_t{1} << (amount % 18)));
            break;
        case 3:
            endpoint.read(stream, size_t{1} << (amount % 18), ended);
            break;
        case 4:
            endpoint.finish(stream);
            break;
        case 5:
            endpoint.abort(stream);
            break;
        case 6:
            endpoint.release(stream);
            break;
        case 7:
            int ends[2];
            if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0) {
                endpoint.splice(stream, ends[0]);
                ::send(ends[1], zeros.data(), amount * 10, MSG_NOSIGNAL);
                ::close(ends[1]);
            }
            break;
        }
    }

    void calls(Input data) {
        if (!linked()) {
            return;
        }
        for (size_t i = 0; i + 2 < data.size() && i < 300; i += 3) {
            const bool theirs = (data[i] & 0x80) != 0;
            try {
                call(theirs ? victim : attacker, theirs ? accepted : streams, data[i + 1], data[i + 2]);
            } catch (const StreamError &) {
            }
            if ((data[i] & 0x70) == 0x70) {
                usleep(100);
                take_events();
            }
        }
        if (data.size() % 5 == 0) {
            attacker.close(link, "enough", data.size() % 2 == 0);
        }
    }
};

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * bytes, size_t size) {
    static auto * pair = new Pair; // never ended: its threads would race with the end of the program
    if (size < 2) {
        return 0;
    }
    const Input rest(bytes + 1, size - 1);
    switch (bytes[0] % 4) {
    case 0:
        pair->datagram(rest);
        break;
    case 1:
    case 2:
        pair->frames(rest);
        break;
    case 3:
        pair->calls(rest);
        break;
    }
    if (pair->streams.size() + pair->accepted.size() > 500) {
        pair->attacker.close(pair->link, "new", true);
        for (const uint64_t stream : pair->streams) {
            pair->attacker.release(stream);
        }
        for (const uint64_t stream : pair->accepted) {
            pair->victim.release(stream);
        }
        pair->streams.clear();
        pair->accepted.clear();
    }
    return 0;
}
