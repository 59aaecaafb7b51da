// The threads that the user gave to OpenVINO: evaluate() runs inside its arena.
#pragma once

#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <functional>

namespace bitsmith {

inline void on_its_threads(int n, const std::function<void(int)>& f) {
    tbb::parallel_for(0, n, [&](int i) { f(i); }, tbb::static_partitioner());
}

inline int its_threads() { return tbb::this_task_arena::max_concurrency(); }

}  // namespace bitsmith
