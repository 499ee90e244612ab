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
    "not_examined": "it was not scored by the harness",
    "other_data": "it opens another dataset than the session's, {name}: say prepare.open_data() and no more; for "
    "another dataset start another session, with AUTORESEARCH_DATA",
    "changed_weights": "its weights are not those that it was scored with",
    "other_watch": "it says that it trained for {told:.1f} s; the harness counted {seconds:.1f} s",
    "slow_saving": "it took {seconds:.1f} s to save its weights, which is no training time",
    "no_clock": "train.py made no Clock",
    "scoring_raised": "{error}: score.log in the run's folder says more",
    "no_scores": "its scores are no positive numbers",
    # The verdict (verdict/gate.py, verdict/plan.py)
    "baseline": "the baseline",
    "not_run": "not run yet",
    "parent_not_run": "its parent has no runs",
    "not_a_number": "a score that is not a finite number can't be compared",
    "tested": "{amount:.6f} bits per byte {direction} than its parent ({t:.1f} standard errors, {runs} against "
    "{parent_runs} runs): p = {p:.2g}, at most {share:.2g} is required",
    "simpler": "simpler, and {amount:.6f} bits per byte {direction} than its parent ({t:.1f} standard errors, {runs} "
    "against {parent_runs} runs): a loss above {loss:.6f} is excluded, {allowed:.6f} is allowed",
    "moved": "what it was made on is no longer the best: experiment {best} is, and it is made again on that",
    "simpler_and_equal": "simpler, and its score is its parent's to the last bit, on {seeds} of the same seeds",
    "not_worth_it": "{amount:.6f} bits per byte {direction} than its parent ({t:.1f} standard errors, {runs} against "
    "{parent_runs} runs): another run is expected to gain {pays:.6f} bits per byte, at least {asked:.6f} is required",
    "worth_another_run": "worth another run: {amount:.6f} bits per byte {direction} than its parent ({t:.1f} standard "
    "errors, {runs} against {parent_runs} runs)",
    "parent": "the parent again, beside experiment {of}",
    "further_runs": "as experiment {of}, of which these are further runs",
    "screened": "{runs} shared runs of {patches} patches: {chosen} look better together, and are tested as one",
    "screened_in_vain": "{runs} shared runs of {patches} patches: none looks better",
    "mostly_bad": "{runs} shared runs of {patches} patches: so many make a run far worse that each is tried alone",
    "plainly_good": "{runs} shared runs of {patches} patches: {what} is plainly better, and goes on alone",
    "confirmed": "on held-out rows and {pairs} new seeds the best is {gain:+.6f} bits per byte better than the "
    "baseline (90 % interval {low:+.6f} to {high:+.6f})",
    "compared": "{what}: on held-out rows and {pairs} new seeds {gain:+.6f} bits per byte better than what it is "
    "compared with (90 % interval {low:+.6f} to {high:+.6f})",
    "resized": "the baseline in another size",
    "scaled": "the baseline for other times of training: {points}",
    "same_start": "it starts from the same weights, or nearly, whatever AUTORESEARCH_SEED says: chance could not be "
    "told from gain. Draw them from SEED, as train.py does; a fixed start of some parameters is fine",
    "not_scored_again": "its saved weights could not be scored again: {problem}",
    "other_score": "it reported {reported:.6f}; its saved weights, scored again, have {again:.6f}",
    "not_held_out": "its gain is not on held-out rows: {gain:+.6f} bits per byte on validation rows, {held:+.6f} on "
    "those it can't have seen",
    "other_conditions": "the run was made under other conditions: {what}",
    "other_attention": "it ran with attention from {now}, its parent with that from {before}. Bring that back, and run "
    "this again; or start another session",
    "parent_fails": "its parent does not run any more: {why}",
    "interrupted": "it was interrupted {times} times: does it bring the machine down?",
    "harness_failed": "the lab failed at it {times} times; see supervisor.log in the session's folder, and "
    "please report it",
    "changed_judge": "it changed the judge's files, which were put back: {files}",
    "changed_ledger": "it changed the ledger, which was put back",
    "suspect": "the devices {workers} were lost while they ran it: does it bring them down?",
    # Runs that are made again (verdict/executor.py, fleet/pool.py)
    "device_lost": "the device was lost",
    "weights_lost": "the device that had its weights was lost",
    "device_differs": "the device does not measure as the session's does: {what}",
    "killed": "the harness was killed",
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
