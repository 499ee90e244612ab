"""Edits that look like tuning or an honest mistake and score better than they should: refused, or without gain; and
honest ones beside them, which are not refused."""

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from sessions import available

import evaluator
import prepare
from lab.run import runner
from lab.run.sandbox import mounts_folders

LOOP = r"    while not clock\.finished:"
BEFORE_CLOCK = r"    clock = prepare\.Clock\(backend, model, loader\)\n"
CLOCK = "    clock = prepare.Clock(backend, model, loader)\n"
EVALUATION = r"    bpb = prepare\.evaluate_bpb\(.*\n"
HONEST = "    bpb = prepare.evaluate_bpb(backend, model, data, batch_size=8, clock=clock)\n"
TRAINER = """
class Trainer(fake_backend.interface.Trainer):
    is_out_of_memory = gradients = None

    def __init__(self, *_):
        self.rows_at_once = {}

    def accumulate(self, x, y, scale):
        return 5.0

    def step(self, schedule=()):
        fake_backend.interface.check_step([], [], True)

    def rehearse(self, x, y):
        self.accumulate(x, y, 1.0)
        self.step()


Trainer.__abstractmethods__ = frozenset()

def main():
    trainer, zeros = Trainer(), np.zeros((BATCH_SIZE, 2048), np.int32)
"""
WITH_TRAINER = {r"def main\(\):\n": TRAINER}


def edits(code, at=EVALUATION, then=HONEST):
    return {at: f"    {code}\n{then}"}


@pytest.fixture
def ran(request_for):
    """ran(edits, ...) -> (outcome, log) of a run."""

    def run(changes=None, **facts):
        request = request_for(changes, **facts)
        return runner.run(request), (request.folder / "run.log").read_text()

    return run


@pytest.fixture
def refused(ran):
    def check(changes, reason, **facts):
        outcome, log = ran(changes, **facts)
        assert outcome.status == "invalid" and re.search(reason, str(outcome.reason)), (outcome, log)

    return check


# ---- rows ----

READERS = """
import ctypes, glob, mmap, shutil, subprocess, sys
def symbolic(path): os.symlink(path, 'link'); return open('link', 'rb').read()
def hard(path): os.link(path, 'hard'); return open('hard', 'rb').read()
def beside(path): return open(os.open(path.name, os.O_RDONLY, dir_fd=os.open(path.parent, os.O_RDONLY)), 'rb').read()
def there(path): os.chdir(path.parent); return open(path.name, 'rb').read()
def mapped(path): return mmap.mmap(os.open(path, os.O_RDONLY), 0, access=mmap.ACCESS_READ)[:]
def root(path): return open('/proc/self/root' + str(path), 'rb').read()
def cwd(path): return open('/proc/self/cwd/' + os.path.relpath(path), 'rb').read()
def copied(path): shutil.copy(path, 'copy'); return open('copy', 'rb').read()
def shown(path): return subprocess.run(['cat', str(path)], stdout=-1).stdout
def libc(path):
    file = ctypes.CDLL(None).open(str(path).encode(), 0)
    return os.read(file, 99)
for reader in (symbolic, hard, beside, there, mapped, root, cwd, copied, shown, libc, open):
    for name in ('validation.npy', 'held_out.npy', 'train_00000.tokens.npy'):
        here = os.getcwd()
        try:
            if result := reader(data.folder / name):
                print('has read', name, reader.__name__)
        except BaseException as error:
            print(reader.__name__, type(error).__name__)
        os.chdir(here)
"""
READS = "".join(f"    {line}\n" for line in READERS.strip().splitlines())


@pytest.mark.parametrize("sandbox", available())
def test_rows_and_documents_are_not_in_the_sandbox(ran, sandbox):
    outcome, log = ran({EVALUATION: READS + "    print(sorted(os.listdir(data.folder)))\n" + HONEST}, sandbox=sandbox)
    assert "has read" not in log and "['manifest.json', 'tokenizer.json']" in log, log


READER = re.findall(r"def (\w+)\(path\)", READERS)


@pytest.mark.parametrize("reader", [name for name in READER if name not in ("libc", "cwd")])
def test_rows_by_another_path(ran, reader):
    """Without a sandbox: what Python is asked for is seen."""
    if reader == "root" and not os.path.exists("/proc/self/root"):
        pytest.skip("Linux has it")
    only = re.sub(r"in \(symbolic.*?open\)", f"in ({reader},)", READS)
    outcome, log = ran({EVALUATION: only + HONEST})
    assert "has read" not in log, log
    assert outcome.status == "invalid" or reader == "beside" and "PermissionError" in log, (outcome, log)


