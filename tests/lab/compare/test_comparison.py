"""Sessions side by side: facts, changes joined, agreement, kinds; and all of it as text and JSON."""

import csv
import io
import json
import os
import random
import subprocess
import sys

import pytest
import sessions
from records import change, record, replay, trials

from lab.compare import comparison, show, sources
from lab.compare.comparison import compare, sort_of
from lab.errors import LabError

H100, CPU = "nvidia-h100-80gb", "cpu-amd-epyc-2c-24gb"
A, B = f"{1:016x}", f"{2:016x}"
# Of the original's form; scores are made up.
BIG = """commit\tval_bpb\tmemory_gb\tstatus\tdescription
baseline\t0.998000\t44.0\tkeep\tbaseline
b1\t0.986000\t43.9\tkeep\thalve batch 524K to 262K (more steps in 5 min)
b2\t0.987000\t60.2\tdiscard\tadd 5% warmup
b3\t0.000000\t0.0\tcrash\tbatch 131K (assert fail: not divisible)
b4\t0.988000\t60.2\tdiscard\tmatrix LR 0.04 to 0.05
b5\t0.981000\t60.2\tkeep\twarmdown 0.5 to 0.7
"""
SMALL = """commit\tval_bpb\tmemory_gb\tstatus\tdescription
s0\t2.700000\t26.9\tkeep\tbaseline
s1\t2.750000\t26.9\tdiscard\tlower weight decay to 0.1
s2\t2.600000\t26.9\tkeep\thalve total batch size to 2^16
s3\t2.550000\t26.9\tkeep\tincrease matrix LR to 0.05
s4\t1.900000\t20.7\tkeep\treduce depth from 8 to 4
"""


@pytest.fixture
def ledgers(tmp_path):
    for name, text in (("big", BIG), ("small", SMALL)):
        (tmp_path / f"{name}.tsv").write_text(text)
    return [str(tmp_path / "big.tsv"), str(tmp_path / "small.tsv")]


def found_and_replayed(there, *, source=(-0.010,) * 3, known=True, **facts):
    """A change that H100 kept, measured again there if `known`, and replayed on the CPU with these effects."""
    after = {"after": trials([1 + one for one in source], beside=2)} if known else {}
    first = record(
        H100,
        "night",
        change(1, [0.98], "keep", patch=A, kinds=("schedule",), **after),
        after=trials([1.0] * 3, beside=2) if known else (),
    )
    return first, record(CPU, "copy", replay(1, [1 + one for one in there], f"{H100}/night/{A}", **facts))


def cell(found, place=CPU):
    (one,) = found.shared
    return one.cells[place]


def test_ledgers_without_tags_are_counted_from_the_files_themselves(ledgers):
    found = compare(sources.read_all(ledgers, [H100, "apple-m4-16gb"]))
    for facts, text in zip(found.sessions, (BIG, SMALL)):
        rows = list(csv.DictReader(io.StringIO(text), delimiter="\t"))
        statuses = [row["status"] for row in rows]
        kept = [float(row["val_bpb"]) for row in rows if row["status"] == "keep"]
        assert facts.rows == len(rows) == facts.experiments + 1
        assert (facts.kept + 1, facts.discarded, facts.crashed) == tuple(
            map(statuses.count, ("keep", "discard", "crash"))
        )
        assert (facts.baseline, facts.best) == (kept[0], kept[-1])
        assert facts.gain == pytest.approx(kept[0] - kept[-1]) and facts.noise is None and not facts.tagged
        assert facts.keep_rate == facts.kept / facts.experiments
    assert found.sessions[1].relative == pytest.approx(0.8 / 2.7)


