"""A scripted model behind the APIs that coding agents speak, on the loopback: to try real agents without a network.

    model_server.py --port 11434 --queue FILE [--log FILE.jsonl] [--bodies FOLDER]

It speaks, streamed and not:

    OpenAI chat completions    POST /v1/chat/completions              aider, OpenCode, Qwen Code, Cline, Crush, pi
    OpenAI responses           POST /v1/responses                     Codex CLI
    Anthropic messages         POST /v1/messages                      Claude Code
    Gemini                     POST /v1beta/models/M:generateContent  Gemini CLI (also :streamGenerateContent)
    Ollama                     POST /api/chat, GET /api/tags, ...     aider (ollama_chat/...), codex --oss

What the model does in a conversation is a scenario: a word of SCENARIOS. Each new conversation (told apart by its
first words of the user's) takes the first line of the queue file, or "edit" once there is none. A line "shell: COMMAND"
edits, and runs that with the agent's own tool; "tool: NAME JSON" edits, and calls that tool. A scenario is a list of
steps:

    read()                  looks at train.py with the agent's own tool
    edit(name, file, new)   changes a hyperparameter with the agent's own tool, from the value that was read
    shell(command)          with the agent's own tool
    say(text)               the end of the turn
    fault(kind)             answers 429, 500, ..., hangs, cuts the stream, calls a tool that isn't there, ...

Steps are counted by the tool results in the request, so the server keeps no state but which scenario a conversation
has. Agents differ in their tools: the one that is used is found by the names of its parameters (`Tools`). An agent
without tools (aider) gets its edit as a text block. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL = "scripted"
HANG, LATER = 3600.0, 8.0  # seconds

# --- Scenarios ---


@dataclass(frozen=True)
class Step:
    kind: str
    value: str = ""
    more: dict = field(default_factory=dict)


def read(file="train.py"):
    return Step("read", file)


def edit(name="MATRIX_LR", file="train.py", new=None):
    return Step("edit", name, {"file": file, "new": new})


def shell(command):
    return Step("shell", command)


def say(text):
    return Step("say", text)


def fault(kind):
    return Step("fault", kind)


DONE = say("I made the matrix rate another one.\n\nCHANGE: matrix rate {value}")
TRAIN = "python train.py"
SCENARIOS = {
    # As it should be.
    "edit": [read(), edit(), DONE],
    "edit-shell": [
        shell("sed -i 's/^MATRIX_LR = .*/MATRIX_LR = 0.055/' train.py && grep -n ^MATRIX_LR train.py"),
        say("CHANGE: matrix rate 0.055, by sed"),
    ],
    "look": [
        shell("python -m lab log"),
        shell("python -m lab status"),
        shell("git log --oneline -3"),
        shell("python -m backends.surface train.py"),
        read(),
        edit(),
        DONE,
    ],
    "bold-line": [read(), edit(), say("Done.\n\n**CHANGE:** matrix rate {value}, in bold")],
    "long-line": [read(), edit(), say("CHANGE: matrix rate {value}: " + "what is wide moves further, " * 8 + "END")],
    "no-line": [read(), edit(), say("I made the matrix rate {value}.")],
    # Things an agent shouldn't do, and does.
    "nothing": [read(), say("The code looks fine.")],
    "ask": [read(), say("I could raise the matrix rate. Shall I go on?")],
    "elsewhere": [read(), edit(), read("dataset.py"), edit("MAX_SEQ_LEN", "dataset.py"), DONE],
    "elsewhere-only": [read("dataset.py"), edit("MAX_SEQ_LEN", "dataset.py"), say("CHANGE: a longer context")],
    "commit": [
        read(),
        edit(),
        shell("git -c user.name=agent -c user.email=a@b commit -qam mine; git log --oneline -2"),
        DONE,
    ],
    "train": [read(), edit(), shell(TRAIN), DONE],
    "lab-run": [read(), edit(), shell("python -m lab run -m mine --wait 60"), DONE],
    "lab-run-unmarked": [read(), edit(), shell("env -u LAB_TURN python -m lab run -m mine --wait 60"), DONE],
    "env": [read(), edit(new='MATRIX_LR = float(os.environ.get("MY_RATE", {value}))'), DONE],
    "background": [read(), edit(), shell(f"nohup {TRAIN} > /dev/null 2>&1 & echo started"), DONE],
    "daemon": [read(), edit(), shell(f"setsid nohup {TRAIN} > /dev/null 2>&1 < /dev/null & echo started"), DONE],
    "escaped": [
        read(),
        edit(),
        shell(f"env -u LAB_TURN setsid nohup {TRAIN} > /dev/null 2>&1 < /dev/null & echo ok"),
        DONE,
    ],
    "flood": [read(), edit(), shell("head -c 50000000 /dev/zero | tr '\\0' x | fold -w 120"), DONE],
    "loud": [read(), edit(), Step("loud")],  # 50 MB of words
    "endless": [shell("echo again")] * 10_000,  # calls tools and never ends
    "broken": [read(), edit(new="MATRIX_LR = = {value}"), DONE],
    # A server that fails.
    "429": [fault("429")],
    "500": [fault("500")],
    "401": [fault("401")],
    "context": [fault("context")],
    "429-once": [fault("429-once"), read(), edit(), DONE],
    "hang": [fault("hang")],
    "stall": [fault("stall")],
    "cut": [fault("cut")],
    "garbage": [fault("garbage")],
    "hang-edited": [read(), edit(), fault("hang")],
    "empty": [fault("empty")],
    # A model that can't call tools well.
    "no-such-tool": [Step("call", "frobnicate", {"arguments": {"x": 1}}), read(), edit(), DONE],
    "malformed": [Step("malformed"), read(), edit(), DONE],  # arguments that are no JSON
    "wrong-arguments": [Step("wrong"), read(), edit(), DONE],
    "tool-as-text": [say('<tool_call>{"name": "edit", "arguments": {"path": "train.py"}}</tool_call>')],
}


def steps_of(line: str) -> list[Step]:
    """The steps of a line of the queue: a word of SCENARIOS, "shell: COMMAND" or "tool: NAME JSON"."""
    if line.startswith("tool:"):
        name, _, given = line.removeprefix("tool:").strip().partition(" ")
        call = Step("call", name, {"arguments": json.loads(given or "{}")})
        return [read(), edit(), Step("later", "train.py"), call, DONE]
    if line.startswith("shell:"):
        return [read(), edit(), shell(line.removeprefix("shell:").strip()), DONE]
    return SCENARIOS[line.strip()]


# --- What an agent offers, and what it has been told so far ---

OLD = ("old_string", "oldString", "oldText", "old_str", "old_text", "search")
NEW = ("new_string", "newString", "newText", "new_str", "new_text", "replace")
PATHS = ("file_path", "filePath", "path", "absolute_path", "filename", "file", "target_file")
COMMANDS = ("command", "cmd", "commands")
READERS = ("read", "read_file", "readfile", "view", "read_files", "cat")
# What a tool may ask for beside that, by the name of the parameter.
FILLERS = {
    "description": "what the script says",
    "instruction": "change the rate",
    "explanation": "the script",
    "is_background": False,
    "requires_approval": False,
}


@dataclass
class Talk:
    """A request, whatever API it came by.

    Attributes:
        told: the user's words, all of them. first: the first of them, by which a conversation is known.
        tools: by name, their parameters as JSON schema properties (None: free text). results: of tool calls, in order.
        wants: a JSON schema that the answer has to follow, or None.
        spaces: namespaces of tools. code_mode: they are called from JavaScript, which the tool "exec" runs. (Codex.)
    """

    told: str
    first: str
    system: str = ""
    tools: dict[str, dict | None] = field(default_factory=dict)
    required: dict[str, list] = field(default_factory=dict)
    results: list[str] = field(default_factory=list)
    wants: dict | None = None
    stream: bool = False
    model: str = MODEL
    spaces: dict[str, str] = field(default_factory=dict)
    code_mode: bool = False


@dataclass
class Answer:
    """text, or a call of a tool: (name, arguments; a string is passed on as it is)."""

    text: str = ""
    call: tuple[str, dict | str] | None = None
    fault: str | None = None


class Tools:
    """Finds what an agent offers for reading, editing and the shell."""

    def __init__(self, talk: Talk, folder: str):
        self.talk, self.folder = talk, folder

    def _having(self, *choices) -> tuple[str, list[str]] | None:
        """(the tool with one parameter of each choice, their names)."""
        for name, properties in self.talk.tools.items():
            found = [next((key for key in keys if key in (properties or {})), None) for keys in choices]
            if all(found):
                return name, found
        return None

    def _call(self, name: str, arguments: dict) -> tuple[str, dict]:
        """With what else the tool requires."""
        for key in self.talk.required.get(name, ()):
            if key not in arguments:
                kind = (self.talk.tools[name] or {}).get(key, {}).get("type")
                arguments[key] = FILLERS.get(key, {"boolean": False, "integer": 60, "number": 60}.get(kind, "scripted"))
        return name, arguments

    def path(self, file: str) -> str:
        return f"{self.folder}/{file}" if self.folder else file

    def read(self, file: str):
        for name, properties in self.talk.tools.items():
            if name.lower() in READERS and properties is not None:
                if key := next((key for key in PATHS if key in properties), None):
                    return self._call(name, {key: self.path(file)})
        return self.shell(f"cat {file}")

    def edit(self, file: str, old: str, new: str):
        if found := self._having(PATHS, OLD, NEW):
            name, (path, before, after) = found
            return self._call(name, {path: self.path(file), before: old, after: new})
        if found := self._having(PATHS, ("edits",)):  # pi: a list of them
            name, (path, edits) = found
            return self._call(name, {path: self.path(file), edits: [{"oldText": old, "newText": new}]})
        if "apply_patch" in self.talk.tools or self.talk.code_mode:
            patch = f"*** Begin Patch\n*** Update File: {file}\n@@\n-{old}\n+{new}\n*** End Patch"
            if self.talk.code_mode:
                return "exec", f"text(await tools.apply_patch({json.dumps(patch)}));"
            free = self.talk.tools["apply_patch"] is None
            given = self.talk.tools["apply_patch"] or {}
            key = next((key for key in ("patchText", "patch", "input") if key in given), "input")
            return "apply_patch", patch if free else {key: patch}
        quoted = [re.sub(r"([/&\\.*^$\[\]])", r"\\\1", text).replace("'", "'\\''") for text in (old, new)]
        return self.shell(f"sed -i 's/^{quoted[0]}/{quoted[1]}/' {file}")

    def shell(self, command: str):
        if self.talk.code_mode:
            given = json.dumps({"cmd": command, "yield_time_ms": 30_000})
            return "exec", f"const done = await tools.exec_command({given}); text(done.output); text(done);"
        if found := self._having(COMMANDS):
            name, (key,) = found
            kind = (self.talk.tools[name] or {}).get(key, {}).get("type")
            if kind == "array":
                return self._call(name, {key: ["bash", "-lc", command] if key == "command" else [command]})
            return self._call(name, {key: command})
        return None


# --- The model ---


class Script:
    """What the model says next."""

    def __init__(self, queue: Path | None):
        self.queue, self.lock = queue, threading.Lock()
        self.given: dict[str, tuple[str, float]] = {}  # by conversation: scenario, and by what a value is multiplied
        self.faults: dict[str, int] = {}

    def scenario(self, talk: Talk) -> tuple[str, float, str]:
        key = hashlib.sha256(talk.first.encode()).hexdigest()[:12]
        with self.lock:
            if key not in self.given:
                lines = self.queue.read_text().split("\n") if self.queue and self.queue.is_file() else []
                lines = [line for line in lines if line.strip()]
                if lines:
                    self.queue.write_text("\n".join(lines[1:]))
                self.given[key] = (lines[0] if lines else "edit", 0.5 + int(key, 16) % 1500 / 1000)
        return *self.given[key], key

    def answer(self, talk: Talk) -> tuple[Answer, dict]:
        """(what is said, what is noted of it)."""
        if talk.wants:
            return Answer(json.dumps(instance(talk.wants))), {"aside": "JSON"}
        blocks = not talk.tools and re.search(r"SEARCH/REPLACE|\*SEARCH|file listing", talk.system + talk.told)
        if not talk.tools and not blocks:  # a title, a summary, a commit message
            return Answer("A scripted answer."), {"aside": "text"}
        name, rate, key = self.scenario(talk)
        steps = steps_of(name)
        if blocks:
            return self.in_blocks(talk, name, rate), {"scenario": name, "conversation": key, "step": "blocks"}
        number = len(talk.results)
        step = steps[min(number, len(steps) - 1)]
        with self.lock:
            if step.kind == "fault" and step.value.endswith("-once"):  # it leaves no result: one step less from here on
                self.faults[key] = self.faults.get(key, 0) + 1
                if self.faults[key] > 1:
                    step = steps[1]
            elif self.faults.get(key):
                step = steps[min(number + 1, len(steps) - 1)]
        about = {"scenario": name, "conversation": key, "step": number, "kind": step.kind}
        return self.perform(step, talk, rate), about

    def perform(self, step: Step, talk: Talk, rate: float) -> Answer:
        tools = Tools(talk, folder_of(talk))
        seen = "\n".join(talk.results)
        old, rest, value = values(seen, step.value if step.kind == "edit" else "MATRIX_LR", rate)
        match step.kind:
            case "say":  # what was written, and not what would be written next
                return Answer(step.value.replace("{value}", value))
            case "loud":
                return Answer("\n".join(["x" * 119] * 420_000) + "\nCHANGE: matrix rate, after many words")
            case "later":  # MCP servers may still be starting
                time.sleep(LATER)
                return called(tools.read(step.value))
            case "read":
                return called(tools.read(step.value))
            case "shell":
                return called(tools.shell(step.value))
            case "edit":
                new = (step.more["new"] or f"{step.value} = {{value}}").replace("{value}", value) + rest
                return called(tools.edit(step.more["file"], old, new))
            case "call" if talk.code_mode:
                return Answer(call=("exec", f"text(await tools.{step.value}({json.dumps(step.more['arguments'])}));"))
            case "call":
                return Answer(call=(step.value, dict(step.more["arguments"])))
            case "malformed":
                name, _ = tools.read("train.py") or ("read", {})
                return Answer(call=(name, '{"path": "train.py", "old'))
            case "wrong":
                name, _ = tools.edit("train.py", "a", "b") or ("edit", {})
                return Answer(call=(name, {"wrong": True}))
        return Answer(fault=step.value)

    def in_blocks(self, talk: Talk, name: str, rate: float) -> Answer:
        """For an agent without tools: the edits of a scenario as text, its commands, its faults, its last words."""
        whole, text, value = talk.system + talk.told, [], ""
        listing = "SEARCH/REPLACE" not in whole
        for step in steps_of(name):
            if step.kind == "fault" and not (step.value.endswith("-once") and self.faults.get(talk.first)):
                self.faults[talk.first] = 1
                return Answer(fault=step.value)
            if step.kind == "loud":
                return self.perform(step, talk, rate)
            if step.kind == "shell":
                text.append(f"```bash\n{step.value}\n```")
            if step.kind == "say":
                text.append(step.value.replace("{value}", value))
            if step.kind == "edit":
                old, rest, value = values(whole, step.value, rate)
                new = (step.more["new"] or f"{step.value} = {{value}}").replace("{value}", value) + rest
                file = step.more["file"]
                if listing:
                    found = re.search(rf"{re.escape(file)}\n```[^\n]*\n(.*?)\n```", whole, re.S)
                    body = found[1] if found else old
                    text.append(f"{file}\n```\n{body.replace(old, new, 1)}\n```")
                else:
                    text.append(f"{file}\n```python\n<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE\n```")
        return Answer("\n\n".join(text))


def called(call) -> Answer:
    return Answer(call=call) if call else Answer("I have no tool for that.\n\nCHANGE: none")


def values(seen: str, name: str, rate: float) -> tuple[str, str, str]:
    """(the line with the assignment that was read, what follows the value there, the value that it becomes)."""
    found = re.search(rf"\b{name} = ([0-9.]+)([^\n]*)", seen.replace("\\n", "\n"))  # some agents give files as JSON
    old, rest = found.groups() if found else ("0.04", "")
    return f"{name} = {old}{rest}", rest, f"{float(old) * rate:g}"


def folder_of(talk: Talk) -> str:
    """The working directory, as agents tell it; "" if they don't."""
    for pattern in (r"working in the directory: (/\S+)", r"<cwd>(/[^<]+)</cwd>", r"[Ww]orking [Dd]irectory: (/\S+)"):
        if found := re.search(pattern, f"{talk.told}\n{talk.system}"):
            return found[1].rstrip("/")
    return ""


