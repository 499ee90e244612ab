"""Real coding agents in real nights, with a scripted model: no network, no keys, no GPU.

    python tests/agents/trial.py --folder FOLDER [--agents claude,codex] [--scenarios edit,429]

Each agent that is found (npm's in FOLDER/npm, Python's in FOLDER/pip, else on PATH) gets a night of three experiments
for each scenario, its turns scripted by model_server.py; several words joined by "+" are the turns of one night. What
an experiment trains is tests/lab/fake_train.py: half a second. A table tells what came of each night; the exit status
is 1 where a night's ledger is not right, its repository is not clean, or an agent that works as it should failed.

`make test-agents` installs the agents and does all this. Folders lie outside /tmp, which Codex treats specially.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "lab"), str(ROOT)]

import psutil  # noqa: E402
import sessions  # noqa: E402
from texts import sentences, write_files  # noqa: E402

import corpus  # noqa: E402
import dataset  # noqa: E402
from lab.session.journal import Journal  # noqa: E402
from lab.session.events import NIGHT_EVENTS, TurnTaken  # noqa: E402
from lab.session.session import Session  # noqa: E402

NIGHT = """import sys
sys.path.insert(0, sys.argv.pop(1))
from lab.night import limits
limits.troubles = lambda session: []
from lab.__main__ import main
sys.exit(main())
"""  # a night that a busy machine does not stop
EXPERIMENTS, TURN_SECONDS, LONGEST = 3, 60, 900
SERVED = ("edit", "look", "no-such-tool", "429-once", "bold-line", "edit+look+edit")  # scenarios that have to succeed


@dataclass
class Recipe:
    """How an agent is called, as docs/agents.md says, and told where its model is.

    Attributes:
        command: for --agent. variables: of its environment; {url} is the server. files: of its home, or, where a name
            begins with "repository/", of the repository.
    """

    command: str
    variables: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


CODEX = """model = "scripted"
model_provider = "here"
[model_providers.here]
name = "here"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "OPENAI_API_KEY"
"""
OPENCODE = """{
  "$schema": "https://opencode.ai/config.json",
  "provider": {"ollama": {"npm": "@ai-sdk/openai-compatible", "name": "Ollama",
    "options": {"baseURL": "{url}/v1"}, "models": {"qwen3-coder": {}}}},
  "permission": {
    "external_directory": "deny",
    "bash": {"*": "deny", "python -m lab*": "allow", "python -m backends.surface*": "allow",
      "git show*": "allow", "git log*": "allow"}
  }
}
"""
PI = """{"providers": {"ollama": {"baseUrl": "{url}/v1", "api": "openai-completions", "apiKey": "ollama",
  "models": [{"id": "qwen3-coder"}]}}}
