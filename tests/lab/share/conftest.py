"""Fixtures: a session to share, and what it exports."""

import exports
import pytest

from lab.share.export import export_session
from lab.verdict import executor


@pytest.fixture
def session(tmp_path, runner, monkeypatch):
    """One that kept two changes, discarded one, and saw one crash; what is launched is carried out at once."""
    session = exports.worked(tmp_path / "my project")
    monkeypatch.setattr(executor, "launch", exports.AtOnce)
    monkeypatch.chdir(session.repository.path)
    return session


@pytest.fixture
def sent(session, tmp_path):
    """Its export, as a folder."""
    return export_session(session, tmp_path / "sent")