def instance(schema: dict):
    """Something that follows a JSON schema."""
    kind = str(schema.get("type", "object")).lower()
    if schema.get("enum"):
        return schema["enum"][0]
    if kind == "object":
        return {key: instance(value) for key, value in schema.get("properties", {}).items()}
    return {"array": [], "boolean": False, "integer": 1, "number": 1}.get(kind, "scripted")


# --- The APIs: each reads a request into a Talk, and writes an Answer ---


def words(content) -> str:
    """The text of a message's content, whichever form it has."""
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content or () if isinstance(part, dict) and part.get("text"))


def first_words(messages) -> str:
    """The user's, before the first tool was called. (Some agents make up an exchange before that.)"""
    told = []
    for one in messages:
        parts = one.get("content") or one.get("parts") or ()
        if (
            one.get("tool_calls")
            or str(one.get("type", "")).endswith("_call")
            or not isinstance(parts, str)
            and any("functionCall" in part or part.get("type") == "tool_use" for part in parts)
        ):
            break
        if one.get("role") == "user":
            told.append(words(parts))
    return "\n".join(told)


def schema_of(talk: Talk, name: str, schema: dict | None) -> None:
    talk.tools[name] = None if schema is None else schema.get("properties", {}) or {}
    talk.required[name] = (schema or {}).get("required", [])