def test_words_join_where_there_is_nothing_else_and_are_said_to(ledgers):
    found = compare(sources.read_all(ledgers, [H100, "apple-m4-16gb"]))
    assert all(one.by_words and not one.source for one in found.shared)
    assert [tuple(one.texts.values()) for one in found.shared] == [
        ("halve batch 524K to 262K (more steps in 5 min)", "halve total batch size to 2^16"),
        ("matrix LR 0.04 to 0.05", "increase matrix LR to 0.05"),
    ]
    assert {c.verdict for one in found.shared for c in one.cells.values()} == {""}
    (pair,) = found.agreements
    assert pair.by_words and (pair.n, pair.same, pair.rho) == (2, 1, None)
    text = show.text(found)
    assert "By its words: probably the same change" in text and text.count("unconfirmed") >= 4


@pytest.mark.parametrize(
    "there, said",
    [((-0.011, -0.009, -0.010), "holds"), ((0.0, 0.001, -0.001), "fades"), ((0.010, 0.009, 0.010), "reverses")],
)
def test_a_replay_is_joined_by_its_origin_and_classed(there, said):
    found = compare(found_and_replayed(there))
    (one,) = found.shared
    assert (one.key, one.source, one.by_words, one.kinds) == (A, H100, False, ("schedule",))
    assert one.cells[H100].verdict == "source" and one.cells[H100].effect.value == pytest.approx(-0.010)
    assert cell(found).verdict == said
    assert one.cells[CPU].tried == [f"{CPU}/copy #1 discard"]


def test_what_was_not_measured_since_is_shown_and_not_believed():
    found = compare(found_and_replayed((-0.010,) * 3, known=False))
    assert cell(found, H100).effect.flattered and cell(found, H100).effect.value == pytest.approx(-0.02)
    assert cell(found).verdict == "can't be told" and cell(found).more["source"] > 0
    text = show.text(found)
    assert "flatters itself" in text and f"python -m lab replay {H100}/night --runs 3" in text


def test_what_was_discarded_looks_worse_beside_a_parent_that_flatters_itself():
    """And no replay takes it: none is asked for."""
    first = record(H100, "night", change(1, [0.98], "keep", patch=A), change(2, [0.985], parent=1, patch=B))
    found = compare([first, record(CPU, "own", change(1, [1.01], patch=B))])
    (one,) = found.shared
    assert one.source == H100 and one.cells[CPU].why == "its parent there flatters itself"
    text = show.text(found)
    assert "against a parent that flatters itself" in text and "lab replay" not in text


def test_a_replay_on_its_own_device_measures_the_source():
    first, copy = found_and_replayed((-0.010,) * 3, known=False)
    again = record(H100, "again", replay(1, [0.990, 0.991, 0.989], f"{H100}/night/{A}"))
    found = compare([first, again, copy])
    assert cell(found, H100).effect.value == pytest.approx(-0.010) and not cell(found, H100).effect.flattered
    assert len(cell(found, H100).tried) == 2 and cell(found).verdict == "holds"
    alone = compare([again, copy])  # the session itself is not at hand
    assert cell(alone).verdict == "holds" and alone.shared[0].source == H100
    assert show.transfer(compare([first, again])).startswith(f"Both are of {H100}: ")


def test_without_its_source_nothing_is_claimed():
    copies = [record(device, "copy", replay(1, [0.99] * 3, f"{H100}/night/{A}")) for device in (CPU, "apple-m4-16gb")]
    found = compare(copies)
    assert found.shared[0].source == "" and {c.verdict for c in found.shared[0].cells.values()} == {""}
    assert found.agreements[0].same == 1


def test_two_that_found_the_same_are_joined_by_patch():
    one = record(H100, "a", change(1, [0.99] * 3, patch=A), change(2, [1.01] * 3, patch=B))
    other = record(CPU, "b", change(7, [0.98] * 3, patch=A))
    found = compare([one, other])
    assert [shared.key for shared in found.shared] == [A] and len(found.changes) == 2
    assert found.shared[0].source == H100


