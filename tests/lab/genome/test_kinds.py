"""What a change is about: of this project's train.py, and of others."""

import subprocess
from pathlib import Path

import pytest

from lab.genome import kinds

ROOT = Path(__file__).resolve().parents[3]
TRAIN = (ROOT / "train.py").read_text()
EDITS = ROOT / "tests" / "edits"
OTHER = '''
import torch
import torch.nn as nn

class CausalSelfAttention(nn.Module):
    """Attention."""
    def forward(self, x):
        return self.c_proj(x)

class MuonAdamW(torch.optim.Optimizer):
    def step(self):
        pass

# ---------------
# Hyperparameters
# ---------------

# Model architecture
ASPECT_RATIO = 64
GAIN: float = 1.5

# Optimization
TOTAL_BATCH_SIZE = 2**19
EMBEDDING_LR = 0.6
WEIGHT_DECAY = 0.2
WARMUP_RATIO = 0.0

# Something else
LOG_EVERY = 10

def get_lr_multiplier(progress):
    return 1.0

for step in range(10):
    loss = model(x)
'''


def change(old: str, new: str, source: str = TRAIN) -> tuple[bytes, bytes]:
    assert source.count(old) == 1, old
    return source.encode(), source.replace(old, new).encode()


@pytest.mark.parametrize(
    "old, new, kind",
    [
        ("MATRIX_LR = 0.04", "MATRIX_LR = 0.05", "optimizer"),
        ("X0_BETAS = (0.96, 0.95)", "X0_BETAS = (0.9, 0.95)", "optimizer"),
        ("MOMENTUM_STEPS = 300", "MOMENTUM_STEPS = 100", "optimizer"),
        ("norm * 1.02 + 1e-6", "norm * 1.01 + 1e-6", "optimizer"),
        ("betas[1], eps=eps", "betas[1], eps=2 * eps", "optimizer"),
        ("WEIGHT_DECAY = 0.2", "WEIGHT_DECAY = 0.1", "regularisation"),
        ("SOFTCAP = 15", "SOFTCAP = 20", "regularisation"),
        ("FINAL_LR_FRACTION = 0.0", "FINAL_LR_FRACTION = 0.1", "schedule"),
        ("multiplier = progress / WARMUP_RATIO", "multiplier = (progress / WARMUP_RATIO) ** 2", "schedule"),
        ("TOTAL_BATCH_SIZE = defaults.total_batch_size", "TOTAL_BATCH_SIZE = defaults.total_batch_size // 2", "batch"),
        ("ROPE_BASE = 10000", "ROPE_BASE = 200000", "architecture"),
        ("DEPTH = defaults.depth ", "DEPTH = defaults.depth + 1 ", "architecture"),
        ("self.c_fc = nn.Linear(width, 4 * width)", "self.c_fc = nn.Linear(width, 2 * 2 * width)", "architecture"),
        ("0.001 * rng.standard_normal", "0.01 * rng.standard_normal", "architecture"),
        ("SEED = prepare.seed()", "SEED = prepare.seed() + 1", "other"),
        ("smooth_loss + 0.1", "smooth_loss + 0.2 - 0.1", "other"),
    ],
)
def test_a_change_of_train_py(old, new, kind):
    assert kinds.of_change(*change(old, new)) == (kind,)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("gelu", ("architecture",)),
        ("gqa", ("architecture",)),
        ("window", ("architecture",)),
        ("swiglu", ("architecture",)),
        ("smear", ("architecture", "optimizer")),
        ("adamw", ("optimizer", "regularisation")),
    ],
)
def test_the_patches_of_the_tests(tmp_path, name, expected):
    (tmp_path / "train.py").write_text(TRAIN)
    subprocess.run(["git", "apply", EDITS / f"{name}.patch"], cwd=tmp_path, check=True)
    assert kinds.of_change(TRAIN.encode(), (tmp_path / "train.py").read_bytes()) == expected


