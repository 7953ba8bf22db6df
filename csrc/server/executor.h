// Threads that run tasks in the order in which they were posted.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace meshllm::server {

class Executor {
  public:
    explicit Executor(int n_threads = 1) {
        for (int i = 0; i < n_threads; i++) {
            threads_.emplace_back([this] { work(); });
        }
    }

    /// Runs the tasks that are still queued, then returns.
    ~Executor() {
        {
            std::lock_guard lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (std::thread & thread : threads_) {
            thread.join();
        }
    }

    Executor(const Executor &) = delete;
    Executor & operator=(const Executor &) = delete;

    /// Returns at once; the task must not throw.
    void post(std::function<void()> task) {
        {
            std::lock_guard lock(mutex_);
            tasks_.push_back(std::move(task));
        }
        wake_.notify_one();
    }

    /// Returns when the task has run, and throws what it threw.
    void run(std::function<void()> task) {
        const auto job = std::make_shared<std::packaged_task<void()>>(std::move(task));
        std::future<void> done = job->get_future();
        post([job] { (*job)(); });
        done.get();
    }

  private:
    void work() {
        std::unique_lock lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
            if (tasks_.empty()) {
                return;
            }
            const std::function<void()> task = std::move(tasks_.front());
            tasks_.pop_front();
            lock.unlock();
            task();
            lock.lock();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<std::function<void()>> tasks_;
    bool stopping_ = false;
    std::vector<std::thread> threads_;
};

} // namespace meshllm::server
