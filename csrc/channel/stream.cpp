#include "channel/stream.h"

#include <arpa/inet.h>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <netdb.h>
#include <netinet/tcp.h>
#include <optional>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

namespace meshllm::channel {

namespace {

constexpr size_t read_ahead = 64 << 10; // bytes, so that a token's small frames take one system call

#ifdef MSG_NOSIGNAL
constexpr int send_flags = MSG_NOSIGNAL;
#else
constexpr int send_flags = 0; // macOS: SO_NOSIGPIPE in tune()
#endif

std::string reason(int error) {
    return std::strerror(error);
}

struct HostPort {
    std::string host, port;
};

std::optional<std::string> unix_path(const std::string & address) {
    if (address.rfind("unix:", 0) != 0) {
        return std::nullopt;
    }
    return address.substr(5);
}

HostPort host_port(const std::string & address) {
    const size_t colon = address.rfind(':');
    if (colon == std::string::npos || colon == 0 || colon + 1 == address.size()) {
        throw AddressError("'" + address + "' is not an address; write HOST:PORT or unix:/path");
    }
    HostPort out{address.substr(0, colon), address.substr(colon + 1)};
    if (out.host.front() == '[' && out.host.back() == ']') {
        out.host = out.host.substr(1, out.host.size() - 2);
    }
    const bool digits = out.port.find_first_not_of("0123456789") == std::string::npos;
    if (!digits || out.port.size() > 5 || std::stoul(out.port) > 65535) {
        throw AddressError("'" + address + "' has no valid port; write HOST:PORT with a port up to 65535");
    }
    return out;
}

using AddrInfo = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

AddrInfo resolve(const std::string & address, bool passive) {
    const HostPort hp = host_port(address);
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0);
    addrinfo * found = nullptr;
    if (const int error = getaddrinfo(hp.host.c_str(), hp.port.c_str(), &hints, &found)) {
        throw AddressError("cannot resolve " + address + ": " + gai_strerror(error));
    }
    return {found, freeaddrinfo};
}

sockaddr_un unix_address(const std::string & path) {
    sockaddr_un out{};
    out.sun_family = AF_UNIX;
    if (path.empty() || path.size() >= sizeof(out.sun_path)) {
        throw AddressError("the socket path '" + path + "' is empty or longer than " +
                           std::to_string(sizeof(out.sun_path) - 1) + " bytes");
    }
    std::memcpy(out.sun_path, path.c_str(), path.size() + 1);
    return out;
}

Fd open_socket(int family) {
    Fd fd(::socket(family, SOCK_STREAM, 0));
    if (fd.get() < 0) {
        throw TransportError("cannot open a socket: " + reason(errno));
    }
    ::fcntl(fd.get(), F_SETFD, FD_CLOEXEC);
    return fd;
}

void set_option(int fd, int level, int option, int value) {
    ::setsockopt(fd, level, option, &value, sizeof(value));
}

// Small frames must leave at once, and a machine that lost its power must be noticed although it sends nothing: probes
// start after 4 s of silence, the third without a reply ends the connection, and so do 10 s without acknowledgement.
void tune(int fd, bool tcp) {
#ifdef SO_NOSIGPIPE
    set_option(fd, SOL_SOCKET, SO_NOSIGPIPE, 1);
#endif
    if (!tcp) {
        return;
    }
    set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
#ifdef TCP_KEEPIDLE
    set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 4);
#endif
#ifdef TCP_KEEPINTVL
    set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, 2);
    set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
#endif
#ifdef TCP_USER_TIMEOUT
    set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 10000);
#endif
}

bool try_connect(int fd, const sockaddr * to, socklen_t size, double timeout_s, int & error) {
    const int flags = ::fcntl(fd, F_GETFL);
    ::fcntl(fd, F_SETFL, flags | O_NONBLOCK);
    if (::connect(fd, to, size) != 0) {
        error = errno;
        if (error != EINPROGRESS) {
            return false;
        }
        pollfd p{fd, POLLOUT, 0};
        socklen_t length = sizeof(error);
        if (::poll(&p, 1, static_cast<int>(timeout_s * 1000)) <= 0) {
            error = ETIMEDOUT;
            return false;
        }
        ::getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
        if (error != 0) {
            return false;
        }
    }
    ::fcntl(fd, F_SETFL, flags);
    return true;
}

