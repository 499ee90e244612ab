"""What can be said of a train.py without running it: whether it is Python, what it amounts to, how complex it is."""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass

from backends import surface
from lab.errors import LabError


@dataclass(frozen=True)
class Source:
    """A train.py.

    Attributes:
        digest: equal for files with equal syntax trees, whatever their comments, layout and docstrings.
        nodes: of the syntax tree, docstrings aside: the measure of simplicity.
        portable: it uses only what every backend offers, as far as can be told.
    """

    digest: str
    nodes: int
    portable: bool


def describe(content: bytes) -> Source:
    """Raises LabError, with the line, if it is no Python."""
    try:
        text = content.decode("utf-8-sig")
        tree = ast.parse(text, "train.py")
        portable = not surface.check(text)
    except UnicodeDecodeError as error:
        raise LabError(f"train.py is not UTF-8 text ({error}); save it as UTF-8 and run again") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" line {error.lineno}:" if getattr(error, "lineno", None) else ""
        raise LabError(
            f"train.py{where} {getattr(error, 'msg', error)}; nothing was run: mend it and run again"
        ) from error
    without_docstrings(tree)
    digest = hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]
    return Source(digest, sum(1 for _ in ast.walk(tree)), portable)


def without_docstrings(tree: ast.AST) -> None:
    """Removes them in place."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                node.body = node.body[1:] or [ast.Pass()]
