"""Fuzzing of everything that decodes bytes somebody else wrote: `python -m tests.fuzz` (docs/fuzzing.md).

target.py says what a target and an accepted outcome are; one file a noun makes the targets; table.py lists them. Two engines feed them:
guided.py (atheris, by coverage) and drawn.py (hypothesis). Here is also what both share: inputs, mutations, bounds.
"""
