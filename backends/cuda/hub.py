"""Flash Attention 3 from the hub of kernels, by the `kernels` package: at pinned commits of a few publishers."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator

from backends import bench as benches
from backends.cuda import flash3

# The publishers whose code is run, and the commits.
TRUSTED = {
    "varunneal/flash-attention-3": "de87b9b5af06dd9984df595bef90b2eba44b181a",
    "kernels-community/flash-attn3": "9542c462013476380ce4b395b9ddc0e8118161ee",
}


def kernels(fetch: bool) -> Iterator[tuple]:
    """Providers, in order of preference.

    Args:
        fetch: get from the network what is not on disk; said, where that can't be reached.
    """
    if importlib.util.find_spec("kernels") is None:
        yield "kernels", functools.partial(importlib.import_module, "kernels")  # which raises
        return
    if fetch and (problem := unreachable()):
        print(f"no kernels can be downloaded ({problem}): only those that are here already are tried", flush=True)
        fetch = False
    for repository, commit in TRUSTED.items():
        yield f"kernels {repository}@{commit}", functools.partial(load, repository, commit, fetch)


def load(repository: str, commit: str, fetch: bool = False) -> flash3.Kernels:
    """One kernel. Raises Unavailable where it is not on disk and not to be fetched; else what `kernels` raises."""
    if repository not in TRUSTED or not re.fullmatch("[0-9a-f]{40}", commit):
        raise flash3.Unavailable(f"not a commit of {' or '.join(TRUSTED)}")
    from kernels import get_kernel

    known = inspect.signature(get_kernel).parameters  # newer releases want to be told whom to trust beside their own
    trust = {"trust_remote_code": [repository]} if "trust_remote_code" in known else {}
    try:
        with contextlib.nullcontext() if fetch else offline():
            return flash3.from_module(get_kernel(repository, revision=commit, **trust))
    except FileNotFoundError as error:
        raise flash3.Unavailable("no build for this PyTorch" if fetch else "not on disk") from error


@contextlib.contextmanager
def offline():
    """Nothing is asked of the hub meanwhile."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def unreachable() -> str | None:
    """Why the hub can't be asked, or None: found out once, not for each repository."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().repo_info(next(iter(TRUSTED)), timeout=10)
    except huggingface_hub.errors.HfHubHTTPError:  # an answer, if not the one to this question
        return None
    except Exception as error:
        return benches.first_line(error)
    return None
