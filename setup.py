"""Build fastbn._core: OpenMP where the compiler has it, the kernels once per instruction set."""

import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# Instruction set: (compiler flags, the macro that they define, what the machine must have). The
# last one that a machine has is the one in use. A set that the compiler does not know, or that is
# not of its target, is left out of the build. (AVX2 implies F16C, for which not all can ask.)
ISAS = {
    "base": ([], None, "1"),
    "avx2": (["-mavx2", "-mfma", "-mf16c"], "__AVX2__", 'HAS("avx2") && HAS("fma")'),
    "avx512": (
        [
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"),
            "-mprefer-vector-width=512",
        ],
        "__AVX512VL__",
        'HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl")',
    ),
}
# The kernels of the other sets are written with the vector types of gcc and clang.
ISAS_MSVC = {"base": ([], None, "1")}

# Every instruction set gives the same bits only where no compiler fuses or reorders a sum. Square
# roots are computed in registers where none has to set errno. Most Pythons ask for debug symbols,
# which are four fifths of the file; they are made where CFLAGS asks. With gcc 12's -O3 the kernels
# are no faster, take a quarter longer to compile and are larger by a tenth; its -O2 alone does not
# vectorize all loops. Where a loop begins in a cache line decides over up to 8 % of its time:
# functions begin with one, lest that depend on what is linked before them.
FLAGS = ["-O2", "-ftree-vectorize", "-ffp-contract=off", "-fno-math-errno", "-falign-functions=64"]
if not any(flag.startswith("-g") for flag in os.environ.get("CFLAGS", "").split()):
    FLAGS.append("-g0")
FLAGS_MSVC = ["/O2", "/fp:precise"]

KERNELS = [
    f"fastbn/kernels/{name}.c" for name in ("float32", "float64", "float16", "bfloat16", "common")
]

ISA_PROBE = """
#if !defined({macro})
#  error not of this target
#endif
int main(void) {{ return 0; }}
"""

OPENMP_PROBE = """
#include <omp.h>
int main(void)
{
    int threads = 0;
#pragma omp parallel num_threads(2) reduction(+ : threads)
    threads += omp_get_num_threads();
    return threads == 0;
}
"""


def openmp_candidates(msvc):
    """Pairs of compiler and linker flags that may switch OpenMP on."""
    if msvc:
        return [(["/openmp"], [])]
    candidates = [
        # Bound to one runtime as a whole, at import: a process may load others later.
        (["-fopenmp"], ["-fopenmp", "-Wl,-z,now"]),
        (["-fopenmp"], ["-fopenmp"]),
        (["-Xpreprocessor", "-fopenmp"], ["-lomp"]),
    ]
    try:  # Homebrew's libomp lies where Apple's clang does not look.
        brew = subprocess.run(["brew", "--prefix", "libomp"], capture_output=True, text=True)
    except OSError:
        return candidates
    prefix = Path(brew.stdout.strip())
    return [
        *candidates,
        (
            ["-Xpreprocessor", "-fopenmp", f"-I{prefix / 'include'}"],
            [f"-L{prefix / 'lib'}", "-lomp"],
        ),
    ]


class BuildExt(build_ext):
    """build_ext that asks the compiler what it can do."""

    def build_extension(self, ext):
        msvc = self.compiler.compiler_type == "msvc"
        flags = FLAGS_MSVC if msvc else FLAGS
        openmp_flags, link_flags = next(
            (c for c in openmp_candidates(msvc) if self.builds(OPENMP_PROBE, *c)), ([], [])
        )
        if not openmp_flags:
            self.warn("no OpenMP: fastbn will use one thread")
        isas = {
            name: (isa_flags, supported)
            for name, (isa_flags, macro, supported) in (ISAS_MSVC if msvc else ISAS).items()
            if macro is None or self.builds(ISA_PROBE.format(macro=macro), isa_flags, [])
        }
        table = " ".join(f"X({name}, {supported})" for name, (_, supported) in isas.items())
        core_macros = [*ext.define_macros, ("FASTBN_ISAS", table)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # The kernels come first, since they take the longest.
            kernels = [
                pool.submit(self.compiled, ext, source, isa, [("ISA", isa)], [*flags, *isa_flags])
                for isa, (isa_flags, _) in isas.items()
                for source in KERNELS
            ]
            core = [
                pool.submit(self.compiled, ext, source, "", core_macros, [*flags, *openmp_flags])
                for source in ext.sources
            ]
        ext.extra_objects = [job.result() for job in (*core, *kernels)]
        ext.extra_link_args = link_flags
        ext.depends, ext.sources = [*ext.depends, *ext.sources], []
        super().build_extension(ext)

    def compiled(self, ext, source, folder, macros, flags):
        """The object file of a source, in a folder of the temporary one."""
        (path,) = self.compiler.compile(
            [source],
            output_dir=os.path.join(self.build_temp, folder),
            macros=macros,
            include_dirs=ext.include_dirs,
            extra_postargs=flags,
            depends=ext.depends,
        )
        return path

    def builds(self, source, compile_flags, link_flags):
        """Tell whether a program compiles and links with these flags."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe.c")
            path.write_text(source)
            try:
                objects = self.compiler.compile(
                    [str(path)], output_dir=folder, extra_postargs=compile_flags
                )
                self.compiler.link_executable(
                    objects, str(Path(folder, "probe")), extra_postargs=link_flags
                )
            except (CompileError, LinkError):
                return False
        return True


core = Extension(
    "fastbn._core",
    sources=["fastbn/_core.pyx", "fastbn/core/results.c", "fastbn/kernels/platform.c"],
    # All that the core and the kernels include.
    depends=sorted(
        str(path)
        for pattern in ("core/*.pxi", "core/*.[ch]", "kernels/*.[ch]")
        for path in Path("fastbn").glob(pattern)
    ),
    include_dirs=["fastbn/core", "fastbn/kernels", np.get_include()],
    # What is built with NumPy 2 runs with the oldest NumPy that fastbn asks for.
    define_macros=[
        ("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION"),
        ("NPY_TARGET_VERSION", "NPY_1_25_API_VERSION"),
    ],
)

setup(
    ext_modules=cythonize([core], build_dir="build/cython"),
    cmdclass={"build_ext": BuildExt},
)
