"""What other sessions kept is named where it was not tried here and applies as it is."""

import sessions
from test_prompt import PROGRAM

import storage
from lab.night import findings, prompt
from lab.verdict.executor import supervise


def other(tmp_path, train, tag, **edits):
    """Another session of this home, which kept something."""
    one = sessions.make(tmp_path / tag, train=train, tag=tag)
    supervise(one)
    content = one.repository.train()
    for name, (old, new) in edits.items():
        content = content.replace(f"{name} = {old}".encode(), f"{name} = {new}".encode())
    sessions.attempt(one, content, f"from {tag}")
    assert one.state.best.number == 1
    return one


def test_what_was_kept_elsewhere(searched, tried, tmp_path):
    train = searched.repository.train()
    assert findings.untried(searched) == []
    other(tmp_path, train, "better", LOSS=(1.0, 0.8), WARMUP_RATIO=(0.0, 0.1))
    other(tmp_path, train, "here", LOSS=(1.0, 0.9))
    (storage.home() / "imported" / "gpu" / "broken").mkdir(parents=True)
    (storage.home() / "imported" / "gpu" / "broken" / "journal.jsonl").write_text("no journal\n")
    found = findings.untried(searched)
    assert sorted(one.description for one in found) == ["from better", "from here"]
    text = prompt.write(searched, PROGRAM, [])
    assert "# Kept elsewhere, not tried here" in text and "-WARMUP_RATIO = 0.0\n+WARMUP_RATIO = 0.1" in text
    tried("LOSS = 1.0", "LOSS = 0.9")  # now it was tried here
    assert [one.description for one in findings.untried(searched)] == ["from better"]
    tried("WARMUP_RATIO = 0.0", "WARMUP_RATIO = 0.2", "keep")  # and now that no longer applies
    assert findings.untried(searched) == []
