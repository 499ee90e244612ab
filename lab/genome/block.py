"""The hyperparameters of a train.py, read from its own text and written back into it.

They are what is assigned at the top level, in capitals, before the first function or class; and where a heading there
says "Hyperparameters", between it and the next. Kind, bounds and scale follow from how a value is written:

    MATRIX_LR = 0.04                          a positive number: a tenth of it to ten times, logarithmic
    WARMDOWN_RATIO = 0.5                      a part of a whole, by its name or its section's: 0 to 1
    MOMENTUM = (0.85, 0.95)                   averages' decays, each by itself: 1 - x is logarithmic
    HEAD_DIM = 128                            a size: powers of two. Other whole numbers: by one, or logarithmic
    DEPTH = defaults.depth                    relative to what was calibrated, and stays so: defaults.depth + 1
    TOTAL_BATCH_SIZE = defaults.total_batch_size          ... defaults.total_batch_size // 2
    WINDOW_PATTERN = "SSSL"                   one of a few

A comment may say otherwise: `# Muon [0.004 .. 0.4, log]`, or `# iterations, at most 5`. What can't be read is left
alone.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from dataset import MAX_SEQ_LEN

NEVER = ("SEED", "DEVICE_BATCH_SIZE")  # the harness's, and calibration's
HEADING = re.compile(r"^# -{20,}\n# (?P<title>.*)\n# -{20,}$", re.M)
STATED = re.compile(r"\[\s*(?P<low>[-+.\de]+)\s*\.\.\s*(?P<high>[-+.\de]+)\s*(?:,\s*(?P<scale>log|linear)\s*)?\]")
AT_MOST = re.compile(r"\bat most (\d+)\b")
PARTS = re.compile(r"(^|_)(RATIO|FRACTION|SHARE|DROPOUT)(_|$)")
FRACTIONAL = re.compile(r"_LR$|DECAY$|FRACTION|SHARE|DROPOUT|WARM\w*_RATIO")  # also where it is written as 0 or 1
DECAYS = re.compile(r"(^|_)(BETAS?|MOMENTUM|DECAYS|(AVERAGE|EMA)_DECAY)\d*$")
SIZES = re.compile(r"(^|_)(DIM|CHANNELS|SIZE|WINDOW|WIDTH)$")
PATTERNS = ("L", "SL", "SSL", "SSSL")
FACTOR = 10.0  # from a value to its bounds
LEAST = {"DEPTH": 1, "TOTAL_BATCH_SIZE": MAX_SEQ_LEN}  # with less nothing can be trained
MOST = 1e15  # of a value
WINDOWS = "WINDOW_PATTERN[i % len(WINDOW_PATTERN)]", "return sizes[:-1] + [None]"  # train.py's own lines
DEEPEST = 1000  # layers whose windows are looked at
WIDTH = "return -(-depth * ASPECT_RATIO // HEAD_DIM) * HEAD_DIM"
HEADS = "return max(1, width // HEAD_DIM // KV_RATIO)"
NEAR_ONE = 1e-4  # how near a decay may come to 1


@dataclass(frozen=True)
class Variable:
    """A number or choice of the block.

    Attributes:
        name: "MATRIX_LR", or "ADAM_BETAS[1]" for the second of a tuple.
        kind: "number", "part", "decay", "whole", "size" (powers of two), "more" (`text` + value), "times" (`text` times
            2^value), "choice".
        value: as it is. low, high: bounds of value. scale: "log" or "linear"; a decay's is that of 1 - value.
        choices: of a choice, as source text. text: what "more" and "times" are relative to.
        stated: the bounds are those of a comment. start, end: where in the source it stands, in bytes.
    """

    name: str
    kind: str
    value: float | int | str
    low: float = 0.0
    high: float = 0.0
    scale: str = "linear"
    choices: tuple[str, ...] = ()
    text: str = ""
    stated: bool = False
    start: int = 0
    end: int = 0

    @property
    def whole(self) -> bool:
        return self.kind in ("whole", "size", "more", "times")

    @property
    def width(self) -> float:
        """The distance between the bounds, on the variable's scale."""
        return self._scaled(self.high) - self._scaled(self.low)

    def place(self, value) -> float:
        """The position of a value between the bounds, 0 to 1 on the variable's scale; for a choice, its index."""
        if self.kind == "choice":
            return self.choices.index(value)
        return (self._scaled(value) - self._scaled(self.low)) / self.width

    def at(self, place: float):
        """The value there, as it would be written: three digits, whole, a power of two."""
        if self.kind == "choice":
            return self.choices[int(place)]
        low, high = self._scaled(self.low), self._scaled(self.high)
        x = self._unscaled(low + min(max(place, 0.0), 1.0) * (high - low))
        low, high = self.low, self.high
        if self.kind == "size":
            low, high = 2 ** math.ceil(math.log2(max(low, 1))), 2 ** math.floor(math.log2(max(high, 1)))
            value = 2 ** round(math.log2(max(x, 1)))
        elif self.whole:
            low, high = math.ceil(low), math.floor(high)
            value = round(x) if abs(x) < 100 else int(float(f"{x:.2g}"))
        elif self.kind == "decay":
            value = min(round(1 - float(f"{1 - x:.2g}"), 6), 1 - 2 * NEAR_ONE)  # nearer to 1 it is no variable any more
        else:
            value = float(f"{x:.2g}")
        return type(value)(min(max(value, low), high)) if self.stated else value

    def wider(self, *values) -> Variable:
        """The variable with bounds that include these values; without values, with wider bounds, if possible."""
        if values:
            return replace(self, low=min(self.low, *values), high=max(self.high, *values))
        if self.stated or self.kind == "choice":
            return self
        low, high, span = self.low, self.high, self.high - self.low
        if self.kind == "part":
            high = 1.0
        elif self.kind in ("more", "times"):
            low, high = low - 1, high + 1 if self.kind == "more" or high > 0 else high
        elif self.kind == "decay":
            low, high = max(0.0, 2 * low - 1), _below_one(high, 2)
        elif self.scale == "log":
            low, high = max(1, low // 2) if self.whole else low / 2, high * 2
        else:
            low = min(low, max(low - span, 1)) if self.whole else low - span if low else 0.0
            high = high + span if high else 0.0
        return replace(self, low=low, high=high)

    def fits(self, other: Variable | None) -> bool:
        """Whether the other's value has a place here."""
        if other is None or (other.kind, other.text) != (self.kind, self.text):
            return False
        if self.kind == "choice":
            return other.value in self.choices
        return self.scale == "linear" or self.kind == "decay" or float(other.value) > 0  # log: zero has no place

    def written(self, value) -> str:
        """The value as source text."""
        if self.kind == "more":
            return self.text + (f" {'+' if value > 0 else '-'} {abs(value)}" if value else "")
        if self.kind == "times":
            return self.text + (f" {'*' if value > 0 else '//'} {2 ** abs(value)}" if value else "")
        return value if self.kind == "choice" else repr(value)

    def _scaled(self, x):
        if self.kind == "decay":
            return -math.log(max(1 - x, NEAR_ONE))
        return math.log(x) if self.scale == "log" else x

    def _unscaled(self, y):
        if self.kind == "decay":
            return 1 - math.exp(-y)
        return math.exp(y) if self.scale == "log" else y


@lru_cache(maxsize=4096)
def read(source: str) -> tuple[Variable, ...]:
    """The variables of a train.py, in order; none if that part is not valid Python."""
    try:
        head, nodes = _head(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    lines = head.encode().splitlines(keepends=True)  # ast counts in bytes, and knows fewer line ends than str
    starts = [0, *itertools.accumulate(map(len, lines))]
    first, last = _span(head)
    variables: dict[str, Variable] = {}
    for node in nodes:
        if not first <= node.lineno <= last or not isinstance(node, ast.Assign) or len(node.targets) != 1:
            continue
        target = node.targets[0]
        if not isinstance(target, ast.Name) or not re.fullmatch(r"[A-Z][A-Z0-9_]*", target.id) or target.id in NEVER:
            continue
        comment = lines[_end(node)[0] - 1][_end(node)[1] :].decode().strip()
        parts = {target.id: node.value}
        if isinstance(node.value, ast.Tuple):
            parts = {f"{target.id}[{i}]": part for i, part in enumerate(node.value.elts)}
        for name, part in parts.items():
            if variable := _variable(name, part, _section(lines, node.lineno), comment):
                start, (line, end) = starts[part.lineno - 1] + part.col_offset, _end(part)
                variables[name] = replace(variable, start=start, end=starts[line - 1] + end)
    return tuple(variables.values())


@lru_cache(maxsize=4096)
def structure(source: str) -> str:
    """A digest of all but the values: equal for files that `write` makes of one another."""
    parts, done, content = [], 0, source.encode()
    for variable in read(source):
        parts += [content[done : variable.start], variable.text.encode()]
        done = variable.end
    return hashlib.sha256(re.sub(b" +", b" ", b"".join([*parts, content[done:]]))).hexdigest()


def write(source: str, values: dict[str, object]) -> str:
    """The source with these values in the block, by variable's name; a comment behind one stays in its column if it
    can. KeyError for a name that is not there."""
    variables, content = {variable.name: variable for variable in read(source)}, source.encode()
    for variable in sorted((variables[name] for name in values), key=lambda variable: -variable.start):
        text = variable.written(values[variable.name]).encode()
        rest, longer = content[variable.end :], len(text) - (variable.end - variable.start)
        if behind := re.match(rb"([)\]]?)( +)#", rest):
            rest = behind[1] + b" " * max(2, len(behind[2]) - longer) + rest[behind.end() - 1 :]
        content = content[: variable.start] + text + rest
    return content.decode()


def _head(source: str) -> tuple[str, list[ast.stmt]]:
    """What stands before the first function or class, and its statements."""
    try:
        nodes = ast.parse(source).body
    except SyntaxError:  # perhaps only further down
        definition = re.search(r"^(?:@|class\b|(?:async\s+)?def\b)", source, re.M)
        head = source[: definition.start()] if definition else source
        return head, ast.parse(head).body
    for place, node in enumerate(nodes):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min(part.lineno for part in (node, *node.decorator_list))
            return b"".join(source.encode().splitlines(keepends=True)[: first - 1]).decode(), nodes[:place]
    return source, nodes


def _span(head: str) -> tuple[int, int]:
    """First and last line of the block."""
    headings = [(head.count("\n", 0, match.start()) + 1, match["title"].lower()) for match in HEADING.finditer(head)]
    for i, (line, title) in enumerate(headings):
        if "hyperparameter" in title:
            return line, headings[i + 1][0] if i + 1 < len(headings) else len(head)
    return 1, len(head)


def _end(node: ast.stmt | ast.expr) -> tuple[int, int]:
    """Line, and offset in bytes, where it ends."""
    return node.end_lineno or node.lineno, node.end_col_offset or 0


def _section(lines: list[bytes], number: int) -> str:
    """The comment that begins the paragraph this line is in."""
    while number > 1 and lines[number - 2].strip():
        number -= 1
    return lines[number - 1].decode().strip() if lines[number - 1].startswith(b"#") else ""


def _variable(name: str, node: ast.expr, section: str, comment: str) -> Variable | None:
    if relative := _relative(name, node):
        return relative
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _choice(name, repr(node.value).replace("'", '"'))
    try:
        value = _power_of_two(node) if SIZES.search(name) else None
        value = ast.literal_eval(node) if value is None else value
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return None
    if type(value) not in (int, float) or not abs(value) < MOST:
        return None
    if DECAYS.search(name.split("[")[0]) and 1 - NEAR_ONE <= value < 1:
        return None
    made = _number(name.split("[")[0], value, "fraction" in section.lower())
    most = AT_MOST.search(comment)
    if stated := STATED.search(comment):
        try:
            low, high = float(stated["low"]), float(stated["high"])
        except ValueError:
            return None
        scale = stated["scale"] or made.scale
        if not low < high or scale == "log" and low <= 0:
            return None
        if scale == "log" and value <= 0 and made.kind != "decay":  # zero has no place there
            return None
        kind = "number" if made.kind == "part" or stated["scale"] and made.kind == "decay" else made.kind
        made = replace(made, kind=kind, low=low, high=high, scale=scale, stated=True)
    elif most and int(most[1]) >= value:
        made = replace(made, high=int(most[1]), stated=True)
    return replace(made, name=name) if made.low < made.high else None


def _power_of_two(node: ast.expr) -> int | None:
    """The value of 2**18, say."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and ast.unparse(node.left) == "2":
        exponent = ast.literal_eval(node.right)
        return 2**exponent if type(exponent) is int and 0 <= exponent < 64 else None
    return None


def _number(name: str, value: int | float, in_parts: bool) -> Variable:
    if in_parts and value in (0, 1) or FRACTIONAL.search(name):
        value = float(value)
    if isinstance(value, int):
        if value > 0 and SIZES.search(name) and value & (value - 1) == 0:
            return Variable(name, "size", value, max(1, value // 4), value * 4, "log")
        if value > 12:
            span = 2 if PARTS.search(name) else 4 if value < 100 else FACTOR
            return Variable(name, "whole", value, math.ceil(value / span), int(value * span), "log")
        return Variable(name, "whole", value, max(min(1, value), value - 2), value + 2)
    if (in_parts or PARTS.search(name)) and 0 <= value <= 1:
        return Variable(name, "part", value, 0.0, 1.0 if value else 0.5)
    if DECAYS.search(name) and 0 <= value < 1:
        low = max(0.5 if value > 0.5 else value / 2, 1 - FACTOR * (1 - value))
        return Variable(name, "decay", value, low, _below_one(value, FACTOR), "log")
    if value > 0:
        return Variable(name, "number", value, value / FACTOR, value * FACTOR, "log")
    return Variable(name, "number", value, 2 * value, 0.0) if value else Variable(name, "number", value, 0.0, 0.1)


def too_small(text: str, calibrated: dict) -> str:
    """Which size of a train.py leaves nothing to train, where these are `defaults`: its name, or "" if none does."""
    for variable in read(text):
        size = resolved(variable, calibrated)
        if variable.name in LEAST and isinstance(size, (int, float)) and size < LEAST[variable.name]:
            return variable.name
    return ""


def resolved(variable: Variable, calibrated: Mapping) -> float | int | str | None:
    """Its value on a device, where these are `defaults`: a pattern without quotes. None where that is not known."""
    if variable.kind == "choice":
        pattern = str(variable.value)
        return pattern.strip('"') if pattern.startswith('"') else calibrated.get(pattern.removeprefix("defaults."))
    if not variable.text:
        return variable.value
    name = variable.text.removeprefix("defaults.")
    base = MAX_SEQ_LEN if name == "prepare.MAX_SEQ_LEN" else calibrated.get(name)
    if base is None:
        return None
    value = float(variable.value)
    size = base + value if variable.kind == "more" else base * 2**value
    return int(size) if size == int(size) else size


def effective(text: str, calibrated: Mapping) -> dict[str, float | int | str | None]:
    """The values of a train.py on a device, as far as they do something there, by name: a pattern by layer, the width
    instead of the aspect ratio, the heads of keys and values, the short window only if a layer has one."""
    values: dict = {variable.name: resolved(variable, calibrated) for variable in read(text)}
    depth, pattern = values.get("DEPTH"), values.get("WINDOW_PATTERN")
    if isinstance(depth, int) and pattern and all(line in text for line in WINDOWS):
        layers = range(min(depth - 1, DEEPEST))
        values["WINDOW_PATTERN"] = "".join(str(pattern)[layer % len(str(pattern))] for layer in layers)
        if "S" not in values["WINDOW_PATTERN"]:
            values.pop("SHORT_WINDOW", None)
    ratio, head = values.get("ASPECT_RATIO"), values.get("HEAD_DIM")
    if isinstance(depth, int) and ratio and head and WIDTH in text:
        values["ASPECT_RATIO"] = width = -(-depth * ratio // head) * head
        if values.get("KV_RATIO") and HEADS in text:
            values["KV_RATIO"] = max(1, width // head // values["KV_RATIO"])
    return values


def model(text: str, calibrated: Mapping) -> tuple[str, frozenset]:
    """Equal for train.py that differ in nothing but values, and on a device in none of these."""
    return structure(text), frozenset(effective(text, calibrated).items())


def _below_one(value: float, factor: float) -> float:
    """As much nearer to 1, as far as it can be read again."""
    return max(value, min(1 - (1 - value) / factor, 1 - 2 * NEAR_ONE))


def _relative(name: str, node: ast.expr) -> Variable | None:
    """defaults.depth, or prepare.MAX_SEQ_LEN // 2, say."""
    base, number, operator = node, 0, None
    if isinstance(node, ast.BinOp) and isinstance(node.right, ast.Constant) and type(node.right.value) is int:
        base, number, operator = node.left, node.right.value, type(node.op)
    if not isinstance(base, ast.Attribute) or not isinstance(base.value, ast.Name):
        return None
    text, sign = ast.unparse(base), -1 if operator in (ast.Sub, ast.FloorDiv) else 1
    if base.attr == "window_pattern":
        return None if operator else _choice(name, text)
    if operator in (ast.Add, ast.Sub) or operator is None and re.search(r"depth|layers", base.attr):
        return Variable(name, "more", sign * number, sign * number - 2, sign * number + 4, text=text)
    if operator not in (None, ast.Mult, ast.FloorDiv) or operator and (number < 1 or number & (number - 1)):
        return None
    power = sign * (number.bit_length() - 1) if operator else 0
    high = 0 if base.attr.startswith("MAX_") else power + 3
    return Variable(name, "times", power, power - 3, high, text=text) if high > power - 3 else None


def _choice(name: str, text: str) -> Variable | None:
    """A pattern of windows; other strings mean nothing here."""
    if text.startswith('"') and not re.fullmatch(r'"[SL]+"', text):
        return None
    choices = dict.fromkeys([text, *(f'"{pattern}"' for pattern in PATTERNS)])
    return Variable(name, "choice", text, choices=tuple(choices))
