"""Where the time of a training step goes: kernels of our train.py's step, or of the original's, by what they do.

    python benchmarks/breakdown.py                                                  (on a CUDA device)
    python benchmarks/breakdown.py --without mlp projection cross_entropy           (without these kernels of ours)
    python benchmarks/breakdown.py --theirs ORIGINAL_TRAIN_PY --fa3
    python benchmarks/breakdown.py --float32 --depth 2 --device-batch 1 --total-batch 4096      (a try on a CPU)

The file trains on the dataset prepared last, with these sizes and a schedule that goes by steps: a few to warm up, some
that are timed as they are, then some in the profiler. Passes (forward and backward) and the optimizer's update are
profiled apart, each finished before the next begins, so no kernel has to be assigned by guessing. Within them a kernel
is grouped by its name: the first pattern of GROUPS that is found in it says where it belongs. The compiler names a
kernel after all that it fused, so a kernel of several things counts for the first of them in that table; its full name
is in the list below the table. Without a GPU, what is listed are operators and their own time on the CPU.

"the rest" is the time of a step, measured without the profiler, in which none of its kernels ran; it is below zero if
kernels overlap, or run faster in the profiled steps: they run apart there, and a GPU at its power limit, which the
timed steps may reach, lowers its clock. So the energy of a timed step is told too.
"""

import argparse
import os
import re
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from peers import (  # beside this file
    add_options,
    by_steps,
    check_options,
    execute,
    patched,
    replaced,
    run_torch_source,
    torch_peak,
    torch_source,
    with_constants,
)
from seed_noise import TRAIN, StepClock

import prepare

WARM_UP, TIMED = 6, 30  # steps

# Of passes; the update has two groups of its own, its products and all else.
GROUPS = {
    "attention backward": r"flash\w*bwd|bprop|flex_attention_backward|dot_do_o|convert_dq|attention\w*backward",
    "attention forward": r"flash|fprop|flex_attention|fmha|attention",
    "matrix products": r"nvjet|gemm|cutlass|xmma|cublas|splitk|triton_tem_|^_product|mkl|::(b?mm|addmm|linear)$",
    "cross-entropy": r"cross_entropy|softmax|nll_loss|softcap|^_row|_(exp|log|tanh|gather)(?=_|$)",
    "embedding": r"embedding|index_|indexing|scatter|gather",
    "squared ReLU": r"relu|threshold",
    "RMS norm and what is fused with it": r"rms_norm|rsqrt|^_(forward|backward)(_\d+)?$",
    "copies, casts and fills": r"memcpy|memset|copy_kernel|fill|::(copy_|zero_|clone)|"
    r"triton_poi_fused(__to_copy|_clone|_zeros|_view|_t|_transpose)+_\d+$",
    "other elementwise kernels": r"triton_|elementwise|reduce|::",
    "other": "",
}


class Profile:
    """A profile of the steps of a run that says by `enter` where it is.

    Attributes:
        seconds: of each step.
        power: (joules counted, MHz of the multiprocessors, watts allowed) before the timed steps and after, where NVML
            tells.
        kernels: (part, name) -> [milliseconds, calls], of all profiled steps.
    """

    def __init__(self, profiled: int):
        self.profiled, self.steps, self.seconds, self.kernels = profiled, -1, [], defaultdict(lambda: [0.0, 0])
        self._profiler = self._part = self._began = None
        self.power = []

    def enter(self, part: str | None) -> None:
        """What follows belongs to this part, "passes" or "update"; passes begin a step, with an idle device."""
        import torch

        if self._profiler:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._profiler.stop()
            self._count()
            self._profiler = None
        if part == "passes":
            now = time.perf_counter()
            if self._began:
                self.seconds.append(now - self._began)
            self._began, self.steps = now, self.steps + 1
            if self.steps in (WARM_UP, WARM_UP + TIMED):
                self.power.append(power())
        self._part = part
        if part and 0 <= self.steps - WARM_UP - TIMED < self.profiled:
            if torch.cuda.is_available():  # the step before may still run
                torch.cuda.synchronize()
            # Of a GPU its own records are enough: those of the host would slow it down.
            on = torch.profiler.ProfilerActivity
            self._profiler = torch.profiler.profile(activities=[on.CUDA if torch.cuda.is_available() else on.CPU])
            self._profiler.start()

    def _count(self):
        import torch

        gpu = torch.cuda.is_available()
        for event in self._profiler.key_averages():
            if gpu == (event.device_type == torch.autograd.DeviceType.CUDA) and not event.is_user_annotation:
                kernel = self.kernels[self._part, event.key]
                kernel[0] += (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1000
                kernel[1] += event.count


def power() -> tuple[float, int, float] | None:
    """Joules that the GPU has taken since its driver was loaded, its clock in MHz, and the watts it may take."""
    import torch

    from backends import machine
    from backends.pytorch import device

    if not torch.cuda.is_available():
        return None
    with machine.nvml() as nvml:
        handle = nvml and machine.nvidia_handle(nvml, device.uuid(torch.device("cuda")))
        return handle and (
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000,
            nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        )


def group_of(part: str, name: str) -> str:
    found = next(group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE))
    if part == "passes":
        return found
    return "optimizer: matrix products" if found == "matrix products" else "optimizer: all else"


