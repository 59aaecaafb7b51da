#include "pool.h"

#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace bitsmith {

namespace {

class Pool {
public:
    void run(int n, const std::function<void(int)>& f) {
        const std::lock_guard<std::mutex> turn(turn_);
        while (static_cast<int>(workers_.size()) < n - 1)
            workers_.emplace_back([this, index = static_cast<int>(workers_.size()) + 1, seen = round_] {
                serve(index, seen);
            });
        {
            const std::lock_guard<std::mutex> lock(state_);
            f_ = &f;
            n_ = n;
            waiting_ = n - 1;
            error_ = nullptr;
            ++round_;
        }
        begin_.notify_all();
        std::exception_ptr error;
        try {
            f(0);
        } catch (...) {
            error = std::current_exception();
        }
        std::unique_lock<std::mutex> lock(state_);
        end_.wait(lock, [this] { return waiting_ == 0; });
        if (!error) error = error_;
        if (error) std::rethrow_exception(error);
    }

private:
    void serve(int index, unsigned long seen) {
        std::unique_lock<std::mutex> lock(state_);
        for (;;) {
            begin_.wait(lock, [&] { return round_ != seen; });
            seen = round_;
            if (index >= n_) continue;
            const std::function<void(int)>& f = *f_;
            lock.unlock();
            std::exception_ptr error;
            try {
                f(index);
            } catch (...) {
                error = std::current_exception();
            }
            lock.lock();
            if (error) error_ = error;
            if (--waiting_ == 0) end_.notify_one();
        }
    }

    std::mutex turn_, state_;
    std::condition_variable begin_, end_;
    std::vector<std::thread> workers_;
    const std::function<void(int)>* f_ = nullptr;
    int n_ = 0, waiting_ = 0;
    unsigned long round_ = 0;
    std::exception_ptr error_;
};

// Never destroyed: its threads would have to be joined while the process ends. A forked child, in which those threads
// do not exist, begins with a new one.
Pool*& current() {
    static Pool* pool = new Pool;
    return pool;
}

}  // namespace

void pool_for(int n, const std::function<void(int)>& f) {
#if defined(__unix__) || defined(__APPLE__)
    static const int at_fork = pthread_atfork(nullptr, nullptr, [] { current() = new Pool; });
    (void)at_fork;
#endif
    current()->run(n, f);
}

}  // namespace bitsmith
