"""What a change of train.py is about, by its syntax tree: to see what was not tried yet, and what helped where.

A file is taken apart into definitions (constants, functions, methods, what else a class says, the rest). Each is of the
kind that its name says, or the heading that it stands under ("# Optimizer"), or what it is: a model's class, an update
rule. What can't be told is "other".
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Literal, cast, get_args

from lab import untrusted
from lab.genome.syntax import MODULE, Definition, canonical, changed, definitions

Subject = Literal["architecture", "optimizer", "schedule", "batch", "regularisation", "other"]
KINDS: tuple[Subject, ...] = get_args(Subject)
Rules = list[tuple[Subject, str]]  # a kind, and the words that say it


def _rules(text: str) -> Rules:
    lines = (line.partition(": ") for line in text.strip().split("\n"))
    return [(cast(Subject, kind), words) for kind, _, words in lines]


# By words of a name, in the order in which they are asked. The strong ones are said whatever heading it stands under.
STRONG = _rules("""
other: seed
schedule: lr_decay
regularisation: drop|dropout|weight_decay|wd|decay|softcap|cap|label_smoothing|smoothing|z_?loss|clip|clipping
regularisation: regulari[sz]ation
schedule: schedules?|scheduler|warm|warmup|warmdown|cooldown|anneal|annealing|final|lr_multiplier|cosine
batch: batch|batches|batchsize|accum|accumulation
optimizer: lrs?|learning_rates?|betas?|muon|adamw?|sgd|lion|momentum|optimi[sz]ers?|optimi[sz]ation|orthogonali[sz]e
optimizer: ns_steps|newton_schulz
""")
WEAK = _rules("""
schedule: progress|iters|iterations
optimizer: rate|eps|epsilon|steps|update
architecture: depth|width|dim|heads?|layers?|windows?|rope|ratio|vocab|embed|embedding|attn|attention|mlp|norm
architecture: models?|architecture|network|ve|lambdas?|init|initiali[sz]ation|gates?|tying|tied|skip|residual|rotary
architecture: activation|relu|gelu|swiglu|layernorm|rmsnorm|kv|parallel|pattern|hidden|channels
""")
LONGEST = 40  # characters of a value in a summary
# In a description: a hyperparameter among its first words ("Reduce MATRIX_LR ..."), and what only gives reasons.
NAMED = re.compile(r"(?:\S+ ){0,3}?([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)")
REASONS = re.compile(r" [-\u2013\u2014] | \[GPU: ")


def of_change(before: bytes, after: bytes) -> tuple[Subject, ...]:
    """The KINDS that a change touches, the one with most changes first; empty if it changes nothing."""
    try:
        changes = changed(before, after)
        kinds: dict[str, Subject] = {**definition_kinds(before), **definition_kinds(after)}
    except SyntaxError:
        return ("other",)
    sizes: Counter[Subject] = Counter()
    for name, old, new in changes:
        sizes["regularisation" if old and new and _regularises(old, new) else kinds[name]] += _size(old, new)
    return tuple(sorted(sizes, key=lambda kind: (kind == "other", -sizes[kind], KINDS.index(kind))))


def of_words(text: str) -> tuple[Subject, ...]:
    """What a change is about, by its description alone: one of KINDS. A hyperparameter that it begins with decides.
    Else its words do, without those after a dash; remarks in parentheses count only where there is nothing else."""
    if (found := NAMED.match(text)) and (kind := _named(found[1], STRONG + WEAK)):
        return (kind,)
    text = REASONS.split(text)[0].lower()
    said: list[Subject | None] = [_named(words, STRONG + WEAK) for words in (re.sub(r"\([^()]*\)", " ", text), text)]
    return (said[0] or said[1] or "other",)


def summary(before: bytes, after: bytes) -> str:
    """A change in a line: "MATRIX_LR 0.04 -> 0.05; edited Attention.forward". Nothing if only comments changed.

    Raises:
        SyntaxError: one of them is not valid Python.
    """
    said, groups = [], {"edited": [], "new": [], "removed": []}
    for name, old, new in changed(before, after):
        if new and new.constant and (old is None or old.constant):
            said.append(f"{name} {_value(old)} -> {_value(new)}" if old else f"{name} = {_value(new)}")
        else:
            groups["edited" if old and new else "new" if new else "removed"].append(name)
    said += [f"{what} {', '.join(names)}" for what, names in groups.items() if names]
    return untrusted.one_line("; ".join(said))


def _value(definition: Definition) -> str:
    """What a constant is set to, as source text."""
    return untrusted.cut(ast.unparse(definition.nodes[0].value), LONGEST)  # pyright: ignore[reportAttributeAccessIssue]


@functools.lru_cache(maxsize=64)  # a best is compared with many
def definition_kinds(content: bytes) -> dict[str, Subject]:
    """The kind of each definition of a train.py, by its name. SyntaxError if it is not valid Python."""
    headings = _headings(content.decode("utf-8-sig"))
    models: set[str] = set()  # classes that are a Module, or inherit from one here
    kinds: dict[str, Subject] = {}
    for name, definition in definitions(content).items():
        node, owner = definition.nodes[-1], name.partition(".")[0]
        bases, arguments = [], set()
        kind: Subject | None = None
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = {part.arg for part in ast.walk(node.args) if isinstance(part, ast.arg)}
        if any(base == "Module" or base in models for base in bases):
            models.add(name)
        if owner in models:
            kind = "architecture"
        elif any("Optimizer" in base for base in bases):
            kind = "optimizer"
        elif "." in name:
            kind = kinds.get(owner)
        elif {"grad", "state"} <= arguments:  # an update rule
            kind = "optimizer"
        elif name != MODULE and not (kind := _named(name, STRONG)):
            heading: Subject | None = next((kind for line, kind in reversed(headings) if line < node.lineno), None)
            kind = heading or _named(name, WEAK)
            if "progress" in arguments:
                kind = "schedule"
        kinds[name] = kind or "other"
    return kinds


def _regularises(old: Definition, new: Definition) -> bool:
    """Whether what a definition reads now says so: a model's class that dropout came into is regularised."""
    names = Counter(map(_identifier, _nodes(new)))
    names.subtract(map(_identifier, _nodes(old)))
    return any(name and n and _named(name, STRONG) == "regularisation" for name, n in names.items())


