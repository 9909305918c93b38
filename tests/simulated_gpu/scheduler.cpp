#include "scheduler.h"

#include <algorithm>
#include <csetjmp>
#include <deque>
#include <link.h>
#include <numeric>
#include <random>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

#include "language.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

/* ------------------------------------------------------------------ fibers */

#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t STACK = 256 << 10;
#else
constexpr std::size_t STACK = 64 << 10;
#endif

struct Fiber {
    jmp_buf place;
    const void *stack = nullptr;
    std::size_t stack_bytes = 0;
};

Fiber host;

/* A jump saves and restores registers alone; swapcontext would ask the system for the signals. */
void switch_between(Fiber &from, Fiber &to)
{
#ifdef __SANITIZE_ADDRESS__
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, to.stack, to.stack_bytes);
#endif
    if (!_setjmp(from.place))
        _longjmp(to.place, 1);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

/* ------------------------------------------------------------------ threads, and where they meet */

struct Barrier {
    unsigned expected = 0, arrived = 0, generation = 0;

    void arrive()
    {
        if (++arrived == expected)
            arrived = 0, generation++;
    }
};

struct Copy {
    void *to;
    const void *from;
};

struct Thread {
    Fiber fiber;
    unsigned index, shuffles, arrival; /* the last: generation of the cluster's barrier */
    bool done, arrived;
    const Barrier *barrier; /* that it waits at, and its generation */
    unsigned generation;
    std::vector<Copy> copies;

    bool runs() const
    {
        return !done && (barrier == nullptr || barrier->generation != generation);
    }
};

struct Warp {
    Barrier barrier;
    double values[2][32]; /* of one exchange, while some still read those of the last */
};

struct Block {
    unsigned index, running;
    Barrier barrier;
    std::vector<Warp> warps;
    std::vector<Thread *> threads; /* in the order in which they run */
    std::vector<char> memory;      /* its shared memory, while another block runs */
};

std::deque<Thread> threads;
std::vector<Block> blocks;
Barrier cluster;
Block *block;
Thread *thread;
const std::function<void()> *body;
const char *wrong;
std::mt19937 coin;
bool tosses;

void yield()
{
    switch_between(thread->fiber, host);
}

/* What no schedule can go on after. */
void fail(const char *what)
{
    wrong = what;
    for (;;)
        yield();
}

void wait(const Barrier &barrier, unsigned generation)
{
    thread->barrier = &barrier;
    thread->generation = generation;
    while (barrier.generation == generation)
        yield();
    thread->barrier = nullptr;
}

void meet(Barrier &barrier)
{
    const unsigned generation = barrier.generation;
    barrier.arrive();
    wait(barrier, generation);
}

/* The values of all lanes of a warp. */
const double *exchanged(unsigned mask, double value)
{
    if (mask != ~0u)
        fail("a shuffle of less than a warp is not simulated");
    Warp &warp = block->warps[thread->index / 32];
    double *values = warp.values[thread->shuffles++ % 2];
    values[thread->index % 32] = value;
    meet(warp.barrier);
    return values;
}

/* A fiber serves one thread after the other. */
void live()
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &host.stack, &host.stack_bytes);
#endif
    for (;;) {
        (*body)();
        if (!thread->copies.empty())
            fail("a thread ended while its copies were on their way");
        thread->done = true;
        yield();
    }
}

void begin(Thread &fresh)
{
    void *stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fresh.fiber.stack = stack;
    fresh.fiber.stack_bytes = STACK;
    /* Once in the new context, it is left by a jump, and only jumped to from then on. */
    static ucontext_t here, there;
    static Fiber *starting;
    getcontext(&there);
    there.uc_stack = {stack, 0, STACK};
    there.uc_link = nullptr;
    starting = &fresh.fiber;
    makecontext(&there, [] {
        if (!_setjmp(starting->place))
            setcontext(&here);
        live();
    }, 0);
    swapcontext(&here, &there);
}

