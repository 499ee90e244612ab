"""What is prepared from which text, and what bad input does."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import prepared, sentences, write_files

import corpus
import dataset
import prepare
import sources
from storage import DataError, home

ROOT = os.path.dirname(corpus.__file__)


def write_parquet(path, documents, group=50):
    pq.write_table(pa.table({"text": pa.array(documents, pa.string())}), path, row_group_size=group)
    return path


def fails(capsys, *arguments) -> str:
    assert corpus.main([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err


def decoded(data) -> list[str]:
    """The training documents as text."""
    texts = []
    for tokens, sizes in data.batches():
        for document in np.split(tokens, np.cumsum(sizes)[:-1]):
            assert document[0] == data.bos
            texts.append(data.tokenizer.decode(document[1:].tolist()))
    return texts


@pytest.fixture(scope="module")
def texts():
    return [sentences(seed, 50) for seed in range(80)]


# ---- what is prepared ----


def test_sides_share_no_file(isolated_home, tmp_path, texts):
    data = prepared("--dataset", write_files(tmp_path / "text", texts))
    train = "".join(decoded(data))
    for rows in (data.validation_rows, data.held_out_rows):
        text = "\n".join(data.tokenizer.decode_batch(rows.tolist())).replace("<|reserved_0|>", "\n")
        lines = [line for line in text.split("\n") if len(line) > 40 and line.endswith(".")]
        assert lines and not any(line + "\n" in train for line in lines)


def test_files_are_ordered_by_content_not_by_place(tmp_path, texts, monkeypatch):
    first = prepared("--dataset", write_files(tmp_path / "a", texts), "--name", "first")
    second = prepared("--dataset", write_files(tmp_path / "b" / "deep", texts[::-1], ".md"), "--name", "second")
    assert (first.eval_tag, first.data_tag) == (second.eval_tag, second.data_tag)


def test_duplicates_empty_and_non_utf8_files(tmp_path, texts, capsys):
    plain = prepared("--dataset", write_files(tmp_path / "a", texts), "--name", "plain")
    odd = texts + texts[:9] + [b"", b"\xff\xfe broken", b"caf\xe9"]
    messy = prepared("--dataset", write_files(tmp_path / "b", odd), "--name", "messy")
    assert messy.data_tag == plain.data_tag
    assert "skipped 2 files: 90.txt (not UTF-8 text), 91.txt (not UTF-8 text)" in capsys.readouterr().out


def test_suffixes_and_excluded_folders(tmp_path, texts, capsys):
    folder = write_files(tmp_path / "a", texts)
    plain = prepared("--dataset", folder)
    write_files(folder, texts[:3], ".bin")
    write_files(folder / ".git", [t + "x" for t in texts])
    assert prepared("--dataset", folder).data_tag == plain.data_tag
    assert "too small" in fails(capsys, "--dataset", folder, "--suffixes", ".rst", "--name", "x")
    assert "--suffixes" in fails(capsys, "--dataset", folder, "--suffixes", ".rst", "--name", "x")


def test_long_files_are_cut_at_line_ends():
    text = sentences(1, 1000)
    parts = list(sources.pieces(text))
    assert "".join(parts) == text and len(parts) > 5
    assert all(part.endswith("\n") and 6000 <= len(part) < 6200 for part in parts[:-1])
    assert list(sources.pieces("a" * 12_000)) == ["a" * 12_000] and list(sources.pieces("")) == []


@pytest.mark.parametrize("unit", ["word ", "a", "é"])
def test_a_long_line_is_cut_and_none_of_it_is_lost(unit):
    text = unit * 10_000
    parts = list(sources.pieces(text))
    assert "".join(parts) == text and all(len(part) <= 12_000 for part in parts)
    assert unit != "word " or all(part.endswith("word ") for part in parts)
    assert list(sources.pieces(text + "\n" + text)) != [text + "\n" + text]


def test_most_of_the_text_in_long_lines_is_trained_on(tmp_path, texts):
    data = prepared("--dataset", write_files(tmp_path / "a", [text.replace("\n", " ") * 20 for text in texts]))
    rows = sum(1 for _ in dataset.pack(data.batches()))
    assert rows * dataset.ROW > 0.6 * data.train_tokens


def test_shares():
    assert sources.shares([]) == (0, 0) and sources.shares([9]) == (1, 1) and sources.shares([9, 9]) == (1, 2)
    assert sources.shares([10] * 100) == (20, 40), "20 % of a small set"
    assert sources.shares([1000] * 400) == (50, 100), "50 kB of a larger one"
    assert sources.shares([1000] * 4000) == (200, 400), "5 % of a large one"
    assert sources.shares([900_000, 1, 1, 200_000, 5]) == (1, 4)


def test_stdlib_source_is_this_pythons():
    source = sources.stdlib()
    documents = sum(len(batch) for batch in source.train[0].batches())
    complete = os.path.exists(f"{os.path.dirname(os.__file__)}/test/test_grammar.py")  # Debian's has no tests
    assert documents > (3000 if complete else 1000) and source.eval_rows == (128,)


def test_rerun_is_quick_and_changes_nothing(tmp_path, texts, capsys):
    folder = write_files(tmp_path / "a", texts)
    data = prepared("--dataset", folder)
    before = {path.name: path.stat().st_mtime_ns for path in data.folder.glob("*.npy")}
    capsys.readouterr()
    prepared("--dataset", folder)
    assert "all files are complete and intact" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in data.folder.glob("*.npy")}


def test_changed_text_is_prepared_again(tmp_path, texts):
    folder = write_files(tmp_path / "a", texts)
    before = prepared("--dataset", folder)
    write_files(folder, [sentences(999, 60)], ".md")
    assert prepared("--dataset", folder).data_tag != before.data_tag


def test_eval_rows_and_full(tmp_path, texts):
    folder = write_files(tmp_path / "a", texts)
    part, full = prepared("--dataset", folder), prepared("--dataset", folder, "--full")
    assert part.eval_rows == full.eval_rows == min(len(part.validation_rows), len(part.held_out_rows))
    source = sources.own_files([str(folder)], sources.SUFFIXES, "a")._replace(eval_rows=(10**6, 1))
    first, second = corpus.build(source), corpus.build(source, full=True)
    assert first["eval_rows"] == 1 < second["eval_rows"] and first["eval_tag"] != second["eval_tag"]
    assert first["data_tag"] == second["data_tag"]


def test_two_datasets_of_one_name(tmp_path, texts, capsys):
    prepared("--dataset", write_files(tmp_path / "a" / "notes", texts))
    assert "choose another name with --name" in fails(capsys, "--dataset", write_files(tmp_path / "b" / "notes", texts))
    assert "--name" in fails(capsys, "--dataset", tmp_path / "a" / "notes", "--name", "stdlib")


def test_what_a_session_rests_on_is_not_replaced_by_a_folder_that_has_changed(tmp_path, texts, capsys):
    folder = write_files(tmp_path / "notes", texts)
    data = prepared("--dataset", folder)
    session = home() / "sessions" / "cpu" / "night"
    session.mkdir(parents=True)
    begun = {"event": "session", "dataset": "notes", "eval": data.eval_tag}
    (session / "journal.jsonl").write_text(f"{json.dumps(begun)}\n")
    prepared("--dataset", folder)  # nothing has changed
    (folder / "another.txt").write_text(texts[0] * 2)
    assert "this rests on it: cpu/night. Choose another name" in fails(capsys, "--dataset", folder)
    assert dataset.open_data("notes").eval_tag == data.eval_tag
    prepared("--dataset", folder, "--name", "newer")
    (session / "journal.jsonl").write_text("no journal\n")
    assert prepared("--dataset", folder).eval_tag != data.eval_tag


# ---- parquet ----


def test_parquet_keeps_documents_and_row_groups(tmp_path, texts):
    odd = ["", None, "control \x00\x01\x1b characters", "<|reserved_0|> is text", "naïve 你好 🙂"]
    documents = [*texts, *odd] * 4
    path = write_parquet(tmp_path / "own.parquet", documents, group=37)
    data = prepared("--dataset", path)
    train = decoded(data)
    assert set(train) <= {document or "" for document in documents} and len(train) > 0.7 * len(documents)
    tokens, lengths, batches = data.train[0]
    assert batches.sum() == len(lengths) == len(train) and batches.max() <= 37 and lengths.sum() == len(tokens)
    specials = (tokens >= data.bos).sum()
    assert specials == len(train), "special tokens written in a text must stay text"
    kept = sources.parquet_source("x", "x", [path]).train[0].batches()
    assert [text for batch in kept for text in batch] == train


def test_a_file_that_may_not_be_read_is_told(tmp_path, texts, capsys, monkeypatch):
    path = write_parquet(tmp_path / "own.parquet", texts)
    folder, locked = write_files(tmp_path / "text", texts), tmp_path / "text" / "7.txt"
    read = Path.read_bytes

    def refused(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", lambda path: refused(path) if path == locked else read(path))
    prepared("--dataset", folder)
    assert "skipped 1 files: 7.txt (Permission denied)\n" in capsys.readouterr().out
    monkeypatch.setattr(sources, "is_parquet", refused)
    with pytest.raises(DataError, match="own.parquet can't be read .Permission denied."):
        sources.own_files([str(path)], [], None)


def test_parquet_copies_stay_on_one_side(tmp_path, texts):
    path = write_parquet(tmp_path / "own.parquet", texts * 3)
    source = sources.own_files([str(path)], [], None)
    sides = [
        {text for batch in side.batches() for text in batch}
        for side in (source.train[0], source.validation, source.held_out)
    ]
    assert sum(map(len, sides)) == len(set(texts)) == len(set.union(*sides))


def test_the_tokenizer_learns_from_all_parquet_files(tmp_path, texts):
    tiny, large = (
        write_parquet(tmp_path / "tiny.parquet", ["a few words"]),
        write_parquet(tmp_path / "large.parquet", texts * 4),
    )
    one, other = (prepared("--dataset", *paths) for paths in ((tiny, large), (large, tiny)))
    assert dataset.read_tokens(one.folder) == dataset.read_tokens(other.folder) and one.vocab_size > 500


def test_parquet_refill_batches_never_cross_row_groups(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [str(i) for i in range(700)], group=300)
    assert [len(b) for b in sources.read_parquet(path)] == [128, 128, 44, 128, 128, 44, 100]
    inside = [text for batch in sources.read_parquet(path, lambda rows: (250, rows - 50)) for text in batch]
    assert inside == [str(i) for i in range(250, 650)]


def test_parquet_with_invalid_utf8_and_surrogates(tmp_path):
    documents = [b"fine", b"\xff\xfe bad", "a\ud800b".encode("utf-8", "surrogatepass")]
    column = pa.Array.from_buffers(pa.string(), 3, pa.array(documents, pa.binary()).buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    (batch,) = sources.read_parquet(tmp_path / "a.parquet")
    assert batch[0] == "fine" and "\ufffd" in batch[1] and "\ufffd" in batch[2]
    assert not any("\ud800" <= c <= "\udfff" for text in batch for c in text)


def test_half_a_parquet_file(tmp_path, texts, capsys):
    path = write_parquet(tmp_path / "own.parquet", texts)
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a complete parquet file" in fails(capsys, "--dataset", path)
    path.write_bytes(b"PAR1")
    assert "not a complete parquet file" in fails(capsys, "--dataset", path)


def test_parquet_damaged_inside_or_without_text(tmp_path, texts, capsys):
    path = write_parquet(tmp_path / "own.parquet", texts)
    raw = bytearray(path.read_bytes())
    raw[-60:-10] = bytes(50)
    path.write_bytes(raw)
    assert "is damaged" in fails(capsys, "--dataset", path)
    pq.write_table(pa.table({"words": ["a"]}), path)
    assert "`text`" in fails(capsys, "--dataset", path)


def test_parquet_whose_text_is_not_text(tmp_path, capsys):
    for values in ([1, 2], [["a"], ["b"]], [b"\xff", b"\xfe"]):
        pq.write_table(pa.table({"text": values}), tmp_path / "own.parquet")
        assert "no column of strings named `text`" in fails(capsys, "--dataset", tmp_path / "own.parquet")


# ---- giant documents ----


@pytest.mark.parametrize("unit", ["word ", "w", " ", "\n", "\t ", "é", "x\r\n  y", "\x00"])
def test_giant_documents_are_tokenized_whole(tiny_data, unit):
    text = unit * (1_000_000 // len(unit))
    tokens, lengths = corpus.encode(tiny_data.tokenizer, [text, "after"])
    assert sum(lengths) == len(tokens)
    assert tiny_data.tokenizer.decode(tokens[1 : lengths[0]].tolist()) == text


@pytest.mark.slow
def test_50_mb_document(tiny_data):
    text = "a" * 25_000_000 + " " * 25_000_000
    tokens, lengths = corpus.encode(tiny_data.tokenizer, [text])
    assert int(tiny_data.token_bytes[tokens].sum()) == len(text)


def test_segments_change_no_token(tmp_path, monkeypatch):
    odd = "  \n\n\t don't 12345 ... !!\r\n" * 50 + "    indented more\n" * 50 + ("a" + " " * 30 + "b ") * 20
    text = odd + sentences(5, 300)
    corpus.train_tokenizer(tmp_path / "tokenizer.json", [[text]], 10**9)  # learns blanks of several characters too
    tokenizer = dataset.load_tokenizer(tmp_path)
    expected = tokenizer.encode_ordinary(text)
    for size in (40, 97, 1000):
        monkeypatch.setattr(corpus, "SEGMENT_CHARS", size)
        assert len(list(corpus.segments(text))) > 10
        assert corpus.encode(tokenizer, [text])[0][1:].tolist() == expected


def test_tokenizer_is_deterministic(tmp_path, texts):
    for name, order in (("a", texts), ("b", texts), ("c", texts[::-1])):
        corpus.train_tokenizer(tmp_path / name / "tokenizer.json", [order], 10**9)
    files = {hashlib.sha256((tmp_path / name / "tokenizer.json").read_bytes()).hexdigest() for name in "abc"}
    assert len(files) == 1


def test_tokenizer_limits(tmp_path):
    """Of each document 10,000 characters are read and counted, and no document after `max_chars`."""
    for limit, second in ((10_000, False), (10_001, True)):
        corpus.train_tokenizer(tmp_path / "tokenizer.json", [["zq" * 20_000, "vw" * 100]], limit)
        tokens = dataset.read_tokens(tmp_path)
        assert b"zq" in tokens and (b"vw" in tokens) == second


# ---- too small ----


@pytest.mark.parametrize("count, length", [(0, 0), (1, 5000), (2, 5000), (5, 3)])
def test_too_small_for_a_validation_row(tmp_path, capsys, count, length):
    folder = write_files(tmp_path / "a", [sentences(i, length) for i in range(count)])
    assert ("too few files" if length == 5000 else "too small") in fails(capsys, "--dataset", folder)
    with pytest.raises(DataError):
        prepare.open_data()


@pytest.mark.parametrize("others", [0, 2, 40])
def test_one_large_file_does_not_leave_training_without_text(tmp_path, capsys, others):
    """Whichever part its hash puts it in."""
    for attempt in range(8):
        large = sentences(attempt, 3000) * 5
        folder = write_files(tmp_path / f"{attempt}", [large, *(sentences(100 + i, 60) for i in range(others))])
        if corpus.main(["--dataset", str(folder), "--name", f"of-{attempt}"]):
            told = capsys.readouterr().err
            assert f"{folder / '0.txt'} alone is" in told and "cut it into" in told
        else:
            assert large[:5000] in "".join(decoded(prepare.open_data()))


def test_too_small_parquet(tmp_path, capsys):
    assert "too small" in fails(capsys, "--dataset", write_parquet(tmp_path / "a.parquet", ["one", "two"]))


def test_missing_path(capsys):
    assert "no such path" in fails(capsys, "--dataset", "nowhere")


def test_num_shards_out_of_range(capsys):
    assert "--num-shards" in fails(capsys, "--num-shards", "0")


# ---- writing ----

FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
import corpus
sys.exit(corpus.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("limit", [100, 2_000, 10_000, 40_000])
def test_full_disk(tmp_path, texts, isolated_home, limit):
    folder = write_files(tmp_path / "a", texts)
    arguments = ["--dataset", str(folder), "--name", "mine"]
    command = [sys.executable, "-c", FULL_DISK.format(limit=limit), *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and "could not write" in ended.stderr and "free some space" in ended.stderr
    assert not list(isolated_home.rglob("*.tmp"))
    with pytest.raises(DataError):
        prepare.open_data("mine")
    assert prepared(*arguments).name == "mine"


def test_leftovers_are_removed(tmp_path, texts):
    folder = write_files(tmp_path / "a", texts)
    data = prepared("--dataset", folder)
    (data.folder / "train_00009.tokens.npy.77.tmp").write_bytes(b"half")
    prepared("--dataset", folder)
    assert not list(data.folder.glob("*.tmp"))


def test_what_is_a_users_own_stays(isolated_home, tmp_path, texts, capsys):
    mine = write_files(isolated_home / "data" / "mine", texts)
    for arguments in (mine,), (mine / "0.txt", "--name", "mine"):
        assert "choose another name with --name" in fails(capsys, "--dataset", *arguments)
    assert prepared("--dataset", mine, "--name", "other").name == "other"
    assert prepared("--dataset", write_files(tmp_path / "a", texts), "--name", "mine").name == "mine"
    assert len(list(mine.glob("*.txt"))) == len(texts)


def test_leftover_folders_stay(tmp_path, texts):
    folder = write_files(tmp_path / "a", texts)
    data = prepared("--dataset", folder)
    (data.folder / "mine").mkdir()
    assert prepared("--dataset", folder).name == "a" and (data.folder / "mine").is_dir()


def test_interrupted_repair_keeps_what_is_whole(copy, monkeypatch, capsys):
    """While one part is made again the manifest still lists the others."""
    command = json.loads((copy / "manifest.json").read_text())["command"].split()[2:]
    (copy / "validation.npy").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "write_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            corpus.main(command)
    with pytest.raises(DataError, match="interrupted"):
        prepare.open_data("tiny")
    capsys.readouterr()
    assert corpus.main(command) == 0
    made = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if " in 0." in line]
    assert made == ["validation"] and prepare.open_data("tiny")


@pytest.mark.parametrize("parts", [[], {"tokenizer": {}}, {"tokenizer": None}, None])
def test_a_damaged_manifest_is_repaired_by_the_command_that_opening_names(copy, capsys, parts):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"parts": parts}))
    with pytest.raises(DataError, match="damaged"):
        prepare.open_data("tiny")
    assert corpus.main(manifest["command"].split()[2:]) == 0
    assert "manifest.json is damaged" in capsys.readouterr().out
    assert prepare.open_data("tiny").eval_tag == manifest["eval_tag"]


# ---- the command ----


def test_the_command(tmp_path, texts):
    """prepare.py as a script is two modules, `__main__` and the `prepare` that corpus imports."""
    folder = write_files(tmp_path / "a", texts)
    command = [sys.executable, os.path.join(ROOT, "prepare.py"), "--dataset"]
    ended = subprocess.run([*command, str(folder)], cwd=tmp_path, capture_output=True, text=True)
    data = prepare.open_data()
    assert ended.returncode == 0 and f"eval: {data.eval_tag}  data: {data.data_tag}" in ended.stdout
    ended = subprocess.run([*command, "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("error: ") and "no such path" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