def _size(old: Definition | None, new: Definition | None) -> int:
    """How many nodes of its syntax tree were changed, about; a moved one is none."""
    before, after = (Counter(map(canonical, _nodes(side))) if side else Counter() for side in (old, new))
    return max(1, ((before - after) + (after - before)).total())


def _nodes(definition: Definition) -> Iterator[ast.AST]:
    return (node for statement in definition.nodes for node in ast.walk(statement))


def _identifier(node: ast.AST) -> str | None:
    return getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)


def _named(name: str, rules: Rules) -> Subject | None:
    """The kind that a word of a name says: of WEIGHT_DECAY, weightDecay and "weight decay" the same."""
    words = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    return next((kind for kind, known in rules if re.search(rf"(?:^|_)(?:{known})\d*(?:_|$)", words)), None)


def _headings(text: str) -> list[tuple[int, Subject | None]]:
    """(line, kind) of comments that begin a section: lines of their own, at the margin, after an empty line or a rule.
    One after an empty line that says no kind goes back to that of the last one after a rule.
    """
    headings, before, chapter = [], "", None
    rule = re.compile(r"#\s*[-=#*]{3,}\s*")
    for number, line in enumerate(text.splitlines(), 1):
        ruled = rule.fullmatch(before)
        if line.startswith("#") and not rule.fullmatch(line) and (ruled or not before.strip()):
            kind = _named(re.split(r"[,:(.;]", line)[0], STRONG + WEAK)
            if ruled:
                chapter = kind
            headings.append((number, kind or chapter))
        before = line
    return headings