def test_another_backend_or_evaluator_or_budget_on_one_device_is_another_place():
    def session(tag, **facts):
        return record(CPU, tag, change(1, [0.99] * 3, patch=A), **facts)

    found = compare([session("a"), session("b", backend="mlx"), session("c")])
    assert found.places == [f"{CPU} (sdpa)", f"{CPU} (mlx)"] and len(found.shared[0].cells) == 2
    other = record(CPU, "d", change(1, [0.99], patch=A))
    other.changes = {
        n: comparison.Change(**{**vars(c), "trials": trials([1.0], eval="f" * 12)}) for n, c in other.changes.items()
    }
    found = compare([session("a"), other])
    assert found.places == [f"{CPU} (eval eeeeee)", f"{CPU} (eval ffffff)"]
    assert any("same evaluator" in note for note in found.notes)
    assert show.text(found).count("Measured by evaluator") == 2  # no scores beside each other
    short = record(CPU, "e", budget=60.0)
    assert compare([session("a"), short]).places[1].startswith(f"{CPU} (60 s")


def test_facts_of_a_session():
    confirms = {"confirms": True, "beside": 3}
    best = change(1, [0.98, 0.98], "keep", tokens=2e6, after=trials([0.985, 0.987], tokens=2e6, **confirms))
    session = record(
        CPU,
        "a",
        best,
        change(2, [], "crash", parent=1),
        tokens=1e6,
        hours=2.0,
        rows=11,
        after=trials([1.0, 1.002], tokens=1e6, **confirms),
        confirmation="it is",
    )
    (facts,) = compare([session]).sessions
    assert (facts.baseline, facts.best, facts.best_number) == (1.0, 0.98, 1) and facts.relative == pytest.approx(0.02)
    assert (facts.experiments, facts.kept, facts.crashed, facts.rows, facts.per_hour) == (2, 1, 1, 11, 1.0)
    assert facts.keep_rate == facts.crash_rate == 0.5 and facts.tokens == (1e6, 2e6) and facts.flops == (1e12, 2e12)
    assert facts.confirmed.value == pytest.approx(0.986 - 1.001) and facts.confirmed.error == pytest.approx(0.001)
    assert (facts.noise, facts.df, facts.confirmation) == (0.001, 10, "it is")


def test_a_session_without_a_score():
    session = record(CPU, "a", change(1, [], "crash"), base=(), noise=None)
    (facts,) = compare([session]).sessions
    assert facts.gain is facts.baseline is facts.confirmed is None
    assert "crashed" in show.text(compare([session]))


def test_kinds_by_sort_of_device():
    one = record(
        H100,
        "a",
        change(1, [0.98] * 3, "keep", kinds=("batch", "schedule")),
        change(2, [1.02] * 3, parent=0, kinds=("batch",)),
        change(3, [], "crash", kinds=("architecture",)),
    )
    found = {(paid.kind, paid.sort): paid for paid in compare([one, record(CPU, "b")]).kinds}
    assert found.keys() == {("batch", "nvidia datacentre"), ("architecture", "nvidia datacentre")}
    batch = found["batch", "nvidia datacentre"]
    assert (batch.tried, batch.kept) == (2, 1) and batch.median == pytest.approx(0.0, abs=1e-9)
    assert found["architecture", "nvidia datacentre"].median is None


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
    effects = [-0.01, -0.005, 0.0, 0.005, 0.01]
    one = record(H100, "a", *(change(i + 1, [1 + e] * 3, patch=f"{i:016x}") for i, e in enumerate(effects)))
    other = record(
        CPU,
        "b",
        *(change(i + 1, [1 + 2 * e] * 3, patch=f"{i:016x}") for i, e in enumerate(effects)),
        change(9, [], "crash", patch="9" * 16),
    )
    (pair,) = compare([one, other]).agreements
    assert (pair.n, pair.same, pair.share, pair.flattered) == (5, 5, 1.0, 0) and pair.rho == pytest.approx(1.0)
    assert pair.share_low < 1 == pair.share_high and pair.rho_low < 1


