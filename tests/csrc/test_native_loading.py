"""Building and loading the native library: what a user is told when either does not work."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_ops.runtime import native

ROOT = Path(__file__).parents[2]


def run(code: str, **env: str) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_best_instruction_set_is_chosen() -> None:
    assert (
        run("from lora_ops.runtime import native; print(native.isa())", LORA_OPS_ISA="") == native.supported_isas()[-1]
    )


def test_environment_forces_instruction_set() -> None:
    assert run("from lora_ops.runtime import native; print(native.isa())", LORA_OPS_ISA="portable") == "portable"


def test_unknown_instruction_set_is_a_reason() -> None:
    reason = run("from lora_ops.runtime import native; print(native.unavailable_reason())", LORA_OPS_ISA="sse9")
    assert "'sse9' was asked for" in reason
    assert "portable" in reason


@pytest.mark.parametrize("name", native.ISAS)
def test_every_instruction_set(name: str) -> None:
    """The one skip for a set that this machine lacks: the other tests run on those that it has."""
    if name not in native.supported_isas():
        pytest.skip(f"this CPU has no {name}, whose kernels are not tested here: run the tests on one that has it")
    with native.force_isa(name):
        assert native.isa() == name


def test_force_isa_is_undone() -> None:
    before = native.isa()
    with native.force_isa("portable"):
        assert native.isa() == "portable"
    assert native.isa() == before
    with pytest.raises(native.NativeError, match="'sse9' was asked for"), native.force_isa("sse9"):
        pass


def test_abi_refuses_an_instruction_set_that_the_machine_lacks() -> None:
    unsupported = 3
    assert native.library().lora_ops_force_isa(99) == unsupported


def test_missing_library_is_a_reason(tmp_path: Path) -> None:
    with pytest.raises(native.NativeError, match="was not built: reinstall"):
        native._open(tmp_path / "_liblora_ops.so")


def test_broken_library_is_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "_liblora_ops.so"
    path.write_bytes(b"not a library")
    with pytest.raises(native.NativeError, match="cannot be loaded"):
        native._open(path)


def test_a_missing_openmp_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a torch that is not pip's, and no libgomp on the machine: another compiler would not help."""

    def missing(path: str) -> None:
        raise OSError("libgomp.so.1: cannot open shared object file: No such file or directory")

    path = tmp_path / "_liblora_ops.so"
    path.touch()
    monkeypatch.setattr(native.ctypes, "CDLL", missing)
    with pytest.raises(native.NativeError, match="apt-get install libgomp1"):
        native._open(path)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("int lora_ops_abi_version(void) { return 999; }", "ABI version 999, expected"),
        ("int something_else(void) { return 1; }", "cannot be loaded"),
        (f"int lora_ops_abi_version(void) {{ return {native.ABI_VERSION}; }}", "cannot be loaded"),
    ],
)
def test_library_of_another_version_is_a_reason(tmp_path: Path, source: str, reason: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: install gcc or clang")
    (tmp_path / "stale.c").write_text(source)
    library = tmp_path / "_liblora_ops.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "stale.c"], check=True)
    with pytest.raises(native.NativeError, match=reason):
        native._open(library)


def test_header_and_python_agree_on_the_abi_version() -> None:
    header = (ROOT / "csrc/include/lora_ops.h").read_text()
    assert re.findall(r"#define LORA_OPS_ABI_VERSION (\d+)", header) == [str(native.ABI_VERSION)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps, which only Linux has")
def test_openmp_is_the_one_of_torch() -> None:
    code = """
from lora_ops.runtime import native
native.library()
print(*{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libomp" in line}, sep="\\n")
"""
    libraries = run(code).splitlines()
    assert len(libraries) == 1, libraries


def build(tmp_path: Path, **env: str) -> subprocess.CompletedProcess:
    out = [f"--build-lib={tmp_path}/lib", f"--build-temp={tmp_path}/temp"]
    command = [sys.executable, "setup.py", "build_ext", *out]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)


def test_build_without_a_compiler_says_so_and_goes_on(tmp_path: Path) -> None:
    result = build(tmp_path, CXX="no-such-compiler", LORA_OPS_REQUIRE_NATIVE="0")
    assert result.returncode == 0, result.stderr
    assert "native CPU backend was not built" in result.stderr
    assert "no-such-compiler" in result.stderr


def test_build_without_a_compiler_fails_when_native_is_required(tmp_path: Path) -> None:
    result = build(tmp_path, CXX="no-such-compiler", LORA_OPS_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "native CPU backend was not built" in result.stderr


def test_build_has_no_warnings(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler: install g++ or clang++")
    result = build(tmp_path, CXXFLAGS="-Werror", LORA_OPS_REQUIRE_NATIVE="1")
    assert result.returncode == 0, result.stderr