def read_chat(body: dict) -> Talk:
    """OpenAI chat completions, and Ollama's /api/chat."""
    told = [words(one.get("content")) for one in body["messages"] if one["role"] == "user"]
    talk = Talk(
        "\n".join(told), first_words(body["messages"]), stream=bool(body.get("stream")), model=body.get("model", MODEL)
    )
    if not body.get("tools"):  # aider has made up what was said before
        talk.first = talk.told
    talk.system = "\n".join(
        words(one.get("content")) for one in body["messages"] if one["role"] in ("system", "developer")
    )
    talk.results = [words(one.get("content")) for one in body["messages"] if one["role"] == "tool"]
    for one in body.get("tools") or ():
        schema_of(talk, one["function"]["name"], one["function"].get("parameters") or {})
    if (wanted := body.get("response_format") or {}).get("type") == "json_schema":
        talk.wants = wanted["json_schema"].get("schema", {})
    return talk


def read_responses(body: dict) -> Talk:
    items = [{"role": "user", "content": body["input"]}] if isinstance(body["input"], str) else body["input"]
    told = [words(one.get("content")) for one in items if one.get("role") == "user"]
    talk = Talk("\n".join(told), first_words(items), stream=bool(body.get("stream")), model=body.get("model", MODEL))
    talk.system = body.get("instructions") or ""
    talk.system += "\n".join(words(one.get("content")) for one in items if one.get("role") in ("developer", "system"))
    given = [one.get("output") for one in items if str(one.get("type", "")).endswith("_call_output")]
    talk.results = [one if isinstance(one, str) else words(one) or json.dumps(one) for one in given]
    offered = [*(body.get("tools") or ()), *(tool for one in items for tool in one.get("tools") or ())]  # these: Codex
    while offered:
        one = offered.pop(0)
        if one["type"] == "namespace":
            offered += [tool | {"namespace": one["name"]} for tool in one.get("tools") or ()]
            continue
        if one["type"] not in ("function", "custom"):
            continue
        schema_of(talk, one["name"], (one.get("parameters") or {}) if one["type"] == "function" else None)
        if one.get("namespace"):
            talk.spaces[one["name"]] = one["namespace"]
        talk.code_mode |= one["name"] == "exec" and "tools.exec_command" in one.get("description", "")
    if (wanted := (body.get("text") or {}).get("format") or {}).get("type") == "json_schema":
        talk.wants = wanted.get("schema", {})
    return talk


