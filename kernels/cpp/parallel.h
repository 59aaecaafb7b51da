// How a layer is given threads.
#pragma once

#include <functional>

namespace bitsmith {

// Calls f(0) ... f(n - 1), in any order and on any threads, and returns when all have returned.
using ParallelFor = std::function<void(int n, const std::function<void(int)>& f)>;

}  // namespace bitsmith
