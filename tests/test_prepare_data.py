"""Datasets as a run opens them: that they are whole, and what is said when they are not."""

import errno
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from texts import prepared, sentences, write_files

import dataset
import prepare
import storage
from storage import DataError, Stop

ROOT = os.path.dirname(prepare.__file__)


def test_data_attributes(tiny_data):
    data = tiny_data
    assert data.vocab_size == data.bos + 4 == data.tokenizer.n_vocab
    assert data.tokenizer.encode_single_token("<|reserved_0|>") == data.bos
    assert data.token_bytes.dtype == np.int32 and data.token_bytes.shape == (data.vocab_size,)
    assert (data.token_bytes[-4:] == 0).all() and (data.token_bytes[:-4] > 0).all()
    expected = [len(data.tokenizer.decode_single_token_bytes(i)) for i in range(data.bos)]
    assert data.token_bytes[:-4].tolist() == expected
    for rows in (data.validation_rows, data.held_out_rows):
        assert rows.dtype == np.uint16 and rows.shape[1] == 2049 and len(rows) >= data.eval_rows >= 1
        assert (rows[:, 0] == data.bos).all()


def test_names_select_datasets(tmp_path, monkeypatch):
    folder = write_files(tmp_path / "a", [sentences(seed, 50) for seed in range(80)])
    prepared("--dataset", folder, "--name", "one")
    prepared("--dataset", folder, "--name", "two")
    assert prepare.open_data().name == "two" and prepare.open_data("one").name == "one"
    monkeypatch.setenv("AUTORESEARCH_DATA", "one")
    assert prepare.open_data().name == "one" and prepare.open_data("two").name == "two"


def test_opening_removes_an_older_result(copy, tmp_path, monkeypatch):
    """Also when there are no data to open; what is not a file stays."""
    path = tmp_path / "result.json"
    monkeypatch.setenv("AUTORESEARCH_RESULT", str(path))
    for _ in range(2):
        path.write_text("{}", encoding="utf-8")
        prepare.open_data("tiny")
        assert not path.exists()
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError):
        prepare.open_data("nowhere")
    assert not path.exists()
    monkeypatch.setenv("AUTORESEARCH_RESULT", os.devnull)
    prepare.open_data("tiny")
    assert os.path.exists(os.devnull)


@pytest.mark.parametrize("name", [".", "/", "weights.safetensors"])
def test_a_result_that_could_not_be_written_is_refused_before_training(copy, tmp_path, monkeypatch, name):
    monkeypatch.setenv("AUTORESEARCH_RESULT", str(tmp_path / name))
    (tmp_path / "weights.safetensors").write_text("of an earlier run")
    with pytest.raises(Stop, match="AUTORESEARCH_RESULT"):
        prepare.open_data("tiny")
    assert (tmp_path / "weights.safetensors").exists()


def test_nothing_is_read_in_the_locales_encoding(copy):
    code = "import warnings, prepare; warnings.simplefilter('error', EncodingWarning); print(prepare.open_data().name)"
    command = [sys.executable, "-X", "warn_default_encoding", "-c", code]
    assert subprocess.check_output(command, cwd=ROOT, text=True).strip() == "tiny"


# ---- damage ----


def test_nothing_prepared():
    with pytest.raises(DataError, match=r"run: python prepare.py"):
        prepare.open_data()
    with pytest.raises(DataError, match=r"run: python prepare.py --dataset tinystories"):
        prepare.open_data("tinystories")


@pytest.mark.parametrize(
    "stem",
    [
        "tokenizer.json",
        "validation.npy",
        "held_out.npy",
        "train_00000.tokens.npy",
        "train_00000.lengths.npy",
        "train_00000.batches.npy",
    ],
)
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damaged_artifact_is_named_and_rebuilt(copy, stem, harm):
    path, before = copy / stem, prepare.open_data("tiny")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.unlink() if harm == "remove" else path.write_bytes(raw if harm == "flip" else raw[: len(raw) // 2])
    with pytest.raises(DataError, match=rf"{stem}.*run: python prepare.py --dataset .* --name tiny"):
        prepare.open_data("tiny")
    if harm == "flip":
        command = json.loads((copy / "manifest.json").read_text())["command"].split()[2:]
        after = prepared(*command)
        assert (after.eval_tag, after.data_tag) == (before.eval_tag, before.data_tag)


def test_manifest_of_another_dataset(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"name": "other"}))
    with pytest.raises(DataError, match="another dataset"):
        prepare.open_data("tiny")
    copy.rename(copy.with_name("renamed"))
    (copy.with_name("renamed") / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="another dataset.*tiny"):
        prepare.open_data("renamed")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\x00\x01"])
def test_unreadable_manifest(copy, content):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="run: python prepare.py"):
        prepare.open_data("tiny")


@pytest.mark.parametrize("parts", [{}, [], {"tokenizer": "text"}, {"tokenizer": {"files": {"tokenizer.json": {}}}}])
def test_manifest_with_parts_that_are_none(copy, parts):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"parts": parts}))
    with pytest.raises(DataError, match="manifest.json is damaged .*run: python prepare.py"):
        prepare.open_data()


