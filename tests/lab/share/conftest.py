"""Fixtures: a session to share, and what it exports."""

import exports
import pytest
import sessions

import storage
from lab.session.session import Session
from lab.share.export import export_session
from lab.verdict import executor


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """templates(make): a folder with what `make(folder / "my project")` makes, made once: a session, its home."""
    made = {}

    def template(make):
        if make not in made:
            made[make] = tmp_path_factory.mktemp(make.__name__)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AUTORESEARCH_HOME", str(made[make] / "home"))
                sessions.Runner().install(patch)
                make(made[make] / "my project")
        return made[make]

    return template


@pytest.fixture
def copied(templates, tmp_path, runner, monkeypatch):
    """copied(make): a session of this test's own, as `make` makes it; what is launched is carried out at once."""

    def session(make) -> Session:
        exports.moved(templates(make), tmp_path)
        monkeypatch.setattr(executor, "launch", exports.AtOnce)
        monkeypatch.chdir(tmp_path / "my project")
        return Session(storage.home() / "sessions" / sessions.DEVICE / sessions.TAG)

    return session


@pytest.fixture
def session(copied):
    """One that kept two changes, discarded one, and saw one crash."""
    return copied(exports.worked)


@pytest.fixture
def sent(session, tmp_path):
    """Its export, as a folder."""
    return export_session(session, tmp_path / "sent")
