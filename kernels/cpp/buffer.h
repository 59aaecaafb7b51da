// Aligned memory, zeroed, never shrinking.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bitsmith {

// 64-byte aligned; from 256 KiB on in huge pages where the system grants them (weights are streamed: with 4 KiB pages
// every one of them costs a translation).
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(std::size_t bytes) { reserve(bytes); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    // At least so many bytes. What was there is lost when it grows.
    void* reserve(std::size_t bytes) {
        if (bytes <= size_) return data_;
        const std::size_t page = bytes >= huge_from ? huge_page : 64;
        const std::size_t rounded = (bytes + page - 1) / page * page;
        std::free(data_);
        size_ = 0;
        data_ = std::aligned_alloc(page, rounded);
        if (!data_) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        if (page == huge_page) madvise(data_, rounded, MADV_HUGEPAGE);  // a wish: without it all still works
#endif
        std::memset(data_, 0, rounded);
        size_ = rounded;
        return data_;
    }

    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }
    std::size_t size() const { return size_; }

private:
    static constexpr std::size_t huge_from = 256 << 10;
    static constexpr std::size_t huge_page = 2 << 20;
    void* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace bitsmith
