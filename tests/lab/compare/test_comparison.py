"""Sessions side by side: facts, changes joined, agreement, kinds; and all of it as text and JSON."""

import json
from collections import Counter

import pytest
from records import EVAL, Builder, analysed, session

from lab.compare import published, tables
from lab.compare.analysis import Analysis, sort_of
from lab.compare.comparison import CHANGE, compare
from lab.errors import LabError
from lab.reasons import because
from lab.session.events import Patch

H100, CPU, M4 = "nvidia-h100-80gb", "cpu-amd-epyc-2c-24gb", "apple-m4-16gb"
A, B = f"{1:016x}", f"{2:016x}"
BIG = [
    ("baseline", 0.998, "keep"),
    ("halve batch 524K to 262K (more steps in 5 min)", 0.986, "keep"),
    ("add 5% warmup", 0.987, "discard"),
    ("batch 131K (assert fail: not divisible)", None, "crash"),
    ("matrix LR 0.04 to 0.05", 0.988, "discard"),
    ("warmdown 0.5 to 0.7", 0.981, "keep"),
]
SMALL = [
    ("baseline", 2.7, "keep"),
    ("lower weight decay to 0.1", 2.75, "discard"),
    ("halve total batch size to 2^16", 2.6, "keep"),
    ("increase matrix LR to 0.05", 2.55, "keep"),
    ("reduce depth from 8 to 4", 1.9, "keep"),
]


def ledger(device, rows, tag="mar8"):
    """What a ledger of five columns tells: a run for each row, and no ids."""
    facts = {"eval": "", "total_tokens_M": None}
    builder = Builder(device, tag, facts, 0.0, source="ledger", backend="", budget=None, eval="")
    builder.baseline([rows[0][1]], budget=None)
    best = 0
    for number, (description, score, status) in enumerate(rows[1:], 1):
        runs = [] if score is None else [score]
        builder.change(number, runs, status, onto=best, change="", description=description, runs={"budget": None})
        best = number if status == "keep" else best
    return builder


@pytest.fixture
def ledgers():
    return [analysed(ledger(H100, BIG), None), analysed(ledger(M4, SMALL), None)]


def shown_and_replayed(there, source=(-0.010,) * 3, known=True, **facts):
    """A change that H100 kept, measured again there if `known`, and replayed on the CPU with these effects."""
    first = session(H100, "night").change(1, [0.98], "keep", change=A, kinds=["schedule"])
    if known:
        first.again(2, 1, [1 + effect for effect in source]).again(2, 0, [1.0] * 3)
    copy = session(CPU, "copy").replay(1, [1 + effect for effect in there], f"{H100}/night/{A}", **facts)
    return analysed(first), analysed(copy)


def cell(compared, place=CPU):
    (change,) = compared.shared
    return change.cells[place]


def test_ledgers_without_ids_are_counted_row_by_row(ledgers):
    compared = compare(ledgers)
    for facts, rows in zip(compared.facts()["sessions"], (BIG, SMALL)):
        statuses, kept = [row[2] for row in rows], [row[1] for row in rows if row[2] == "keep"]
        assert facts["source"] == "ledger" and facts["noise"] is None
        scored = sum(row[1] is not None for row in rows)
        assert (facts["rows"], facts["experiments"]) == (scored, len(rows) - 1)
        assert Counter(facts["counts"]) + Counter(keep=1) == Counter(statuses)
        assert (facts["baseline"]["val_bpb"], facts["best"]["val_bpb"]) == (kept[0], kept[-1])
        assert facts["gain"] == pytest.approx(kept[0] - kept[-1])
    assert compared.sessions[1].relative == pytest.approx(0.8 / 2.7)


def test_words_join_where_there_is_nothing_else_and_are_said_to(ledgers):
    compared = compare(ledgers)
    assert all(change.joined == "words" and not change.source for change in compared.shared)
    assert [tuple(cell.description for cell in change.cells.values()) for change in compared.shared] == [
        ("halve batch 524K to 262K (more steps in 5 min)", "halve total batch size to 2^16"),
        ("matrix LR 0.04 to 0.05", "increase matrix LR to 0.05"),
    ]
    assert {c.verdict for change in compared.shared for c in change.cells.values()} == {""}
    (pair,) = compared.agreements
    assert pair.joined == "words" and (pair.n, pair.same, pair.rho) == (2, 1, None)
    text = tables.text(compared)
    assert "Matched by the description alone: perhaps the same change" in text and text.count("unconfirmed") >= 4