def read_messages(body: dict) -> Talk:
    told, results = [], []
    for one in body["messages"]:
        if one["role"] != "user":
            continue
        told.append(words(one["content"]))
        if isinstance(one["content"], list):
            results += [words(part.get("content")) for part in one["content"] if part.get("type") == "tool_result"]
    talk = Talk(
        "\n".join(told), first_words(body["messages"]), stream=bool(body.get("stream")), model=body.get("model", MODEL)
    )
    talk.system, talk.results = words(body.get("system")), results
    for one in body.get("tools") or ():
        if "input_schema" in one:
            schema_of(talk, one["name"], one["input_schema"])
    return talk


def read_gemini(body: dict) -> Talk:
    told, results = [], []
    for one in body.get("contents", ()):
        if one.get("role") == "user":
            told.append(words(one.get("parts")))
        for part in one.get("parts", ()):
            if "functionResponse" in part:
                results.append("\n".join(str(value) for value in part["functionResponse"].get("response", {}).values()))
    talk = Talk("\n".join(told), first_words(body.get("contents", ())))
    talk.system = words((body.get("systemInstruction") or {}).get("parts"))
    talk.results = results
    for group in body.get("tools") or ():
        for one in group.get("functionDeclarations", ()):
            schema_of(talk, one["name"], one.get("parametersJsonSchema") or one.get("parameters") or {})
    config = body.get("generationConfig") or {}
    if config.get("responseMimeType") == "application/json":
        talk.wants = config.get("responseJsonSchema") or config.get("responseSchema") or {"type": "object"}
    return talk


