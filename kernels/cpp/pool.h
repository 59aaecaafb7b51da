// Threads for callers that have none of their own.
#pragma once

#include <functional>

namespace bitsmith {

// Calls f(0) ... f(n - 1) on the calling thread and n - 1 others, which stay for the next time. What f
// throws is thrown again.
// Safe from several threads (they take turns) and after fork (a child gets threads of its own).
void pool_for(int n, const std::function<void(int)>& f);

}  // namespace bitsmith
