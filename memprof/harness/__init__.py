"""Harnesses that score models: an adapter each, which profiles every sample they ask and puts memory beside its score.

A harness is no dependency: an adapter is loaded from inside it, or by ``memprof harness NAME``.
"""
