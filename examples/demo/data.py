"""Instruction data from the running Python's standard library: no download, and every answer can be looked up.

Each documented function gives three items: what it does (its docstring's first line), its signature, and its name.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from examples.demo.stdlib import SourceFile, Split, library_files, top_module

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = ("describe", "signature", "name")
_SUMMARY_CHARS = range(12, 121)  # shorter says nothing, longer is rare and costs everybody padding
_SIGNATURE_CHARS = 100

_PROMPTS = {
    "describe": "Question: What does this function of the module {module} do?\n{signature}\nAnswer:\n",
    "signature": "Question: Write the signature of {name} in the module {module}: {summary}\nAnswer:\n",
    "name": "Question: Which function of the module {module} does this? {summary}\nAnswer:\n",
}


@dataclass(frozen=True)
class Function:
    """A documented function: where it stands, its name ("dedent", "TextWrapper.wrap"), signature and summary."""

    path: str
    module: str
    name: str
    signature: str
    summary: str

    def item(self, kind: str) -> dict[str, str]:
        """Make one instruction item in TRL's prompt/completion format.

        Args:
            kind: one of `KINDS`.

        Returns:
            The item with the columns prompt, completion, kind, file and module.
        """
        answer = {"describe": self.summary, "signature": self.signature, "name": self.name}[kind]
        prompt = _PROMPTS[kind].format(
            module=self.module, name=self.name, signature=self.signature, summary=self.summary
        )
        return {
            "prompt": prompt,
            "completion": answer,
            "kind": kind,
            "file": self.path,
            "module": top_module(self.path),
        }


def _definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield functions and methods with their qualified names; functions inside functions are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}", child
        elif isinstance(child, ast.If | ast.Try):
            yield from _definitions(child, prefix)


def _summary(docstring: str) -> str:
    return docstring.strip().split("\n")[0].strip()


def functions_of(file: SourceFile) -> list[Function]:
    """Collect a file's documented functions.

    Args:
        file: the source file. It is parsed, never imported or run.

    Returns:
        The functions in the order of the file; none if the running Python cannot parse it.
    """
    return list(_functions_of(file))


@lru_cache(maxsize=1024)  # a split's functions are asked for again by each later split
def _functions_of(file: SourceFile) -> tuple[Function, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old files hold escapes that newer Pythons warn about
        try:
            tree = ast.parse(file.text)
        except (SyntaxError, ValueError):
            return ()
    found = []
    for name, node in _definitions(tree):
        summary = _summary(ast.get_docstring(node) or "")
        keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        signature = f"{keyword} {node.name}({ast.unparse(node.args)})"
        if len(summary) in _SUMMARY_CHARS and " " in summary and len(signature) <= _SIGNATURE_CHARS:
            found.append(Function(file.path, file.module, name, signature, summary))
    return tuple(found)


def _plain(summary: str) -> str:
    return re.sub(r"\W+", " ", summary).strip().lower()


def functions_in(split: Split, root: str | Path | None = None) -> list[Function]:
    """Collect a split's documented functions, each summary once, none that another split's text gives away.

    A function whose summary also stands in an earlier split (base, then train, then heldout) is left out: copies
    like `posixpath` and `ntpath` would make the held-out questions open-book.

    Args:
        split: "base", "train" or "heldout".
        root: folder of the library; the running Python's own when None.

    Returns:
        The functions, in the order of files and lines.

    Raises:
        ValueError: if `split` is unknown.
        FileNotFoundError: if the library has no sources.
    """
    wanted = library_files(root, split)
    earlier: tuple[Split, ...] = {"base": (), "train": ("base",), "heldout": ("base", "train")}[split]  # type: ignore[assignment]
    seen = {_plain(f.summary) for other in earlier for file in library_files(root, other) for f in functions_of(file)}
    kept = []
    for file in wanted:
        for function in functions_of(file):
            key = _plain(function.summary)
            if key not in seen:
                seen.add(key)
                kept.append(function)
    return kept


def _draw(item: dict[str, str]) -> bytes:
    return hashlib.sha256((item["file"] + item["prompt"]).encode()).digest()


def instruction_items(
    split: Split, *, max_items: int | None = None, root: str | Path | None = None
) -> list[dict[str, str]]:
    """Build a split's instruction items in a fixed order that mixes files and kinds.

    Args:
        split: "base", "train" or "heldout".
        max_items: keep this many, drawn by a hash of each item, so always the same ones; all when None.
        root: folder of the library; the running Python's own when None.

    Returns:
        Items with the string columns prompt, completion, kind, file and module.

    Raises:
        ValueError: if `split` is unknown or `max_items` is not positive.
        FileNotFoundError: if the library has no sources.
    """
    if max_items is not None and max_items < 1:
        raise ValueError(f"max_items: expected a positive number or None, got {max_items}")
    items = [function.item(kind) for function in functions_in(split, root) for kind in KINDS]
    return sorted(items, key=_draw)[:max_items]


def instruction_dataset(split: Split, *, max_items: int | None = None, root: str | Path | None = None) -> Dataset:
    """Build a split's instruction items as a `datasets.Dataset` that TRL takes as it is.

    Args:
        split: "base", "train" or "heldout".
        max_items: keep this many, always the same ones; all when None.
        root: folder of the library; the running Python's own when None.

    Returns:
        A dataset with the columns prompt, completion, kind, file and module.

    Raises:
        ValueError: if `split` is unknown or `max_items` is not positive.
        FileNotFoundError: if the library has no sources.
        ImportError: if `datasets` is not installed.
    """
    from lora_ops.trainer._require import require

    require("datasets")
    from datasets import Dataset

    return Dataset.from_list(instruction_items(split, max_items=max_items, root=root))