@pytest.mark.parametrize(
    "there, said",
    [((-0.011, -0.009, -0.010), "holds"), ((0.0, 0.001, -0.001), "fades"), ((0.010, 0.009, 0.010), "reverses")],
)
def test_a_replay_is_joined_by_its_origin_and_classed(there, said):
    compared = compare(shown_and_replayed(there))
    (change,) = compared.shared
    assert (change.key, change.source, change.joined, change.kind) == (A, H100, "change", "schedule")
    assert change.cells[H100].verdict == "source" and change.cells[H100].effect.value == pytest.approx(-0.010)
    assert cell(compared).verdict == said
    assert change.cells[CPU].tried == [f"{CPU}/copy #1 discard"]


def test_what_was_not_measured_since_is_shown_and_not_believed():
    compared = compare(shown_and_replayed((-0.010,) * 3, known=False))
    assert cell(compared, H100).effect.biased and cell(compared, H100).effect.value == pytest.approx(-0.02)
    assert cell(compared).verdict == "can't be told" and cell(compared).more["source"] > 0
    text = " ".join(tables.text(compared).split())
    assert "biased by selection" in text and f"python -m lab replay {H100}/night --runs 3" in text


def test_what_was_discarded_looks_worse_beside_a_parent_that_is_biased():
    """And no replay takes it: none is asked for."""
    first = session(H100, "night").change(1, [0.98], "keep", change=A).change(2, [0.985], onto=1, change=B)
    compared = compare([analysed(first), analysed(session(CPU, "own").change(1, [1.01], change=B))])
    (change,) = compared.shared
    assert change.source == H100 and change.cells[CPU].why == "its parent there is biased by selection"
    text = tables.text(compared)
    assert "its parent is biased by selection" in text and "lab replay" not in text


def test_a_replay_on_its_own_device_measures_the_source():
    first, copy = shown_and_replayed((-0.010,) * 3, known=False)
    again = analysed(session(H100, "again").replay(1, [0.990, 0.991, 0.989], f"{H100}/night/{A}"))
    compared = compare([first, again, copy])
    effect = cell(compared, H100).effect
    assert effect.value == pytest.approx(-0.010) and not effect.biased
    assert len(cell(compared, H100).tried) == 2 and cell(compared).verdict == "holds"
    alone = compare([again, copy])  # the session itself is not at hand
    assert cell(alone).verdict == "holds" and alone.shared[0].source == H100
    assert tables.transfer(compare([first, again])).startswith(f"Both are of {H100}: ")
    assert f"  A: {H100}\n  B: {CPU}\n\nThe same change" in tables.transfer(compare([first, copy]))


def test_without_its_source_nothing_is_claimed():
    copies = [analysed(session(d, "copy").replay(1, [0.99] * 3, f"{H100}/night/{A}")) for d in (CPU, M4)]
    compared = compare(copies)
    assert compared.shared[0].source == "" and {c.verdict for c in compared.shared[0].cells.values()} == {""}
    assert compared.agreements[0].same == 1


def test_two_that_made_the_same_change_are_joined_by_its_id():
    one = session(H100, "a").change(1, [0.99] * 3, change=A).change(2, [1.01] * 3, change=B)
    other = session(CPU, "b").change(7, [0.98] * 3, change=A)
    compared = compare([analysed(one), analysed(other)])
    assert [change.key for change in compared.shared] == [A] and len(compared.changes) == 2
    assert compared.shared[0].source == H100