def arguments_of(call) -> str:
    return call[1] if isinstance(call[1], str) else json.dumps(call[1])


def pieces(text: str, size: int = 60_000):
    return [text[i : i + size] for i in range(0, len(text), size)] or [""]


def tokens(talk: Talk) -> int:
    return (len(talk.system) + len(talk.told) + sum(map(len, talk.results))) // 4 + 1


def write_chat(talk: Talk, answer: Answer):
    """Yields server-sent events; or the one object that was asked for."""
    base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": talk.model}
    calls = (
        [
            {
                "index": 0,
                "id": f"call_{uuid.uuid4().hex[:12]}",
                "type": "function",
                "function": {"name": answer.call[0], "arguments": arguments_of(answer.call)},
            }
        ]
        if answer.call
        else []
    )
    ends = "tool_calls" if calls else "stop"
    spent = {"prompt_tokens": tokens(talk), "completion_tokens": 50, "total_tokens": tokens(talk) + 50}
    if not talk.stream:
        message = {"role": "assistant", "content": answer.text or None} | ({"tool_calls": calls} if calls else {})
        yield base | {
            "object": "chat.completion",
            "usage": spent,
            "choices": [{"index": 0, "message": message, "finish_reason": ends}],
        }
        return
    base["object"] = "chat.completion.chunk"

    def chunk(delta, ends=None):
        return f"data: {json.dumps(base | {'choices': [{'index': 0, 'delta': delta, 'finish_reason': ends}]})}\n\n"

    yield chunk({"role": "assistant", "content": ""})
    for piece in pieces(answer.text) if answer.text else ():
        yield chunk({"content": piece})
    if calls:
        yield chunk({"tool_calls": calls})
    yield chunk({}, ends)
    yield f"data: {json.dumps(base | {'choices': [], 'usage': spent})}\n\n"
    yield "data: [DONE]\n\n"


