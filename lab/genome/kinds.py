"""What a change of train.py is about, by its syntax tree: to see what was not tried yet, and what helped where.

A file is taken apart into pieces (constants, functions, methods, what else a class says, the rest). A piece is of the
kind that its name says, or the heading that it stands under ("# Optimizer"), or what it is: a model's class, an update
rule. What can't be told is "other".
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from dataclasses import dataclass

from lab import untrusted
from lab.genome import syntax as source

KINDS = ("architecture", "optimizer", "schedule", "batch", "regularisation", "other")
# By words of a name, in the order in which they are asked. The first are said whatever heading a piece stands under.
STRONG = (
    ("other", "seed"),
    ("schedule", "lr_decay"),
    ("regularisation", "drop|dropout|weight_decay|wd|decay|softcap|cap|label_smoothing|smoothing|z_?loss|clip"),
    ("schedule", "schedule|scheduler|warm|warmup|warmdown|cooldown|anneal|annealing|final|lr_multiplier"),
    ("batch", "batch|batches|batchsize|accum|accumulation"),
    ("optimizer", "lr|learning_rate|betas?|muon|adamw?|sgd|lion|momentum|optimi[sz]ers?|orthogonali[sz]e"),
)
WEAK = (
    ("schedule", "progress|multiplier|iters|iterations"),
    ("optimizer", "rate|eps|epsilon|steps|update"),
    (
        "architecture",
        "depth|width|dim|heads?|layers?|windows?|rope|ratio|vocab|embed|embedding|attn|attention|mlp|norm",
    ),
)
HEADINGS = (
    ("regularisation", "regulari[sz]ation"),
    ("schedule", "schedules?"),
    ("batch", "batch|batches"),
    ("optimizer", "optimi[sz]ers?|optimi[sz]ation"),
    ("architecture", "models?|architecture|attention|layers|network"),
)
SPOKEN = (  # words of descriptions that names in train.py don't have
    ("regularisation", "clipping|regulari[sz]ation"),
    ("optimizer", "learning_rates|lrs|ns_steps|newton_schulz"),
    ("schedule", "schedules|cosine"),
    (
        "architecture",
        "ve|lambdas?|init|initiali[sz]ation|gates?|tying|tied|skip|residual|rotary|activation|relu|gelu"
        "|swiglu|layernorm|rmsnorm|kv|parallel|pattern|hidden|channels",
    ),
)
LONGEST = 40  # characters of a value in a summary


@dataclass(frozen=True)
class Piece:
    """Of a train.py.

    Attributes:
        name: "MATRIX_LR", "Attention.forward"; "the imports" and "the rest" for what has none.
        kind: one of KINDS. constant: it is an assignment at the top of the file.
        text: without comments and layout; of a constant, its value's.
    """

    name: str
    kind: str
    constant: bool
    text: str
    node: ast.AST


def of_change(before: bytes, after: bytes) -> tuple[str, ...]:
    """Which of KINDS a change touches, the one most is changed of first; none if nothing is."""
    try:
        changes = changed(before, after)
    except SyntaxError:
        return ("other",)
    sizes = Counter()
    for old, new in changes:
        sizes[_kind_of(old, new)] += _size(old, new)
    return tuple(sorted(sizes, key=lambda kind: (kind == "other", -sizes[kind], KINDS.index(kind))))


def of_words(text: str) -> tuple[str, ...]:
    """What a change is about, by its description alone: one of KINDS. Remarks in parentheses count for nothing, unless
    there is nothing else."""
    text = text.lower()
    for said in (re.sub(r"\([^()]*\)", " ", text), text):
        if kind := _named(said, STRONG) or _named(said, SPOKEN[:3]) or _named(said, WEAK) or _named(said, SPOKEN):
            return (kind,)
    return ("other",)


def summary(before: bytes, after: bytes, width: int = 200) -> str:
    """A change in a line: "MATRIX_LR 0.04 -> 0.05; edited Attention.forward". Nothing if only comments changed.

    Raises:
        SyntaxError: one of them is no Python.
    """
    said, groups = [], {"edited": [], "new": [], "removed": []}
    for old, new in changed(before, after):
        name = (new or old).name
        if old and new and old.constant and new.constant:
            said.append(f"{name} {untrusted.cut(old.text, LONGEST)} -> {untrusted.cut(new.text, LONGEST)}")
        elif new and not old and new.constant:
            said.append(f"{name} = {untrusted.cut(new.text, LONGEST)}")
        else:
            groups["edited" if old and new else "new" if new else "removed"].append(name)
    said += [f"{what} {', '.join(names)}" for what, names in groups.items() if names]
    return untrusted.one_line("; ".join(said), width)


def changed(before: bytes, after: bytes) -> list[tuple[Piece | None, Piece | None]]:
    """(before, after) of each piece that differs, in the order of the file; None where it is not there.

    Raises:
        SyntaxError: one of them is no Python.
    """
    old, new = pieces(before), pieces(after)
    names = dict.fromkeys([*new, *old])
    return [
        (old.get(name), new.get(name))
        for name in names
        if name not in old or name not in new or old[name].text != new[name].text
    ]


@functools.lru_cache(maxsize=64)  # a best is compared with many
def pieces(content: bytes) -> dict[str, Piece]:
    """A train.py taken apart, by name. SyntaxError if it is no Python."""
    try:
        text = content.decode("utf-8-sig")
        tree = ast.parse(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise SyntaxError(str(error)) from error
    source.without_docstrings(tree)
    headings, models = _headings(text), _models(tree)
    found: dict[str, list[tuple]] = {}  # name -> (node, kind, constant, text) of each statement that it stands for

    def add(name, node, kind, constant=False, text=None):
        found.setdefault(name, []).append((node, kind, constant, ast.unparse(node) if text is None else text))

    for node in tree.body:
        heading = next((kind for line, kind in reversed(headings) if line < node.lineno), None)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            add("the imports", node, "other")
        elif name := _constant(node):
            add(
                name,
                node,
                _named(name, STRONG) or heading or _named(name, WEAK) or "other",
                True,
                ast.unparse(node.value),
            )
        elif isinstance(node, ast.ClassDef):
            kind = (
                "architecture"
                if node.name in models
                else "optimizer"
                if any("Optimizer" in base for base in _bases(node))
                else _named(node.name, STRONG) or heading or _named(node.name, WEAK) or "other"
            )
            methods = [part for part in node.body if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))]
            for method in methods:
                add(f"{node.name}.{method.name}", method, kind)
            node.body = [part for part in node.body if part not in methods] or [ast.Pass()]
            add(node.name, node, kind)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            add(node.name, node, _function(node) or heading or _named(node.name, WEAK) or "other")
        else:
            add("the rest", node, "other")
    return {
        name: Piece(
            name,
            parts[-1][1],
            len(parts) == 1 and parts[0][2],
            "\n".join(part[3] for part in parts),
            ast.Module([part[0] for part in parts], []),
        )
        for name, parts in found.items()
    }


def _kind_of(old: Piece | None, new: Piece | None) -> str:
    """Of a change of a piece. A model's class that dropout came into is regularised: what it reads now says so."""
    piece = new or old
    if old and new:
        names = Counter(map(_identifier, ast.walk(new.node)))
        names.subtract(map(_identifier, ast.walk(old.node)))
        if any(name and n and _named(name, STRONG) == "regularisation" for name, n in names.items()):
            return "regularisation"
    return piece.kind


