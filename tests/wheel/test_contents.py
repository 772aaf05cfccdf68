"""The wheel and the sdist: their files, tags and metadata. `make wheel` compiles, repairs, installs and runs them."""

from __future__ import annotations

import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.wheel import contents
from tests.wheel.build import NO_COMPILER, build_sdist, build_wheel, copy_checkout, unpack

PLATFORM = sysconfig.get_platform().replace("-", "_").replace(".", "_")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("packaging") / "checkout")


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdist(tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From the sdist, where there is no compiler."""
    source = unpack(sdist, tmp_path_factory.mktemp("source"))
    return build_wheel(source, tmp_path_factory.mktemp("wheel"), CXX=NO_COMPILER, LORA_OPS_REQUIRE_NATIVE="0")


def test_sdist(sdist: Path) -> None:
    assert contents.sdist_problems(sdist) == []


def test_wheel(wheel: Path) -> None:
    assert contents.wheel_problems(wheel, PLATFORM, native=False) == []


def test_sdist_and_checkout_make_the_same_wheel(wheel: Path, tree: Path, tmp_path: Path) -> None:
    direct = build_wheel(tree, tmp_path, CXX=NO_COMPILER, LORA_OPS_REQUIRE_NATIVE="0")
    with zipfile.ZipFile(wheel) as a, zipfile.ZipFile(direct) as b:
        assert {n: a.read(n) for n in a.namelist()} == {n: b.read(n) for n in b.namelist()}


def test_a_build_without_a_compiler_says_what_to_do(wheel: Path) -> None:
    said = (wheel.parent / "wheel.log").read_text()
    assert "the native CPU backend was not built" in said
    assert NO_COMPILER in said
    assert "apt-get install g++" in said
    assert "--no-cache-dir" in said  # pip would install what it has built without one again


def test_the_checks_see_what_is_wrong(wheel: Path, tmp_path: Path) -> None:
    """A wheel with a file of the tests, one changed after RECORD was written, and one missing."""
    broken = tmp_path / wheel.name.replace("py3-none", "cp310-cp310")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(broken, "w") as new:
        for name in old.namelist():
            if name != "lora_ops/py.typed":
                new.writestr(name, old.read(name) + b"\n" * (name == "lora_ops/cli.py"))
        new.writestr("tests/models.py", "")
    found = "\n".join(contents.wheel_problems(broken, PLATFORM, native=True))
    assert "not in the wheel: lora_ops/py.typed" in found
    assert f"not in the wheel: {contents.LIBRARY}" in found
    assert "not of the package: tests/models.py" in found
    assert "RECORD has another hash of lora_ops/cli.py" in found
    assert "name: expected the tag py3-none" in found
