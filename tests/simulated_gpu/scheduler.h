/* Runs the threads of a kernel on one thread of the host, in an order that the caller chooses. */

#include <functional>

#include "language.h"

/* The memory that a launch sizes: where it is, how much there is, and how much was asked for. */
struct Shared {
    char *data;
    std::size_t most, bytes;
};

/* Runs `kernel` in every thread of every block, one cluster of blocks after the other. The schedule
 * 0 takes threads and blocks in their order, 1 from the last to the first, any other shuffles them
 * in an order of its own. Returns what the kernel did wrong, or nullptr. */
const char *run(const std::function<void()> &kernel, const Index &grid, unsigned threads,
                unsigned cluster, const Shared &shared, unsigned schedule);
