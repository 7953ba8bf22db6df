// Who a node is in TLS 1.3: its Ed25519 key with the certificate that carries it, and the key that a peer has proved.
//
// As in meshllm/mesh/identity.py, nothing in a certificate counts but its key: CertificateVerify (RFC 8446 section
// 4.4.3) proves that the peer holds it, and the key is the peer's name.
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

/// Hears of the key that the peer of a connection has proved to hold.
using KeyProved = std::function<void(st_picoquic_cnx_t *, const PublicKey &)>;

/// What picoquic needs as long as its context lives, and a little longer.
class Tls {
  public:
    /// Makes both roles show the identity and ask for the peer's; no resumption, which would skip the proof. Throws
    /// std::runtime_error.
    Tls(st_picoquic_quic_t * quic, const Identity & identity, KeyProved proved);
    ~Tls();
    Tls(const Tls &) = delete;

  private:
    struct Verifier;
    std::unique_ptr<Verifier> verifier_;
};

/// A secret that follows from the key: so that peers of a node that was started anew believe its stateless resets.
std::array<uint8_t, 16> reset_seed(const Identity & identity);

} // namespace meshllm::quic
