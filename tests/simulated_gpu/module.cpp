/* The kernels for a host compiler, and how they are launched. */

#include "language.h"

#include SOURCE

#include "scheduler.h"

/* The memory that a launch sizes, as much as any device has. */
thread_local Chunk resident[(227 << 10) / sizeof(Chunk)];

extern "C" const i64 job_bytes = sizeof(Job);

/* Runs a kernel; returns what is wrong with it, or nullptr. */
extern "C" const char *launch(void (*kernel)(const Job), const Job *job, unsigned blocks,
                              unsigned rows, unsigned threads, unsigned shared_bytes,
                              unsigned schedule)
{
    const Shared shared = {reinterpret_cast<char *>(resident), sizeof resident, shared_bytes};
    return run([&] { kernel(*job); }, {blocks, rows, 1}, threads, CLUSTER, shared, schedule);
}