Stream connect_unix(const std::string & address, const std::string & path, double timeout_s) {
    const sockaddr_un to = unix_address(path);
    Fd fd = open_socket(AF_UNIX);
    int error = 0;
    if (!try_connect(fd.get(), reinterpret_cast<const sockaddr *>(&to), sizeof(to), timeout_s, error)) {
        throw TransportError("cannot connect to " + address + ": " + reason(error));
    }
    tune(fd.get(), false);
    return Stream(std::move(fd));
}

} // namespace

Stream Stream::connect(const std::string & address, double timeout_s) {
    if (const auto path = unix_path(address)) {
        return connect_unix(address, *path, timeout_s);
    }
    const AddrInfo found = resolve(address, false);
    int error = 0;
    for (const addrinfo * a = found.get(); a != nullptr; a = a->ai_next) {
        Fd fd = open_socket(a->ai_family);
        if (try_connect(fd.get(), a->ai_addr, a->ai_addrlen, timeout_s, error)) {
            tune(fd.get(), true);
            return Stream(std::move(fd));
        }
    }
    throw TransportError("cannot connect to " + address + ": " + reason(error));
}

bool Stream::read_exactly(std::span<uint8_t> out) {
    size_t done = 0;
    while (done < out.size()) {
        if (begin_ < buffer_.size()) {
            const size_t n = std::min(out.size() - done, buffer_.size() - begin_);
            std::memcpy(out.data() + done, buffer_.data() + begin_, n);
            begin_ += n;
            done += n;
            continue;
        }
        // Large reads go straight to their destination, small ones through the buffer.
        const bool direct = out.size() - done >= read_ahead;
        buffer_.resize(direct ? 0 : read_ahead);
        begin_ = 0;
        const ssize_t n = direct ? ::recv(fd_.get(), out.data() + done, out.size() - done, 0)
                                 : ::recv(fd_.get(), buffer_.data(), buffer_.size(), 0);
        const int error = errno;
        buffer_.resize(direct || n < 0 ? 0 : static_cast<size_t>(n));
        if (n < 0 && error == EINTR) {
            continue;
        }
        if (n < 0) {
            throw TransportError(error == EAGAIN ? "the peer did not reply in time"
                                                 : "the connection is lost: " + reason(error));
        }
        if (n == 0) {
            if (done == 0) {
                return false;
            }
            throw TransportError("the peer closed the connection in the middle of a frame");
        }
        done += direct ? static_cast<size_t>(n) : 0;
    }
    return true;
}

void Stream::write_all(std::span<const uint8_t> head, std::span<const uint8_t> body) {
    while (!head.empty() || !body.empty()) {
        iovec parts[2] = {{const_cast<uint8_t *>(head.data()), head.size()},
                          {const_cast<uint8_t *>(body.data()), body.size()}};
        msghdr message{};
        message.msg_iov = parts;
        message.msg_iovlen = 2;
        const ssize_t n = ::sendmsg(fd_.get(), &message, send_flags);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            throw TransportError("the connection is lost: " + reason(errno));
        }
        const size_t from_head = std::min(head.size(), static_cast<size_t>(n));
        head = head.subspan(from_head);
        body = body.subspan(static_cast<size_t>(n) - from_head);
    }
}

void Stream::shutdown() {
    ::shutdown(fd_.get(), SHUT_RDWR);
}

size_t Stream::read_some(std::span<uint8_t> out) {
    const ssize_t n = ::recv(fd_.get(), out.data(), out.size(), MSG_DONTWAIT);
    if (n > 0) {
        return static_cast<size_t>(n);
    }
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) {
        return 0;
    }
    throw TransportError(n == 0 ? "the peer closed the connection" : "the connection is lost: " + reason(errno));
}

size_t Stream::write_some(std::span<const uint8_t> data) {
    const ssize_t n = ::send(fd_.get(), data.data(), data.size(), MSG_DONTWAIT | send_flags);
    if (n >= 0) {
        return static_cast<size_t>(n);
    }
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) {
        return 0;
    }
    throw TransportError("the connection is lost: " + reason(errno));
}

