"""Downloads against a hub of our own: a server in a thread, reached through HF_ENDPOINT, that fails in every way."""

import errno
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import sentences

import prepare
import sources
import storage

ROOT = os.path.dirname(prepare.__file__)
# Waiting between attempts is patched away; the library reads its settings when it is imported, hence the subprocess.
# It also keeps what arrived in blocks of 10 MB; these shards are smaller.
SCRIPT = """
import sys, time
import huggingface_hub.constants
import corpus
time.sleep = lambda seconds: None
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000
sys.exit(corpus.main(sys.argv[1:]))
"""


def shard(seed: int, count: int = 120) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [sentences(seed * 1000 + i, 30) for i in range(count)]}), sink, row_group_size=50)
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def shards():
    return {f"shard_{i:05d}.parquet": shard(i) for i in (0, 1, 6542)}


class Hub(http.server.ThreadingHTTPServer):
    """Serves `files` as a dataset repository does; `failures[name]` is a list of what goes wrong first."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.failures, self.requests, self.hashes = dict(files), {}, [], {}
        self.refuses = lambda authorization: False
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, address):
        pass  # a client that hangs up


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        hub, name = self.server, self.path.split("/")[-1].split("?")[0]
        hub.requests.append((self.command, name, self.headers.get("Range")))
        if hub.refuses(self.headers.get("Authorization")):
            self.send_response(401)
            self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        todo = hub.failures.get(name, [])
        failure = todo[0] if todo and (todo[0] != "cut" or with_body) else None
        if failure and failure != "always 503":
            todo.pop(0)
        if name not in hub.files or failure in ("503", "always 503"):
            status = 503 if failure else 404
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = hub.files[name]
        start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        digest = hub.hashes.get(name) or hashlib.sha256(body).hexdigest()
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if with_body:
            self.wfile.write(body[start : start + len(body) // 3] if failure == "cut" else body[start:])
            if failure == "cut":
                self.close_connection = True


@pytest.fixture
def hub(shards):
    with Hub(shards) as server:
        yield server
        server.shutdown()


@pytest.fixture
def prepared(hub, tmp_path, isolated_home):
    """Runs prepare.py against the hub; returns the exit status and all it wrote."""

    def run(*arguments, endpoint=None):
        settings = {"HF_ENDPOINT": endpoint or hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", SCRIPT, *arguments]
        ended = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=60)
        return ended.returncode, ended.stdout + ended.stderr

    return run


def test_climbmix_and_more_shards_later(prepared, hub, capsys):
    status, output = prepared("--num-shards", "1")
    assert status == 0, output
    one = prepare.open_data()
    assert one.name == "climbmix" and len(one.train) == 1
    tokens, time = one.folder / "train_00000.tokens.npy", (one.folder / "train_00000.tokens.npy").stat().st_mtime_ns
    status, output = prepared("--num-shards", "2")
    two = prepare.open_data()
    assert status == 0 and len(two.train) == 2 and tokens.stat().st_mtime_ns == time
    assert two.eval_tag == one.eval_tag and two.data_tag != one.data_tag
    assert [name for command, name, _ in hub.requests if command == "GET"].count("shard_00000.parquet") == 1
    hub.requests.clear()
    status, output = prepared("--num-shards", "2")
    assert status == 0 and "all files are complete and intact" in output and not hub.requests


def test_tinystories_ranges():
    source = sources.tinystories()
    assert {documents.download for documents in (*source.train, source.validation, source.held_out)} == {
        ("karpathy/tinystories-gpt4-clean", "tinystories_gpt4_clean.parquet")
    }
    spans = [documents.batches.args[1](0) for documents in (*source.train, source.validation, source.held_out)]
    assert spans == [(20_000, 10**9), (10_000, 20_000), (0, 10_000)]


def test_missing_file(prepared, hub):
    del hub.files["shard_00001.parquet"]
    status, output = prepared("--num-shards", "2")
    assert status == 1 and "shard_00001.parquet" in output and "HF_ENDPOINT" in output
    assert "Traceback" not in output and len([r for r in hub.requests if r[1] == "shard_00001.parquet"]) < 3


def test_busy_for_a_while(prepared, hub):
    hub.failures = {"shard_00000.parquet": ["503", "503"], "shard_06542.parquet": ["503"]}
    status, output = prepared("--num-shards", "1")
    assert status == 0, output
    assert not any(hub.failures.values())


def test_busy_for_ever(prepared, hub):
    hub.failures = {"shard_00000.parquet": ["always 503"]}
    status, output = prepared("--num-shards", "1")
    assert status == 1 and "could not download" in output and "--dataset stdlib" in output and "503" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("cause", [False, True])
def test_a_full_disk_is_not_the_hubs_fault(monkeypatch, isolated_home, cause):
    calls = []
    monkeypatch.setattr(sources.time, "sleep", calls.append)

    def download():
        calls.append("download")
        full = OSError(errno.ENOSPC, "No space left on device")
        raise RuntimeError("xet failed") from full if cause else full

    with pytest.raises(storage.DataError, match="no space for shard.*free some space") as caught:
        sources.retrying(download, "shard")
    assert calls == ["download"] and str(isolated_home) in str(caught.value) and "hub" not in str(caught.value)


def test_a_home_that_cannot_be_written_is_not_the_hubs_fault(prepared, hub, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "file" / "home"))
    status, output = prepared("--num-shards", "1")
    assert status == 1 and "set AUTORESEARCH_HOME to a folder that you can write to" in output
    assert "trying again" not in output and "HF_ENDPOINT" not in output


def test_unreachable(prepared):
    status, output = prepared("--num-shards", "1", endpoint="http://127.0.0.1:9")
    assert status == 1 and "could not download" in output and "HF_ENDPOINT" in output and "Traceback" not in output


def test_cut_connection_resumes(prepared, hub):
    hub.failures = {"shard_00000.parquet": ["cut", "cut"]}
    status, output = prepared("--num-shards", "1")
    assert status == 0, output
    assert not hub.failures["shard_00000.parquet"]
    ranges = [r[2] for r in hub.requests if r[:2] == ("GET", "shard_00000.parquet")]
    assert ranges[0] is None and any(r and not r.startswith("bytes=0-") for r in ranges[1:]), ranges
    path = sources.downloaded(sources.CLIMBMIX, "shard_00000.parquet")
    assert path.read_bytes() == hub.files["shard_00000.parquet"]


def test_wrong_hash_is_deleted(prepared, hub):
    hub.hashes = {"shard_00000.parquet": "ab" * 32}
    status, output = prepared("--num-shards", "1")
    path = sources.downloaded(sources.CLIMBMIX, "shard_00000.parquet")
    assert status == 1 and "sha256" in output and "deleted" in output and not path.exists()
    hub.hashes = {}
    status, output = prepared("--num-shards", "1")
    assert status == 0, output


def test_half_downloaded_shard_is_fetched_again(prepared, hub):
    path = sources.downloaded(sources.CLIMBMIX, "shard_00000.parquet")
    path.parent.mkdir(parents=True)
    path.write_bytes(hub.files["shard_00000.parquet"][:5000])
    status, output = prepared("--num-shards", "1")
    assert status == 0 and "downloading it again" in output, output
    assert path.read_bytes() == hub.files["shard_00000.parquet"]


def test_shard_with_a_flipped_byte_is_fetched_again(prepared, hub):
    path = sources.downloaded(sources.CLIMBMIX, "shard_00000.parquet")
    path.parent.mkdir(parents=True)
    raw = bytearray(hub.files["shard_00000.parquet"])
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    status, output = prepared("--num-shards", "1")
    assert status == 0 and path.read_bytes() == hub.files["shard_00000.parquet"], output


def test_shards_at_hand_are_used_offline(prepared, hub, shards):
    for name in ("shard_00000.parquet", "shard_06542.parquet"):
        path = sources.downloaded(sources.CLIMBMIX, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(shards[name])
    status, output = prepared("--num-shards", "1", endpoint="http://127.0.0.1:9")
    assert status == 0 and "as it is" in output, output


def test_not_parquet(prepared, hub):
    hub.files["shard_00000.parquet"] = b"<html>quota exceeded</html>"
    status, output = prepared("--num-shards", "1")
    assert status == 1 and "not a complete parquet file" in output and "Traceback" not in output


def test_interrupted_preparing_goes_on(prepared, hub, isolated_home):
    hub.failures = {"shard_00001.parquet": ["always 503"]}
    assert prepared("--num-shards", "1")[0] == 0
    assert prepared("--num-shards", "2")[0] == 1
    assert prepare.open_data().name == "climbmix", "what was whole stays usable while more is fetched"
    manifest = isolated_home / "data" / "climbmix" / "manifest.json"
    assert len(json.loads(manifest.read_text())["parts"]) == 4


def test_an_expired_token_is_said_and_not_used(prepared, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    hub.refuses = lambda authorization: authorization == "Bearer hf_expired"
    status, text = prepared("--num-shards", "1")
    assert status == 0 and "ready" in text, text
    assert "hf auth login" in text and "Continuing without the token" in text and "has no" not in text


def test_a_hub_that_wants_a_token_is_told_from_one_without_the_dataset(prepared, hub):
    hub.refuses = lambda authorization: True
    status, text = prepared("--num-shards", "1")
    assert status == 1 and "Hugging Face refuses karpathy/climbmix-400b-shuffle" in text and "hf auth login" in text