# ---- Runs ----


def run_ours(options, profile: Profile, steps: int) -> dict:
    import backends
    import calibration

    backend = backends.load(
        precision="float32" if options.float32 else None, calibrated=calibration.defaults().calibrated
    )
    patched(backends.load, lambda **_: backend).start()
    if options.without:
        from backends.pytorch import runtime

        runtime.kernels -= frozenset(options.without)

    class Clock(StepClock):
        total = steps

        def __init__(self, *args):
            super().__init__(*args)
            profile.enter("passes")

        def tick(self, loss):
            seconds = super().tick(loss)
            profile.enter("passes")
            return seconds

    class Trainer(backend.Trainer):
        def step(self, schedule):
            if profile.steps < 0:  # `warm_up`, before there is a clock
                return super().step(schedule)
            profile.enter("update")
            super().step(schedule)
            profile.enter(None)

    found = {}

    def finish(backend, model, data, clock, **_):
        found.update(gigabytes=backend.peak_memory() / 1e9, notes=backend.device.notes)
        clock.stop()

    backend.Trainer = Trainer
    patched(prepare.Clock, Clock).start()
    patched(prepare.evaluate_bpb, finish).start()
    patched(prepare.report, lambda *_, **__: None).start()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AUTORESEARCH_RESULT"] = f"{folder}/result.json"
        execute("ours", with_constants(TRAIN.read_text(), options)).main()
    return found


def run_theirs(options, profile: Profile, steps: int) -> dict:
    found = {}
    source = by_steps(torch_source(options))
    passes, update = "    for micro_step in range(grad_accum_steps):\n", "    optimizer.step()\n"
    source = replaced(source, passes, f'    enter("passes")\n{passes}')
    source = replaced(source, update, f'    enter("update")\n{update}    enter(None)\n')

    def evaluate(*_):
        profile.enter(None)
        found.update(gigabytes=torch_peak() / 1e9, notes=())
        return float("nan")

    run_torch_source(source, options, prepare.open_data(), steps, evaluate, enter=profile.enter)
    return found


# ---- Tables ----


def show(profile: Profile, tokens: int, top: int) -> None:
    # The mean, as the clock's probes make some steps long and the next one short.
    wall = 1000 * statistics.mean(profile.seconds[WARM_UP : WARM_UP + TIMED])
    kernels = [
        (ms / profile.profiled, calls / profile.profiled, part, name)
        for (part, name), (ms, calls) in profile.kernels.items()
    ]
    groups = dict.fromkeys([*GROUPS, "optimizer: matrix products", "optimizer: all else"], (0.0, 0.0))
    for ms, calls, part, name in kernels:
        group = group_of(part, name)
        groups[group] = groups[group][0] + ms, groups[group][1] + calls
    busy = sum(ms for ms, _ in groups.values())
    print(f"\n{wall:.1f} ms per step (mean of {TIMED}), {1000 * tokens / wall:,.0f} tokens/s; kernels {busy:.1f} ms")
    if all(profile.power):
        (before, _, _), (after, clock, limit) = profile.power
        joules, seconds = after - before, sum(profile.seconds[WARM_UP : WARM_UP + TIMED])
        print(f"{joules / TIMED:.1f} J per step, {joules / seconds:.0f} W of {limit:.0f} W allowed; {clock} MHz")
    print("\n| what | ms per step | % | kernels per step |\n|---|---|---|---|")
    for group, (ms, calls) in [*groups.items(), ("the rest", (wall - busy, 0))]:
        if ms or calls:
            print(f"| {group} | {ms:.2f} | {100 * ms / wall:.1f} | {calls:.0f} |")
    print(f"\nthe {top} longest\n\n| ms per step | calls | part | group | kernel |\n|---|---|---|---|---|")
    for ms, calls, part, name in sorted(kernels, reverse=True)[:top]:
        print(f"| {ms:.2f} | {calls:.0f} | {part} | {group_of(part, name)} | {name[:160].replace('|', '/')} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theirs", type=Path, help="the original's train.py, instead of ours")
    add_options(parser)
    parser.add_argument("--without", nargs="+", default=[], choices=["mlp", "projection", "cross_entropy"])
    parser.add_argument("--steps", type=int, default=3, help="in the profiler")
    parser.add_argument("--top", type=int, default=40, help="kernels to list")
    parser.set_defaults(defaults=False)
    options = parser.parse_args()
    check_options(parser, options)
    profile = Profile(options.steps)
    found = (run_theirs if options.theirs else run_ours)(options, profile, WARM_UP + TIMED + options.steps)
    print(
        f"{options.theirs or 'ours'}: depth {options.depth}, {options.device_batch} rows per pass, "
        f"{options.total_batch} tokens per step, peak memory {found['gigabytes']:.2f} GB"
    )
    for note in found["notes"]:
        print(note)
    show(profile, options.total_batch, options.top)


if __name__ == "__main__":
    main()
