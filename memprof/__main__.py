"""``python -m memprof``."""

from memprof.cli import main

main()
