"""The ratchet: sessions of experiments, each run guarded, judged, kept or reverted, and recorded.

    python -m lab start TAG           a branch, a pinned judge, and baseline runs to learn the noise from
    python -m lab run -m "what, why"  takes train.py, runs it, decides, keeps or reverts, records
    python -m lab wait | status | log | confirm | night | replay | export | import | compare | report

A session is a folder, AUTORESEARCH_HOME/sessions/<device>/<tag>: what was pinned (session.json), every state change
before it is made (journal.jsonl), the ledger (results.tsv), the code that judges (judge/, a git worktree of the first
commit) and what runs left (runs/). Commands are carried out by the judge's copy of this package, whatever the user's
tree holds.

    session.py     makes, finds and resumes a session
    state.py       what the journal adds up to
    experiment.py  carries one experiment to its verdict, in a process of its own
    gate.py        the statistics of the verdict; near.py: changes that it could not tell from chance, together
    runner.py      one guarded run of train.py; child.py is its other end, guard.py what it may not do there,
                   sandbox.py what the system can add, log.py what it prints, outcome.py what is believed of its result
    tree.py        the user's git repository; source.py what can be said of a train.py without running it
    ledger.py      results.tsv
    exchange.py    sessions as folders and archives; bundle.py: what these hold, and what is refused;
                   packing.py their files, summary.py what they say in words
    compare/       several sessions side by side: what holds where
    begin.py       beginning an experiment and waiting for its verdict
    replay.py      what another machine kept, tried here; merge.py makes its changes, publish.py the branch to share
    report/        the morning page
    commands.py    what each command does; show.py what it says
"""