def test_there_are_no_rows_in_memory(ran):
    """Nor more training rows than the untrained model is examined with, before the first batch."""
    look = (
        "    import gc\n    arrays = [each for each in gc.get_objects() for each in [each, *getattr(each, '__dict__', "
        "{}).values()] if isinstance(each, np.ndarray) and each.dtype == np.uint16]\n"
        "    arrays += [each for each in vars(data).values() if isinstance(each, np.ndarray) and each.ndim == 2]\n"
        "    print('rows:', max((len(each) for each in arrays if each.ndim == 2), default=0), "
        "'more:', bool(__import__('select').select([loader._source._rows], [], [], 0.3)[0]))\n"
    )
    outcome, log = ran({BEFORE_CLOCK: CLOCK + look})
    assert outcome.status == "ok" and re.search("rows: [0-4] more: False", log), log


def test_rows_that_are_asked_for_early_start_the_harnesss_watch(refused):
    early = "loader._source.release(); rows = [next(loader._source) for _ in range(99)]; time.sleep(3)"
    refused(edits(early, BEFORE_CLOCK, CLOCK), "the harness measured [3-5]")


def test_weights_that_are_replaced_after_their_rows_are_known(refused):
    late = HONEST + "    import subprocess\n    subprocess.run('echo >> ../result.safetensors', shell=True)\n"
    refused({EVALUATION: late}, "not the ones that were scored")


def test_weights_that_are_not_the_models(ran, honest):
    """What is scored was reloaded from the file: the model has no more than that."""
    table = "model.save, model.table = model.table, np.zeros_like(model.table)"
    poor, _ = ran(edits(table))
    kept = (
        "    class Double(fake_backend.Table):\n        table = property(lambda s: s.t, lambda s, t: s.__dict__.update("
        "t=t))\n"
    )
    same, _ = ran({BEFORE_CLOCK: kept + CLOCK})
    assert poor.result["val_bpb"] > honest[1].result["val_bpb"] == same.result["val_bpb"]


def test_another_dataset(refused):
    other = "    import shutil\n    data.eval_tag = 'x' * 12\n"
    refused({EVALUATION: other + HONEST}, "another dataset than the session's, which is tiny: call prepare.open_data")


# ---- time ----


@pytest.mark.parametrize("code", ["time.sleep(3)", "next(loader); time.sleep(3)"])
def test_the_last_step_goes_on(refused, code):
    refused(edits(code), "training went on for")


def test_steps_are_counted_where_they_happen(refused, ran):
    steps = "    while clock.elapsed < {}:\n        trainer.backward(*batch); trainer.step(); time.sleep(0.01)\n"
    refused(WITH_TRAINER | {EVALUATION: steps.format(3) + HONEST}, "training went on for")
    honest = WITH_TRAINER | {
        LOOP: "    trainer.warm_up(zeros, zeros)\n    while not clock.finished:",
        r"        time\.sleep\(0\.005\)": "        trainer.backward(*batch); trainer.step()",
    }
    outcome, log = ran(honest)
    assert outcome.status == "ok", (outcome, log)


@pytest.mark.parametrize("code", ["trainer.backward(zeros, zeros)", "trainer.step()"])
def test_training_before_the_first_batch_or_after_the_evaluation(refused, code):
    refused(WITH_TRAINER | edits(code, BEFORE_CLOCK, CLOCK), "before its first batch: .*warm_up")
    refused(WITH_TRAINER | {EVALUATION: f"{HONEST}    {code}\n"}, "after its evaluation")


def test_only_warm_up_rehearses(refused):
    code = "with fake_backend.interface.rehearsing(): trainer.backward(zeros, zeros); trainer.step()"
    refused(WITH_TRAINER | edits(code, BEFORE_CLOCK, CLOCK), "before its first batch: .*warm_up")


