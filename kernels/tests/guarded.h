// Memory with an unreadable page on both sides, one of them directly at the data: an access beyond that end is a crash,
// also of masked loads and stores, which the address sanitizer does not see.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

class Guarded {
public:
    Guarded(std::size_t bytes, bool guard_after) {
        const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        const std::size_t inner = (bytes + page - 1) / page * page;
        all_ = inner + 2 * page;
        base_ = mmap(nullptr, all_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) throw std::bad_alloc();
        std::uint8_t* first = static_cast<std::uint8_t*>(base_) + page;
        if (inner && mprotect(first, inner, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
        data_ = guard_after ? first + inner - bytes : first;
    }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    ~Guarded() { munmap(base_, all_); }

    std::uint8_t* data() { return data_; }

private:
    void* base_;
    std::size_t all_;
    std::uint8_t* data_;
};
