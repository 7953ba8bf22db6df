// The device server: listens, and serves each client in a thread of its own.
#pragma once

#include "server/session.h"

#include <list>

namespace meshllm::server {

struct Options {
    std::string listen;               // channel address
    std::vector<std::string> devices; // ggml names; empty for those that ggml prefers (GPUs, else the CPU)
    std::vector<ModelFiles> models;
    int threads = 0;           // of CPU devices; 0 for the number of cores
    uint64_t memory_limit = 0; // bytes per device; 0 for what it has
    bool allow_remote = false; // listen on, and push to, addresses that are not loopback
};

class DeviceServer {
  public:
    /// Throws std::runtime_error or a subclass, with one line for the user.
    explicit DeviceServer(Options options);
    ~DeviceServer();

    /// The address to connect to.
    const std::string & address() const { return listener_->address(); }
    std::vector<wire::DeviceInfo> devices() const;
    std::vector<std::pair<const char *, uint64_t>> counters() const;

    /// The models whose weights sessions may request from now on. Throws gguf::GgufError.
    void set_models(const std::vector<ModelFiles> & models) { shared_.models.replace(models); }

    /// The lines logged since the last call, at most the newest 256.
    std::vector<std::string> take_log();

    /// Ends all sessions and returns when their memory is free.
    void stop();

  private:
    struct Client {
        channel::Stream stream;
        std::thread thread;
        std::atomic<bool> finished{false};
        explicit Client(channel::Stream s) : stream(std::move(s)) {}
    };
    void accept_loop();
    void serve(Client & client);
    void reap(bool all);
    void log(const std::string & line);

    Options options_;
    Shared shared_;
    std::unique_ptr<channel::Listener> listener_;
    std::mutex mutex_;
    std::list<Client> clients_;
    std::deque<std::string> log_;
    std::atomic<bool> stopping_{false};
    std::thread acceptor_;
};

/// The devices that a server uses when none are named: GPUs, or the CPU when there are none.
std::vector<ggml_backend_dev_t> default_devices();

/// All devices of this machine except accelerators that only assist the CPU.
std::vector<wire::DeviceInfo> list_devices();

} // namespace meshllm::server
