"""Why something was decided: a code with its facts. Sentences are made of them here, and nowhere else.

What is recorded and compared is the code and the facts. A sentence may be reworded at any time.
"""

from __future__ import annotations

import msgspec

from results import REFUSALS, fill


class Reason(msgspec.Struct, frozen=True, omit_defaults=True):
    """A code of TEXTS, and the facts that its sentence names: numbers, names, and other reasons."""

    code: str
    facts: dict[str, bool | int | float | str | Reason | None] = {}

    def __str__(self) -> str:
        return sentence(self)


def because(code: str, **facts: bool | int | float | str | Reason | None) -> Reason:
    """A reason. KeyError for a code that has no sentence."""
    TEXTS[code]
    return Reason(code, facts)


TEXTS: dict[str, str] = {
    **REFUSALS,
    # What a run ended with, as seen from outside of it
    "not_believed": "the run gives a reason for its end that is not one of the judge's",
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
    "claims_training": "it claims {told:.1f} s of training; it ran for {seconds:.1f} s, with a budget of {budget:g} s",
    "no_weights": "it left no weights",
    "not_examined": "the harness did not score it",
    "other_data": "it opens another dataset than the session's, which is {name}: call prepare.open_data() without a "
    "name. For another dataset, set AUTORESEARCH_DATA and start another session",
    "changed_weights": "the weights that it left are not the ones that were scored",
    "other_watch": "it reports {told:.1f} s of training; the harness measured {seconds:.1f} s",
    "slow_saving": "saving its weights took {seconds:.1f} s: too long for saving alone",
    "no_clock": "train.py made no Clock",
    "scoring_raised": "{error}: score.log in the run's folder says more",
    "no_scores": "its scores are not positive numbers",
    # The verdict (verdict/gate.py, verdict/plan.py)
    "baseline": "the baseline",
    "not_run": "not run yet",
    "parent_not_run": "its parent has no runs",
    "not_a_number": "a score that is not a finite number can't be compared",
    "tested": "{amount:.6f} bits per byte {direction} than its parent ({t:.1f} standard errors; runs: {runs}, of its "
    "parent {parent_runs}): p = {p:.2g}, a keep needs at most {share:.2g}",
    "simpler": "simpler, and {amount:.6f} bits per byte {direction} than its parent ({t:.1f} standard errors; runs: "
    "{runs}, of its parent {parent_runs}): a loss above {loss:.6f} is excluded, {allowed:.6f} is allowed",
    "moved": "the best has changed since it was made: if it can be merged, it is made again on experiment {best}",
    "simpler_and_equal": "simpler, and its score is exactly its parent's (seeds compared: {seeds})",
    "not_worth_it": "{amount:.6f} bits per byte {direction} than its parent ({t:.1f} standard errors; runs: {runs}, "
    "of its parent {parent_runs}). Another run is not worth it: expected gain {pays:.6f}, needed {asked:.6f}",
    "worth_another_run": "worth another run: {amount:.6f} bits per byte {direction} than its parent ({t:.1f} "
    "standard errors; runs: {runs}, of its parent {parent_runs})",
    "parent": "the parent of experiment {of}, run again",
    "further_runs": "the verdict of experiment {of}; these are further runs of it",
    "screened": "{runs} shared runs of {patches} findings: {chosen} look better, and are tested together as one change",
    "screened_in_vain": "{runs} shared runs of {patches} findings: none looks better",
    "mostly_bad": "{runs} shared runs of {patches} findings: many make a run far worse, so each is tried alone",
    "plainly_good": "{runs} shared runs of {patches} findings: {what} is plainly better, and is tried alone",
    "confirmed": "on held-out rows and {pairs} new seeds the best is {gain:+.6f} bits per byte better than the "
    "baseline (90 % interval {low:+.6f} to {high:+.6f})",
    "compared": "{what}: on held-out rows and {pairs} new seeds {gain:+.6f} bits per byte better than what it is "
    "compared with (90 % interval {low:+.6f} to {high:+.6f})",
    "pairs_replaced": "{said}; pairs replaced, as one run got far more or less training than others: {replaced}",
    "resized": "in another size, for what is compared with it; it is not judged",
    "scaled": "the baseline with other training times: {points}",
    "same_start": "it starts from (nearly) the same weights with every AUTORESEARCH_SEED, so a gain could not be "
    "told from chance. Draw the initial weights from SEED, as train.py did; fixed values are fine for some",
    "not_scored_again": "its saved weights could not be scored again: {problem}",
    "other_score": "it reported {reported:.6f}; its saved weights, scored again, give {again:.6f}",
    "not_held_out": "its gain does not hold on held-out rows: {gain:+.6f} bits per byte on validation rows, "
    "{held:+.6f} on held-out rows, which it can't have seen",
    "other_conditions": "the run was made under other conditions: {what}",
    "other_attention": "its attention came from {now}, and that of its parent from {before}. Bring back {before} and "
    "run this again, or start another session",
    "parent_fails": "its parent no longer runs: {why}",
    "interrupted": "it was interrupted {times} times: it may crash the machine",
    "harness_failed": "the lab itself failed {times} times while it ran this; see supervisor.log in the session's "
    "folder, and please report it",
    "changed_judge": "it changed the judge's files, which were put back: {files}",
    "changed_ledger": "it changed the ledger, which was put back",
    "suspect": "the devices {workers} were lost while they ran it: it may crash them",
    # Runs that are made again (verdict/executor.py, fleet/pool.py)
    "device_lost": "the device was lost",
    "weights_lost": "the device that had its weights was lost",
    "device_differs": "the device does not measure as the session's does: {what}",
    "killed": "the harness was killed",
    "not_begun": "the run could not be begun",
    "disk_full": "the disk was full",
    "paused": "the session was paused",
    "stopped": "the night ended",
    # As somebody's ledger has it (share/ledgers.py)
    "told": "{words}",
    # After the verdict (session/repository.py)
    "edited_meanwhile": "train.py was edited meanwhile, and was left as it is",
    "no_train": "{branch} has no train.py: it was left as it is",
    "not_checked_out": "{branch} is not checked out; go back to it: git switch {branch}",
}


def sentence(reason: Reason | None) -> str:
    """A reason in words; "" for none. A code that this version does not know is shown as it is."""
    if reason is None:
        return ""
    text = TEXTS.get(reason.code)
    if text is None:
        return f"{reason.code} ({', '.join(f'{name} {value}' for name, value in reason.facts.items())})"
    return fill(text, reason.facts)
