"""A worker of ``test_study``: python worker.py STORAGE."""

from __future__ import annotations

import sys

from stub import Stub, question

from memprof.tuning.study import Session, open_storage

Session(question("topv", search=("keep", "layer")), open_storage(sys.argv[1])).work(Stub(seconds=0.4), 12)