def test_a_family_is_shown_as_probably_the_same_and_nothing_is_claimed_of_it():
    def of(device, tag, change, family="a" * 16):
        return analysed(session(device, tag).change(1, [0.99] * 3, change=change, family=family))

    compared = compare([of(H100, "a", A), of(CPU, "b", B)])
    (change,) = compared.shared
    assert (change.joined, change.source, list(change.cells)) == ("family", "", [H100, CPU])
    assert {c.verdict for c in change.cells.values()} == {""}
    assert [pair.joined for pair in compared.agreements] == ["family"]
    assert "Probably the same change" in tables.text(compared)
    assert [c.joined for c in compare([of(H100, "a", A), of(CPU, "b", A)]).shared] == ["change"]
    assert compare([of(H100, "a", A), of(CPU, "b", B, "b" * 16)]).shared == []
    # Where one of three has another id, the family is shown beside what the id joins.
    three = compare([of(H100, "a", A), of(CPU, "b", A), of(M4, "c", B)])
    assert [(c.joined, len(c.cells)) for c in three.shared] == [("change", 2), ("family", 3)]


def test_another_backend_or_evaluator_or_budget_on_one_device_is_another_place():
    def of(tag, facts=None, **started):
        return analysed(session(CPU, tag, facts=facts, **started).change(1, [0.99] * 3, change=A))

    compared = compare([of("a"), of("b", backend="mlx"), of("c")])
    assert compared.places == [f"{CPU} (sdpa)", f"{CPU} (mlx)"] and len(compared.shared[0].cells) == 2
    compared = compare([of("a"), of("d", {"eval": "f" * 12})])
    assert compared.places == [f"{CPU} (eval eeeeee)", f"{CPU} (eval ffffff)"]
    assert any("same evaluator" in note for note in compared.notes)
    assert tables.text(compared).count("Measured by evaluator") == 2  # no scores beside each other
    short = analysed(Builder(CPU, "e", budget=60.0).baseline(budget=60.0))
    assert compare([of("a"), short]).places[1] == f"{CPU} (60 s)"


def test_facts_of_a_session():
    facts = {"flops_per_token": 1e6}
    builder = session(CPU, "a", base=[1.0, 1.0, 1.0], facts=facts, time=1e9)
    builder.change(1, [0.98, 0.98], "keep", runs={"total_tokens_M": 2.0}).change(2, [], "crash", onto=1)
    builder.confirm(3, 1, [0.985, 0.987], [1.0, 1.002], (0.015, 0.01, 0.02))
    analysis = analysed(builder)
    (facts,) = compare([analysis]).facts()["sessions"]
    baseline, best = facts["baseline"], facts["best"]
    assert (baseline["val_bpb"], best["val_bpb"], best["number"]) == (1.0, 0.98, 1)
    assert facts["relative"] == pytest.approx(0.02)
    assert (facts["experiments"], facts["counts"], facts["rows"]) == (2, {"keep": 1, "crash": 1}, 9)
    assert facts["hours"] == pytest.approx(9 * 340 / 3600) and facts["per_hour"] == pytest.approx(2 / facts["hours"])
    assert (baseline["tokens"], best["tokens"]) == (1e6, 1.5e6)  # of all runs, confirmations too
    assert (baseline["flops"], best["flops"]) == (1e12, 1.5e12)
    assert facts["confirmed"]["value"] == pytest.approx(0.986 - 1.001)
    assert facts["confirmed"]["error"] == pytest.approx(0.001)
    assert (facts["noise"]["sd"], facts["noise"]["df"]) == (0.001, 10)
    assert facts["confirmation"].startswith("on held-out rows and 2 new seeds")
    assert analysis.confirmation.verdict.confirmed and not analysis.kept_since


def test_runs_belong_to_the_train_py_that_they_are_of():
    """A parent's beside an experiment, further runs and confirmations too, whatever experiment they were made for."""
    builder = session().change(1, [0.9], "keep").change(2, [0.95], onto=1).again(2, 1, [0.91], seed=43)
    builder.again(3, 2, [0.96]).confirm(4, 1, [0.92], [1.01])
    analysis = Analysis(builder.record())
    assert {n: [run.bpb for run in runs] for n, runs in analysis.runs.items()} == {
        0: [1.0, 1.0, 1.0, 1.01],
        1: [0.9, 0.91, 0.92],
        2: [0.95, 0.96],
    }
    assert analysis.scores == pytest.approx({0: 1.0, 1: 0.905, 2: 0.955})
    assert [run.experiment for run in analysis.runs[1] if analysis.confirms(run)] == [4]