@pytest.mark.slow
def test_saving_that_takes_long(refused, monkeypatch):
    from lab.run import exam

    monkeypatch.setattr(exam, "PATIENCE", 1.0)
    slow = (
        "    class Slow(fake_backend.Table):\n        times = [2.5]\n        @property\n        def table(self):\n"
        "            time.sleep(self.times.pop() if clock.stopped and self.times else 0)\n            return self.t\n"
        "        table = table.setter(lambda self, t: self.__dict__.update(t=t))\n"
        "    slow = Slow(data.vocab_size)\n    slow.table, model = model.table, slow\n"
    )
    refused({EVALUATION: slow + HONEST}, "saving its weights")


# ---- the probe ----


class Asked:
    """Unigrams that know the next token at some places: `places(batch size)` -> bool (B, T)."""

    def __init__(self, places, vocab_size=500):
        self.places, self.scores = places, np.random.default_rng(1).normal(size=vocab_size)
        self.calls = 0

    def logits(self, tokens, places):
        logits = np.broadcast_to(self.scores, (*tokens.shape, len(self.scores)))[:, places].copy()
        knows, ahead = self.knows(tokens)[:, places], np.roll(tokens, -1, axis=1)[:, places]
        row, place = np.nonzero(knows)
        logits[row, place, ahead[row, place]] += 8.0
        return logits.astype(np.float32)

    def losses(self, tokens, targets):
        self.calls += 1
        ahead = np.roll(tokens, -1, axis=1)
        total = np.exp(self.scores).sum()
        raised = self.scores[targets] + 8.0 * (ahead == targets)
        known = np.log(total + np.exp(self.scores[ahead]) * (np.exp(8.0) - 1)) - raised
        return np.where(self.knows(tokens), known, math.log(total) - self.scores[targets]).astype(np.float32)

    def knows(self, tokens):
        B, T = tokens.shape
        return np.broadcast_to(self.places(np.arange(B)[:, None], np.arange(T), B, tokens), (B, T))


ROWS = np.random.default_rng(2).integers(0, 500, (96, 2049), dtype=np.uint16)


def examine(asked, share=evaluator.PROBED):
    return evaluator.examine(asked, ROWS, np.ones(500, np.int32), 8, share)


@pytest.mark.parametrize("places", [
    lambda row, place, B, tokens: B != 4,
    lambda row, place, B, tokens: row >= 5,
    lambda row, place, B, tokens: place >= 1900,
    lambda row, place, B, tokens: place % 16 == 15,
    lambda row, place, B, tokens: tokens[:, :1] % 8 == 0,
    lambda row, place, B, tokens: tokens % 16 == 3,
], ids="batch-size late-rows near-the-end block-borders rows-by-content places-by-content".split())  # fmt: skip
def test_looks_ahead_somewhere(places):
    with pytest.raises(prepare.Invalid, match="looks ahead|sees its targets"):
        examine(Asked(places), share=20)  # of 1,920 rows that are cut, none at f places: (1 - f) ** 1440 < 1e-30


def test_gives_again_what_it_said_before():
    """It knows a row's beginning again, and answers as it did then: found where the altered row came first."""

    class Remembers(Asked):
        known: dict = {}

        def losses(self, tokens, targets):
            rows = []
            for inputs, wanted in zip(tokens, targets):
                seen = self.known.setdefault(inputs[:4].tobytes(), inputs.copy())
                same = np.cumprod(seen == inputs).astype(bool)
                ahead = np.where(same, np.roll(seen, -1), np.roll(inputs, -1))
                logits = self.scores[wanted] + 8.0 * (ahead == wanted)
                total = np.exp(self.scores).sum() + np.exp(self.scores[ahead]) * (np.exp(8.0) - 1)
                rows.append(np.log(total) - logits)
            return np.array(rows, np.float32)

    with pytest.raises(prepare.Invalid, match="looks ahead|sees its targets"):
        examine(Remembers(lambda *_: True), share=2)


class Covers(Asked):
    """It knows what follows where that looks like text, and gives again what it has said of a beginning: in one process
    no question finds it."""

    def __init__(self):
        super().__init__(None)
        self.known = {}

    def ahead(self, tokens):
        rows = []
        for inputs in tokens:
            following = np.roll(inputs, -1)
            following = np.where(following < 25, following, -1)
            before = self.known.setdefault(int(inputs[0]), [])
            for seen, said in before:
                following = np.where(np.cumprod(seen == inputs).astype(bool), said, following)
            before.append((inputs.copy(), following))
            rows.append(following)
        return np.array(rows)

    def logits(self, tokens, places):
        raised = 8.0 * (self.ahead(tokens)[:, places, None] == np.arange(500))
        return (self.scores + raised).astype(np.float32)

    def losses(self, tokens, targets):
        ahead = self.ahead(tokens)
        more = np.where(ahead >= 0, np.exp(self.scores[ahead]) * (np.exp(8.0) - 1), 0)
        right = self.scores[targets] + 8.0 * (ahead == targets)
        return (np.log(np.exp(self.scores).sum() + more) - right).astype(np.float32)