def write_responses(talk: Talk, answer: Answer):
    identity = f"resp_{uuid.uuid4().hex}"
    if answer.call:
        free = talk.tools.get(answer.call[0], {}) is None
        item = {
            "type": "custom_tool_call" if free else "function_call",
            "id": f"fc_{uuid.uuid4().hex[:12]}",
            "call_id": f"call_{uuid.uuid4().hex[:12]}",
            "name": answer.call[0],
            "status": "completed",
            ("input" if free else "arguments"): arguments_of(answer.call),
        }
        if space := talk.spaces.get(answer.call[0]):
            item["namespace"] = space
    else:
        item = {
            "type": "message",
            "id": f"msg_{uuid.uuid4().hex[:12]}",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": answer.text, "annotations": []}],
        }
    spent = {
        "input_tokens": tokens(talk),
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 50,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens(talk) + 50,
    }
    whole = {"id": identity, "object": "response", "created_at": int(time.time()), "model": talk.model}
    if not talk.stream:
        yield whole | {"status": "completed", "output": [item], "usage": spent}
        return
    events = [
        ("response.created", {"response": whole | {"status": "in_progress", "output": []}}),
        (
            "response.output_item.added",
            {
                "output_index": 0,
                "item": item | {"status": "in_progress"} | ({"content": []} if item["type"] == "message" else {}),
            },
        ),
    ]
    if not answer.call:
        events += [
            (
                "response.output_text.delta",
                {"item_id": item["id"], "output_index": 0, "content_index": 0, "delta": piece},
            )
            for piece in pieces(answer.text)
        ]
    events += [
        ("response.output_item.done", {"output_index": 0, "item": item}),
        ("response.completed", {"response": whole | {"status": "completed", "output": [item], "usage": spent}}),
    ]
    for number, (kind, data) in enumerate(events):
        yield f"event: {kind}\ndata: {json.dumps({'type': kind, 'sequence_number': number} | data)}\n\n"


