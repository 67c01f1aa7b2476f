"""Load on real servers: for an hour at a pace they can keep (soak), and at four times what they can do (overload).

wire.py      HTTP/1.1 over a socket, cheap enough to offer more than a server can take on the cores it shares with it
pauses.py    when this process stood still, so that what happened then is no measurement
model.py     documents, what was done to them, and what a read may therefore show
stage.py     two replicas over one store, a directory or an S3 server, with maintenance in a hurry (short/)
store.py     that store: what lies in it, and the S3 server's process
load.py      the mix of calls, each answer held against the model
samples.py   memory, files, threads, caches and objects, every second
soak.py      a run from start to end
report.py    slopes, quarters, verdict; plot.py draws them
overload.py  capacity, unloaded latency, four times the capacity, recovery

`python -m soak` and `python -m soak.overload` with PYTHONPATH=.:tests, or `make soak SECONDS=3600` and `make overload`.
tests/test_soak.py runs both for some seconds.
"""
