"""What can be said of a train.py without running it: whether it is Python, what it amounts to, how complex it is.

A syntax tree is written as a text of its own here (`canonical`), because `ast.dump` differs between Python versions:
a digest has to be the same on every machine of a comparison, and after an update during a session.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import itertools
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass

from lab.errors import LabError

TRAIN = "train.py"
LONGEST = 2**19  # bytes of it: a diff of two has room in an event
IGNORED = ("ctx", "type_comment", "kind", "type_ignores")  # fields that don't change what is computed
CALIBRATED = "defaults"  # its attributes stand for numbers
MODULE = "the module"  # name of what stands at the top level and defines no single name
Definitional = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Source:
    """A train.py."""

    digest: str  # equal for files with equal syntax trees, whatever their comments, layout and docstrings
    complexity: int  # size of the tree, docstrings aside; a number counts as what `defaults` gives
    portable: bool  # it uses only what every backend offers, as far as can be told


@dataclass(frozen=True)
class Definition:
    """A named part of a train.py: a function, a method, the rest of a class, a top-level name, or MODULE."""

    name: str  # "MATRIX_LR", "Attention.forward", "GPT", MODULE
    nodes: tuple[ast.stmt, ...]
    lines: frozenset[int]  # that it covers, from 1
    constant: bool = False  # it is one assignment at the top level

    @functools.cached_property
    def canonical(self) -> str:
        """Its syntax, the same under every Python version."""
        return "".join(map(canonical, self.nodes))


def normalised(content: bytes) -> bytes:
    """A train.py with line ends as git stores them."""
    return content.replace(b"\r\n", b"\n")


def text_of(content: bytes) -> str:
    """A train.py as text, whatever its line ends."""
    return normalised(content).decode("utf-8-sig", "replace")


def with_ends_of(content: bytes, made: bytes) -> bytes:
    """What was made of a train.py, normalised, with the line ends that this one has."""
    return made.replace(b"\n", b"\r\n") if b"\r\n" in content else made


@functools.lru_cache(maxsize=256)
def describe(content: bytes) -> Source:
    """The facts of a train.py. LabError, with the line, if it is not valid Python, or too long."""
    if len(content) > LONGEST:
        raise LabError(
            f"{TRAIN} has {len(content):,} bytes, and may have {LONGEST:,}: a table has to be computed, not written out"
        )
    try:
        tree = parsed(content.decode("utf-8-sig"))
        portable = not beyond_the_surface(content)
        digest = hashlib.sha256(canonical(tree).encode()).hexdigest()[:16]
        return Source(digest, sum(1 for _ in counted(tree)), portable)
    except UnicodeDecodeError as error:
        raise LabError(f"{TRAIN} is not UTF-8 text ({error}); save it as UTF-8 and run again") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" line {error.lineno}:" if isinstance(error, SyntaxError) and error.lineno else ""
        problem = error.msg if isinstance(error, SyntaxError) else error
        raise LabError(f"{TRAIN}{where} {problem}. Nothing was run: fix it and run again") from error


def beyond_the_surface(content: bytes) -> list:
    """Code in it that other machines may not run: a list of `surface.Problem`; [] if it is not valid Python."""
    from backends import surface  # here, because all the rest needs nothing but Python

    try:
        return surface.check(content.decode("utf-8-sig"))
    except (ValueError, SyntaxError):
        return []


def is_python(content: bytes) -> bool:
    """Whether it can be a train.py: `describe` says why not, and much more."""
    try:
        describe(content)
    except LabError:
        return False
    return True


def parsed(text: str) -> ast.Module:
    """The syntax tree without docstrings."""
    tree = ast.parse(text, TRAIN)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *Definitional)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                node.body = node.body[1:] or [ast.Pass()]
    return tree


def canonical(node: ast.AST) -> str:
    """A syntax tree as text: names of nodes, and of their fields what is neither empty nor ignored."""
    fields = [(name, getattr(node, name, None)) for name in node._fields if name not in IGNORED]
    known = (f"{name}={_written(value)}" for name, value in fields if value is not None and value != [])
    return f"{type(node).__name__}({','.join(known)})"


def _written(value: object) -> str:
    if isinstance(value, ast.AST):
        return canonical(value)
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return repr(value)


def counted(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that make a program complex: contexts of names are none, and a value that is assigned and names
    `defaults` is one, as a number in its place would be."""
    yield tree
    if _calibrated(tree):
        return
    for child in ast.iter_child_nodes(tree):
        if isinstance(tree, (ast.Assign, ast.AnnAssign)) and child is tree.value:
            if any(map(_calibrated, ast.walk(child))):
                yield child
                continue
        if not isinstance(child, ast.expr_context):
            yield from counted(child)


