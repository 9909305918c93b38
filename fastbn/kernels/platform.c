#define _GNU_SOURCE /* dladdr, RTLD_NOLOAD */
#include "platform.h"

#include <stdio.h>
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

#define X(name, supported) extern const fastbn_isa fastbn_isa_##name;
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
        isas[count++] = &fastbn_isa_##name;
    FASTBN_ISAS
#undef X
    return count;
}

ptrdiff_t fastbn_l3_bytes(void)
{
    long kilobytes = 0;
    /* sysconf gives the sum over all CPUs on some machines. */
    FILE *file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r");
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
/* The file of the OpenMP runtime that this library is bound to: of several in the process, one. */
static const char *runtime(void)
{
    Dl_info info;
    return dladdr((void *)omp_get_max_threads, &info) ? info.dli_fname : NULL;
}
#endif

int fastbn_omp_pause(void)
{
#if defined(_OPENMP) && !defined(_WIN32)
    const char *path = runtime();
    void *library = path ? dlopen(path, RTLD_LAZY | RTLD_NOLOAD) : NULL;
    if (library == NULL)
        return 0;
    /* Looked up, since runtimes before OpenMP 5.0 have no such function. */
    int (*pause)(int);
    *(void **)&pause = dlsym(library, "omp_pause_resource_all");
    dlclose(library);
    const int soft = 1;
    return pause != NULL && pause(soft) == 0;
#else
    return 1;
#endif
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
    const char *library = NULL;
#  if !defined(_WIN32)
    library = runtime();
#  endif
    snprintf(name, sizeof name, "%d (%s)", _OPENMP, library ? library : "unknown");
    return name;
#else
    return "none";
#endif
}
