"""What a run reports, once: every measure with its type, unit and meaning, and every refusal by its code.

`prepare.report` prints and writes these measures, the lab checks them, and results.tsv, `lab log`, comparison and
report take their lists from here. To add one: an entry here, and the line in prepare.py that measures it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from string import Formatter
from typing import Literal, NamedTuple

from storage import Stop

RunStatus = Literal["ok", "crash", "invalid", "lost"]  # how a run ended; see lab/run/outcome.py


class Measure(NamedTuple):
    """One fact that a run reports.

    Attributes:
        name: in result.json and in the summary that a run prints.
        type: float, int, bool, str, or dict of names and floats. unit: of a number, "" if it has none.
        summary: the format of its line in the printed summary; "" leaves it out.
        column: its name in results.tsv; "" if it has none. form: the format there.
        scale: what the value is multiplied with for that column.
        needed: a run without it can't be judged or recorded. nullable: it may be unknown.
    """

    name: str
    type: type
    unit: str
    meaning: str
    summary: str = ""
    column: str = ""
    form: str = ""
    scale: float = 1.0
    needed: bool = False
    nullable: bool = False


MEASURES = (
    Measure("val_bpb", float, "bits per byte", "score on the validation rows", ".6f", "val_bpb", ".6f", needed=True),
    Measure("training_seconds", float, "s", "training time", ".1f", "training_seconds", ".1f", needed=True),
    Measure("total_seconds", float, "s", "from the start of the process", ".1f", "total_seconds", ".1f", needed=True),
    Measure("peak_vram_mb", float, "MiB", "peak of memory", ".1f", "memory_gb", ".1f", 1 / 1024, needed=True),
    Measure("mfu_percent", float, "%", "of the measured matmul peak", ".2f", "mfu", ".2f", nullable=True),
    Measure("total_tokens_M", float, "million", "tokens trained on", ".1f", "tokens_M", ".3f", needed=True),
    Measure("num_steps", int, "", "optimizer steps", "d", "steps", "d", needed=True),
    Measure("num_params_M", float, "million", "parameters", ".1f", "params_M", ".3f"),
    Measure("depth", int, "", "transformer layers", "d", "depth", "d"),
    Measure("device", str, "", "tag of the device", "s", "device", needed=True),
    Measure("backend", str, "", "backend that it ran on", "s", "backend", needed=True),
    Measure("profile", str, "", "tag of the calibration", "s", "profile"),
    Measure("eval", str, "", "eval tag: scores compare where it is equal", "s", "eval", needed=True),
    Measure("data", str, "", "data tag: the training documents", "s", "data", needed=True),
    Measure("tokens_per_second", float, "1/s", "training throughput", ".0f", "tok_per_s", ".1f", needed=True),
    Measure("val_rows", int, "", "rows that were scored", "d", "val_rows", "d", needed=True),
    Measure("epochs", int, "", "passes begun over the training data", "d"),
    Measure("speed", float, "", "matmul rate relative to calibration's", ".2f", "speed", ".2f", nullable=True),
    Measure("budget_seconds", float, "s", "training time allowed", "", "budget", "g", needed=True),
    Measure("disturbance", float, "", "time lost to others, by training time", ".2f", "disturbed", ".2f", needed=True),
    Measure("paused_seconds", float, "s", "time in which no process of the run ran", needed=True),
    Measure("probe_seconds", float, "s", "of the clock's probe, undisturbed", nullable=True),
    Measure("clock_rate", float, "Hz", "of a GPU's processors while it trained", nullable=True),
    Measure("step_seconds", dict, "s", "of a step of each kind, undisturbed"),
    Measure("losses", dict, "nats", "training loss by share of the steps, and so of tokens and time"),
    Measure("flops_per_token", float, "FLOP", "FLOP of the model per token, forward and backward"),
    Measure("model_tflops", float, "TFLOP/s", "the model's FLOP per second", "", "tflops", ".4g", nullable=True),
    # by the harness, outside of the run
    Measure("joules", float, "J", "energy of the device while it trained", "", "joules", ".1f", nullable=True),
    Measure("dataset", str, "", "name of the dataset"),
    Measure("initial_weights", str, "", "sketch of the initial weights"),
    Measure("attention_provider", str, "", "where the attention comes from, if not from the framework", nullable=True),
    Measure("compiled", bool, "", "whether the whole step ran compiled", "", "compiled", nullable=True),
    Measure("captured", bool, "", "whether the whole step ran as CUDA graphs", nullable=True),
    Measure("rows_at_once", int, "rows", "that fit, if fewer than a batch", "", "rows_at_once", "d", nullable=True),
)  # fmt: skip
BY_NAME = {measure.name: measure for measure in MEASURES}

# Why a run is refused from within its process, by code. A fact is a finite number, or a short name without blanks.
REFUSALS = {
    # by the clock and the evaluator
    "warm_start": "warm start: the untrained model's loss is {loss:.3f} nats, better than chance ({chance:.3f})",
    "diverged": "the loss is {loss:.4g} at step {step}; at most {limit:.1f} is allowed",
    "batch_before_clock": "it asked for a training batch before a Clock checked the untrained model",
    "trains_before_batch": "it trains before its first batch: to compile, use Trainer.warm_up, which leaves the "
    "weights as they were",
    "trains_after_evaluation": "it trains after its evaluation began",
    "batch_after_evaluation": "it asked for a training batch after the evaluation",
    "overtime": "training went on for {seconds:.1f} s; a budget of {budget:g} s allows {limit:.1f}",
    "evaluated_twice": "this run was evaluated already; a run is scored once",
    "other_rows": "a run is scored on the standard rows: leave out `rows` and `count` where you give a clock",
    "losses_shape": "losses have shape {shape}, the targets {expected}",
    "logits_shape": "logits have shape {shape}, not {expected}",
    "not_finite": "not finite: {count} of {total} losses are NaN or infinite",
    "not_repeatable": "two calls on the same rows differ (by up to {worst:.4f} nats, {mean:.4f} on average)",
    "looks_ahead": "the model looks ahead: losses change with later tokens (by up to {worst:.4f} nats, {mean:.4f} on "
    "average)",
    "sees_targets": "the model sees its targets: it gives random targets a probability of {mean:.4f} on average, and "
    "chance is {chance:.4f}",
    "answers_apart": "the model looks ahead: in a fresh process, with other tokens after the same beginning, its "
    "losses differ (by up to {worst:.4f} nats, {mean:.4f} on average)",
    "mixes_rows": "a row's losses depend on its neighbours in the batch (by up to {worst:.4f} nats, {mean:.4f} on "
    "average)",
    "not_normalised": "not normalised: the probabilities sum to {mean:.4f} on average, and differ from 1 by up to "
    "{worst:.4f}",
    # by the guard of a run
    "reads_data": "it reads {name} itself: data come from prepare, and training batches from prepare.Loader",
    "reads_rows": "it reads the {name} rows: only the evaluator may read them",
    "reads_documents": "it reads the training documents: training batches have to come from prepare.Loader",
    "reads_another_run": "it reads {name}, which another run left: a run starts from nothing",
    "loads_weights": "it loads weights from {name}: a run starts from nothing",
    "imports_safetensors": "it imports safetensors: weights are written by evaluate_bpb, and a run starts from nothing",
    "writes_result": "it writes {name} in its run's folder: only prepare.report may write results",
    "changes_file": "it changes {name}, which belongs to the {owner}",
    "replaces": "it replaces {name}",
    "shadows": "it shadows {name}",
    "other_backend": "its backend, {name}, is not one of backends/",
    "other_clock": "its Clock is not prepare.Clock",
    "second_clock": "it makes a second Clock: a run has only one",
    "batch_by_other_clock": "it takes batches with a clock that is not the run's",
    "other_budget": "its clock allows {told} s; the budget is {budget:g} s",
    "clock_behind": "its clock shows {told} s of training; there were {elapsed:.1f} s",
    "evaluates_without_clock": "it calls evaluate_bpb without the run's clock: a run is scored once, at its end",
    "reports_other_score": "the score that it reports is not the evaluator's",
    "raises_itself": "it raised prepare.{name} itself",
}


def apart(sketch: str, other: str) -> float:
    """How far two `sketch`es of initial weights are apart, for two independent draws about 1, for the same 0; 1 for
    what is no sketch."""
    try:
        pairs = [(a - 256 * (a > 127), b - 256 * (b > 127)) for a, b in zip(*map(bytes.fromhex, (sketch, other)))]
    except ValueError:
        return 1.0
    lengths = sum(a * a + b * b for a, b in pairs)
    return sum((a - b) ** 2 for a, b in pairs) / lengths if lengths else 0.0


class _Lenient(Formatter):
    """Shows "?" for a fact that is missing or unknown, and as it is a fact that its format does not fit."""

    def get_value(self, key, args, kwargs):
        return kwargs.get(str(key))

    def format_field(self, value, format_spec):
        try:
            return "?" if value is None else format(value, format_spec)
        except (ValueError, TypeError):
            return str(value)


def fill(text: str, facts: Mapping) -> str:
    """A sentence of a table with its facts filled in."""
    return _Lenient().vformat(text, (), facts)


class Refusal(Stop):
    """A run ends without a score.

    Args:
        code: one of `REFUSALS`, whose text is what people read. KeyError if it is none.
        facts: what the text names. A number that is not finite becomes a word, such as "nan".

    Attributes:
        reason: {"code": ..., "facts": {...}}, as it is recorded.
    """

    def __init__(self, code: str, **facts: float | str):
        words = {name: f"{fact}" for name, fact in facts.items() if isinstance(fact, float) and not math.isfinite(fact)}
        self.reason = {"code": code, "facts": facts | words}
        super().__init__(fill(REFUSALS[code], self.reason["facts"]))


class Invalid(Refusal):
    """The clock or the evaluator refuses to score this run."""


class Diverged(Refusal):
    """The training loss is not finite, or exploded."""