def _calibrated(node: ast.AST) -> bool:
    """Whether it is an attribute of `defaults`."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == CALIBRATED


def comments(source: str) -> list[tuple[int, int]]:
    """Where comments and docstrings are: their first characters, and those after them. SyntaxError if it is none."""
    begins = [0, *itertools.accumulate(len(line) + 1 for line in source.split("\n"))]
    found, before = [], tokenize.NEWLINE
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            alone = token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            if token.type == tokenize.COMMENT or alone:
                (line, column), (last, end) = token.start, token.end
                found.append((begins[line - 1] + column, begins[last - 1] + end))
            if token.type not in (tokenize.COMMENT, tokenize.NL):
                before = token.type
    except tokenize.TokenError as error:
        raise SyntaxError(str(error)) from error
    return found


@functools.lru_cache(maxsize=256)
def definitions(content: bytes) -> dict[str, Definition]:
    """The definitions of a train.py, by name, in the order of the file. SyntaxError if it is not valid Python."""
    try:
        tree = parsed(content.decode("utf-8-sig"))
    except (ValueError, RecursionError, MemoryError) as error:
        raise SyntaxError(str(error)) from error
    parts: dict[str, list[ast.stmt]] = {}
    constants = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))]
            node.body = [part for part in node.body if part not in methods] or [ast.Pass()]
            parts.setdefault(node.name, []).append(node)
            for method in methods:
                parts.setdefault(f"{node.name}.{method.name}", []).append(method)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            parts.setdefault(node.name, []).append(node)
        elif name := assigned_name(node):
            parts.setdefault(name, []).append(node)
            constants.add(name)
        else:
            parts.setdefault(MODULE, []).append(node)
    return {
        name: Definition(name, tuple(nodes), _lines(nodes), name in constants and len(nodes) == 1)
        for name, nodes in parts.items()
    }


def assigned_name(node: ast.stmt) -> str | None:
    """The name that a statement gives a value, if it is a single one."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
    else:
        target = node.target if isinstance(node, ast.AnnAssign) and node.value else None
    return target.id if isinstance(target, ast.Name) else None


def _lines(nodes: list[ast.stmt]) -> frozenset[int]:
    """The lines of statements; of a class only those of what is left of it, so that methods keep theirs."""
    lines: set[int] = set()
    for node in nodes:
        parts = [part for part in node.body if hasattr(part, "lineno")] if isinstance(node, ast.ClassDef) else [node]
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        lines.update(range(first, parts[0].lineno if parts else node.lineno + 1))
        for part in parts:
            lines.update(range(part.lineno, (part.end_lineno or part.lineno) + 1))
    return frozenset(lines)


def changed(before: bytes, after: bytes) -> list[tuple[str, Definition | None, Definition | None]]:
    """(name, before, after) of each definition that differs, in the order of the file; None where it is not there.

    Raises:
        SyntaxError: one of them is not valid Python.
    """
    old, new = definitions(before), definitions(after)
    return [
        (name, old.get(name), new.get(name))
        for name in dict.fromkeys([*new, *old])
        if name not in old or name not in new or old[name].canonical != new[name].canonical
    ]
