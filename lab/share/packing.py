"""The files of an exported session, from what is known of it; bundle.py says what they are."""

from __future__ import annotations

import hashlib
import io
import json
import re

import numpy as np

from lab.session import ledger
from lab.share.bundle import ATTRIBUTES, FORMAT, Bundle
from lab.share.summary import readme, summary


def files_of(bundle: Bundle) -> dict[str, bytes]:
    """The files of an exported session by name; equal sessions give equal files."""
    patches = [f"patches/{place:04d}-{slug(kept.description)}.patch" for place, kept in enumerate(bundle.kept, 1)]
    told = [
        {
            "number": kept.number,
            "commit": kept.commit,
            "parent": kept.parent,
            "description": kept.description,
            "patch": patch,
        }
        for kept, patch in zip(bundle.kept, patches)
    ]
    own = dict.fromkeys(name for row in bundle.rows for name in row if name not in ledger.EMPTY)
    files = {
        "session.json": _json({**bundle.session, "format": FORMAT, "kept": told}),
        "results.tsv": ledger.dumps(bundle.rows, (*ledger.COLUMNS, *own)),
    }
    if bundle.set_aside:
        files["results.tsv.damaged"] = bundle.set_aside.encode(errors="replace")
    if bundle.base is not None:
        files["train.py"] = bundle.base
    if bundle.changes:
        files["changes.json"] = _json({"format": FORMAT, "changes": bundle.changes})
        files["SUMMARY.md"] = summary(bundle).encode(errors="replace")
        files[".gitattributes"] = ATTRIBUTES
    if bundle.profile is not None:
        files["profile.json"] = _json(bundle.profile)
    files |= {patch: kept.patch_text.encode() for kept, patch in zip(bundle.kept, patches)}
    files |= {f"rows/{run:04d}.npz": _packed(losses) for run, losses in sorted(bundle.losses.items())}
    files["README.md"] = readme(bundle, patches).encode(errors="replace")
    return sealed(files)


def sealed(files: dict[str, bytes]) -> dict[str, bytes]:
    """Files by name, and the manifest of them."""
    manifest = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
        if name != "MANIFEST.json"
    }
    return files | {"MANIFEST.json": _json({"format": FORMAT, "files": manifest})}


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))[:40].strip("-") or "unnamed"


def _json(content: dict) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"


def _packed(losses: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **losses)
    return buffer.getvalue()
