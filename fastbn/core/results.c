#include "results.h"

#include "platform.h"

#include <stdint.h>
#include <string.h>
#if !defined(_WIN32)
#  include <pthread.h>
#  include <sys/mman.h>
#  include <unistd.h>
#endif

typedef struct {
    void *memory;
    size_t size;
} block;

enum {
    MOST_BLOCKS = 64,
    MOST_OF_A_SIZE = 2,
    /* Offering a block to the system may have to tell all CPUs of a process, which takes long on
     * some virtual machines. Where it has, so many blocks are not offered. */
    OFFERS_LEFT_OUT = 1024,
};

/* The call whose result it is takes 10 microseconds and more for a MiB. */
static const double MOST_SECONDS_PER_BYTE = 2e-6 / (1 << 20);

/* The free blocks, those that were given back first in front. */
static struct {
    block blocks[MOST_BLOCKS];
    int count;
    size_t bytes, limit;
    int unoffered; /* blocks that will not be offered */
} kept;

static PyDataMemAllocator *below;

/* Any thread may free an array or fork, at any time. So the lock is held for a look at the table
 * only, and around forks: a child would wait for ever for a lock that another thread had. */
#if defined(_WIN32)
static void lock(void) {}
static void unlock(void) {}
static void lock_around_forks(void) {}
#else
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static void lock(void) { pthread_mutex_lock(&mutex); }
static void unlock(void) { pthread_mutex_unlock(&mutex); }
static void lock_around_forks(void) { pthread_atfork(lock, unlock, unlock); }
#endif

/* Advises the system on the whole pages of a block, of a given size; it may refuse. */
static void advise(const block *freed, uintptr_t page, int advice)
{
#if !defined(_WIN32)
    const uintptr_t first = ((uintptr_t)freed->memory + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)freed->memory + freed->size) / page * page;
    if (first < end)
        (void)madvise((void *)first, end - first, advice);
#endif
}

#if defined(MADV_FREE)
/* Whether a block of a size will be kept, and is offered then. */
static int shall_be_offered(size_t size)
{
    int shall_be = 0;
    lock();
    if (size <= kept.limit) {
        shall_be = kept.unoffered == 0;
        if (!shall_be)
            kept.unoffered--;
    }
    unlock();
    return shall_be;
}

/* Lets the system take pages where it needs them, as long as they are not written again. */
static void offer_to_system(const block *freed)
{
    if (!shall_be_offered(freed->size))
        return;
    const double start = fastbn_seconds();
    /* The small pages at the ends would take longer than all huge ones together. */
    advise(freed, (uintptr_t)2 << 20, MADV_FREE);
    if (fastbn_seconds() - start > MOST_SECONDS_PER_BYTE * (double)freed->size) {
        lock();
        kept.unoffered = OFFERS_LEFT_OUT;
        unlock();
    }
}
#else
static void offer_to_system(const block *freed) { (void)freed; }
#endif

static void give_to_system(const block *freed)
{
#if defined(__linux__)
    /* Not all that is freed leaves the heap. */
    advise(freed, (uintptr_t)sysconf(_SC_PAGESIZE), MADV_DONTNEED);
#endif
    below->free(below->ctx, freed->memory, freed->size);
}

static block remove_block(int i)
{
    const block removed = kept.blocks[i];
    kept.count--;
    kept.bytes -= removed.size;
    memmove(&kept.blocks[i], &kept.blocks[i + 1], (size_t)(kept.count - i) * sizeof(block));
    return removed;
}

/* The free block of a size that was given back last, or NULL. */
static void *take(size_t size)
{
    void *memory = NULL;
    lock();
    for (int i = kept.count - 1; i >= 0 && memory == NULL; i--)
        if (kept.blocks[i].size == size)
            memory = remove_block(i).memory;
    unlock();
    return memory;
}

/* The block that has to go so that one more of a size can be kept, or -1. */
static int block_in_the_way(size_t size)
{
    int oldest = -1, of_the_size = 0;
    for (int i = kept.count - 1; i >= 0; i--)
        if (kept.blocks[i].size == size) {
            of_the_size++;
            oldest = i;
        }
    if (of_the_size == MOST_OF_A_SIZE)
        return oldest;
    return kept.count == MOST_BLOCKS || kept.bytes + size > kept.limit ? 0 : -1;
}

/* Keeps a block, and puts those that must go for it into `gone`; returns their number, or -1 if
 * the block is not kept. */
static int keep(block freed, block *gone)
{
    int count = -1;
    lock();
    if (freed.size <= kept.limit) {
        for (count = 0; block_in_the_way(freed.size) >= 0; count++)
            gone[count] = remove_block(block_in_the_way(freed.size));
        kept.blocks[kept.count++] = freed;
        kept.bytes += freed.size;
    }
    unlock();
    return count;
}

/* Takes out the oldest blocks until so many bytes are left at most; returns their number. */
static int shrink(size_t bytes, block *gone)
{
    int count = 0;
    while (kept.bytes > bytes)
        gone[count++] = remove_block(0);
    return count;
}

void fastbn_limit_free_blocks(size_t bytes)
{
#if !defined(_WIN32)
    block gone[MOST_BLOCKS];
    lock();
    kept.limit = bytes;
    const int count = shrink(bytes, gone);
    unlock();
    for (int i = 0; i < count; i++)
        give_to_system(&gone[i]);
#endif
}

size_t fastbn_release_free_blocks(void)
{
    block gone[MOST_BLOCKS];
    size_t bytes = 0;
    lock();
    const int count = shrink(0, gone);
    unlock();
    for (int i = 0; i < count; i++) {
        bytes += gone[i].size;
        give_to_system(&gone[i]);
    }
    return bytes;
}

/* ------------------------------------------------------------------ NumPy's protocol */

static void *allocate(void *ctx, size_t size)
{
    void *memory = size < FASTBN_SMALLEST_BLOCK ? NULL : take(size);
    if (memory == NULL)
        memory = below->malloc(below->ctx, size);
    if (memory == NULL && fastbn_release_free_blocks() > 0)
        memory = below->malloc(below->ctx, size);
    return memory;
}

static void *allocate_zeroed(void *ctx, size_t count, size_t size)
{
    void *memory = below->calloc(below->ctx, count, size);
    if (memory == NULL && fastbn_release_free_blocks() > 0)
        memory = below->calloc(below->ctx, count, size);
    return memory;
}

static void *reallocate(void *ctx, void *memory, size_t size)
{
    void *moved = below->realloc(below->ctx, memory, size);
    if (moved == NULL && fastbn_release_free_blocks() > 0)
        moved = below->realloc(below->ctx, memory, size);
    return moved;
}

static void give_back(void *ctx, void *memory, size_t size)
{
    const block freed = {memory, size};
    block gone[MOST_BLOCKS];
    if (memory == NULL || size < FASTBN_SMALLEST_BLOCK) {
        below->free(below->ctx, memory, size);
        return;
    }
    offer_to_system(&freed); /* before another thread can take it */
    const int count = keep(freed, gone);
    if (count < 0)
        below->free(below->ctx, memory, size);
    for (int i = 0; i < count; i++)
        below->free(below->ctx, gone[i].memory, gone[i].size);
}

PyDataMem_Handler *fastbn_results_handler(PyDataMem_Handler *other)
{
    static PyDataMem_Handler handler = {
        "fastbn", 1, {NULL, allocate, allocate_zeroed, reallocate, give_back}};
    if (below == NULL)
        lock_around_forks();
    below = &other->allocator;
    return &handler;
}
