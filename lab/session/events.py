"""The events of a session: what its journal holds, one a line of JSON, with every fact as a field.

The journal is the session. Everything else (results.tsv, status, exports, reports) is made of these events.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypedDict

import msgspec
from msgspec import Meta, Struct

from lab.genome.kinds import Subject
from lab.reasons import Reason, sentence
from results import RunStatus

Kind = Literal[
    "baseline", "change", "near misses", "joint", "shared", "replay", "repeat", "confirm", "scale", "transfer"
]
Status = Literal["keep", "discard", "crash", "invalid", "superseded"]

Number = Annotated[int, Meta(ge=0, lt=10**9)]
Text = Annotated[str, Meta(max_length=4000)]
Name = Annotated[str, Meta(max_length=200)]
TAG = r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,60}(?<!\.)(?<!\.lock)"  # it names a folder and a branch
Tag = Annotated[str, Meta(pattern=rf"^{TAG}\Z")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{0,64}\Z")]
Commit = Annotated[str, Meta(pattern=r"^[0-9A-Za-z]{0,64}\Z")]
Origin = Annotated[str, Meta(pattern=rf"^({TAG}/{TAG}/[0-9a-f]{{1,64}})?\Z")]  # of a change elsewhere: DEVICE/TAG/ID
Score = Annotated[float, Meta(gt=0)]  # bits per byte
Interval = tuple[float, float, float]  # an estimate, and the ends of its 90 % interval


def is_tag(text: str) -> bool:
    """Whether a text can name a session or a device."""
    return bool(re.fullmatch(TAG, text))


class Gains(TypedDict):
    """The gains in a confirmation, by rows: the best against the baseline, above 0 is better."""

    val_bpb: Interval
    held_out_bpb: Interval


class Evidence(Struct, frozen=True, omit_defaults=True):
    """The numbers of a verdict, in bits per byte.

    Attributes:
        gain: the parent's mean minus the candidate's; above 0 is better. error: its standard error.
        low, high: its 90 % interval. p: of a worthless change doing as well. level: for p, split over the looks.
        runs, parent_runs: how many this rests on. corrected: what the runs' conditions explain (disturbance,
            unusual tokens, the device), left out of the gain.
        better, simpler: why it is kept, if it is.
        near_miss: worth trying together with others. stake, loss: what it costs the session's account.
    """

    gain: float = 0.0
    error: float = 0.0
    low: float = 0.0
    high: float = 0.0
    p: float = 1.0
    level: float = 0.0
    runs: int = 0
    parent_runs: int = 0
    corrected: float = 0.0
    better: bool = False
    simpler: bool = False
    near_miss: bool = False
    stake: float = 0.0
    loss: float = 0.0


class Verdict(Struct, frozen=True, omit_defaults=True):
    """What was decided on an experiment.

    Attributes:
        mean, parent_mean: val_bpb over the runs. evidence: None where nothing was compared.
        gains: of a confirmation. effects: of the patches of a block of shared runs, by origin: below 0 is better, None
            if it made runs fail or far worse.
        judged: False if nothing was learnt of the change.
    """

    status: Status
    reason: Reason
    mean: float | None = None
    parent_mean: float | None = None
    evidence: Evidence | None = None
    gains: Gains | None = None
    effects: dict[str, Interval | None] | None = None
    judged: bool = True

    @property
    def said(self) -> str:
        """The reason in words."""
        return ("" if self.judged else "not judged: ") + sentence(self.reason)

    @property
    def confirmed(self) -> bool | None:
        """Whether a confirmation showed a gain on held-out rows; None if this is none."""
        return self.gains["held_out_bpb"][1] > 0 if self.gains else None


class Event(Struct, kw_only=True, omit_defaults=True, tag_field="event"):
    """`time`: seconds since the epoch."""

    time: Annotated[float, Meta(ge=0, lt=1e11)] = 0.0


class SessionStarted(Event, tag="session"):
    """The begin of a session, and what it is measured with.

    Attributes:
        commit: of the train.py that it began with. budget: seconds of training. eval, data, profile: tags.
        attention_provider: where the profile's attention comes from, None for the framework.
        source: "session", or "ledger" where only an imported results.tsv is known.
    """

    tag: Tag
    device: Tag
    backend: Name = ""
    commit: Commit = ""
    budget: Annotated[float, Meta(gt=0, lt=1e9)] | None = None
    baseline_runs: Number = 0
    dataset: Name = ""
    eval: Name = ""
    data: Name = ""
    profile: Name = ""
    versions: dict[Name, Name] = {}
    sandbox: Name | None = None
    python: Name = ""
    attention_provider: Name | None = None
    source: Literal["session", "ledger"] = "session"
    notes: list[Text] = []


class Patch(Struct, frozen=True, omit_defaults=True):
    """A change found elsewhere, as an edit (genome/edits.py)."""

    origin: Origin
    description: Text
    edit: Annotated[str, Meta(max_length=20_000)]


class ExperimentOpened(Event, tag="experiment"):
    """One change of train.py, or the baseline (number 0), or a confirmation.

    Attributes:
        kind: "replay" is a change from elsewhere on the baseline, "repeat" further runs of one, "scale" runs of the
            baseline for other times, "transfer" the best against the baseline, both of another size; "shared" a block
            of runs that hold several patches each, "joint" those together that did best there.
        blob, parent: git's ids of its train.py and of the one that it is judged against, which experiment `onto` was
            kept for. commit: where it is stored.
        digest, complexity, portable: see genome/syntax.py. change, family: ids, see genome/change.py.
        kinds: what it is about, see genome/kinds.py. diff: a unified diff from parent to blob.
        members: numbers of the near misses that it puts together, of the one that it repeats, or of its block.
        rebased: number of the experiment that it makes again on a newer best.
        patches: of a block, those that its runs may hold; of a joint change, those that it is made of.
        min_runs: seeds that it and its parent are run on at least.
        pairs, budget: of a confirmation; pairs: of a scale, the runs for each time, of a block its runs, of a joint
            change those of it and of its parent.
    """

    number: Number
    kind: Kind
    blob: Digest
    parent: Digest | None = None
    onto: Number | None = None
    commit: Commit = ""
    description: Text = ""
    digest: Digest = ""
    complexity: Number = 0
    portable: bool = True
    change: Digest = ""
    family: Digest = ""
    kinds: list[Subject] = []
    diff: Annotated[str, Meta(max_length=2**21)] = ""
    origin: Origin = ""
    members: list[Number] = []
    rebased: Number | None = None
    patches: list[Patch] = []
    min_runs: Number = 1
    pairs: Number = 0
    budget: float | None = None


class RunStarted(Event, tag="run"):
    """A training of one train.py, for an experiment: its own, its parent's beside it, or one that holds some `patches`
    of its block, by their places. `worker`: the name of the device that makes it, where there are several; "" for the
    session's own."""

    number: Number
    experiment: Number
    blob: Digest
    seed: Annotated[int, Meta(ge=-(2**62), lt=2**62)] | None = None
    budget: float | None = None
    worker: Name = ""
    patches: list[Number] = []