def test_the_noise_is_what_the_session_estimates():
    from lab.verdict.plan import noise_of

    builder = session(base=[1.0, 1.01, 0.99]).change(1, [0.9, 0.93, 0.94], "keep").change(2, [0.5, 0.1], "invalid")
    assert Analysis(builder.record()).noise is noise_of(builder.state)  # of the verdicts


def test_of_runs_of_one_seed_the_last_counts():
    """Shared runs hold the bare parent again and again, on one seed."""
    once = session(base=[1.0, 1.01, 0.99]).again(2, 0, [1.0, 1.02]).change(1, [1.0, 1.01, 0.99])
    again = session(base=[1.0, 1.01, 0.99]).again(2, 0, [1.5, 1.02]).change(1, [1.0, 1.01, 0.99])
    for i in range(12):
        again.again(2, 0, [1.5 - 0.001 * i], seed=50)
    again.again(2, 0, [1.0], seed=50)
    wanted, found = Analysis(once.record()), Analysis(again.record())
    assert found.noise == wanted.noise and found.scores == wanted.scores and len(found.runs[0]) == 18
    assert found.effect(found.experiments[1]) == wanted.effect(wanted.experiments[1])


def test_what_only_resembles_a_finding_is_no_trial_of_it():
    half = next(finding for finding in published.library() if finding.name == "half-batch")
    tried = [
        session(device, "n").change(1, [0.9] * 3, origin=half.origin, description=half.title) for device in (CPU, M4)
    ]
    words = [("baseline", 1.0, "keep"), ("halve total batch size", 0.9, "keep")]
    compared = compare([*map(analysed, tried), analysed(ledger(H100, words), None)])
    assert [list(one.change.cells) for one in compared.published] == [[CPU, M4]]
    assert all(change.joined != CHANGE for change in compared.shared)


def test_a_block_is_told_as_it_was_estimated():
    half = next(finding for finding in published.library() if finding.name == "half-batch")

    def screened(*effect, runs=1):
        block = session(CPU)
        block.open(1, "shared", patches=[Patch(half.origin, half.title, half.edit.text)], pairs=60)
        for seed in range(runs):
            block.run(1, 1.0, of=0, seed=200 + seed)
        block.decide(1, "discard", because("screened_in_vain", runs=runs, patches=1), effects={half.origin: effect})
        return compare([analysed(block)]).published

    ((_, cell),) = screened(-0.0043, -0.0162, 0.0017)[0].change.cells.items()
    assert (cell.effect.value, cell.effect.low, cell.effect.high) == (-0.0043, -0.0162, 0.0017)
    assert screened(-0.004, -0.004, -0.004) == screened(-0.004, -0.006, -0.002, runs=0) == []


def test_a_session_without_a_score():
    compared = compare([analysed(session(CPU, "a", base=()).change(1, [], "crash"), noise=None)])
    (facts,) = compared.facts()["sessions"]
    assert facts["gain"] is facts["baseline"] is facts["confirmed"] is None
    assert "crashed" in tables.text(compared)


def test_kinds_by_sort_of_device():
    one = session(H100, "a").change(1, [0.98] * 3, "keep", kinds=["batch", "schedule"])
    one.change(2, [1.02] * 3, kinds=["batch"]).change(3, [], "crash", kinds=["architecture"])
    compared = compare([analysed(one), analysed(session(CPU, "b"))])
    paid = {(paid.kind, paid.sort): paid for paid in compared.kinds}
    assert paid.keys() == {("batch", "nvidia datacentre"), ("architecture", "nvidia datacentre")}
    batch, failed = paid["batch", "nvidia datacentre"], paid["architecture", "nvidia datacentre"]
    assert (batch.tried, batch.kept, batch.crashed) == (2, 1, 0) and batch.median == pytest.approx(0.0, abs=1e-9)
    assert failed.median is None and failed.crashed == 1