void Stream::set_read_timeout(double timeout_s) {
    timeval t{};
    t.tv_sec = static_cast<time_t>(timeout_s);
    t.tv_usec = static_cast<suseconds_t>((timeout_s - static_cast<double>(t.tv_sec)) * 1e6);
    ::setsockopt(fd_.get(), SOL_SOCKET, SO_RCVTIMEO, &t, sizeof(t));
}

namespace {

void listen_on(int fd, const std::string & address, const sockaddr * at, socklen_t size) {
    if (::bind(fd, at, size) != 0 || ::listen(fd, 64) != 0) {
        const std::string advice = errno == EADDRINUSE ? "; choose another address" : "";
        throw TransportError("cannot listen on " + address + ": " + reason(errno) + advice);
    }
    ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK); // a client may disconnect between poll and accept
}

std::string bound_address(int fd, const std::string & host) {
    sockaddr_storage at{};
    socklen_t size = sizeof(at);
    ::getsockname(fd, reinterpret_cast<sockaddr *>(&at), &size);
    const bool v6 = at.ss_family == AF_INET6;
    const uint16_t port = ntohs(v6 ? reinterpret_cast<const sockaddr_in6 &>(at).sin6_port
                                   : reinterpret_cast<const sockaddr_in &>(at).sin_port);
    const bool brackets = host.find(':') != std::string::npos;
    return (brackets ? "[" + host + "]" : host) + ":" + std::to_string(port);
}

// A socket file whose owner has ended would block the path permanently; one that accepts connections is in use.
void remove_stale(const std::string & path) {
    struct stat info{};
    if (::lstat(path.c_str(), &info) != 0 || !S_ISSOCK(info.st_mode)) {
        return;
    }
    try {
        connect_unix("unix:" + path, path, 1);
    } catch (const TransportError &) {
        ::unlink(path.c_str());
    }
}

} // namespace

Listener::Listener(const std::string & address) {
    if (const auto path = unix_path(address)) {
        const sockaddr_un at = unix_address(*path);
        remove_stale(*path);
        fd_ = open_socket(AF_UNIX);
        listen_on(fd_.get(), address, reinterpret_cast<const sockaddr *>(&at), sizeof(at));
        ::chmod(path->c_str(), 0600);
        unix_path_ = *path;
        address_ = address;
        return;
    }
    const AddrInfo found = resolve(address, true);
    fd_ = open_socket(found->ai_family);
    set_option(fd_.get(), SOL_SOCKET, SO_REUSEADDR, 1);
    listen_on(fd_.get(), address, found->ai_addr, found->ai_addrlen);
    address_ = bound_address(fd_.get(), host_port(address).host);
}

Listener::~Listener() {
    close();
}

Stream Listener::accept() {
    for (;;) {
        pollfd waiting[2] = {{fd_.get(), POLLIN, 0}, {closing_.fd(), POLLIN, 0}};
        ::poll(waiting, 2, -1);
        if (waiting[1].revents != 0) {
            throw TransportError("no longer listening on " + address_);
        }
        const int fd = ::accept(fd_.get(), nullptr, nullptr);
        if (fd >= 0) {
            ::fcntl(fd, F_SETFD, FD_CLOEXEC);
            ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) & ~O_NONBLOCK); // BSDs inherit it
            tune(fd, unix_path_.empty());
            return Stream(Fd(fd));
        }
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
            ::poll(nullptr, 0, 100); // out of descriptors: others will close; the backlog keeps the caller waiting
        } else if (errno != EINTR && errno != ECONNABORTED && errno != EAGAIN) {
            throw TransportError("no longer listening on " + address_ + ": " + reason(errno));
        }
    }
}

void Listener::close() {
    closing_.notify();
    if (!unix_path_.empty()) {
        ::unlink(unix_path_.c_str());
        unix_path_.clear();
    }
}

bool is_local(const std::string & address) {
    if (unix_path(address)) {
        return true;
    }
    const AddrInfo found = resolve(address, true);
    for (const addrinfo * a = found.get(); a != nullptr; a = a->ai_next) {
        const bool loopback =
            a->ai_family == AF_INET6
                ? IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6 *>(a->ai_addr)->sin6_addr)
                : (ntohl(reinterpret_cast<const sockaddr_in *>(a->ai_addr)->sin_addr.s_addr) >> 24) == 127;
        if (!loopback) {
            return false;
        }
    }
    return true;
}

} // namespace meshllm::channel
