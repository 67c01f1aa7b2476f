"""The engine that is guided by coverage: atheris (libFuzzer) sees which lines of engine/ and handler/ an input reaches.

`python -m tests.fuzz.guided`, started by the runner in a process of its own: the code must be instrumented while it is imported, and
libFuzzer ends the process by itself. Half of the mutations are the target's own, half libFuzzer's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from random import Random

from . import worker


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["engine", "handler"], enable_loader_override=False):
        from .table import TARGETS
        from .target import judge

    work = worker.arguments()
    target = TARGETS[work.target]
    record = worker.Record(work)

    def one(data: bytes) -> None:
        record.trying(data)
        try:
            record.tried(data, judge(target, data))
        except BaseException as error:
            record.found(error)
            worker.leave(record)
        if record.is_over():
            worker.leave(record)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = Random(seed)
        if rng.random() < 0.5:
            return bytes(atheris.Mutate(data, max_size))
        return target.mutate(data, rng, target.seeds, target.tokens)[:max_size]

    corpus = tempfile.mkdtemp(prefix="tartan-fuzz-corpus-")
    for number, seed in enumerate(target.seeds):
        (Path(corpus) / f"seed{number}").write_bytes(seed)
    bounds = ["-max_len=65536", "-rss_limit_mb=0", "-timeout=1200"]  # a clock's bound would find every pause of the machine
    flags = [f"-seed={work.seed + 1}", f"-artifact_prefix={work.folder}/", "-handle_int=0", "-verbosity=0", *bounds]
    atheris.Setup([sys.argv[0], *flags, corpus], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