def write_messages(talk: Talk, answer: Answer):
    identity, ends = f"msg_{uuid.uuid4().hex[:24]}", "tool_use" if answer.call else "end_turn"
    block = (
        {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:20]}", "name": answer.call[0], "input": {}}
        if answer.call
        else {"type": "text", "text": ""}
    )
    spent = {
        "input_tokens": tokens(talk),
        "output_tokens": 50,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }
    whole = {"id": identity, "type": "message", "role": "assistant", "model": talk.model, "stop_sequence": None}
    if not talk.stream:
        done = block | ({"input": answer.call[1]} if answer.call else {"text": answer.text})
        yield whole | {"content": [done], "stop_reason": ends, "usage": spent}
        return
    parts = (
        [{"type": "input_json_delta", "partial_json": arguments_of(answer.call)}]
        if answer.call
        else [{"type": "text_delta", "text": piece} for piece in pieces(answer.text)]
    )
    events = [
        {"type": "message_start", "message": whole | {"content": [], "stop_reason": None, "usage": spent}},
        {"type": "content_block_start", "index": 0, "content_block": block},
        *({"type": "content_block_delta", "index": 0, "delta": part} for part in parts),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": ends, "stop_sequence": None}, "usage": spent},
        {"type": "message_stop"},
    ]
    for event in events:
        yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"


def write_gemini(talk: Talk, answer: Answer):
    spent = {"promptTokenCount": tokens(talk), "candidatesTokenCount": 50, "totalTokenCount": tokens(talk) + 50}
    parts = [{"text": piece} for piece in pieces(answer.text)]
    if answer.call:
        given = answer.call[1] if isinstance(answer.call[1], dict) else {"_": answer.call[1]}
        parts = [{"functionCall": {"name": answer.call[0], "args": given, "id": uuid.uuid4().hex[:8]}}]
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        one = {
            "candidates": [
                {"content": {"role": "model", "parts": [part]}, "index": 0} | ({"finishReason": "STOP"} if last else {})
            ],
            "usageMetadata": spent,
            "modelVersion": talk.model,
        }
        yield f"data: {json.dumps(one)}\r\n\r\n" if talk.stream else one
        if not talk.stream:
            return


