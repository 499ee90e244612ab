"""What the machine calls itself: names for tags and logs. What it can do is measured elsewhere."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
from pathlib import Path


def processor_name() -> str:
    """The CPU's marketing name; on a Mac, the chip's."""
    try:
        if platform.system() == "Darwin":
            asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True,
                                   timeout=10)
            return asked.stdout.strip() or "Apple"
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return named.group(1).strip() if named else platform.machine()
    except (OSError, subprocess.TimeoutExpired):
        return platform.processor() or platform.machine()


def slug(name: str, memory: int, cpu: bool = False) -> str:
    """A tag from a name and bytes of memory: "apple-m4-16gb", "nvidia-rtx-3090-24gb", "cpu-amd-epyc-2c-24gb"."""
    name = re.sub(r"\((r|tm)\)|geforce|processor|cpu @.*|\d+-core", " ", name.lower())
    words = re.findall(r"[a-z0-9.]+", f"cpu {name} {os.cpu_count()}c" if cpu else name)
    return "-".join([*words, f"{math.ceil(memory / 2**30)}gb"])