@pytest.mark.parametrize(
    "device, sort",
    [
        ("nvidia-h100-80gb-hbm3-80gb", "nvidia datacentre"),
        ("nvidia-a100-sxm4-80gb", "nvidia datacentre"),
        ("nvidia-h200-141gb", "nvidia datacentre"),
        ("nvidia-gb200-192gb", "nvidia datacentre"),
        ("nvidia-rtx-3090-24gb", "nvidia desktop"),
        ("nvidia-rtx-a6000-48gb", "nvidia desktop"),
        ("nvidia-titan-v-12gb", "nvidia desktop"),
        ("nvidia-l40s-48gb", "nvidia datacentre"),
        ("nvidia-gh200-96gb", "nvidia datacentre"),
        ("nvidia-a10g-24gb", "nvidia datacentre"),
        ("nvidia-gb10-120gb", "nvidia desktop"),
        ("nvidia-jetson-agx-orin-64gb", "jetson"),
        ("apple-m4-16gb", "apple"),
        ("cpu-amd-epyc-2c-24gb", "cpu"),
        ("fake-1gb", "other"),
    ],
)
def test_sorts(device, sort):
    assert sort_of(device) == sort


def test_agreement_over_what_both_measured():
    one, other = session(H100, "a"), session(CPU, "b")
    for number, effect in enumerate([-0.01, -0.005, 0.0, 0.005, 0.01], 1):
        one.change(number, [1 + effect] * 3)
        other.change(number, [1 + 2 * effect] * 3)
    other.change(9, [], "crash", change="9" * 16)
    (pair,) = compare([analysed(one), analysed(other)]).agreements
    assert (pair.n, pair.same, pair.share[0], pair.biased) == (5, 5, 1.0, 0)
    assert pair.share[1] < 1 == pair.share[2] and pair.rho[0] == pytest.approx(1.0) and pair.rho[1] < 1


def test_scores_against_tokens_and_flops():
    builder = session(CPU, "a", facts={"total_tokens_M": 2.0, "flops_per_token": 1e6})
    compared = compare([analysed(builder.change(1, [0.9], "keep", runs={"total_tokens_M": 3.0}))])
    (section,) = (section for section in tables.sections(compared) if section.name == "steps")
    rows = [row[1:5] for row in section.parts[0].rows]
    assert rows == [("0", "1.000000", "2", "0.002"), ("1", "0.900000", "3", "0.003")]
    assert "val_bpb against tokens and FLOPs" in tables.text(compared)


def test_nothing_and_the_same_twice_are_refused():
    with pytest.raises(LabError, match="at least one"):
        compare([])
    with pytest.raises(LabError, match="twice"):
        compare([analysed(session(CPU, "a")), analysed(session(CPU, "a"))])


def test_text_is_narrow_and_hides_no_codes():
    hostile = "\x1b[31mred\x1b[0m \u202eevil" + "x" * 500
    first = session(H100, "night").change(1, [0.98], "keep", change=A, description=hostile, kinds=[hostile[:200]])
    copy = session(CPU, "copy", backend="\x1b[2J").replay(1, [0.999, 1.001, 1.0], f"{H100}/night/{A}")
    for noise in (0.001, None):
        text = tables.text(compare([analysed(first, noise), analysed(copy, noise)]))
        assert "\x1b" not in text and "\u202e" not in text and "red evil" in text
        assert max(map(len, text.splitlines())) <= 120


def test_odd_figures_break_nothing():
    for odd in ({"val_bpb": -1.0}, {"val_bpb": "1"}, {"total_tokens_M": 1e308}, {"mfu_percent": 1e308}, {"eval": 7}):
        builder = session(CPU, "a").change(1, [0.9] * 2, "keep", runs=odd)
        compared = compare([Analysis(builder.record())])
        json.dumps(compared.facts(), allow_nan=False)
        assert tables.text(compared).replace("\n", "").isprintable()


def test_facts_are_json():
    facts = compare(shown_and_replayed((-0.010,) * 3)).facts()
    assert json.loads(json.dumps(facts, allow_nan=False)) == json.loads(json.dumps(facts))
    assert facts["changes"][0]["cells"][CPU]["verdict"] == "holds"
    assert facts["sessions"][0]["eval"] == EVAL


def test_one_ledger_under_two_names_is_said(ledgers):
    for device, tag in ((M4, "mar8"), (H100, "copy")):
        twice = compare([analysed(ledger(H100, BIG), None), analysed(ledger(device, BIG, tag), None)])
        assert any("hold the same scores: one may be a copy" in note for note in twice.notes)
    assert not any("same scores" in note for note in compare(ledgers).notes)