class RunEnded(Event, tag="ran"):
    """How a run ended.

    Attributes:
        status: "lost" if the harness was killed, or ended it because the session was held, or the disk was full.
        result: measures by name, see results.py. seconds: from start to end, as seen from outside.
    """

    run: Number
    status: RunStatus
    reason: Reason | None = None
    result: dict[Name, bool | int | float | Text | dict[Name, float] | None] | None = None
    seconds: float = 0.0
    traceback: Annotated[str, Meta(max_length=20_000)] = ""


class RunScored(Event, tag="scored"):
    """A run's saved weights, scored again in a fresh process.

    Attributes:
        val_bpb, held_out_bpb: None, and why (`problem`), where they could not be.
        rows: sha256 of rows.npz, which has each row's nats and bytes.
        against, error: another scored run, and the standard error of the difference between this run's gain over it on
            validation rows and on held-out rows.
    """

    run: Number
    val_bpb: Score | None = None
    held_out_bpb: Score | None = None
    problem: Reason | None = None
    rows: Digest = ""
    against: Number | None = None
    error: float | None = None


class StakeReserved(Event, tag="staked"):
    """What an open experiment may cost the account of false keeps, fixed when it first goes beyond one run."""

    experiment: Number
    stake: float


class ExperimentJudged(Event, tag="judged"):
    """The verdict is known, and further runs are made that leave it as it is."""

    experiment: Number
    verdict: Verdict


class ExperimentDecided(Event, tag="decided"):
    """The verdict."""

    experiment: Number
    verdict: Verdict


class ExperimentApplied(Event, tag="applied"):
    """All of a verdict is done: `commit` is where the change is; `left_alone` says why train.py was not put back."""

    experiment: Number
    commit: Commit = ""
    left_alone: Reason | None = None


class Sampled(Event, tag="sampled"):
    """What two models wrote after a prompt: that of the baseline, and of `experiment`, the best by then."""

    experiment: Number
    prompt: Text
    baseline: Text
    best: Text


class HarnessFailed(Event, tag="failed"):
    """The lab itself failed at an experiment."""

    experiment: Number


AnyEvent = (
    SessionStarted
    | ExperimentOpened
    | RunStarted
    | RunEnded
    | RunScored
    | StakeReserved
    | ExperimentJudged
    | ExperimentDecided
    | ExperimentApplied
    | Sampled
    | HarnessFailed
)


# --- What an agent or a search did between experiments: night.jsonl ---


class NightBegan(Event, tag="night"):
    """Attributes:
    first: number of its first experiment. deadline: as of time.time(), None without one. asked: the limits as given.
    """

    first: Number
    deadline: float | None = None
    asked: dict[str, float | str | None] = {}


class TurnTaken(Event, tag="turn"):
    """A proposal.

    Attributes:
        by: who made it.
        outcome: "edited" if it gave a train.py to run. Else there is nothing to run, as the agent "failed" (exit
            status), "hung" (time limit), "flooded" (output limit), "asked" (a question, of nobody), wrote "no python",
            changed only files "elsewhere", did "nothing", or made what had been tried "again"; or it was "stopped" or
            "interrupted" with the night, or "unserved" by the service of its model, which is no failure of its own.
        said: what the agent did, on a clean line that goes on from "the agent ...".
        description: of the change, what and why. blob: git's id of the train.py, which is stored; parent: of the best
            that it was made on. origin: of a change found elsewhere.
        experiment: its number. log: path of what was printed. others: files beside train.py that changed.
        reproached: it did something that has no effect; `said` tells what.
        left: processes that it left running. saved: path of what it wrote, where that is not run.
    """

    by: Literal["agent", "proposer", "findings"]
    outcome: Name
    said: Text = ""
    description: Text = ""
    origin: Origin = ""
    blob: Digest = ""
    parent: Digest = ""
    experiment: Number | None = None
    log: str = ""
    others: list[str] = []
    seconds: float = 0.0
    reproached: bool = False
    left: int = 0
    saved: str = ""


class NightEnded(Event, tag="ended"):
    """`why`: in words, for people."""

    why: Text = ""


NightEvent = NightBegan | TurnTaken | NightEnded

EVENTS = msgspec.json.Decoder(AnyEvent)
NIGHT_EVENTS = msgspec.json.Decoder(NightEvent)
