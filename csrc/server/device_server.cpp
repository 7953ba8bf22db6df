#include "server/device_server.h"

#include <algorithm>
#include <random>

namespace meshllm::server {

namespace {

constexpr size_t max_clients = 256; // hosts and pushing stages together
constexpr size_t max_log_lines = 256;
constexpr int loader_threads = 4; // enough to keep an SSD busy

wire::Key random_key() {
    std::random_device source; // the kernel's generator on Linux and macOS
    wire::Key key;
    std::ranges::generate(key, [&] { return static_cast<uint8_t>(source()); });
    return key;
}

std::vector<ggml_backend_dev_t> named_devices(const std::vector<std::string> & names) {
    std::vector<ggml_backend_dev_t> out;
    for (const std::string & name : names) {
        ggml_backend_dev_t device = ggml_backend_dev_by_name(name.c_str());
        if (device == nullptr) {
            std::string known;
            for (const wire::DeviceInfo & d : list_devices()) {
                known += (known.empty() ? "" : ", ") + d.name;
            }
            throw std::runtime_error("no device '" + name + "' on this machine; available: " + known);
        }
        out.push_back(device);
    }
    return out;
}

std::string unix_folder(const std::string & address) {
    const size_t slash = address.rfind('/');
    return address.rfind("unix:", 0) == 0 && slash != std::string::npos ? address.substr(0, slash) : "";
}

} // namespace

std::vector<ggml_backend_dev_t> default_devices() {
    std::vector<ggml_backend_dev_t> gpus, cpus;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t d = ggml_backend_dev_get(i);
        switch (ggml_backend_dev_type(d)) {
        case GGML_BACKEND_DEVICE_TYPE_GPU:
        case GGML_BACKEND_DEVICE_TYPE_IGPU:
            gpus.push_back(d);
            break;
        case GGML_BACKEND_DEVICE_TYPE_CPU:
            cpus.push_back(d);
            break;
        default:
            break;
        }
    }
    return gpus.empty() ? cpus : gpus;
}

std::vector<wire::DeviceInfo> list_devices() {
    std::vector<wire::DeviceInfo> out;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t d = ggml_backend_dev_get(i);
        if (ggml_backend_dev_type(d) == GGML_BACKEND_DEVICE_TYPE_ACCEL) {
            continue;
        }
        wire::DeviceInfo info;
        info.name = ggml_backend_dev_name(d);
        info.description = ggml_backend_dev_description(d);
        info.type = ggml_backend_dev_type(d);
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(d, &free, &total);
        info.memory_free = free;
        info.memory_total = total;
        out.push_back(info);
    }
    return out;
}

DeviceServer::DeviceServer(Options options) : options_(std::move(options)) {
    if (!options_.allow_remote && !channel::is_local(options_.listen)) {
        throw std::runtime_error("refusing to listen on " + options_.listen +
                                 ": this channel has no encryption; use a loopback address, or pass --allow-remote "
                                 "on a network you trust");
    }
    set_models(options_.models);
    const int threads = options_.threads > 0 ? options_.threads : compute::default_threads();
    const auto devices = options_.devices.empty() ? default_devices() : named_devices(options_.devices);
    for (ggml_backend_dev_t d : devices) {
        shared_.devices.push_back(std::make_unique<Device>(d, threads, options_.memory_limit));
    }
    shared_.loader = std::make_unique<Loader>(loader_threads, shared_.counters);
    shared_.log = [this](const std::string & line) { log(line); };
    shared_.peer_address = [this](const std::string & address) -> std::optional<std::string> {
        const std::string unix_prefix = "unix:";
        if (address.rfind(unix_prefix, 0) == 0) {
            // Only sockets that our node has created for this beside our own, by the name that the host knows.
            const std::string folder = unix_folder(options_.listen);
            const std::string name = address.substr(unix_prefix.size());
            const bool ours = name.rfind("peer-", 0) == 0 && name.find('/') == std::string::npos;
            return ours && !folder.empty() ? std::optional(folder + "/" + name) : std::nullopt;
        }
        try {
            return options_.allow_remote || channel::is_local(address) ? std::optional(address) : std::nullopt;
        } catch (const channel::TransportError &) {
            return std::nullopt;
        }
    };
    listener_ = std::make_unique<channel::Listener>(options_.listen);
    acceptor_ = std::thread([this] { accept_loop(); });
}

DeviceServer::~DeviceServer() {
    stop();
}

void DeviceServer::stop() {
    if (stopping_.exchange(true)) {
        return;
    }
    listener_->close();
    acceptor_.join();
    reap(true);
}

void DeviceServer::accept_loop() {
    while (!stopping_) {
        try {
            channel::Stream stream = listener_->accept();
            reap(false);
            std::lock_guard lock(mutex_);
            if (clients_.size() >= max_clients) {
                log_.push_back("client refused: too many connections");
                continue;
            }
            Client & client = clients_.emplace_back(std::move(stream));
            client.thread = std::thread([this, &client] { serve(client); });
        } catch (const std::exception & e) {
            if (!stopping_) {
                log(e.what());
            }
            return;
        }
    }
}

void DeviceServer::serve(Client & client) {
    shared_.counters.sessions_total++;
    shared_.counters.sessions_open++;
    try {
        Session(shared_, client.stream, random_key()).run();
    } catch (const std::exception & e) { // out of memory for the session itself
        log(std::string("client refused: ") + e.what());
    }
    shared_.counters.sessions_open--;
    client.stream.shutdown();
    client.finished = true;
}

void DeviceServer::reap(bool all) {
    std::list<Client> ended;
    {
        std::lock_guard lock(mutex_);
        for (auto it = clients_.begin(); it != clients_.end();) {
            auto next = std::next(it);
            if (all) {
                it->stream.shutdown();
            }
            if (all || it->finished) {
                ended.splice(ended.end(), clients_, it);
            }
            it = next;
        }
    }
    for (Client & c : ended) {
        c.thread.join();
    }
}

void DeviceServer::log(const std::string & line) {
    std::lock_guard lock(mutex_);
    log_.push_back(line);
    if (log_.size() > max_log_lines) {
        log_.pop_front();
    }
}

std::vector<std::string> DeviceServer::take_log() {
    std::lock_guard lock(mutex_);
    std::vector<std::string> out(log_.begin(), log_.end());
    log_.clear();
    return out;
}

std::vector<wire::DeviceInfo> DeviceServer::devices() const {
    std::vector<wire::DeviceInfo> out;
    for (const auto & d : shared_.devices) {
        out.push_back(d->info());
    }
    return out;
}

std::vector<std::pair<const char *, uint64_t>> DeviceServer::counters() const {
    auto out = shared_.counters.snapshot();
    uint64_t used = 0;
    for (const auto & d : shared_.devices) {
        used += d->used();
    }
    out.emplace_back("memory_used", used);
    return out;
}

} // namespace meshllm::server
