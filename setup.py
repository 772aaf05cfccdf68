"""Builds csrc/cpu into lora_ops/_liblora_ops.so: a plain shared library with a C ABI, loaded by runtime/native.py.

Needs setuptools and a C++17 compiler, nothing else. Without a working compiler the package installs with its other
backends and says what is missing; LORA_OPS_REQUIRE_NATIVE=1 makes that an error. CXX, CXXFLAGS and LDFLAGS are
honoured.

With LORA_OPS_BUILD_CUDA=1 csrc/cuda becomes lora_ops/_liblora_ops_cuda.so likewise, by nvcc of CUDA_HOME or the PATH;
"only" builds nothing else, and LORA_OPS_CUDA_ARCHITECTURES=90 for one generation alone.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCE_DIR = Path("csrc/cpu")
CUDA_SOURCE_DIR = Path("csrc/cuda")
NATIVE, CUDA = "lora_ops._liblora_ops", "lora_ops._liblora_ops_cuda"

# pip shows nothing of it without --verbose: `lora-ops doctor` says the same (native.REMEDY).
ADVICE = """The other backends work. For fast CPU kernels:
apt-get install g++ (or dnf install gcc-c++, xcode-select --install), then
LORA_OPS_REQUIRE_NATIVE=1 pip install --force-reinstall --no-deps --no-cache-dir
of lora_ops: pip keeps what it built without a compiler."""

# -ffp-contract=off: the codecs are bit-exact, a fused multiply-add would change their bytes.
FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"
]  # fmt: skip
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [
    *AVX2_FLAGS,
    *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")),
    # g++ 12 warns inside its own intrinsics header (its bug 105593).
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
# A source named after an instruction set is compiled for it, others for every machine; the choice is made at run time.
X86_FLAGS = {
    "avx2": AVX2_FLAGS,
    "avx512": AVX512_FLAGS,
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16", "-mavx512vbmi"],
}
ARM64_FLAGS = {
    "neon": [],  # which every 64-bit ARM processor has
    "neon_bf16": ["-march=armv8.2-a+bf16"],
}
# By the macro that sources ask for.
ARCHITECTURES = {
    "LORA_OPS_X86": (("x86_64", "amd64"), X86_FLAGS),
    "LORA_OPS_ARM64": (("aarch64", "arm64"), ARM64_FLAGS),
}
# Each runs on its successors of the same generation; PTX of the last one serves what comes after.
CUDA_ARCHITECTURES = os.environ.get("LORA_OPS_CUDA_ARCHITECTURES", "80,89,90,100,120").split(",")
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH, on the PATH, or where CUDA installs itself."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [*(f"{home}/bin" for home in homes), *os.environ.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


class BuildNative(build_ext):
    """Compiles every source with its own flags and links a library that does not depend on the Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        library.unlink(missing_ok=True)  # a failed build must not ship the library of an earlier one
        if ext.name == CUDA:
            return self._build_cuda(library)
        try:
            self._build(library)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = f"lora_ops: the native CPU backend was not built: {error}"
            if os.environ.get("LORA_OPS_REQUIRE_NATIVE") == "1":
                raise SystemExit(reason) from error
            print(f"{'*' * 79}\n{reason}\n{ADVICE}\n{'*' * 79}", file=sys.stderr, flush=True)

    def _build(self, library: Path) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        flags = [*FLAGS, f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / SOURCE_DIR}"]
        user_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        machine = self._machine([*compiler, *user_flags])
        isas: dict[str, list[str]] = {}
        for macro, (names, flags_of_isas) in ARCHITECTURES.items():
            if machine in names:
                flags.append(f"-D{macro}")
                isas = flags_of_isas
        openmp = self._openmp(compiler)
        objects_dir = Path(self.build_temp)
        objects_dir.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)

        objects = []
        for source in sorted((ROOT / SOURCE_DIR).glob("*/*.cpp")):
            if source.stem not in isas and any(source.stem in others for _, others in ARCHITECTURES.values()):
                continue  # for another architecture
            objects.append(str(objects_dir / f"{source.parent.name}_{source.stem}.o"))
            isa_flags = isas.get(source.stem, [])
            self._run([*compiler, *flags, *openmp, *user_flags, *isa_flags, "-c", str(source), "-o", objects[-1]])
        link_flags = shlex.split(os.environ.get("LDFLAGS", ""))
        self._run([*compiler, "-shared", "-o", str(library), *objects, *openmp, *link_flags])

    def _build_cuda(self, library: Path) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            raise SystemExit("lora_ops: LORA_OPS_BUILD_CUDA=1 needs nvcc of CUDA 12.8 or newer: set CUDA_HOME or PATH")
        library.parent.mkdir(parents=True, exist_ok=True)
        code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
        code.append("-gencode=arch=compute_{0},code=compute_{0}".format(CUDA_ARCHITECTURES[-1]))
        sources = map(str, sorted((ROOT / CUDA_SOURCE_DIR).glob("*.cu")))
        includes = [f"-I{ROOT / 'csrc/include'}"]
        try:
            self._run([nvcc, *CUDA_FLAGS, *code, *includes, "-shared", "-o", str(library), *sources])
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"lora_ops: the CUDA kernels were not built: {error}") from error

    def _machine(self, compiler: list[str]) -> str:
        """What the compiler builds for, as aarch64: a cross compiler's target is not this machine."""
        asked = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True)
        return (asked.stdout.split("-")[0].strip() or platform.machine()).lower()

    def _openmp(self, compiler: list[str]) -> list[str]:
        probe = [*compiler, "-fopenmp", "-x", "c++", "-shared", "-fPIC", "-o", os.devnull, "-"]
        if subprocess.run(probe, input=b"", capture_output=True).returncode == 0:
            return ["-fopenmp"]
        print("lora_ops: the compiler has no OpenMP: native kernels will use one thread", file=sys.stderr)
        return ["-Wno-unknown-pragmas"]

    @staticmethod
    def _run(command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)


class AnyPythonWheel(bdist_wheel):
    """The library has no Python in it: one wheel serves every Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


BUILD_CUDA = os.environ.get("LORA_OPS_BUILD_CUDA", "0")

setup(
    # The names only tell setuptools that there is something to build for the platform.
    ext_modules=[
        *([Extension(NATIVE, sources=[], optional=True)] if BUILD_CUDA != "only" else []),
        *([Extension(CUDA, sources=[])] if BUILD_CUDA in ("1", "only") else []),
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
