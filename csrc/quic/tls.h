// A node's identity in TLS 1.3: its Ed25519 key, the certificate that carries it, and the key that a peer has proved.
//
// As in identity.py, only the key in a certificate counts: CertificateVerify (RFC 8446 section 4.4.3) proves that the
// peer holds it, and the key is the peer's name.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct st_picoquic_quic_t;
struct st_picoquic_cnx_t;

namespace meshllm::quic {

using PublicKey = std::array<uint8_t, 32>;

struct Identity {
    std::array<uint8_t, 32> private_key; // the seed of RFC 8032
    std::vector<uint8_t> certificate;    // DER
};

/// Called with the key that the peer of a connection has proved to hold.
using OnKeyProved = std::function<void(st_picoquic_cnx_t *, const PublicKey &)>;

/// What picoquic uses until its context is freed: this has to outlive it.
class Tls {
  public:
    /// Makes clients and servers present `identity` and require the peer's. Without session resumption, which would
    /// skip the proof. Throws std::runtime_error.
    Tls(st_picoquic_quic_t * quic, const Identity & identity, OnKeyProved on_key_proved);
    ~Tls();
    Tls(const Tls &) = delete;

  private:
    struct Verifier;
    std::unique_ptr<Verifier> verifier_;
};

/// A secret derived from the key, so that peers accept the stateless resets of a node that was restarted.
std::array<uint8_t, 16> reset_seed(const Identity & identity);

} // namespace meshllm::quic
