"""The demo's steps and picture, the console command, and links in documents."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import demo
import terminal

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"])


def test_a_step_keeps_what_a_command_prints_in_the_log(tmp_path, capsys):
    log = tmp_path / "log.txt"
    assert terminal.step("say it", [sys.executable, "-c", "print('a wall of text')"], log, 1) == 0
    said = capsys.readouterr().out
    assert "say it: done in" in said and "wall" not in said and "a wall of text\n" in log.read_text()


def test_a_step_that_fails_shows_the_end_of_the_log(tmp_path, capsys):
    program = "import sys; [print('line', i) for i in range(100)]; sys.exit(3)"
    assert terminal.step("fail", [sys.executable, "-c", program], tmp_path / "log.txt", 1) == 3
    said = capsys.readouterr().out
    assert "fail: FAILED after" in said and "line 99\n" in said and "line 80\n" not in said
    assert str(tmp_path / "log.txt") in said.replace("\n", "")


def test_the_picture_puts_the_better_score_to_the_left_and_shows_the_noise():
    tried = {"kind": "baseline", "status": "keep", "description": "baseline", "val_bpb": 2.6, "reason": None}
    better = {"kind": "change", "status": "discard", "description": "more", "val_bpb": 2.5, "reason": "chance"}
    crashed = better | {"status": "crash", "val_bpb": None, "reason": "it stopped"}
    _, first, second, third, noise, why = demo.picture([tried, better, crashed], noise=0.05)
    assert second.index("●") < first.index("─") < first.index("●") and "2.500000" in second and "±0.050" in noise
    assert "●" not in third and third.endswith("crash") and why == "The verdict is crash: it stopped."
    assert demo.picture([crashed], 0.05) == ["No experiment has a score."]


def test_the_demo_needs_the_line_that_it_changes(tmp_path):
    (tmp_path / "train.py").write_bytes((ROOT / "train.py").read_bytes())
    assert demo.edit(tmp_path / "train.py") and f"\n{demo.AFTER}" in (tmp_path / "train.py").read_text(encoding="utf-8")
    assert not demo.edit(tmp_path / "train.py")


@pytest.mark.parametrize("busy", [[90.0, 3.0], [3.0, 90.0], [3.0, 5.0]])
def test_the_demo_says_when_the_machine_was_busy(monkeypatch, tmp_path, capsys, busy):
    monkeypatch.setattr(demo, "FOLDER", tmp_path / "demo")
    homes = []
    monkeypatch.setattr(demo, "step", lambda *_, env={}, **__: homes.append(env.get("AUTORESEARCH_HOME")) or True)
    monkeypatch.setattr(demo, "edit", lambda _: True)
    monkeypatch.setattr(demo, "asked", lambda command, _: [] if command == "log" else {"noise": {"sd": 0.1}})
    shares = iter(busy)
    monkeypatch.setattr(demo.psutil, "cpu_percent", lambda interval: next(shares))
    assert demo.main() == 0
    assert homes == [demo.SETTINGS["AUTORESEARCH_HOME"] if i != 2 else None for i in range(6)]  # a clone needs none
    said = capsys.readouterr().out
    assert ("other programs took up to 90% of its CPU" in said) == (90.0 in busy)
    assert ("so it will take longer" in said) == (busy[0] == 90.0)


@pytest.mark.parametrize("folder, status", [("docs", 0), ("..", 1)])
def test_the_console_command_finds_the_checkout(folder, status):
    outer = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "autoresearch.py"), "start", "--help"]
    done = subprocess.run(command, cwd=ROOT / folder, env=outer, capture_output=True, text=True, check=False)
    assert done.returncode == status and ("--baseline-runs" in done.stdout) == (status == 0), done.stderr
    assert ("not in a checkout" in done.stderr) == (status == 1)


def anchors(path: Path) -> set[str]:
    """What the headings of a document are linked by on GitHub."""
    text = re.sub(r"(?ms)^```.*?^```", "", path.read_text(encoding="utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        for heading in re.findall(r"(?m)^#+ (.*)$", text)
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = (document.parent / name).resolve() if name else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000
