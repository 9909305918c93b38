#define _GNU_SOURCE /* dladdr, RTLD_NOLOAD */
#include "platform.h"

#include <stdio.h>
#include <string.h>
#if defined(_MSC_VER)
#  include <intrin.h>
#endif
#if defined(_OPENMP)
#  include <omp.h>
#  if !defined(_WIN32)
#    include <dlfcn.h>
#  endif
#endif
/* FASTBN_ISAS is setup.py's list: X(name, what the machine must have). */
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#  define HAS(feature) (__builtin_cpu_supports(feature) != 0)
#else
#  define HAS(feature) 0
#endif

#define X(name, supported) \
    extern const fastbn_common_kernels fastbn_common_kernels_##name; \
    extern const fastbn_kernels fastbn_kernels_##name##_float32, fastbn_kernels_##name##_float64, \
        fastbn_kernels_##name##_float16, fastbn_kernels_##name##_bfloat16; \
    static const fastbn_isa isa_##name = { \
        #name, \
        &fastbn_common_kernels_##name, \
        &fastbn_kernels_##name##_float32, \
        &fastbn_kernels_##name##_float64, \
        &fastbn_kernels_##name##_float16, \
        &fastbn_kernels_##name##_bfloat16, \
    };
FASTBN_ISAS
#undef X

int fastbn_supported_isas(const fastbn_isa *isas[], int capacity)
{
    int count = 0;
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
    __builtin_cpu_init();
#endif
#define X(name, supported) \
    if (count < capacity && (supported)) \
        isas[count++] = &isa_##name;
    FASTBN_ISAS
#undef X
    return count;
}

ptrdiff_t fastbn_cache_bytes(int level)
{
    long kilobytes = 0;
    char path[64];
    /* sysconf gives the sum over all CPUs on some machines. From the second level on, the number of
     * a cache there is its level. */
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", level);
    FILE *file = fopen(path, "r");
    if (file != NULL) {
        if (fscanf(file, "%ldK", &kilobytes) != 1)
            kilobytes = 0;
        fclose(file);
    }
    return (ptrdiff_t)kilobytes * 1024;
}