def _size(old: Piece | None, new: Piece | None) -> int:
    """How many nodes of its syntax tree were changed, about; a moved one is none."""
    nodes = [Counter(ast.dump(node) for node in ast.walk(piece.node)) if piece else Counter() for piece in (old, new)]
    return max(1, ((nodes[0] - nodes[1]) + (nodes[1] - nodes[0])).total())


def _identifier(node: ast.AST) -> str | None:
    return getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)


def _constant(node: ast.stmt) -> str | None:
    """The name that a statement at the top of the file gives a value."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
    elif isinstance(node, ast.AnnAssign) and node.value:
        target = node.target
    else:
        return None
    return target.id if isinstance(target, ast.Name) else None


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """By its name, or by what it is given."""
    given = {one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
    if {"grad", "state"} <= given:
        return "optimizer"
    return _named(node.name, STRONG) or ("schedule" if "progress" in given else None)


def _named(name: str, rules) -> str | None:
    """The kind that a word of a name says: of WEIGHT_DECAY, weightDecay and "weight decay" the same."""
    words = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    return next((kind for kind, known in rules if re.search(rf"(?:^|_)(?:{known})\d*(?:_|$)", words)), None)


def _bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base).rpartition(".")[2] for base in node.bases]


def _models(tree: ast.Module) -> set[str]:
    """Names of the classes that are a Module, or inherit from one here."""
    found: set[str] = set()
    for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        if any(base == "Module" or base in found for base in _bases(node)):
            found.add(node.name)
    return found


def _headings(text: str) -> list[tuple[int, str | None]]:
    """(line, kind) of comments that begin a section: lines of their own, at the margin, after an empty line or a rule.
    One after an empty line that says no kind goes back to that of the last one after a rule.
    """
    found, before, chapter = [], "", None
    rule = re.compile(r"#\s*[-=#*]{3,}\s*")
    for number, line in enumerate(text.splitlines(), 1):
        ruled = rule.fullmatch(before)
        if line.startswith("#") and not rule.fullmatch(line) and (ruled or not before.strip()):
            kind = _named(re.split(r"[,:(.;]", line)[0], HEADINGS)
            if ruled:
                chapter = kind
            found.append((number, kind or chapter))
        before = line
    return found
