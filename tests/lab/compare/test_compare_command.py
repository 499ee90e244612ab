"""The command: sessions from wherever they are kept, as text and as JSON."""

import json

import pytest

from lab import __main__ as main

H100, M4 = "nvidia-h100-80gb", "apple-m4-16gb"
BIG = """commit\tval_bpb\tmemory_gb\tstatus\tdescription
baseline\t0.998000\t44.0\tkeep\tbaseline
b1\t0.986000\t43.9\tkeep\thalve batch 524K to 262K (more steps in 5 min)
b3\t0.000000\t0.0\tcrash\tbatch 131K (assert fail: not divisible)
b5\t0.981000\t60.2\tkeep\twarmdown 0.5 to 0.7
"""
SMALL = """commit\tval_bpb\tmemory_gb\tstatus\tdescription
s0\t2.700000\t26.9\tkeep\tbaseline
s2\t2.600000\t26.9\tkeep\thalve total batch size to 2^16
"""


@pytest.fixture
def ledgers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAB_TURN", "1")  # an agent may ask for it in its turn
    for name, text in (("big", BIG), ("small", SMALL)):
        (tmp_path / f"{name}.tsv").write_text(text)
    return ["big.tsv", "small.tsv"]


def test_the_originals_ledgers_are_compared(ledgers, capsys):
    assert main.main(["compare", *ledgers, "--device", H100, "--device", M4]) == 0
    text = capsys.readouterr().out
    assert "Matched by the description alone: perhaps the same change" in text and text.count("unconfirmed") >= 2
    assert main.main(["compare", *ledgers, "--device", H100, "--device", M4, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [session["rows"] for session in facts["sessions"]] == [4, 2]
    assert facts["sessions"][0]["counts"] == {"keep": 2, "crash": 1} and facts["sessions"][0]["noise"] is None
    assert facts["sessions"][1]["relative"] == pytest.approx(0.1 / 2.7)
    assert main.main(["compare", *ledgers, "--device", H100, "--device", M4, "--json", "--kinds"]) == 0
    assert json.loads(capsys.readouterr().out) == facts["kinds"] != []


def test_what_is_missing_is_named(ledgers, capsys):
    assert main.main(["compare", *ledgers, "--device", H100]) == 1
    assert "--device" in capsys.readouterr().err
    assert main.main(["compare", "nowhere"]) == 1
    assert "there is no session nowhere" in capsys.readouterr().err


def test_the_kinds_alone_and_as_a_picture(ledgers, tmp_path, capsys):
    command = ["compare", *ledgers, "--device", H100, "--device", M4, "--kinds", "--svg", "kinds.svg"]
    assert main.main(command) == 0
    text = capsys.readouterr().out
    assert "Odds of being kept" in text and "By its words" not in text and "note:" not in text
    drawn = (tmp_path / "kinds.svg").read_bytes()
    assert all(word in drawn for word in (b"<svg", b"batch", b"schedule", b"apple", b"1/2"))
    assert main.main(command) == 0 and (tmp_path / "kinds.svg").read_bytes() == drawn
    (tmp_path / "kinds.svg").write_text("mine")
    capsys.readouterr()
    assert main.main(command) == 1 and "was not written by this command" in capsys.readouterr().err
