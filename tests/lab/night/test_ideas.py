"""What the agent is asked for, over sessions whose verdicts are written down."""

from lab.night import ideas


def test_nothing_is_asked_of_a_fresh_session(searched):
    assert ideas.requests(searched.state) == [] and ideas.named(searched.state) == []


def test_kinds_that_were_not_tried(searched, tried):
    tried("MATRIX_LR = 0.04", "MATRIX_LR = 0.05")
    tried("MATRIX_LR = 0.04", "MATRIX_LR = 0.06")
    tried("DEPTH = 4", "DEPTH = 5")
    assert ideas.untried(searched.state) == (
        "Not tried yet: schedule, batch, regularisation (tried: optimizer 2, architecture 1)."
    )
    tried("BATCH_SIZE = 8", "BATCH_SIZE = 4")
    tried("WARMUP_RATIO = 0.0", "WARMUP_RATIO = 0.1")
    tried("WEIGHT_DECAY = 0.1", "WEIGHT_DECAY = 0.2")
    tried("WEIGHT_DECAY = 0.1", "WEIGHT_DECAY = 0.3")
    assert ideas.untried(searched.state).startswith("Tried least lately: architecture (optimizer 2, regularisation 2")


def test_only_what_was_tried_lately_counts(searched, tried, monkeypatch):
    monkeypatch.setattr(ideas, "LOOKED_BACK", 2)
    tried("BATCH_SIZE = 8", "BATCH_SIZE = 4")
    tried("DEPTH = 4", "DEPTH = 5")
    tried("DEPTH = 4", "DEPTH = 6")
    assert ideas.untried(searched.state).startswith("Not tried lately: optimizer, schedule, batch, regularisation")


def test_near_misses(searched, tried):
    assert ideas.near_misses(searched.state) is None
    one = tried("MATRIX_LR = 0.04", "MATRIX_LR = 0.05", t=1.2, near_miss=True)
    tried("LEAK = 0.0", "LEAK = 0", t=-1.2)
    assert ideas.near_misses(searched.state).startswith(
        f"Experiment {one} looked better and could not be told from chance"
    )
    two = tried("DEPTH = 4", "DEPTH = 5", t=1.5, near_miss=True)
    three = tried("BATCH_SIZE = 8", "BATCH_SIZE = 4", t=1.1, near_miss=True)
    said = ideas.near_misses(searched.state)
    assert said.startswith(f"Experiments {two}, {one} and {three} looked better") and "as one change" in said
    assert ideas.named(searched.state) == [one, two, three]
    for e in searched.state.experiments.values():
        e.members = [one, two, three] if e.number == three else []
    assert ideas.near_misses(searched.state)  # members of another kind of experiment: a repeat, say
    searched.state.experiments[three].kind = "near misses"
    assert ideas.near_misses(searched.state) is None


def test_good_but_too_complex(searched, tried):
    tried("DEPTH = 4", "DEPTH = 5", t=0.9)
    assert ideas.too_complex(searched.state) is None
    code = "DEPTH = 4\n\n\ndef helper(a, b):\n    c = a * b + a - b\n    return [c for _ in range(a)]\n"
    one = tried("DEPTH = 4", code, t=0.6)
    tried("DEPTH = 4", code.replace("helper", "helps"), t=0.1)
    assert ideas.too_complex(searched.state).startswith(f"Experiment {one} looked a little better and added code")


def test_a_plateau_asks_for_one_thing_after_another(searched, tried):
    kept = tried("DEPTH = 4", "DEPTH = 5", "keep", t=5)
    for i in range(ideas.PATIENCE - 3):
        tried("MATRIX_LR = 0.04", f"MATRIX_LR = 0.{i + 5:03d}", t=-i)
    assert ideas.plateau(searched.state) is None
    numbers = [tried("BATCH_SIZE = 8", f"BATCH_SIZE = {i + 20}", t=0.1 * (i + 1)) for i in range(3)]
    said = []
    for i in range(3):
        said.append(ideas.plateau(searched.state))
        tried("WARMUP_RATIO = 0.0", f"WARMUP_RATIO = 0.{i + 1}")
    assert sorted(text.split(". ")[1].split(":")[0].split(" that")[0] for text in said) == [
        "This time be bold",
        "This time combine",
        "This time take something away",
    ]
    combine = next(text for text in said if "combine" in text)
    assert f"Experiments {numbers[2]}, {numbers[1]} and {numbers[0]} came closest" in combine
    assert any(f"Experiment {kept} was kept" in text for text in said)
    tried("DEPTH = 5", "DEPTH = 6", "keep", t=5)
    assert ideas.plateau(searched.state) is None


def test_a_session_that_keeps_seldom_is_on_a_plateau_later(searched, tried):
    for i in range(14):
        tried("MATRIX_LR = 0.04", f"MATRIX_LR = 0.{i + 5:03d}")
    tried("DEPTH = 4", "DEPTH = 5", "keep", t=5)
    for i in range(ideas.PATIENCE):
        tried("MATRIX_LR = 0.04", f"MATRIX_LR = 0.{i + 5:03d}")
    assert ideas.plateau(searched.state) is None
