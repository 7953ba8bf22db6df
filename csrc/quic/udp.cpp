#define __APPLE_USE_RFC_3542 1 // IPV6_RECVPKTINFO on macOS
#include "quic/udp.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <netinet/udp.h>
#include <system_error>
#include <unistd.h>

namespace meshllm::quic {

namespace {

constexpr int socket_buffer = 8 << 20; // the system may allow less
constexpr size_t max_send = 65000;     // bytes of one message: less than an IPv4 packet can carry
constexpr size_t min_space = 1536;
constexpr size_t max_segments = 64; // UDP_MAX_SEGMENTS of Linux before 6.9

[[noreturn]] void fail(const char * what) {
    throw std::system_error(errno, std::generic_category(), what);
}

template <typename T>
void set(int fd, int level, int name, T value) {
    setsockopt(fd, level, name, &value, sizeof(value));
}

/// The control messages of one datagram: addresses, and the size of segments.
struct Control {
    alignas(cmsghdr) uint8_t bytes[128];
    size_t length = 0;

    template <typename T>
    void add(int level, int type, const T & value) {
        auto * header = reinterpret_cast<cmsghdr *>(bytes + length);
        header->cmsg_level = level;
        header->cmsg_type = type;
        header->cmsg_len = CMSG_LEN(sizeof(T));
        std::memcpy(CMSG_DATA(header), &value, sizeof(T));
        length += CMSG_SPACE(sizeof(T));
    }
};

void add_source([[maybe_unused]] Control & control, [[maybe_unused]] const Datagrams & datagrams) {
#ifdef __linux__ // other systems refuse an IPv4 source address on an IPv6 socket
    if (datagrams.local.ss_family == AF_INET6) {
        const in6_pktinfo info{reinterpret_cast<const sockaddr_in6 &>(datagrams.local).sin6_addr, 0};
        control.add(IPPROTO_IPV6, IPV6_PKTINFO, info);
    } else if (datagrams.local.ss_family == AF_INET) {
        in_pktinfo info{};
        info.ipi_spec_dst = reinterpret_cast<const sockaddr_in &>(datagrams.local).sin_addr;
        control.add(IPPROTO_IP, IP_PKTINFO, info);
    }
#endif
}

void read_control(msghdr & message, uint16_t port, Datagrams & out) {
    for (cmsghdr * c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
        if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_PKTINFO) {
            in6_pktinfo info;
            std::memcpy(&info, CMSG_DATA(c), sizeof(info));
            auto & local = reinterpret_cast<sockaddr_in6 &>(out.local);
            local.sin6_family = AF_INET6;
            local.sin6_addr = info.ipi6_addr;
            local.sin6_port = htons(port);
            out.interface = info.ipi6_ifindex;
        }
#ifdef IP_PKTINFO
        if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_PKTINFO) {
            in_pktinfo info;
            std::memcpy(&info, CMSG_DATA(c), sizeof(info));
            auto & local = reinterpret_cast<sockaddr_in &>(out.local);
            local.sin_family = AF_INET;
            local.sin_addr = info.ipi_addr;
            local.sin_port = htons(port);
            out.interface = static_cast<unsigned>(info.ipi_ifindex);
        }
#endif
#ifdef UDP_GRO
        if (c->cmsg_level == IPPROTO_UDP && c->cmsg_type == UDP_GRO) {
            int size = 0;
            std::memcpy(&size, CMSG_DATA(c), sizeof(size));
            out.segment_size = static_cast<size_t>(std::max(size, 0));
        }
#endif
    }
}