"""
VIBE = """active_model = "scripted"
enable_telemetry = false
enable_update_checks = false
[[providers]]
name = "here"
api_base = "{url}/v1"
[[models]]
name = "scripted"
provider = "here"
alias = "scripted"
"""
RECIPES = {
    "claude": Recipe(
        "claude -p --permission-mode acceptEdits --tools Bash,Edit,Read "
        '--allowedTools "Bash(python -m lab:*)" "Bash(python -m backends.surface:*)"',
        {"ANTHROPIC_BASE_URL": "{url}", "ANTHROPIC_API_KEY": "none", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"},
    ),
    "codex": Recipe(
        "codex exec -c allow_login_shell=false --sandbox workspace-write -",
        {"OPENAI_API_KEY": "none"},
        {".codex/config.toml": CODEX},
    ),
    "codex-oss": Recipe(
        "codex exec -c allow_login_shell=false --oss --local-provider ollama --sandbox workspace-write -",
        {"CODEX_OSS_BASE_URL": "{url}/v1"},
    ),
    "gemini": Recipe(
        "gemini --skip-trust --approval-mode auto_edit",
        {"GOOGLE_GEMINI_BASE_URL": "{url}", "GEMINI_API_KEY": "none"},
        {".gemini/settings.json": '{"security": {"auth": {"selectedType": "gemini-api-key"}}}'},
    ),
    "aider": Recipe(
        "aider --model ollama_chat/qwen3-coder --edit-format diff --no-git --yes-always --no-show-model-warnings "
        "--no-show-release-notes --no-check-update --analytics-disable --no-detect-urls --no-pretty "
        "--chat-history-file /dev/null --message-file /dev/stdin train.py",
        {"OLLAMA_API_BASE": "{url}"},
    ),
    "opencode": Recipe("opencode run -m ollama/qwen3-coder", {}, {"repository/opencode.json": OPENCODE}),
    "pi": Recipe("pi -p --model ollama/qwen3-coder", {"PI_OFFLINE": "1"}, {".pi/agent/models.json": PI}),
    "copilot": Recipe(
        "copilot -s --allow-tool=write --allow-tool='shell(python:*)'",
        {
            "COPILOT_PROVIDER_BASE_URL": "{url}/v1",
            "COPILOT_PROVIDER_API_KEY": "none",
            "COPILOT_MODEL": "scripted",
            "COPILOT_OFFLINE": "true",
        },
    ),
    "vibe": Recipe("vibe --trust --agent accept-edits -p", {"MISTRAL_API_KEY": "none"}, {".vibe/config.toml": VIBE}),
    "qwen": Recipe(
        "qwen --bare --approval-mode auto-edit",
        {"OPENAI_BASE_URL": "{url}/v1", "OPENAI_API_KEY": "none", "OPENAI_MODEL": "scripted"},
        {".qwen/settings.json": '{"security": {"auth": {"selectedType": "openai"}}}'},
    ),
}
# Beside a sandbox of their own: with the lab as an MCP server, which {python} runs in {repository}.
MCP = {
    "claude": Recipe(
        "claude -p --permission-mode acceptEdits --tools Edit,Read --allowedTools mcp__lab "
        "--mcp-config {home}/mcp.json",
        RECIPES["claude"].variables,
        {"mcp.json": '{"mcpServers": {"lab": {"command": "{python}", "args": ["-m", "lab", "mcp"]}}}'},
    ),
    "codex": Recipe(
        "codex exec --sandbox workspace-write -",
        RECIPES["codex"].variables,
        {
            ".codex/config.toml": CODEX
            + """