int fastbn_omp_max_threads(void)
{
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

#if defined(_OPENMP) && !defined(_WIN32)
#  define HAS_RUNTIMES 1
#else
#  define HAS_RUNTIMES 0
#endif

#if HAS_RUNTIMES
/* What gcc's programs call of an OpenMP runtime; clang's and Intel's have it as well. */
typedef void parallel_function(void (*work)(void *), void *data, unsigned threads, unsigned flags);

/* Another runtime, whose threads are borrowed; NULL if there is none. The first function is stored
 * last: a thread that sees it sees the others, too, without Python's lock. */
static parallel_function *borrowed_parallel;
static int (*borrowed_thread_num)(void), (*borrowed_num_threads)(void);

static parallel_function *look_at_borrowed(void)
{
    return __atomic_load_n(&borrowed_parallel, __ATOMIC_ACQUIRE);
}

/* The file that a function is in; empty if that is not known. */
static const char *file_of(void *function)
{
    Dl_info info;
    return dladdr(function, &info) ? info.dli_fname : "";
}

/* The file of the runtime that this library is bound to: of several in the process, one. */
static const char *own_runtime(void) { return file_of((void *)omp_get_max_threads); }

static const char *runtime_in_use(void)
{
    parallel_function *const parallel = look_at_borrowed();
    void *function;
    memcpy(&function, &parallel, sizeof function);
    return function != NULL ? file_of(function) : own_runtime();
}

/* A function of a library, or of those that it needs, if the process has loaded it; NULL stands for
   what the whole process sees. */
static void *function_of(const char *library, const char *name)
{
    const int is_known = library == NULL || *library;
    void *handle = is_known ? dlopen(library, RTLD_LAZY | RTLD_NOLOAD) : NULL;
    if (handle == NULL)
        return NULL;
    void *function = dlsym(handle, name);
    dlclose(handle);
    return function;
}

/* A function as a library finds it: that of a preloaded runtime, for example, comes before those of
   the libraries that it needs. */
static void *function_seen_by(const char *library, const char *name)
{
    void *function = function_of(NULL, name);
    return function != NULL ? function : function_of(library, name);
}

static int pause_runtime(const char *library)
{
    /* Looked up, since runtimes before OpenMP 5.0 have no such function. */
    void *function = function_of(library, "omp_pause_resource_all");
    int (*pause)(int);
    memcpy(&pause, &function, sizeof pause);
    const int soft = 1;
    return pause != NULL && pause(soft) == 0;
}
#endif

int fastbn_omp_pause(void)
{
#if HAS_RUNTIMES
    const int paused = pause_runtime(own_runtime());
    return look_at_borrowed() == NULL ? paused : pause_runtime(runtime_in_use()) && paused;
#else
    return 1;
#endif
}

int fastbn_borrow_threads(const char *library)
{
#if HAS_RUNTIMES
    parallel_function *to_store;
    void *parallel = function_seen_by(library, "GOMP_parallel");
    void *thread_num = function_seen_by(library, "omp_get_thread_num");
    void *num_threads = function_seen_by(library, "omp_get_num_threads");
    if (parallel == NULL || thread_num == NULL || num_threads == NULL)
        return 0;
    if (strcmp(file_of(parallel), own_runtime()) == 0)
        return 1;
    memcpy(&borrowed_thread_num, &thread_num, sizeof thread_num);
    memcpy(&borrowed_num_threads, &num_threads, sizeof num_threads);
    memcpy(&to_store, &parallel, sizeof parallel);
    __atomic_store_n(&borrowed_parallel, to_store, __ATOMIC_RELEASE);
    return 1;
#else
    (void)library;
    return 0;
#endif
}

#if HAS_RUNTIMES
typedef struct {
    fastbn_work *work;
    void *data;
    int shares;
} region;

/* What a thread of a region does: a runtime may give it fewer threads than shares. */
static void do_shares(void *region_)
{
    const region *r = region_;
    const int threads = borrowed_num_threads();
    for (int i = borrowed_thread_num(); i < r->shares; i += threads)
        r->work(r->data, i);
}
#endif

int fastbn_on_borrowed_threads(fastbn_work *work, void *data, int shares)
{
#if HAS_RUNTIMES
    region r = {work, data, shares};
    parallel_function *const parallel = look_at_borrowed();
    if (parallel == NULL)
        return 0;
    parallel(do_shares, &r, (unsigned)shares, 0);
    return 1;
#else
    (void)work, (void)data, (void)shares;
    return 0;
#endif
}

void fastbn_set_range(fastbn_range *range, ptrdiff_t first, ptrdiff_t end)
{
    range->first_and_end = (int64_t)first << 32 | (int64_t)end;
}

/* Replaces the range if it still is what was seen; otherwise tells what it is now. */
static int replace(fastbn_range *range, int64_t *seen, int64_t wanted)
{
#if defined(_MSC_VER)
    const int64_t found = _InterlockedCompareExchange64(&range->first_and_end, wanted, *seen);
    const int same = found == *seen;
    *seen = found;
    return same;
#else
    return __atomic_compare_exchange_n(&range->first_and_end, seen, wanted, 0, __ATOMIC_RELAXED,
                                       __ATOMIC_RELAXED);
#endif
}

static int64_t look_at(fastbn_range *range)
{
#if defined(_MSC_VER)
    return _InterlockedCompareExchange64(&range->first_and_end, 0, 0);
#else
    return __atomic_load_n(&range->first_and_end, __ATOMIC_RELAXED);
#endif
}

static int32_t first_of(int64_t range) { return (int32_t)(range >> 32); }
static int32_t end_of(int64_t range) { return (int32_t)(range & INT32_MAX); }

ptrdiff_t fastbn_take_first(fastbn_range *range, ptrdiff_t reserved)
{
    int64_t seen = look_at(range);
    while (first_of(seen) + reserved < end_of(seen))
        if (replace(range, &seen, seen + ((int64_t)1 << 32)))
            return first_of(seen);
    return -1;
}

ptrdiff_t fastbn_take_last(fastbn_range *range, ptrdiff_t reserved)
{
    int64_t seen = look_at(range);
    while (first_of(seen) + reserved < end_of(seen))
        if (replace(range, &seen, seen - 1))
            return end_of(seen) - 1;
    return -1;
}

double fastbn_seconds(void)
{
#if defined(_OPENMP)
    return omp_get_wtime();
#else
    return 0.0;
#endif
}

const char *fastbn_compiler(void)
{
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#elif defined(_MSC_VER)
    static char name[32];
    snprintf(name, sizeof name, "MSVC %d", _MSC_VER);
    return name;
#else
    return "unknown";
#endif
}

const char *fastbn_openmp(void)
{
#if defined(_OPENMP)
    static char name[512];
    const char *library = "";
#  if HAS_RUNTIMES
    library = runtime_in_use();
#  endif
    snprintf(name, sizeof name, "%d (%s)", _OPENMP, *library ? library : "unknown");
    return name;
#else
    return "none";
#endif
}
