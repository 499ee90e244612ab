# Two commands do everything on a machine with Python, git and make:
#   make demo   install, offline data, a quick calibration, a session with one experiment, its report
#   make test   install, and the fast tests; it ends with the twenty slowest
# make check checks format and types; make test-slow runs all tests; make test-agents tries real coding agents.
# UV=1 uses uv instead of venv and pip. PYTHON=... names the interpreter.

SHELL := /bin/sh
# The environment that is active goes before the system's: with conda, its PyTorch may be the one that works here.
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
CANDIDATES := $(if $(ACTIVE),"$(ACTIVE)/bin/python") python3.14 python3.13 python3.12 python3.11 python3.10 python3 python
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 \
	&& command -v "$$p" && break; done)
RUN := .venv/bin/python
# Settings that would have pip install elsewhere than in the environment made here, or Python not find this folder.
export PIP_USER := 0
unexport PIP_TARGET PIP_PREFIX PYTHONSAFEPATH
# MLX runs on Linux too, where the tests cover it; on a Mac it is there anyway.
comma := ,
# PyTorch for NVIDIA brings the Triton it needs; where there is none, our kernels are tested in the interpreter of this one.
TRITON := triton==3.8.0
TEST_EXTRAS := test$(comma)check$(comma)fleet$(comma)mcp$(if $(filter Linux,$(shell uname -s)),$(comma)mlx-cpu)

# Where test-agents keeps agents and what their nights leave: outside /tmp, which Codex treats specially.
AGENTS := $(or $(AGENTS),$(HOME)/.cache/autoresearch-agents)
NPM_AGENTS := @anthropic-ai/claude-code @openai/codex @google/gemini-cli opencode-ai @mariozechner/pi-coding-agent \
	@qwen-code/qwen-code @github/copilot

.PHONY: demo test test-slow test-agents check clean

demo: .venv/installed
	@test -e .git || { echo "This folder is not a git repository, as after a download as ZIP, and each experiment is a" \
		"commit. Make it one: git init && git add . && git commit -m start"; exit 1; }
	@$(RUN) demo.py

# Three files of tests at a time, on two cores: many of them wait for processes.
test: .venv/installed-test
	$(RUN) -m pytest -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder --durations=20

# Format and types.
check: .venv/installed-test
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m pyright --pythonpath $(RUN)

test-slow: .venv/installed-test
	$(RUN) -m pytest

# Real agents, from npm and PyPI, in nights with a scripted model (docs/agents.md). Needs npm; takes about ten minutes
# beside the downloads. What a failing service makes of them takes longer: FAULTS=1.
TRIAL := $(RUN) tests/agents/trial.py --folder "$(AGENTS)"
test-agents: .venv/installed-test
	mkdir -p "$(AGENTS)/npm"
	cd "$(AGENTS)/npm" && npm install --no-audit --no-fund --prefix . $(NPM_AGENTS)
	test -e "$(AGENTS)/pip" || { "$(CURDIR)/$(RUN)" -m venv "$(AGENTS)/pip" && "$(AGENTS)/pip/bin/pip" install --quiet aider-chat; }
	$(TRIAL) --scenarios edit
	$(TRIAL) --mcp
	$(TRIAL) --agents claude,codex,opencode --experiments 1 \
		--scenarios look,elsewhere,commit,train,lab-run,background,daemon,ask,broken,flood,loud
ifeq ($(FAULTS),1)
	$(TRIAL) --experiments 1 --turn-seconds 240 --scenarios 401,429,500,garbage,cut,hang,no-such-tool
endif

clean:
	rm -rf .venv .demo build *.egg-info

.venv/installed: .venv/created
	$(call install,.)
	@touch $@

.venv/installed-test: .venv/created
	$(call install,.[$(TEST_EXTRAS)])
	@test "$$(uname -sm)" != "Linux x86_64" || $(RUN) -c 'import triton' 2>/dev/null \
		|| $(installer) '$(TRITON)' > .venv/log.txt 2>&1 || $(failed)
	@touch $@ .venv/installed

# A PyTorch that came with the system (a Jetson's, say) is used and never replaced: the environment sees it, and the
# pins of it and of the numpy it was built for are left out of the constraints. uv does not look for packages outside of
# the environment: it is told to leave both out.
.venv/created: pyproject.toml constraints.txt
ifeq ($(UV),1)
	@command -v uv >/dev/null || { echo "UV=1 needs uv: https://docs.astral.sh/uv"; exit 1; }
else
	@test -n "$(PYTHON)" || { echo "No Python from 3.10 up with venv and pip was found. Install one (Debian, Ubuntu:" \
		"sudo apt install python3-venv python3-pip; Mac: brew install python), or use uv: make UV=1 $(MAKECMDGOALS)"; exit 1; }
endif
	@if test -n "$(PYTHON)" && "$(PYTHON)" -c 'import torch' 2>/dev/null; \
	then $(create) --system-site-packages; else $(create); fi
	@cp constraints.txt .venv && : > .venv/overrides.txt
	@if $(RUN) -c 'import torch' 2>/dev/null; then for package in torch numpy; do \
		grep -v "^$$package" .venv/constraints.txt > .venv/others.txt && mv .venv/others.txt .venv/constraints.txt; \
		if $(RUN) -c "import $$package"; then echo "$$package; python_version < '3'" >> .venv/overrides.txt; fi; done; fi
	@if test -n "$$$(PINS)"; then echo "$(PINS) is set: versions are those of $$$(PINS), and not those of" \
		"constraints.txt, which the tests were run with"; : > .venv/constraints.txt; fi
	@touch $@

define failed
{ tail -n 15 .venv/log.txt; echo "Installing failed; all that was printed is in .venv/log.txt. If it names a conflict" \
	"between versions: $(PINS) or the configuration of pip asks for versions that this project can't use." \
	"Without that variable: make $(PINS)= $(MAKECMDGOALS)"; exit 1; }
endef

# rich comes first, in a moment: terminal.py shows the progress of the rest with it.
define install
@{ $(installer) rich > .venv/log.txt 2>&1 && $(RUN) terminal.py "install the Python packages into .venv" 240 \
	.venv/log.txt $(installer) '$(1)'; } || $(failed)
endef

ifeq ($(UV),1)
PINS = UV_CONSTRAINT
create = uv venv --quiet --allow-existing .venv $(if $(PYTHON),--python "$(PYTHON)")
installer = uv pip install --quiet --python $(RUN) --constraints .venv/constraints.txt --overrides .venv/overrides.txt
else
PINS = PIP_CONSTRAINT
create = "$(PYTHON)" -m venv .venv
installer = $(RUN) -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt
endif
