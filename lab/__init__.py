"""The ratchet: sessions of experiments, each run guarded, judged, kept or reverted, and recorded.

    python -m lab start TAG           a branch, a pinned judge, and baseline runs to learn the noise from
    python -m lab run -m "what, why"  takes train.py, runs it, decides, keeps or reverts, records
    python -m lab wait | status | log | confirm | night | replay | export | import | compare | report

A session is a folder, AUTORESEARCH_HOME/sessions/<device>/<tag>. Commands are carried out by the copy of this package
that was pinned in it, whatever the user's tree holds. docs/architecture.md is the map of files and code.
"""