[mcp_servers.lab]
command = "{python}"
args = ["-m", "lab", "mcp"]
cwd = "{repository}"
env = {AUTORESEARCH_HOME = "{sessions}"}
default_tools_approval_mode = "approve"
"""
        },
    ),
}
PROPOSE = 'tool: {} {{"message": "matrix rate, over MCP", "edits": []}}'
CALLED = {"claude": "mcp__lab__propose", "codex": "propose"}  # what they name it for their models
PROGRAMS = {"codex-oss": "codex"}  # names of commands that are not those of their recipes


def main() -> int:
    asked = argparse.ArgumentParser(description="Real agents in nights, with a scripted model.")
    asked.add_argument("--folder", type=Path, required=True, help="where agents are, and what nights leave")
    asked.add_argument("--agents", default=",".join(RECIPES))
    asked.add_argument("--scenarios", default="edit", help="words of model_server.SCENARIOS")
    asked.add_argument("--turn-seconds", type=float, default=TURN_SECONDS)
    asked.add_argument("--experiments", type=int, default=EXPERIMENTS, help="of a night")
    asked.add_argument("--mcp", action="store_true", help="no nights: sessions of three experiments over MCP")
    given = asked.parse_args()
    folder = given.folder.absolute()
    path = [folder / "npm" / "node_modules" / ".bin", folder / "pip" / "bin", Path(os.environ["PATH"])]
    os.environ["PATH"] = os.pathsep.join(map(str, path))
    data = prepared(folder / "data")
    rows, bad = [], 0
    print(f"{'agent':<10} {'scenario':<16} {'turns':<34} {'s/turn':>6} {'MB':>5}  what is wrong", flush=True)
    if given.mcp:
        return max(over_mcp(name, recipe, folder, data) for name, recipe in MCP.items())
    for name in given.agents.split(","):
        if not shutil.which(PROGRAMS.get(name, name)):
            print(f"{name:<10} is not here", flush=True)
            continue
        for scenario in given.scenarios.split(","):
            row = night(name, RECIPES[name], scenario, folder, data, given)
            rows.append(row)
            wrong = "; ".join(row["wrong"])
            bad += bool(wrong)
            print(
                f"{name:<10} {scenario:<16} {', '.join(row['outcomes']):<34} {row['seconds']:6.1f} "
                f"{row['memory'] / 2**20:5.0f}  {wrong}",
                flush=True,
            )
            for said in row["said"]:
                print(f"{'':28}{said}", flush=True)
    (folder / "trial.json").write_text(json.dumps(rows, indent=1))
    return 1 if bad else 0


def prepared(home: Path) -> Path:
    """A home with a small dataset."""
    os.environ["AUTORESEARCH_HOME"] = str(home)
    if not (home / "data" / "tiny" / "manifest.json").exists():
        write_files(home / "text", [sentences(i, 60 + i % 37) for i in range(300)])
        assert corpus.main(["--dataset", str(home / "text"), "--name", "tiny"]) == 0
    return home


def begun(place: Path, data: Path) -> Session:
    """A session in a copy of this project, whose train.py is small and quick."""
    home = place / "sessions-home"
    home.mkdir(parents=True)
    (home / "data").symlink_to(data / "data")
    os.environ["AUTORESEARCH_HOME"] = str(home)
    manifest = dataset.read_manifest(data / "data" / "tiny")
    tags = {"eval": manifest["eval_tag"], "data": manifest["data_tag"], "profile": "abc"}
    train = (ROOT / "tests" / "lab" / "fake_train.py").read_text().replace("LEARNING", "MATRIX_LR")
    settings = {"AUTORESEARCH_HOME": str(home), "AUTORESEARCH_DATA": "tiny"}
    session = sessions.make(
        place / "repository",
        train.encode(),
        project=True,
        budget=0.1,
        settings=settings,
        baseline_runs=2,
        **tags,
    )
    for name in ("program.md", "AGENTS.md", "CLAUDE.md", "GEMINI.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, session.repository.path / name)
    shutil.copy(ROOT / ".gitignore", session.repository.path / ".gitignore")
    sessions.git(session.repository.path, "add", "-A")
    sessions.git(session.repository.path, "commit", "-qm", "what agents read")
    return session


def served(name: str, recipe: Recipe, session: Session, place: Path, queue: Path) -> tuple[subprocess.Popen, dict]:
    """(a model that follows the queue, the environment of an agent that asks it)."""
    port = 11434 if name == "codex-oss" else free_port()  # Ollama's own, where no other can be told
    serving = [sys.executable, str(Path(__file__).with_name("model_server.py")), "--port", str(port)]
    serving += ["--queue", str(queue), "--log", str(place / "requests.jsonl"), "--bodies", str(place / "bodies")]
    server = subprocess.Popen(serving, stdout=subprocess.PIPE, text=True)
    assert server.stdout and server.stdout.readline()
    home = place / "home"
    home.mkdir()
    facts = {"url": f"http://127.0.0.1:{port}", "home": str(home), "python": sys.executable}
    facts |= {"repository": str(session.repository.path), "sessions": str(place / "sessions-home")}

    def filled(text: str) -> str:
        for key, value in facts.items():
            text = text.replace(f"{{{key}}}", value)
        return text

    for file, text in recipe.files.items():
        inside = file.startswith("repository/")
        target = session.repository.path / file.removeprefix("repository/") if inside else home / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(filled(text))
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "TERM", "TMPDIR") if key in os.environ}
    variables = {key: filled(value) for key, value in recipe.variables.items()}
    own = {"HOME": str(home), "AUTORESEARCH_HOME": facts["sessions"], "COMMAND": filled(recipe.command)}
    return server, kept | variables | own


def over_mcp(name: str, recipe: Recipe, folder: Path, data: Path) -> int:
    """A session of three experiments, each proposed by an agent over MCP; 1 if it is not as it should be."""
    place = folder / "nights" / f"{name}-mcp"
    shutil.rmtree(place, ignore_errors=True)
    session, queue = begun(place, data), place / "queue"
    queue.write_text(f"{PROPOSE.format(CALLED[name])}\n" * EXPERIMENTS)
    server, environment = served(name, recipe, session, place, queue)
    where = {"cwd": session.repository.path, "env": environment}
    try:
        subprocess.run([sys.executable, "-m", "lab", "wait"], check=True, stdout=subprocess.DEVNULL, **where)
        for number in range(1, EXPERIMENTS + 1):
            with open(place / f"{number}.log", "w") as log:
                told = f"Improve train.py, and propose it over MCP. This is experiment {number}."
                subprocess.run(
                    environment["COMMAND"],
                    shell=True,
                    input=told,
                    text=True,
                    stdout=log,
                    stderr=log,
                    timeout=300,
                    **where,
                )
    finally:
        server.kill()
        server.wait()
    state = Session(session.folder).state
    done = [(e.number, e.status, e.description) for e in state.decided if e.number]
    print(f"{name:<10} over MCP: {done}", flush=True)
    return int(len(done) != EXPERIMENTS)


def night(name: str, recipe: Recipe, scenario: str, folder: Path, data: Path, given) -> dict:
    """A night; what came of it."""
    place = folder / "nights" / f"{name}-{scenario.replace('+', '-').replace(' ', '_').replace('/', '_')[:60]}"
    shutil.rmtree(place, ignore_errors=True)
    session, queue = begun(place, data), place / "queue"
    scenarios = scenario.split("+")
    queue.write_text("\n".join(scenarios if len(scenarios) > 1 else scenarios * 9) + "\n")
    server, environment = served(name, recipe, session, place, queue)
    command = [sys.executable, "-c", NIGHT, str(session.judge), "--session", str(session.folder), "night"]
    command += ["--planned=0", "--max-experiments", str(given.experiments), "--turn-seconds", str(given.turn_seconds)]
    before = sessions.git(session.repository.path, "status", "--porcelain", "--ignored")
    memory = Memory(session)
    with open(place / "night.log", "w") as log:
        process = subprocess.Popen(
            [*command, "--agent", environment.pop("COMMAND")],
            cwd=session.repository.path,
            env=environment,
            stdout=log,
            stderr=log,
        )
        memory.start()
        try:
            process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        finally:
            memory.over = True
            server.kill()
            server.wait()
    session = Session(session.folder)
    turns = [event for event in Journal(session.folder / "night.jsonl", NIGHT_EVENTS).events]
    agents = [turn for turn in turns if isinstance(turn, TurnTaken) and turn.by == "agent"]
    return {
        "agent": name,
        "scenario": scenario,
        "outcomes": [turn.outcome for turn in agents],
        "said": list(
            dict.fromkeys(turn.said for turn in agents if turn.outcome != "edited" or turn.others or turn.left)
        ),
        "described": [turn.description for turn in agents],
        "seconds": sum(turn.seconds for turn in agents) / max(1, len(agents)),
        "memory": memory.most,
        "wrong": wrong(session, scenario, agents, before, process.returncode, given.experiments),
    }


def wrong(
    session: Session, scenario: str, turns: list[TurnTaken], before: str, status: int, experiments: int
) -> list[str]:
    """What is not as it should be, whatever the agent did; and if it is to do well, whether it did."""
    found = []
    if status:
        found.append(f"the night ended with exit status {status}")
    try:
        state = session.state
        assert not state.open, "an experiment is open"
        runs = sorted(row["run"] for row in sessions.rows_of(session.ledger))
        assert runs == sorted(n for n, run in state.runs.items() if run.status != "lost"), "the ledger lacks runs"
        assert state.best, "there is no baseline"
        assert session.repository.blob_of(session.branch) == state.best.blob, "the branch is not at the best"
        after = sessions.git(session.repository.path, "status", "--porcelain", "--ignored")
        assert after == before, f"left in the repository: {after}"
        assert not session.turn.exists(), "the clone is left"
        if scenario in SERVED:
            assert len(turns) == experiments, f"{len(turns)} turns for {experiments} experiments"
            assert all(turn.outcome == "edited" for turn in turns), "a turn gave no edit"
            assert all(turn.description.startswith("matrix rate") for turn in turns), "a turn is not described"
            assert not any(turn.others for turn in turns), "other files were changed"
    except (AssertionError, OSError) as error:
        found.append(str(error))
    return found


class Memory(threading.Thread):
    """The most memory that what a turn started has held."""

    def __init__(self, session: Session):
        super().__init__(daemon=True)
        from lab.night import agent
        from lab.run import processes

        self.mark, self.processes, self.most, self.over = {agent.MARK: agent._mark(session)}, processes, 0, False

    def run(self) -> None:
        while not self.over:
            total = 0
            for process in self.processes.marked(**self.mark):
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            self.most = max(self.most, total)
            time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
