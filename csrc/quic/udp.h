// One UDP socket for all links of a node: batches of datagrams in and out, with segmentation offload where the kernel
// has it (Linux: UDP_SEGMENT, UDP_GRO). Nothing of QUIC.
#pragma once

#include "channel/fd.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <netinet/in.h>
#include <span>
#include <sys/socket.h>
#include <vector>

namespace meshllm::quic {

/// Datagrams of one size (the last may be shorter) between the same two addresses.
struct Datagrams {
    std::span<uint8_t> bytes;
    size_t segment_size = 0;
    sockaddr_storage peer{}, local{}; // local: family 0 when unknown
    unsigned interface = 0;
};

class UdpSocket {
  public:
    /// Binds `port` (0: any) on all addresses of both families, or of IPv4 only on a machine without IPv6. Throws
    /// std::system_error.
    explicit UdpSocket(uint16_t port);

    int fd() const { return fd_.get(); }
    uint16_t port() const { return port_; }
    bool v6() const { return v6_; }

    /// What has arrived, without waiting; valid until the next call.
    std::span<Datagrams> receive();
    /// Whether the last call may have left datagrams in the socket.
    bool more() const { return more_; }

    /// Space for the next datagrams to one peer, up to 64 KiB; empty when send() is needed first.
    std::span<uint8_t> space();
    void queue(const Datagrams & datagrams); // `bytes` begin where space() did
    bool nothing_queued() const { return queued_.empty(); }

    /// False when the kernel accepts no more now: call again when the socket is writable if it is full(), otherwise a
    /// little later. What cannot be sent at all is lost, as in the network.
    bool send();
    bool full() const { return full_; }

  private:
    static constexpr size_t n_messages = 16, message_bytes = 65536;

    bool no_room();
    bool send_singly(Datagrams & datagrams);

    channel::Fd fd_;
    uint16_t port_ = 0;
    bool v6_ = true, offload_ = true, more_ = false, full_ = false;
    std::vector<uint8_t> in_, out_;
    std::array<Datagrams, n_messages> received_;
    std::vector<Datagrams> queued_;
    size_t out_used_ = 0;
};

} // namespace meshllm::quic