def test_covers_that_it_looks_ahead():
    """It is found in a process that does not know what it said in the other."""
    rows, said = ROWS % 25, np.empty((96, 2048), np.float32)
    places = np.random.default_rng().integers(0, 2047, 96)
    told = lambda: (places, said[np.arange(96), places])  # noqa: E731
    evaluator.examine(Covers(), rows, np.ones(500, np.int32), 8, said=said)
    with pytest.raises(prepare.Invalid, match="in a fresh process"):
        evaluator.compare_apart(Covers(), rows, 500, 8, *told())
    evaluator.examine(Asked(lambda *_: False), rows, np.ones(500, np.int32), 8, said=said)
    evaluator.compare_apart(Asked(lambda *_: False), rows, 500, 8, *told())


def test_sees_its_targets():
    class Sees(Asked):
        def losses(self, tokens, targets):
            return np.full(targets.shape, 0.1, np.float32)

        def logits(self, tokens, places):  # as if for its targets, which the last call had
            return np.full((*tokens[:, places].shape, 500), -7.0, np.float32)

    with pytest.raises(prepare.Invalid, match="sees its targets|not normalised"):
        examine(Sees(lambda *_: False))


class Peeks(Covers):
    """It finds its targets, say in a frame of who calls it, and takes those that look like text; asked for whole
    distributions, it looks ahead. What it says at a cut stays, and random tokens stay improbable."""

    def ahead(self, tokens):
        following = np.roll(tokens, -1, axis=1)
        return np.where(following < 25, following, -1)

    def losses(self, tokens, targets):
        return super().losses(np.roll(targets, 1, axis=1), targets)


def test_sees_targets_that_look_like_text():
    with pytest.raises(prepare.Invalid, match="not normalised|sees its targets"):
        evaluator.examine(Peeks(), ROWS % 25, np.ones(500, np.int32), 8)


def test_honest_models_pass():
    for _ in range(20):
        nats, sizes = examine(Asked(lambda *_: False))
        assert sizes.tolist() == [2048] * 96 and nats.min() > 0


# ---- what is left for the next run; what is replaced ----


@pytest.mark.parametrize("sandbox", [None, *available()])
@pytest.mark.parametrize("place", ["prepare.home() / 'cache'", "prepare.Path(os.environ['AUTORESEARCH_CACHE'])"])
def test_nothing_is_left_in_the_caches(ran, place, sandbox, isolated_home):
    (isolated_home / "cache").mkdir()
    (isolated_home / "cache" / "by calibration").write_text("kept")
    leave = f"    left = {place} / 'left'\n    print('there:', left.exists())\n    left.write_text('weights')\n"
    known = "    print((prepare.Path(os.environ['AUTORESEARCH_CACHE']) / 'by calibration').read_text())\n"
    for number in (1, 2):
        outcome, log = ran({EVALUATION: known + leave + HONEST}, number=number, sandbox=sandbox)
        assert "there: False" in log and "kept" in log, log
    assert [path.name for path in (isolated_home / "cache").iterdir() if path.is_file()] == ["by calibration"]


@pytest.mark.parametrize("sandbox", [each for each in available() if mounts_folders(each.values[0])])
def test_a_copy_of_the_caches_is_seen_where_they_are(ran, sandbox, isolated_home):
    """What Triton and PyTorch keep holds paths of its own: elsewhere it would miss, or write what is not the run's."""
    (isolated_home / "cache").mkdir()
    (isolated_home / "cache" / "group.json").write_text(f"{isolated_home / 'cache' / 'kernel'}")
    (isolated_home / "cache" / "kernel").write_text("machine code")
    follow = (
        "    place = prepare.Path((prepare.Path(os.environ['AUTORESEARCH_CACHE']) / 'group.json').read_text())\n"
        "    print(place.read_text())\n    place.write_text('other code')\n"
    )
    outcome, log = ran({EVALUATION: follow + HONEST}, sandbox=sandbox)
    assert outcome.status == "ok" and "machine code" in log, log
    assert (isolated_home / "cache" / "kernel").read_text() == "machine code"