def test_scores_against_tokens_and_flops():
    session = record(CPU, "a", change(1, [0.9], "keep", tokens=3e6), tokens=2e6)
    points = compare([session]).points
    assert [(p.number, p.bpb, p.tokens, p.flops) for p in points] == [(0, 1.0, 2e6, 2e12), (1, 0.9, 3e6, 3e12)]
    assert "val_bpb against tokens and FLOPs" in show.text(compare([session]))


def test_nothing_and_the_same_twice_are_refused():
    with pytest.raises(LabError, match="at least one"):
        compare([])
    with pytest.raises(LabError, match="twice"):
        compare([record(CPU, "a"), record(CPU, "a")])


def test_text_is_narrow_and_hides_no_codes():
    hostile = "\x1b[31mred\x1b[0m \u202eevil" + "x" * 500
    first, copy = found_and_replayed((-0.001, 0.001, 0.0))
    first.changes[1] = comparison.Change(**{**vars(first.changes[1]), "description": hostile})
    text = show.text(compare([first, copy]))
    assert "\x1b" not in text and "\u202e" not in text and "red evil" in text
    assert max(map(len, text.splitlines())) <= 120


def test_facts_are_json():
    found = compare(found_and_replayed((-0.010,) * 3)).facts()
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
    assert found["changes"][0]["cells"][CPU]["verdict"] == "holds"


def test_the_command_works_outside_of_a_session(ledgers, tmp_path):
    def lab(*arguments):
        program = sessions.ROOT / "lab" / "__main__.py"
        return subprocess.run(
            [sys.executable, str(program), "compare", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"LAB_TURN": "1"},
        )

    done = lab(*ledgers, "--device", H100, "--device", "apple-m4-16gb", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["sessions"][0]["rows"] == 6
    done = lab(*ledgers, "--device", H100)
    assert done.returncode == 1 and "--device" in done.stderr and done.stdout == ""
    done = lab("nowhere")
    assert done.returncode == 1 and "there is no session nowhere" in done.stderr


@pytest.fixture(scope="module")
def simulation():
    sys.path.insert(0, str(sessions.ROOT / "benchmarks"))
    try:
        import compare as module
    finally:
        sys.path.remove(str(sessions.ROOT / "benchmarks"))
    return module


def test_where_nothing_does_anything_nothing_is_found(simulation):
    counts, wrong, changes = simulation.outcomes("nothing", 3, 12)
    assert changes > 50 and wrong <= 0.05 * changes


def test_on_identical_devices_what_is_told_is_that_it_holds(simulation):
    counts, wrong, changes = simulation.outcomes("same", 5, 5)
    assert wrong <= 0.05 * changes
    held = simulation.share(counts, "B", ("holds",), lambda right: (right,))
    assert held > 0.6
    naive = simulation.naive("same", 8)
    assert simulation.share(naive, "B", ("holds",), lambda right: ("fades", "reverses")) > 0.1


def test_planted_truths_are_recovered(simulation):
    counts, _, _ = simulation.outcomes("mixed", 5, 12)
    for truth in ("holds", "fades", "reverses"):
        its = {said: sum(counts[name, truth, said] for name in "BCD") for said in simulation.CLASSES}
        false = {"holds": ("fades", "reverses"), "fades": ("holds", "reverses"), "reverses": ("holds",)}[truth]
        assert its[truth] > 0.3 * sum(its.values()) and sum(its[said] for said in false) < 0.1 * sum(its.values())


def test_runs_make_the_difference(simulation):
    few, many = (simulation.outcomes("same", runs, 4)[0] for runs in (1, 6))
    assert simulation.share(many, "C", ("holds",), lambda right: (right,)) > simulation.share(
        few, "C", ("holds",), lambda right: (right,)
    )


def test_the_simulated_runs_have_the_effects_they_should(simulation):
    device = simulation.Device("A", "t", {"x": -0.004}, random.Random(0))
    number = device.add("x", 0)
    device.judge(number, 0, fewest=200)
    found = compare([device.record()]).changes[0].cells["A"].effect
    assert found.runs == 200 and abs(found.value + 0.004) < 4 * found.error
