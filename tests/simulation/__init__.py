"""Deterministic simulation: the real engine as cooperative tasks on a seeded scheduler over a simulated S3 with virtual time.

scheduler.py  an event loop that owns time and chooses who runs next; processes that freeze and die
store.py      a bucket with S3's promises and S3's faults, beneath the real engine/store/objects.py
model.py      plain dictionaries of generations and documents, and what each operation does to them
audit.py      what stored bytes say, read without the engine's index layer
world.py      bucket, model and processes together; every check
actors.py     what processes do
scenes.py     directed episodes: a call stands still while others do what may hurt it
runner.py     episodes, traces, shrinking
mutations.py  planted mistakes that the simulation must catch
"""