def test_manifest_with_other_tags_or_none(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"eval_rows": 1}))
    with pytest.raises(DataError, match="tags"):
        prepare.open_data("tiny")
    del manifest["eval_tag"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="interrupted"):
        prepare.open_data("tiny")


def test_no_pickle_is_ever_loaded(copy):
    path = copy / "validation.npy"
    with open(path, "wb") as file:
        np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    manifest = json.loads((copy / "manifest.json").read_text())
    known = {"size": path.stat().st_size, "sha256": storage.sha256(path)}
    manifest["parts"]["validation"]["files"]["validation.npy"] = known
    (copy / "manifest.json").write_text(json.dumps(manifest | dataset.tags(manifest)))
    with pytest.raises(ValueError, match="Python objects|pickle"):
        prepare.open_data().validation_rows


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), storage.atomic(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path, *tmp_path.glob("home")]


@pytest.mark.parametrize("number, full", [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)])
def test_room_is_asked_for_only_on_a_full_disk(tmp_path, number, full):
    with pytest.raises(DataError, match="could not write") as caught, storage.atomic(tmp_path / "file"):
        raise OSError(number, os.strerror(number))
    assert ("free some space" in str(caught.value)) == full and os.strerror(number) in str(caught.value)


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", "inf", "1e999"])
def test_budget_must_be_positive(monkeypatch, text):
    monkeypatch.setenv("AUTORESEARCH_BUDGET", text)
    for reads in (prepare.budget, prepare.open_data):
        with pytest.raises(storage.Stop, match="AUTORESEARCH_BUDGET"):
            reads()


@pytest.mark.parametrize("text, seconds", [(None, 300), ("2.5", 2.5), ("300.", 300), ("1e3", 1000)])
def test_budget(monkeypatch, text, seconds):
    if text:
        monkeypatch.setenv("AUTORESEARCH_BUDGET", text)
    assert prepare.budget() == seconds


@pytest.mark.parametrize("text", ["abc", "1.5", "-1"])
def test_seed_must_be_a_whole_number(monkeypatch, text):
    monkeypatch.setenv("AUTORESEARCH_SEED", text)
    with pytest.raises(storage.Stop, match=f"AUTORESEARCH_SEED must be a whole number from 0 on, not '{text}'"):
        prepare.seed()


@pytest.mark.parametrize("text, seed", [(None, 42), ("", 42), ("0", 0), ("7", 7)])
def test_seed(monkeypatch, text, seed):
    if text is not None:
        monkeypatch.setenv("AUTORESEARCH_SEED", text)
    assert prepare.seed() == seed


# ---- what is imported, and how a run that must end does ----


@pytest.mark.parametrize("module", ["prepare", "corpus"])
def test_no_framework_is_imported(module):
    code = f"import sys, {module}; print({{'torch', 'mlx', 'pyarrow', 'tiktoken', 'rustbpe'}} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "set()"


def test_prepare_imports_nothing_of_ours():
    code = "import sys, prepare; print({'corpus', 'backends', 'calibration', 'lab', 'train'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "set()"


@pytest.mark.parametrize("error, said", [
    ("DataError('no data; do this')", "DataError: no data; do this"),
    ("Invalid('other_backend', name='x')", "Invalid: its backend, x, is not one of backends/"),
    ("Diverged('diverged', loss=float('nan'), step=3)", "Diverged: the loss is nan at step 3; at most ? is allowed"),
])  # fmt: skip
def test_the_reason_is_the_last_line(error, said):
    """After an unfinished line of progress, with no traceback, and not swallowed by an edit that catches everything."""
    code = f"""
import prepare
try:
    print("device")
    print("\\rstep 1", end="")
    raise prepare.{error}
except Exception:
    pass
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert ended.returncode == 1
    assert ended.stdout.decode() == f"device\n\rstep 1\n{said}\n"


def test_the_reason_can_be_caught():
    with pytest.raises(storage.Stop) as caught:
        raise prepare.Invalid("warm_start", loss=1.5, chance=9)
    assert str(caught.value) == "warm start: the untrained model's loss is 1.500 nats, better than chance (9.000)"
    assert caught.value.reason == {"code": "warm_start", "facts": {"loss": 1.5, "chance": 9}}
    with pytest.raises(KeyError, match="no such code"):
        prepare.Invalid("no such code")


def test_two_threads_write_the_same_file(tmp_path):
    """Each file is whole, and neither write fails."""
    path, both_open = tmp_path / "file", threading.Barrier(2, timeout=10)

    def write(content):
        with storage.atomic(path) as file:
            file.write(content[:5])
            file.flush()
            both_open.wait()
            file.write(content[5:])

    contents = [b"x" * 10, b"y" * 10]
    with ThreadPoolExecutor() as pool:
        list(pool.map(write, contents))
    assert path.read_bytes() in contents and not list(tmp_path.glob("*.tmp"))