@pytest.mark.parametrize(
    "old, new, kind",
    [
        ("ASPECT_RATIO = 64", "ASPECT_RATIO = 80", "architecture"),
        ("GAIN: float = 1.5", "GAIN: float = 2.5", "architecture"),
        ("2**19", "2**18", "batch"),
        ("EMBEDDING_LR = 0.6", "EMBEDDING_LR = 0.7", "optimizer"),
        ("WEIGHT_DECAY = 0.2", "", "regularisation"),
        ("WARMUP_RATIO = 0.0", "WARMUP_RATIO = 0.1", "schedule"),
        ("LOG_EVERY = 10", "LOG_EVERY = 20", "other"),
        ("self.c_proj(x)", "self.c_proj(x) + x", "architecture"),
        ("self.c_proj(x)", "dropout(self.c_proj(x))", "regularisation"),
        ("        pass", "        self.n = 1", "optimizer"),
        ("return 1.0", "return 1.0 - progress", "schedule"),
        ("loss = model(x)", "loss = model(x, x)", "other"),
    ],
)
def test_a_change_of_another_train_py(old, new, kind):
    assert kinds.of_change(*change(old, new, OTHER)) == (kind,)


def test_the_kind_that_most_is_changed_of_comes_first():
    before, after = change("ASPECT_RATIO = 64", "ASPECT_RATIO = 80", OTHER)
    after = after.replace(b"        pass", b"        for p in self.params:\n            p -= p.grad * self.lr")
    assert kinds.of_change(before, after) == ("optimizer", "architecture")
    assert kinds.of_change(before, before + b"# a remark\n") == ()
    assert kinds.of_change(before, b"def broken(") == ("other",)


def test_a_summary():
    before, after = change("MATRIX_LR = 0.04 ", "MATRIX_LR = 0.05\nBOOST = 2 ")
    after = after.replace(b"y = ops.attention(q, k, v", b"y = ops.attention(q, 2 * k, v")
    after = after.replace(b"def kv_heads(", b"def heads(")
    assert kinds.summary(before, after) == (
        "MATRIX_LR 0.04 -> 0.05; BOOST = 2; edited Attention.forward; new heads; removed kv_heads"
    )
    assert kinds.summary(before, before.replace(b'"""Every other', b'"""Each other')) == ""
    with pytest.raises(SyntaxError):
        kinds.summary(before, b"def broken(")


def test_a_summary_is_short_and_clean():
    after = TRAIN.replace("ROPE_BASE = 10000", f"ROPE_BASE = '{'x' * 500}\\x1b[31m'") + "\n".join(
        f"def new_function_{i}():\n    pass\n" for i in range(100)
    )
    said = kinds.summary(TRAIN.encode(), after.encode())
    assert len(said) <= 200 and said.isprintable() and said.startswith("ROPE_BASE 10000 -> 'xxx")


@pytest.mark.parametrize(
    "text, kind",
    [
        ("halve batch 524K to 262K (more steps in 5 min)", "batch"),
        ("FINAL_LR_FRAC 0.0 to 0.05", "schedule"),
        ("embedding LR 0.6 to 0.8", "optimizer"),
        ("Increase the learning rate of the matrices", "optimizer"),
        ("warmdown 0.5 to 0.7", "schedule"),
        ("weight decay 0.2 to 0.15", "regularisation"),
        ("reduce depth from 8 to 4", "architecture"),
        ("RoPE base frequency 10K to 200K", "architecture"),
        ("gradient clipping max_norm=1.0", "regularisation"),
        ("random seed 42 to 137", "other"),
        ("add 5% warmup (hurts; depth is fine)", "schedule"),
        ("(depth)", "architecture"),
        ("", "other"),
        ("weight tying (shared embed/unembed)", "architecture"),
    ],
)
def test_what_words_alone_say(text, kind):
    assert kinds.of_words(text) == (kind,)


@pytest.mark.parametrize(
    "text, kind",
    [
        ("Halve TOTAL_BATCH_SIZE to get 2x more optimizer steps, which typically improves final val_bpb", "batch"),
        ("Change WINDOW_PATTERN from SSSL to SLSL with optimized learning rates", "architecture"),
        ("Reduce FINAL_LR_FRAC from 0.1 to 0.05: a gentler learning rate decay", "schedule"),
        ("Add cosine LR schedule instead of linear warmdown - cosine decay is smoother", "schedule"),
        ("Increase MLP hidden size multiplier from 4x to 4.75x for more capacity", "architecture"),
        ("Increase the softcap [GPU: NVIDIA GeForce RTX 5070 Ti (16303MB VRAM)", "regularisation"),
    ],
)
def test_reasons_given_beside_a_change_do_not_say_what_it_is(text, kind):
    assert kinds.of_words(text) == (kind,)
