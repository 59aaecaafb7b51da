// What went wrong on this thread, for callers of the shared library.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>

namespace bitsmith {

std::string& last_error();

// 0, or 1 on wrong input, or 2 on anything else, the message being kept.
template <class Work>
int guarded(Work&& work) {
    try {
        work();
        return 0;
    } catch (const std::invalid_argument& error) {
        last_error() = error.what();
        return 1;
    } catch (const std::exception& error) {
        last_error() = error.what();
        return 2;
    }
}

}  // namespace bitsmith
