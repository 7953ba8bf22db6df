#include "quic/tls.h"

#include "quic/picoquic_internals.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/x509.h>
#include <picotls.h>
#include <picotls/openssl.h>
#include <stdexcept>
#include <string_view>

/// picoquic asks each crypto library to register itself; ours is built with OpenSSL's (and fusion) alone.
extern "C" void picoquic_ptls_minicrypto_load(int) {}

namespace meshllm::quic {

namespace {

using Key = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;

constexpr uint16_t algorithms[] = {PTLS_SIGNATURE_ED25519, UINT16_MAX};

constexpr size_t largest_message = 16 << 10; // of TLS; ours carry certificates of a few hundred bytes

/// A received certificate; it proves nothing until the signature that follows it has been verified.
struct Claim {
    Key key;
    PublicKey raw;
    picoquic_cnx_t * cnx;
    const OnKeyProved & on_key_proved;
};

int verify_signature(void * context, uint16_t algorithm, ptls_iovec_t data, ptls_iovec_t signature) {
    const std::unique_ptr<Claim> claim(static_cast<Claim *>(context));
    if (data.base == nullptr) {
        return 0; // the handshake has ended early; only the claim has to be freed
    }
    if (algorithm != PTLS_SIGNATURE_ED25519) {
        return PTLS_ALERT_ILLEGAL_PARAMETER;
    }
    const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> digest(EVP_MD_CTX_new(), EVP_MD_CTX_free);
    if (!digest || EVP_DigestVerifyInit(digest.get(), nullptr, nullptr, nullptr, claim->key.get()) != 1) {
        return PTLS_ERROR_LIBRARY;
    }
    if (EVP_DigestVerify(digest.get(), signature.base, signature.len, data.base, data.len) != 1) {
        return PTLS_ALERT_DECRYPT_ERROR;
    }
    claim->on_key_proved(claim->cnx, claim->raw);
    return 0;
}

Key key_of(ptls_iovec_t certificate) {
    const uint8_t * at = certificate.base;
    const std::unique_ptr<X509, decltype(&X509_free)> parsed(d2i_X509(nullptr, &at, static_cast<long>(certificate.len)),
                                                             X509_free);
    return {parsed ? X509_get_pubkey(parsed.get()) : nullptr, EVP_PKEY_free};
}

} // namespace

struct Tls::Verifier : ptls_verify_certificate_t {
    OnKeyProved on_key_proved;

    static int verify(ptls_verify_certificate_t * self, ptls_t * tls, const char *,
                      int (**verify_sign)(void *, uint16_t, ptls_iovec_t, ptls_iovec_t), void ** verify_data,
                      ptls_iovec_t * certificates, size_t count) {
        if (count == 0) {
            return PTLS_ALERT_CERTIFICATE_REQUIRED;
        }
        Key key = key_of(certificates[0]);
        PublicKey raw;
        size_t size = raw.size();
        if (!key || EVP_PKEY_id(key.get()) != EVP_PKEY_ED25519 ||
            EVP_PKEY_get_raw_public_key(key.get(), raw.data(), &size) != 1 || size != raw.size()) {
            return PTLS_ALERT_UNSUPPORTED_CERTIFICATE;
        }
        auto * cnx = static_cast<picoquic_cnx_t *>(*ptls_get_data_ptr(tls));
        *verify_sign = verify_signature;
        *verify_data = new Claim{std::move(key), raw, cnx, static_cast<Verifier *>(self)->on_key_proved};
        return 0;
    }
};

Tls::Tls(picoquic_quic_t * quic, const Identity & identity, OnKeyProved on_key_proved)
    : verifier_(std::make_unique<Verifier>()) {
    ptls_context_t & context = tls_context(quic);
    const Key key(EVP_PKEY_new_raw_private_key(EVP_PKEY_ED25519, nullptr, identity.private_key.data(),
                                               identity.private_key.size()),
                  EVP_PKEY_free);
    auto * signer =
        static_cast<ptls_openssl_sign_certificate_t *>(std::malloc(sizeof(ptls_openssl_sign_certificate_t)));
    if (!key || ptls_openssl_init_sign_certificate(signer, key.get()) != 0) {
        std::free(signer);
        throw std::runtime_error("the node's key cannot be used for TLS");
    }
    context.sign_certificate = &signer->super; // picoquic frees it

    auto * chain = static_cast<ptls_iovec_t *>(std::malloc(sizeof(ptls_iovec_t))); // picoquic frees both
    *chain = {static_cast<uint8_t *>(std::malloc(identity.certificate.size())), identity.certificate.size()};
    std::copy(identity.certificate.begin(), identity.certificate.end(), chain->base);
    picoquic_set_tls_certificate_chain(quic, chain, 1);

    verifier_->cb = Verifier::verify;
    verifier_->algos = algorithms;
    verifier_->on_key_proved = std::move(on_key_proved);
    picoquic_set_verify_certificate_callback(quic, verifier_.get(), [](ptls_verify_certificate_t *) {});
    picoquic_set_client_authentication(quic, 1);
    context.ticket_lifetime = 0; // a server issues no tickets
    context.max_early_data_size = 0;
    context.save_ticket = nullptr; // a client keeps none
    context.max_buffer_size = largest_message;
}

Tls::~Tls() = default;

std::array<uint8_t, 16> reset_seed(const Identity & identity) {
    constexpr std::string_view purpose = "mesh-llm stateless reset 1";
    std::array<uint8_t, EVP_MAX_MD_SIZE> digest;
    unsigned size = 0;
    HMAC(EVP_sha256(), identity.private_key.data(), static_cast<int>(identity.private_key.size()),
         reinterpret_cast<const uint8_t *>(purpose.data()), purpose.size(), digest.data(), &size);
    std::array<uint8_t, 16> seed{};
    std::copy_n(digest.begin(), seed.size(), seed.begin());
    return seed;
}

} // namespace meshllm::quic