/* ------------------------------------------------------------------ shared memory: all that is
 * thread-local here */

struct Image {
    char *data = nullptr;
    std::size_t bytes = 0;
};

Image image_of_shared(const char *some)
{
    struct Search {
        const char *some;
        Image found;
    } search = {some, {}};
    dl_iterate_phdr([](dl_phdr_info *info, std::size_t, void *data) {
        Search &search = *static_cast<Search *>(data);
        for (int i = 0; i < info->dlpi_phnum; i++) {
            const auto &header = info->dlpi_phdr[i];
            char *begin = static_cast<char *>(info->dlpi_tls_data);
            if (header.p_type == PT_TLS && begin != nullptr && search.some >= begin &&
                search.some < begin + header.p_memsz)
                search.found = {begin, header.p_memsz};
        }
        return 0;
    }, &search);
    return search.found;
}

constexpr unsigned char UNWRITTEN = 0xff; /* a NaN in every format */
constexpr std::size_t GUARD = 512;

Image shared_memory;

/* Fresh shared memory, and behind what was asked for some that nobody may write. */
void fill(const Shared &shared)
{
    char *rest = shared.data + shared.most;
    std::memset(shared_memory.data, UNWRITTEN, shared.data - shared_memory.data);
    std::memset(rest, UNWRITTEN, shared_memory.data + shared_memory.bytes - rest);
    std::memset(shared.data, UNWRITTEN, std::min(shared.bytes + GUARD, shared.most));
}

void check_guard(const Shared &shared)
{
    const std::size_t end = std::min(shared.bytes + GUARD, shared.most);
    for (std::size_t i = shared.bytes; i < end; i++)
        if (static_cast<unsigned char>(shared.data[i]) != UNWRITTEN)
            wrong = "a block wrote beyond its shared memory";
}

void guard(const Shared &shared, bool closed)
{
#ifdef __SANITIZE_ADDRESS__
    (closed ? __asan_poison_memory_region
            : __asan_unpoison_memory_region)(shared.data + shared.bytes,
                                             shared.most - shared.bytes);
#else
    (void)shared, (void)closed;
#endif
}

void swap_out(Block &left)
{
    left.memory.assign(shared_memory.data, shared_memory.data + shared_memory.bytes);
}

void swap_in(const Block &entered)
{
    std::memcpy(shared_memory.data, entered.memory.data(), shared_memory.bytes);
}

/* ------------------------------------------------------------------ the schedule */

std::vector<unsigned> order_of(unsigned count, unsigned schedule)
{
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    if (schedule == 1)
        std::reverse(order.begin(), order.end());
    else if (schedule > 1)
        std::shuffle(order.begin(), order.end(), coin);
    return order;
}

void enter(Block &fresh, unsigned index, Thread **first, const std::vector<unsigned> &order)
{
    const unsigned count = order.size();
    fresh.index = index;
    fresh.running = count;
    fresh.barrier = {count, 0, 0};
    fresh.warps.assign((count + 31) / 32, {{32, 0, 0}, {}});
    fresh.threads.resize(count);
    for (unsigned i = 0; i < count; i++)
        fresh.threads[i] = first[order[i]];
}

/* Runs the threads of a block as far as they get; tells whether any got further. */
bool advance(Block &entered)
{
    block = &entered;
    blockIdx = {entered.index % gridDim.x, entered.index / gridDim.x, 0};
    bool any = false, again = true;
    while (again && wrong == nullptr) {
        again = false;
        for (Thread *next : entered.threads) {
            if (!next->runs())
                continue;
            any = again = true;
            thread = next;
            threadIdx = {next->index, 0, 0};
            switch_between(host, next->fiber);
            if (next->done)
                entered.running--;
            if (wrong != nullptr)
                break;
        }
    }
    return any;
}