def write_ollama(talk: Talk, answer: Answer):
    base = {"model": talk.model, "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    call = {}
    if answer.call:
        given = answer.call[1] if isinstance(answer.call[1], dict) else {"_": answer.call[1]}
        call = {"tool_calls": [{"function": {"name": answer.call[0], "arguments": given}}]}
    ends = {
        "done": True,
        "done_reason": "stop",
        "total_duration": 10**9,
        "prompt_eval_count": tokens(talk),
        "eval_count": 50,
    }
    if not talk.stream:
        yield base | {"message": {"role": "assistant", "content": answer.text} | call} | ends
        return
    for piece in pieces(answer.text):
        yield json.dumps(base | {"message": {"role": "assistant", "content": piece} | call, "done": False}) + "\n"
        call = {}
    yield json.dumps(base | {"message": {"role": "assistant", "content": ""}} | ends) + "\n"


APIS = [  # (path, name, reader, writer)
    (re.compile(r"(/v1)?/chat/completions"), "chat", read_chat, write_chat),
    (re.compile(r"(/v1)?/responses"), "responses", read_responses, write_responses),
    (re.compile(r"(/v1)?/messages"), "messages", read_messages, write_messages),
    (
        re.compile(r"/v1(beta|beta1)?/(publishers/google/)?models/[^:]+:(streamG|g)enerateContent"),
        "gemini",
        read_gemini,
        write_gemini,
    ),
    (re.compile(r"/api/chat"), "ollama", read_chat, write_ollama),
]
OLLAMA_MODEL = {
    "license": "",
    "modelfile": "",
    "parameters": "",
    "template": "{{ .Prompt }}",
    "capabilities": ["completion", "tools"],
    "details": {
        "family": "qwen3",
        "families": ["qwen3"],
        "format": "gguf",
        "parameter_size": "30B",
        "quantization_level": "Q4_K_M",
    },
    "model_info": {"general.architecture": "qwen3", "qwen3.context_length": 262144},
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Script
    log: Path | None = None
    bodies: Path | None = None
    count = 0
    counting = threading.Lock()

    def log_message(self, *_):
        pass

    def send(self, status: int, value, kind="application/json", **headers) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def note(self, **facts) -> None:
        if self.log:
            facts = {"time": round(time.time(), 3), "method": self.command, "path": self.path} | facts
            with self.counting, open(self.log, "a") as file:
                file.write(json.dumps(facts) + "\n")

    def do_HEAD(self):
        self.note()
        self.send(200, "")

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.note()
        names = [MODEL, "qwen3-coder", "qwen3-coder:latest", "gpt-oss:20b", "gpt-oss:120b"]
        if path == "/api/version":
            return self.send(200, {"version": "0.30.0"})
        if path == "/api/tags":
            return self.send(
                200,
                {
                    "models": [
                        {"name": name, "model": name, "size": 1, "details": OLLAMA_MODEL["details"]} for name in names
                    ]
                },
            )
        if path.endswith("/models"):
            data = [{"id": name, "object": "model", "created": 0, "owned_by": "here"} for name in names]
            return self.send(
                200, {"object": "list", "data": data, "models": [{"name": f"models/{name}"} for name in names]}
            )
        if path == "/":
            return self.send(200, "Ollama is running", "text/plain")
        return self.send(404, {"error": {"message": f"no {path} here", "type": "not_found"}})

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            data = self.unchunked()
        path = self.path.partition("?")[0]
        try:
            body = json.loads(data or b"{}")
        except ValueError:
            body = {}
        with self.counting:
            Handler.count += 1
            number = Handler.count
        if self.bodies:
            (self.bodies / f"{number:04d}.json").write_bytes(data)
        if path == "/api/show":
            self.note()
            return self.send(200, OLLAMA_MODEL)
        if path == "/api/pull":
            self.note()
            return self.send(200, json.dumps({"status": "success"}) + "\n", "application/x-ndjson")
        if path.endswith(":countTokens"):
            return self.send(200, {"totalTokens": tokens(read_gemini(body))})
        if path.endswith("/count_tokens"):
            return self.send(200, {"input_tokens": tokens(read_messages(body))})
        for pattern, name, reader, writer in APIS:
            if pattern.fullmatch(path):
                break
        else:
            self.note(number=number)
            return self.send(404, {"error": {"message": f"no {path} here", "type": "not_found"}})
        talk = reader(body)
        if name == "gemini":
            talk.stream = ":stream" in path
        if name == "ollama" and "stream" not in body:
            talk.stream = True
        answer, about = self.script.answer(talk)
        self.note(
            api=name,
            number=number,
            stream=talk.stream,
            model=talk.model,
            tools=sorted(talk.tools),
            bytes=len(data),
            told=len(talk.told),
            system=len(talk.system),
            results=len(talk.results),
            **about,
            call=answer.call and [answer.call[0], arguments_of(answer.call)[:300]],
            fault=answer.fault,
            result=talk.results[-1][-400:] if talk.results else None,
        )
        self.give(name, talk, answer, writer)

    def unchunked(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def give(self, api: str, talk: Talk, answer: Answer, writer) -> None:
        if (fault := (answer.fault or "").removesuffix("-once")) in ("429", "500", "401", "context"):
            status, kind, text = {
                "429": (429, "rate_limit_error", "You exceeded your current quota, please check your plan"),
                "500": (500, "api_error", "Internal server error"),
                "401": (401, "authentication_error", "invalid x-api-key"),
                "context": (400, "invalid_request_error", "prompt is too long: 250000 tokens > 200000 maximum"),
            }[fault]
            error = {"type": "error", "error": {"type": kind, "message": text, "code": status, "status": kind.upper()}}
            return self.send(status, {"error": text} if api == "ollama" else error)
        if fault == "hang":
            time.sleep(HANG)
            return None
        if fault == "garbage":
            return self.send(200, "<html>Bad gateway</html>", "text/html")
        if fault in ("stall", "cut"):
            answer = Answer("I begin to say something " * 20)
        parts = list(writer(talk, answer))
        if not talk.stream:
            return self.send(200, parts[0])
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson" if api == "ollama" else "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        if fault == "empty":
            parts = []
        for number, part in enumerate(parts):
            if fault in ("stall", "cut") and number == len(parts) // 2:
                if fault == "stall":
                    time.sleep(HANG)
                return None
            self.wfile.write(part.encode())
            self.wfile.flush()
        return None


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], (BrokenPipeError, ConnectionResetError)):
            super().handle_error(request, client_address)


def main() -> None:
    asked = argparse.ArgumentParser(description="A scripted model on the loopback.")
    asked.add_argument("--port", type=int, default=11434)
    asked.add_argument("--queue", type=Path, help="scenarios, one a line, each taken by a new conversation")
    asked.add_argument("--log", type=Path, help="a JSON line for each request")
    asked.add_argument("--bodies", type=Path, help="a folder that gets what was asked, as it came")
    given = asked.parse_args()
    Handler.script, Handler.log, Handler.bodies = Script(given.queue), given.log, given.bodies
    if given.bodies:
        given.bodies.mkdir(parents=True, exist_ok=True)
    with Server(("127.0.0.1", given.port), Handler) as server:
        print(f"http://127.0.0.1:{given.port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
