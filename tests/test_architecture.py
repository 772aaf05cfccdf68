"""What the design promises of the tree: imports point one way, packages do not collide, import lora_ops is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import from layers before its own, and from its own; optim only from what its entry names.
LAYERS = [
    ("runtime", "version"),
    ("paging",),
    ("quant",),
    ("kernels",),
    ("optim",),
    ("functional",),
    ("formats",),
    ("nn",),
    ("injection",),
    ("trainer", "cli"),
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def modules() -> list[Path]:
    folders = [ROOT / "lora_ops", ROOT / "kernels", ROOT / "quant"]
    files = [f for folder in folders for f in sorted(folder.rglob("*.py"))]
    return [f for f in files if not ({"kernels", "quant"} & set(f.relative_to(ROOT).parts[1:2]))]


def layer_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] in ("kernels", "quant") else parts[1]


def imported(path: Path) -> set[str]:
    """Layers of lora_ops that a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lora_ops":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lora_ops.")}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    layer = layer_of(path)
    if layer == "__init__":
        return
    assert layer in RANK, f"{layer} has no place in LAYERS"
    for other in imported(path):
        # The face's own names (inject, trace, …) may be used from the trainer alone.
        rank = RANK.get(other, RANK["injection"])
        assert rank <= RANK[layer], f"{path.relative_to(ROOT)} imports {other}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_tests_bench_or_examples(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
        assert not {n.split(".")[0] for n in names} & {"tests", "bench", "examples", "kernels", "quant"}


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.strip()


def test_import_needs_torch_and_numpy_only() -> None:
    heavy = ("transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "triton", "matplotlib")
    loaded = run(f"import sys, lora_ops; print([m for m in {heavy} if m in sys.modules])")
    # torch itself may load triton.
    torch_loads = run(f"import sys, torch; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == torch_loads


@pytest.mark.parametrize("name", ["functional.nf4_linear", "nn.LoRALinear", "optim.AdamW"])
def test_import_lora_ops_is_enough(name: str) -> None:
    """For what README writes as lora_ops.optim.AdamW; in a process of its own, where nothing else imported it."""
    run(f"import lora_ops; lora_ops.{name}")


def test_hugging_face_kernels_is_not_shadowed() -> None:
    """From the root of the checkout `import kernels` is Hugging Face's package and not our folder."""
    pytest.importorskip("kernels")
    assert "get_kernel" in run("from kernels import get_kernel; print(get_kernel.__name__)")


def test_links_are_committed_as_links() -> None:
    for name in ("kernels", "quant"):
        assert (ROOT / "lora_ops" / name).is_symlink()
        assert not (ROOT / name / "__init__.py").exists()
