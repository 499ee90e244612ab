"""`lab check` finds what would cost a run, in seconds, and gives no score."""

import re
from pathlib import Path

import pytest
from sessions import made_up_profile

from lab.run import check, processes

ROOT = Path(check.__file__).resolve().parents[2]
SMALL = {"ASPECT_RATIO = 64": "ASPECT_RATIO = 32", "HEAD_DIM = 128": "HEAD_DIM = 32"}
# What is wrong: (edits of train.py, what is said of it).
BROKEN = {
    "a name in a branch of the schedule": (
        {"multiplier = cooldown +": "multiplier = cool_down +"},
        "NameError: name 'cool_down'",
    ),
    "a shape": ({"self.c_proj = nn.Linear(4 * width, width)": "self.c_proj = nn.Linear(3 * width, width)"}, "RuntimeE"),
    "a parameter in no group": (
        {"self.lm_head = nn.Linear": "self.gain = nn.Parameter((width,))\n        self.lm_head = nn.Linear"},
        "gain",
    ),
    "a look ahead": (
        {"return x + self.mlp(ops.rms_norm(x))": "return x + self.mlp(ops.rms_norm(x + ops.roll(x, -1, axis=1)))"},
        "looks ahead",
    ),
    "a look at neighbours": (
        {"return x + self.mlp(ops.rms_norm(x))": "return x + self.mlp(ops.rms_norm(x + ops.roll(x, 1, axis=0)))"},
        "neighbours|looks ahead|sees its targets",
    ),
    "layers in a plain list": (
        {"self.blocks = nn.ModuleList(": "self.blocks = list("},
        "holds a Block in a plain list",
    ),
    "names that can be read once": ({"dict(names=matrices,": "dict(names=(n for n in matrices),"}, "no list"),
    "fewer tokens than a row has": (
        {"TOTAL_BATCH_SIZE = defaults.total_batch_size": "TOTAL_BATCH_SIZE = 1024"},
        "1024",
    ),
    "a batch that can't be divided": (
        {"TOTAL_BATCH_SIZE = defaults.total_batch_size": "TOTAL_BATCH_SIZE = 10000"},
        "TOTAL_BATCH_SIZE",
    ),
    "no number": ({"ops.square(ops.relu(self.c_fc(x)))": "ops.log(self.c_fc(x))"}, "not finite"),
    "a state that is not kept": (
        {"dict(mean=mean, square=square, step=step)": "dict(mean=mean, step=step)"},
        "square",
    ),
    "an argument of another framework": (
        {"ops.logsumexp(logits, axis=-1)": "ops.logsumexp(logits, dim=-1)"},
        "TypeError",
    ),
    "a rate beyond all measure": ({"UNEMBEDDING_LR = 0.004": "UNEMBEDDING_LR = 4000"}, "the loss is"),
    "a loop without end": ({"while not clock.finished:": "while True:"}, "clock.finished"),
    "no report": ({"    prepare.report(": "    str("}, "prepare.report was not called|TypeError"),
}


def train(folder: Path, edits: dict[str, str]) -> Path:
    """The real train.py, small and edited, in a file."""
    source = (ROOT / "train.py").read_text()
    for old, new in {**SMALL, **edits}.items():
        assert old in source
        source = source.replace(old, new)
    path = folder / "train.py"
    path.write_text(source)
    return path


@pytest.fixture
def settings(isolated_home) -> dict[str, str]:
    """With a profile, as a session's: nothing of the device has to be tried."""
    return {
        "AUTORESEARCH_BACKEND": "sdpa",
        "AUTORESEARCH_DEVICE": "cpu",
        "AUTORESEARCH_HOME": str(isolated_home),
        "AUTORESEARCH_PROFILE": str(made_up_profile("sdpa")),
    }


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A machine that runs other tests, too, may take several times as long."""
    monkeypatch.setattr(check, "SECONDS", 600.0)


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_edit_is_found(tmp_path, settings, what):
    edits, said = BROKEN[what]
    tried = check.tried(train(tmp_path, edits), settings)
    assert re.search(said, tried.problem), tried
    assert tried.seconds < check.SECONDS


def test_a_sound_edit_passes_without_a_score(tmp_path, settings, monkeypatch):
    monkeypatch.setenv("LAB_TURN", "an agent's")  # who may do it
    edits = {"MATRIX_LR = 0.04": "MATRIX_LR = 0.05", "\n    main()\n": "\n    main()\n    raise SystemExit\n"}
    tried = check.tried(train(tmp_path, edits), settings)
    assert (tried.problem, tried.elsewhere) == ("", False) and tried.num_params
    assert "bpb" not in tried.printed


@pytest.mark.parametrize(
    "source, said",
    [
        ("while True: print('x' * 100)", "not done after 2 s"),
        ("print('bye')", "train.py made no Clock"),
        ("raise SystemExit(7)", "SystemExit: 7"),
        ("import os; os._exit(9)", "exit status 9: "),
        ("import subprocess; subprocess.Popen(['sleep', '600'])", "train.py made no Clock"),
        ("import backends.interface as i; raise i.BackendError('no device')", "no device"),
    ],
    ids=["endless", "nothing", "exit", "at once", "child", "no device"],
)
def test_what_is_no_training(tmp_path, settings, monkeypatch, source, said):
    monkeypatch.setattr(check, "SECONDS", 2.0 if "while" in source else 600.0)
    (tmp_path / "train.py").write_text(source + "\n")
    mark = f"{tmp_path}"
    tried = check.tried(tmp_path / "train.py", {**settings, "AUTORESEARCH_RUN": mark})
    assert said in tried.problem and len(tried.printed) < 2**21
    assert tried.elsewhere == ("no device" in said)
    assert processes.marked(AUTORESEARCH_RUN=mark) == []