def test_a_session_in_which_nothing_got_a_score_says_nothing_of_kinds():
    failed = session(CPU, "a", base=()).change(1, [], "crash", kinds=["batch"])
    assert compare([analysed(failed, noise=None)]).kinds == []


def test_sessions_with_nothing_in_common_are_told_side_by_side_and_as_such():
    one = session(H100, "a").change(1, [0.98] * 3, "keep", kinds=["batch"])
    other = session(CPU, "b", eval="f" * 12, budget=12.0).change(1, [0.9] * 3, "keep", change="d" * 16, family="e" * 16)
    compared = compare([analysed(one), analysed(other)])
    assert not compared.shared and not compared.agreements
    text = " ".join(tables.text(compared).split())
    assert (
        "No change was tried in more than one of these places" in text
        and "effects are compared, scores are not" in text
    )
    assert all(cell.times is None for change in compared.changes for cell in change.cells.values())


def kept_of(device, tag, counts, **facts):
    """A session in which so many of those tried of each kind were kept, each for 1 % of the baseline."""
    builder, best, number = session(device, tag, **facts), 0, 0
    for kind, (kept, tried) in counts.items():
        for i in range(tried):
            number += 1
            score = 1 - 0.01 * (number if i < kept else 0)
            builder.change(number, [score], "keep" if i < kept else "discard", onto=best, kinds=[kind])
            best = number if i < kept else best
    return analysed(builder)


def test_a_kind_that_is_kept_more_often_on_each_sort_of_device_is_said_to_be():
    counts = {"batch": (12, 14), "schedule": (4, 30)}
    compared = compare([kept_of(H100, "a", counts), kept_of(CPU, "b", counts)])
    told = {one.kind: one for one in compared.across}
    assert (told["batch"].told, told["schedule"].told) == ("more often", "less often")
    assert told["batch"].overall[0] == pytest.approx(12 * 26 / (2 * 4))
    assert compare([kept_of(H100, "a", counts), kept_of("nvidia-a100-80gb", "b", counts)]).across == []


def test_a_kind_that_is_kept_more_often_here_and_less_often_there_differs():
    one, other = {"batch": (12, 14), "schedule": (4, 30)}, {"batch": (2, 30), "schedule": (12, 14)}
    told = {each.kind: each.told for each in compare([kept_of(H100, "a", one), kept_of(CPU, "b", other)]).across}
    assert told == {"batch": "differs", "schedule": "differs"}
    few = {"batch": (1, 2), "schedule": (1, 3)}
    compared = compare([kept_of(H100, "a", few), kept_of(CPU, "b", few)])
    assert {each.told for each in compared.across} == {"can't be told"}


def test_what_was_gained_by_kind_adds_up_and_stands_beside_the_steps():
    sessions = [
        kept_of(CPU, f"s{steps}", {"batch": (1, 1 + i), "optimizer": (1, 2)}, facts={"num_steps": steps, **size})
        for i, (steps, size) in enumerate([(900, {}), (100, {"num_params_M": 0.25}), (300, {}), (500, {})])
    ]
    for analysis in sessions:
        assert sum(analysis.gain_by_kind.values()) == pytest.approx(analysis.relative)
    compared = compare(sessions)
    (table,) = (part for part in tables._gains(compared.sessions) if not isinstance(part, str))
    assert [row[1:4] for row in table.rows] == [(f"s{n}", str(n), str(n)) for n in (100, 300, 500, 900)]
    assert [row[4] for row in table.rows] == ["4", "-", "-", "-"] and table.heads[5:] == ("optimizer", "batch")
    text = tables.kinds_text(compared)
    assert "over 4 sessions" in text and "batch" in text and "val_bpb against tokens" not in text


def test_what_rests_on_single_runs_and_on_words_is_counted(ledgers):
    (said, *_) = (part for part in tables._paid(compare(ledgers)) if isinstance(part, str))
    assert "Of 9 experiments 8 have a score, 8 of these from a single run" in said
    assert "What 9 of them change is known from their descriptions alone" in said