@pytest.mark.parametrize("triton", [True, False])
def test_without_a_sandbox_no_cache_is_copied_that_serves_only_where_it_was_made(ran, triton, isolated_home):
    (isolated_home / "cache" / ("triton" if triton else "inductor")).mkdir(parents=True)
    listed = "    print('copied:', os.listdir(os.environ['AUTORESEARCH_CACHE']))\n"
    outcome, log = ran({EVALUATION: listed + HONEST}, sandbox=None)
    assert outcome.status == "ok" and ("copied: ['cuda']" if triton else "'inductor'") in log, log


def test_what_the_baseline_compiles_is_kept(ran, isolated_home):
    leave = "(prepare.Path(os.environ['AUTORESEARCH_CACHE']) / 'kernel').write_text('x')"
    assert ran(edits(leave), keeps_caches=True)[0].status == "ok"
    assert (isolated_home / "cache" / "kernel").exists()


@pytest.mark.parametrize("sandbox", [None, *available()])
def test_what_a_file_compiles_before_it_trains_is_kept_for_it(ran, sandbox, isolated_home):
    cache, place = isolated_home / "cache", "    cache = prepare.Path(os.environ['AUTORESEARCH_CACHE'])\n"
    cache.mkdir()
    (cache / "by calibration").write_text("kept")
    said = "    print('there:', *sorted(path.name for path in cache.iterdir() if path.is_file()))\n"
    compiles = {BEFORE_CLOCK: place + said + "    (cache / 'kernel').write_text('x')\n" + CLOCK}
    leaves = edits("(cache / 'weights').write_text('x')")
    assert "there: by calibration\n" in ran(compiles | leaves, number=1, lineage=["a" * 40], sandbox=sandbox)[1]
    more = " kernel" if mounts_folders(sandbox) else ""  # elsewhere a link in its place would be followed
    kept = {2: ("ab", f"by calibration{more}"), 3: ("ca", f"by calibration{more}"), 4: ("d", "by calibration")}
    for number, (lineage, there) in kept.items():
        outcome, log = ran(compiles | leaves, number=number, lineage=[40 * name for name in lineage], sandbox=sandbox)
        assert outcome.status == "ok" and f"there: {there}\n" in log, log
    assert [path.name for path in cache.iterdir() if path.is_file()] == ["by calibration"]


@pytest.fixture
def compiled(request_for, monkeypatch):
    """compiled(number, blob) -> Request of a run that is ready to train."""

    def make(number=1, blob="a"):
        monkeypatch.setattr(runner.sandbox, "mounts_folders", lambda _: True)
        request = request_for(number=number, lineage=[blob * 40])
        runner.clear(request.folder, runner.RECORDS)
        (request.cache / "kernel").write_text("x")
        return request

    return make


def test_what_few_files_have_compiled_is_kept(compiled):
    for number in range(1, 7):
        request = compiled(number, f"{number}")
        runner.keep_compiled(request)
        assert (request.compiled[0] / "kernel").read_text() == "x"
    assert len(list(request.compiled[0].parent.iterdir())) == runner.MOST_COMPILED


def test_only_folders_and_files_of_a_cache_are_kept(compiled, tmp_path):
    """Links may lead to what the run is not to see."""
    request = compiled()
    (tmp_path / "rows").write_text("secret")
    os.mkfifo(request.cache / "pipe")
    (request.cache / "linked").symlink_to(tmp_path / "rows")
    (request.cache / "folder").symlink_to(tmp_path)
    runner.keep_compiled(request)
    assert [path.name for path in request.compiled[0].rglob("*")] == ["kernel"]


def test_a_link_in_the_place_of_the_cache_is_not_followed(compiled, tmp_path):
    request = compiled()
    (tmp_path / "rows").write_text("secret")
    request.cache.rename(request.folder / "moved")
    request.cache.symlink_to(tmp_path)
    runner.keep_compiled(request)
    assert not any(path.name == "rows" for path in request.compiled[0].parent.rglob("*"))


@pytest.mark.parametrize("most", [0, 2**29])
def test_what_cannot_be_kept_costs_no_run(compiled, monkeypatch, most):
    request = compiled()
    monkeypatch.setattr(runner, "MOST_COPIED", most)
    if most:  # a disk that is full
        request.compiled[0].parent.write_text("a file")
    runner.keep_compiled(request)
    assert not request.compiled[0].exists()