channel::Fd bound(int family, uint16_t port) {
    channel::Fd fd(socket(family, SOCK_DGRAM, 0));
    if (fd.get() < 0) {
        fail("socket");
    }
    fcntl(fd.get(), F_SETFL, O_NONBLOCK);
    fcntl(fd.get(), F_SETFD, FD_CLOEXEC);
    sockaddr_storage address{};
    address.ss_family = static_cast<sa_family_t>(family);
    socklen_t size = sizeof(sockaddr_in);
    if (family == AF_INET6) {
        set(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, 0);
        set(fd.get(), IPPROTO_IPV6, IPV6_RECVPKTINFO, 1);
        reinterpret_cast<sockaddr_in6 &>(address).sin6_port = htons(port);
        size = sizeof(sockaddr_in6);
    } else {
#ifdef IP_PKTINFO
        set(fd.get(), IPPROTO_IP, IP_PKTINFO, 1);
#endif
        reinterpret_cast<sockaddr_in &>(address).sin_port = htons(port);
    }
    set(fd.get(), SOL_SOCKET, SO_RCVBUF, socket_buffer);
    set(fd.get(), SOL_SOCKET, SO_SNDBUF, socket_buffer);
#ifdef __linux__ // never fragment: QUIC discovers the path's MTU (RFC 9000 section 14)
    set(fd.get(), IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE);
    set(fd.get(), IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_PROBE);
#elif defined(IP_DONTFRAG)
    set(fd.get(), IPPROTO_IP, IP_DONTFRAG, 1);
    set(fd.get(), IPPROTO_IPV6, IPV6_DONTFRAG, 1);
#endif
#ifdef UDP_GRO
    set(fd.get(), IPPROTO_UDP, UDP_GRO, 1);
#endif
    if (bind(fd.get(), reinterpret_cast<sockaddr *>(&address), size) != 0) {
        fail("bind");
    }
    return fd;
}

socklen_t size_of(const sockaddr_storage & address) {
    return address.ss_family == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in);
}

struct Message {
    msghdr header{};
    iovec part{};
    Control control;

    Message(const Datagrams & datagrams, [[maybe_unused]] bool offload) {
        add_source(control, datagrams);
#ifdef UDP_SEGMENT
        if (offload && datagrams.bytes.size() > datagrams.segment_size) {
            control.add(IPPROTO_UDP, UDP_SEGMENT, static_cast<uint16_t>(datagrams.segment_size));
        }
#endif
        part = {datagrams.bytes.data(), datagrams.bytes.size()};
        header.msg_name = const_cast<sockaddr_storage *>(&datagrams.peer);
        header.msg_namelen = size_of(datagrams.peer);
        header.msg_iov = &part;
        header.msg_iovlen = 1;
        header.msg_control = control.length == 0 ? nullptr : control.bytes;
        header.msg_controllen = static_cast<decltype(header.msg_controllen)>(control.length);
    }
    Message(const Message &) = delete; // it points into itself
};

} // namespace

UdpSocket::UdpSocket(uint16_t port) : in_(n_messages * message_bytes), out_(2 * message_bytes) {
    try {
        fd_ = bound(AF_INET6, port);
    } catch (const std::system_error & error) {
        if (error.code().value() == EADDRINUSE || error.code().value() == EACCES) {
            throw;
        }
        v6_ = false;
        fd_ = bound(AF_INET, port);
    }
    sockaddr_storage address{};
    socklen_t size = sizeof(address);
    getsockname(fd_.get(), reinterpret_cast<sockaddr *>(&address), &size);
    port_ = ntohs(v6_ ? reinterpret_cast<sockaddr_in6 &>(address).sin6_port
                      : reinterpret_cast<sockaddr_in &>(address).sin_port);
    queued_.reserve(n_messages);
}

