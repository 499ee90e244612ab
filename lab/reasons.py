"""Why something was decided: a code with its facts. Sentences are made of them here, and nowhere else.

What is recorded and compared is the code and the facts. A sentence may be reworded at any time.
"""

from __future__ import annotations

import msgspec

from results import REFUSALS, fill

Fact = bool | int | float | str | None


class Reason(msgspec.Struct, frozen=True, omit_defaults=True):
    """A code of TEXTS, and the facts that its sentence names."""

    code: str
    facts: dict[str, Fact] = {}

    def __str__(self) -> str:
        return sentence(self)


def because(code: str, **facts: Fact) -> Reason:
    """A reason. KeyError for a code that has no sentence."""
    TEXTS[code]
    return Reason(code, facts)


# What a run ended with, as seen from outside of it.
OF_A_RUN = {
    "not_believed": "it was refused; the reason that it gives is not the judge's",
    "timeout": "timeout: not done after {seconds:.0f} s, with {budget:g} s for training",
    "flooded": "it printed more than {most} MB",
    "memory": "memory: it used {used_mb:,.0f} MB; at most {most_mb:,.0f} MB are allowed",
    "left_processes": "processes that it left running: {count}",
    "no_result": "it ended without a result: prepare.report was not called",
    "raised": "{error}",
    "killed_by_signal": "killed by {signal}",
    "killed_for_memory": "killed by {signal}: most likely out of memory",
    "exit_status": "exit status {status}",
    "result_lacks": "its result lacks {names}, or they are of the wrong kind",
    "bpb_not_positive": "val_bpb is {val_bpb}",
    "trained_with_other_budget": "it trained with a budget of {told:g} s instead of {budget:g} s",
    "claims_training": "it claims {told:.1f} s of training, in {seconds:.1f} s and with a budget of {budget:g} s",
    "claims_total": "it claims to have taken {told:.1f} s; it took {seconds:.1f} s",
    "no_weights": "it left no weights",
    "no_clock": "train.py made no Clock",
    "scoring_raised": "{error}: score.log in the run's folder says more",
    "no_scores": "its scores are no positive numbers",
}

TEXTS: dict[str, str] = {
    **REFUSALS,
    **OF_A_RUN,
}


def sentence(reason: Reason | None) -> str:
    """A reason in words; "" for none. A code that this version does not know is shown as it is."""
    if reason is None:
        return ""
    text = TEXTS.get(reason.code)
    if text is None:
        return f"{reason.code} ({', '.join(f'{name} {value}' for name, value in reason.facts.items())})"
    return fill(text, reason.facts)
