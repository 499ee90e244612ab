"""What a run reports, once: every measure with its type, unit and meaning, and every refusal by its code.

`prepare.report` prints and writes these measures, the lab checks them, and results.tsv, `lab log`, comparison and
report take their lists from here. To add one: an entry here, and the line in prepare.py that measures it.
"""

from __future__ import annotations

from typing import NamedTuple


class Measure(NamedTuple):
    """One fact that a run reports.

    Attributes:
        name: in result.json and in the summary that a run prints.
        type: float, int, bool or str. unit: of a number, "" if it has none.
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
    Measure("eval", str, "", "eval tag: scores compare within one", "s", "eval", needed=True),
    Measure("data", str, "", "data tag: the training documents", "s", "data", needed=True),
    Measure("tokens_per_second", float, "1/s", "training throughput", ".0f", "tok_per_s", ".1f", needed=True),
    Measure("val_rows", int, "", "rows that the score is of", "d", "val_rows", "d", needed=True),
    Measure("epochs", int, "", "passes over the training documents that were begun", "d"),
    Measure("speed", float, "", "matmul rate relative to calibration's", ".2f", "speed", ".2f", nullable=True),
    Measure("budget_seconds", float, "s", "training time allowed", "", "budget", "g", needed=True),
    Measure("tokens_per_second_last_quarter", float, "1/s", "throughput in the last quarter"),
    Measure("flops_per_token", float, "FLOP", "the model's, forward and backward"),
    Measure("model_tflops", float, "TFLOP/s", "the model's FLOP per second", "", "tflops", ".4g", nullable=True),
    Measure("dataset", str, "", "name of the dataset"),
    Measure("initial_weights", str, "", "fingerprint of the initial weights"),
    Measure("attention_provider", str, "", "where the attention comes from, if not from the framework", nullable=True),
    Measure("compiled", bool, "", "whether the whole step ran compiled", "", "compiled", nullable=True),
    Measure("rows_at_once", int, "rows", "that fit into memory, if fewer than a batch", "", "rows_at_once", "d", nullable=True),
)  # fmt: skip
BY_NAME = {measure.name: measure for measure in MEASURES}

# Why the clock or the evaluator refuses a run, by code: {facts} are numbers and names.
REFUSALS: dict[str, str] = {}
