"""Real processes that write, serve, compact and build over one real store, and are killed at random moments.

s3.py        the locked S3 of the tests as a process of its own, with moods: slow, denied, expired, gone
disk/        a file system that is full, read-only or forbidden, at the system call, in any Python process
journal.py   what each process meant to do and was told, one line a call; survives kill -9
actors.py    the processes: a writer through the engine, a client over HTTP, an asker, a compactor, a builder that runs `tartan index`
audit.py     everything read back and held against the journals
arena.py     starts them, kills them, starts them again

`python -m crash` with PYTHONPATH=.:tests, or `make crash`. tests/test_crash.py runs it for some seconds.
"""