std::span<Datagrams> UdpSocket::receive() {
    Control controls[n_messages];
    iovec parts[n_messages];
    size_t count = 0;
#ifdef __linux__
    mmsghdr messages[n_messages]{};
    constexpr size_t n_wanted = n_messages;
#else
    struct {
        msghdr msg_hdr;
        size_t msg_len;
    } messages[1]{};
    constexpr size_t n_wanted = 1;
#endif
    for (size_t i = 0; i < n_wanted; i++) {
        received_[i] = {};
        parts[i] = {in_.data() + i * message_bytes, message_bytes};
        messages[i].msg_hdr = {};
        messages[i].msg_hdr.msg_name = &received_[i].peer;
        messages[i].msg_hdr.msg_namelen = sizeof(sockaddr_storage);
        messages[i].msg_hdr.msg_iov = &parts[i];
        messages[i].msg_hdr.msg_iovlen = 1;
        messages[i].msg_hdr.msg_control = controls[i].bytes;
        messages[i].msg_hdr.msg_controllen = sizeof(controls[i].bytes);
    }
#ifdef __linux__
    const int result = recvmmsg(fd_.get(), messages, n_wanted, MSG_DONTWAIT, nullptr);
    count = result > 0 ? static_cast<size_t>(result) : 0; // an ICMP error of an earlier datagram is ignored
#else
    const ssize_t result = recvmsg(fd_.get(), &messages[0].msg_hdr, MSG_DONTWAIT);
    if (result >= 0) {
        messages[0].msg_len = static_cast<size_t>(result);
        count = 1;
    }
#endif
    for (size_t i = 0; i < count; i++) {
        Datagrams & datagrams = received_[i];
        datagrams.bytes = {in_.data() + i * message_bytes, messages[i].msg_len};
        read_control(messages[i].msg_hdr, port_, datagrams);
        if (datagrams.segment_size == 0) {
            datagrams.segment_size = std::max<size_t>(datagrams.bytes.size(), 1);
        }
    }
    more_ = count == n_wanted;
    return std::span(received_).first(count);
}

std::span<uint8_t> UdpSocket::space() {
    if (queued_.size() == n_messages || out_used_ >= message_bytes) {
        return {};
    }
    const size_t size = std::min(out_.size() - out_used_, max_send);
    return size < min_space ? std::span<uint8_t>{} : std::span(out_).subspan(out_used_, size);
}

void UdpSocket::queue(const Datagrams & datagrams) {
    queued_.push_back(datagrams);
    out_used_ += datagrams.bytes.size();
}

bool UdpSocket::no_room() {
    full_ = errno == EAGAIN; // not on ENOBUFS: the queue of the device is full, which poll does not report
    return full_ || errno == ENOBUFS;
}

bool UdpSocket::send_singly(Datagrams & datagrams) {
    while (!datagrams.bytes.empty()) {
        Datagrams one = datagrams;
        one.bytes = datagrams.bytes.first(std::min(datagrams.segment_size, datagrams.bytes.size()));
        const Message message(one, false);
        if (sendmsg(fd_.get(), &message.header, 0) < 0 && no_room()) {
            return false;
        }
        datagrams.bytes = datagrams.bytes.subspan(one.bytes.size());
    }
    return true;
}

bool UdpSocket::send() {
    size_t sent = 0;
    bool room = true;
    full_ = false;
    while (room && sent < queued_.size()) {
#ifdef __linux__
        if (offload_) {
            alignas(Message) uint8_t memory[n_messages][sizeof(Message)];
            mmsghdr batch[n_messages]{};
            size_t count = 0;
            for (; sent + count < queued_.size(); count++) {
                const auto * message = new (memory[count]) Message(queued_[sent + count], true);
                batch[count].msg_hdr = message->header;
            }
            const int result = sendmmsg(fd_.get(), batch, static_cast<unsigned>(count), 0);
            if (result > 0) {
                sent += static_cast<size_t>(result);
                continue;
            }
            if (no_room()) {
                room = false;
                continue;
            }
            offload_ = errno != EIO; // the device cannot compute the checksums of segments
        }
#endif
        room = send_singly(queued_[sent]);
        sent += room ? 1 : 0;
    }
    queued_.erase(queued_.begin(), queued_.begin() + static_cast<ptrdiff_t>(sent));
    if (queued_.empty()) {
        out_used_ = 0;
    }
    return room;
}

static_assert(max_segments * 1200 > 65536, "a message of 64 KiB has fewer segments than the kernel allows");

} // namespace meshllm::quic
