"""`make peers`: PEFT's own LoRA tests without and with `inject` behind its API; what fails only with us is an error.

The tests come from the source distribution of the PEFT that is installed, and are kept under build/. Those that fail or
are skipped with PEFT alone (most of them ask a hub for a model) are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "peers"
NEEDS = [
    "parameterized",
    "scipy",
    "diffusers",
    "importlib_metadata",
    "zipp",
]  # imported by the tests, beside PEFT's own


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__, allow_abbrev=False)
    parser.add_argument("files", nargs="*", help="of PEFT's tests, such as test_custom_models.py; all by default")
    parser.add_argument("-k", default="lora or Lora", help="pytest's expression for the tests to run")
    options = parser.parse_args(argv)
    source = fetch(f"peft=={version('peft')}")
    selected = options.files or sorted(p.name for p in (source / "tests").glob("test_*.py"))
    alone = run(source, selected, options.k, "alone")
    passed = {test for test, outcome in alone.items() if outcome == "passed"}
    (BUILD / "passed.json").write_text(json.dumps(sorted(passed)))
    ours = run(source, selected, options.k, "behind_peft", plugin="behind_peft")
    only_ours = sorted(test for test in passed if ours.get(test) != "passed")
    for test in only_ours:
        print(f"only with lora_ops: {test}: {ours.get(test, 'did not run')}")
    print(
        f"{len(passed)} of {len(alone)} tests pass with PEFT alone; {len(passed) - len(only_ours)} of them with inject "
        f"behind it, in {fused_forwards()} fused forwards"
    )
    return 1 if only_ours or not passed else 0


def fetch(requirement: str) -> Path:
    """The unpacked source distribution, and beside it what the tests import; both are fetched once."""
    name = requirement.replace("==", "-")
    source = BUILD / name
    if not source.is_dir():
        BUILD.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        _check(
            [
                *pip,
                "download",
                "--no-deps",
                "--no-build-isolation",
                "--no-binary",
                ":all:",
                "--dest",
                str(BUILD),
                requirement,
            ]
        )
        _check([*pip, "install", "--no-deps", "--upgrade", "--target", str(BUILD / "packages"), *NEEDS])
        with tarfile.open(BUILD / f"{name}.tar.gz") as archive:
            archive.extractall(BUILD, filter="data")
        (source / "tests" / "__init__.py").touch()  # the distribution leaves it out, and the tests import each other
    return source


def run(source: Path, files: list[str], expression: str, name: str, plugin: str | None = None) -> dict[str, str]:
    """Outcomes of the tests by id, "passed", "failed" or "skipped"."""
    report, counts = BUILD / f"{name}.xml", BUILD / "counts"
    counts.mkdir(exist_ok=True)
    for old in counts.iterdir():
        old.unlink()
    command = [
        sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(source), "-p", "no:cacheprovider", "-q",
        "--tb=line",
        "-n", "2", "-k", expression, f"--junitxml={report}", "-p", "offline", *(["-p", plugin] if plugin else []),
        *(f"tests/{file}" for file in files),
    ]  # fmt: skip
    # PEFT's folder comes first, whose `tests` is not ours; the plugin is found by its own folder.
    path = os.pathsep.join([str(Path(__file__).parent), str(BUILD / "packages"), str(ROOT)])
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {
        **os.environ,
        **threads,
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "LORA_OPS_PEERS_COUNTS": str(counts),
        "LORA_OPS_PEERS_ONLY": str(BUILD / "passed.json"),
    }
    report.unlink(missing_ok=True)
    print(f"PEFT's tests, {name}", flush=True)
    subprocess.run([*command, "--continue-on-collection-errors"], cwd=source, env=environment)
    return outcomes(report)


def outcomes(report: Path) -> dict[str, str]:
    """A junit file's tests, and what became of each."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found


def fused_forwards() -> int:
    """How often lora_linear served a layer in the run behind PEFT, by the files that the plugin left."""
    return sum(json.loads(p.read_text()).get("fused forwards", 0) for p in (BUILD / "counts").glob("*.json"))


def _check(command: list[str]) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