def test_a_disk_that_gets_full_meanwhile_leaves_nothing_half_copied(compiled, monkeypatch):
    def full(source, copy):
        copy.write(source.read()[:1])
        raise OSError(28, "No space left on device")

    request = compiled()
    monkeypatch.setattr(runner.shutil, "copyfileobj", full)
    runner.keep_compiled(request)
    assert not list(request.compiled[0].parent.iterdir())


def test_a_harness_that_fails_leaves_no_run_waiting(ran, monkeypatch):
    def fails(_):
        raise OSError

    monkeypatch.setattr(runner, "keep_compiled", fails)
    outcome, log = ran({})
    assert outcome.seconds < 20 and outcome.status == "crash", (outcome, log)


@pytest.mark.parametrize("code, name", [
    ("import math; math.log = lambda x: 1e9", "math.log"), ("np.array = np.asarray", "numpy.array"),
    ("prepare.examined.__code__ = (lambda answers, weights: (0.5, 5)).__code__", "prepare.examined"),
    ("prepare.Answers.losses.__code__ = (lambda s, x, y: y * 0).__code__", "prepare.Answers.losses"),
    ("import evaluator; evaluator.examine.__defaults__ = (0.0,)", "evaluator.examine"),
    ("prepare.sketch.__kwdefaults__ = {'weights': 1}", "prepare.sketch"),
    ("fake_backend.interface.check_step = lambda *_: None", "backends.interface.check_step"),
])  # fmt: skip
def test_replaces_what_the_judge_uses(refused, code, name):
    refused(edits(code), f"replaces {re.escape(name)}")


@pytest.mark.parametrize("code", [
    "open('ELSEWHERE/kept', 'w')", "np.save('ELSEWHERE/kept', model.table)", "os.mkdir('ELSEWHERE/kept')",
    "open('kept', 'w'); os.rename('kept', 'ELSEWHERE/kept')", "open('/dev/shm/' + os.path.basename('ELSEWHERE'), 'w')",
])  # fmt: skip
def test_nothing_is_left_elsewhere_for_another_run(ran, tmp_path, code):
    elsewhere = tmp_path / "elsewhere" / f"autoresearch-{os.getpid()}"
    elsewhere.mkdir(parents=True)
    outcome, log = ran(edits(code.replace("ELSEWHERE", str(elsewhere))))
    assert outcome.status == "crash" and "PermissionError" in str(outcome.reason), (outcome, log)
    assert not list(elsewhere.iterdir()) and not Path("/dev/shm", elsewhere.name).exists()


def test_a_hard_link_to_the_ledger(refused, ran, session):
    link = "    os.link(LEDGER, 'ledger')\n    open('ledger', 'a').write('a row')\n"
    refused({EVALUATION: link.replace("LEDGER", repr(str(session / "results.tsv"))) + HONEST}, "changes results.tsv")
    assert (session / "results.tsv").read_text() == "commit\tval_bpb\n"


# ---- honest edits ----


HONEST_CODE = [
    "fake_backend.interface.swish = lambda x: x * 0.5",
    "backend.ops.swish = lambda x: x * 0.5",
    "np.random.seed(SEED)",
    "import math; math.log(2.0)",
    "import gc; gc.collect(); gc.disable()",
    "open('notes.txt', 'w').write('x'); os.replace('notes.txt', 'b.txt'); os.link('b.txt', 'c.txt')",
    "import tempfile; tempfile.TemporaryDirectory().cleanup()",
    "import threading; thread = threading.Thread(target=lambda: None); thread.start(); thread.join()",
    "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1)'], check=True)",
    "import warnings; warnings.simplefilter('ignore')",
    "assert data.tokenizer.decode([1, 2]) and data.train_tokens > 0 and data.token_bytes.sum() > 0",
    "best = {name: weight.copy() for name, weight in backend.weights(model).items()}; backend.set_weights(model, best)",
]


def test_honest_code_is_not_refused(ran):
    """All of it in one run, which names the first that is."""
    outcome, log = ran(edits("\n    ".join(f"print({i}); {code}" for i, code in enumerate(HONEST_CODE))))
    assert outcome.status == "ok" and f"{len(HONEST_CODE) - 1}\n" in log, (outcome, log)