/* Runs the blocks of a cluster to their ends. */
void run_together(std::vector<Thread *> &all, unsigned first, unsigned count, unsigned size,
                  const Shared &shared, unsigned schedule)
{
    blocks.resize(size);
    cluster = {size * count, 0, 0};
    const std::vector<unsigned> order = order_of(count, schedule);
    for (unsigned rank = 0; rank < size; rank++) {
        for (unsigned i = 0; i < count; i++) {
            Thread &fresh = *all[rank * count + i];
            fresh.index = i;
            fresh.shuffles = 0;
            fresh.done = fresh.arrived = false;
            fresh.barrier = nullptr;
        }
        enter(blocks[rank], first + rank, &all[rank * count], order);
        fill(shared);
        if (size > 1)
            swap_out(blocks[rank]);
    }
    for (bool any = true; any && wrong == nullptr;) {
        any = false;
        for (unsigned rank : order_of(size, schedule)) {
            if (size > 1)
                swap_in(blocks[rank]);
            guard(shared, true);
            any |= advance(blocks[rank]);
            guard(shared, false);
            check_guard(shared);
            if (size > 1)
                swap_out(blocks[rank]);
        }
    }
    for (const Block &ended : blocks)
        if (ended.running && wrong == nullptr)
            wrong = "threads wait at different barriers, or for one that has ended";
}

} // namespace

const char *run(const std::function<void()> &kernel, const Index &grid, unsigned count,
                unsigned size, const Shared &shared, unsigned schedule)
{
    wrong = nullptr;
    body = &kernel;
    blockDim = {count, 1, 1};
    gridDim = grid;
    coin.seed(schedule);
    tosses = schedule > 1;
    shared_memory = image_of_shared(shared.data);
    while (threads.size() < count * size)
        begin(threads.emplace_back());
    std::vector<Thread *> all;
    for (Thread &each : threads)
        all.push_back(&each);
    for (unsigned first : order_of(grid.x * grid.y / size, schedule)) {
        run_together(all, first * size, count, size, shared, schedule);
        if (wrong != nullptr) {
            threads.clear(); /* fibers that stand somewhere in the kernel */
            break;
        }
    }
    return wrong;
}

/* ------------------------------------------------------------------ what kernels call */

void __syncthreads()
{
    meet(block->barrier);
}

double __shfl_sync(unsigned mask, double value, int lane)
{
    return exchanged(mask, value)[lane];
}

double __shfl_xor_sync(unsigned mask, double value, int lanes)
{
    return exchanged(mask, value)[thread->index % 32 ^ lanes];
}

unsigned __ballot_sync(unsigned mask, bool predicate)
{
    const double *values = exchanged(mask, predicate);
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; lane++)
        ballot |= unsigned(values[lane] != 0.0) << lane;
    return ballot;
}

/* Which lanes are here is up to the hardware. A lane is always alone with itself here, or perhaps
 * with others of which it knows nothing. */
unsigned __activemask()
{
    return 1u << thread->index % 32;
}

bool __all_sync(unsigned, bool predicate)
{
    return predicate && !(tosses && coin() % 2);
}

void copy_later(void *to, const void *from)
{
    thread->copies.push_back({to, from});
}

void finish_copies()
{
    for (const Copy &copy : thread->copies)
        std::memcpy(copy.to, copy.from, 16);
    thread->copies.clear();
}

void cluster_arrive()
{
    if (thread->arrived)
        fail("a thread arrived twice at the barrier of its cluster");
    thread->arrived = true;
    thread->arrival = cluster.generation;
    cluster.arrive();
}

void cluster_wait()
{
    if (!thread->arrived)
        fail("a thread waits at the barrier of its cluster without having arrived");
    wait(cluster, thread->arrival);
    thread->arrived = false;
}

double read_from_block(const double *address, int rank)
{
    const char *here = reinterpret_cast<const char *>(address);
    const Block &other = blocks[rank];
    if (!other.running)
        fail("a thread read from a block that has ended");
    double value;
    std::memcpy(&value, &other == block ? here : &other.memory[here - shared_memory.data], 8);
    return value;
}
