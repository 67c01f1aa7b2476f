"""python -m tests.fuzz --seconds 60 [--target NAME ...] [--engine atheris|hypothesis] [--seed S]: try inputs, print a table, keep findings.

Each target runs in a process of its own. Exit code 1 if anything was found; the input is then in the folder that is named.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from .worker import Outcome, input_being_tried

PATIENCE, GRACE_S = 10.0, 300.0
"""A process that is to use so many seconds of a processor may take so many times as long, and this more: machines are busy, or stopped."""
ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz everything that decodes bytes (docs/fuzzing.md).")
    parser.add_argument("--seconds", type=float, default=60.0, help="of processor time, all targets together")
    parser.add_argument("--target", action="append", default=[], help="name of a target; may be given several times; default: all")
    parser.add_argument("--engine", choices=("atheris", "hypothesis"), default="atheris")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--input", type=Path, help="try the bytes of this file once instead (with one --target)")
    parser.add_argument("--list", action="store_true", help="print the targets")
    asked = parser.parse_args()
    from .table import TARGETS

    if asked.list:
        for target in TARGETS.values():
            print(f"{target.name:<12} {target.what}")
        return 0
    unknown = [name for name in asked.target if name not in TARGETS]
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    if asked.input:
        return _once(asked.target, asked.input)
    return _all(asked.target or list(TARGETS), _engine(asked.engine), asked.seconds, asked.seed)


def _engine(wanted: str) -> str:
    if wanted == "atheris" and importlib.util.find_spec("atheris") is None:
        print("atheris is not installed (pip install atheris): hypothesis instead, which does not see coverage")
        return "hypothesis"
    return wanted


def _once(targets: list[str], path: Path) -> int:
    from .table import TARGETS
    from .target import judge

    accepted = judge(TARGETS[targets[0]], path.read_bytes())
    print("accepted" if accepted else "refused")
    return 0


def _all(targets: list[str], engine: str, seconds: float, seed: int) -> int:
    folder = Path(tempfile.mkdtemp(prefix="tartan-fuzz-"))
    print(f"{'target':<12} {'engine':<10} {'inputs':>9} {'accepted':>9} {'CPU s':>7} {'per CPU s':>9}")
    n_findings = n_inputs = 0
    for name in targets:
        outcome = _one(name, engine, seconds / len(targets), seed, folder)
        rate = outcome.n_inputs / outcome.seconds if outcome.seconds else 0.0
        counted = f"{outcome.n_inputs:>9} {outcome.n_accepted:>9} {outcome.seconds:>7.1f} {rate:>9.0f}"
        print(f"{name:<12} {outcome.engine:<10} {counted}", flush=True)
        n_inputs += outcome.n_inputs
        if outcome.finding:
            n_findings += 1
            kept = folder / f"{name}.input"
            kept.write_bytes(input_being_tried(folder / name))
            print(f"\nfound: {outcome.finding}\ninput: {kept}   (python -m tests.fuzz --target {name} --input {kept})\n", flush=True)
    print(f"{n_inputs} inputs, {n_findings} findings")
    return 1 if n_findings else 0


def _one(name: str, engine: str, seconds: float, seed: int, folder: Path) -> Outcome:
    own = folder / name
    own.mkdir()
    module = "tests.fuzz.guided" if engine == "atheris" else "tests.fuzz.worker"
    options = ["--target", name, "--engine", engine, "--seconds", str(seconds), "--seed", str(seed), "--folder", str(own)]
    with open(own / "output", "wb") as output:
        process = subprocess.Popen([sys.executable, "-m", module, *options], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(PATIENCE * seconds + GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if (own / "outcome.json").exists():
        return msgspec.json.decode((own / "outcome.json").read_bytes(), type=Outcome)
    said = (own / "output").read_text(errors="replace")[-3000:]
    return Outcome(name, engine, finding=f"the process hung or died (exit code {process.returncode}):\n{said}")


if __name__ == "__main__":
    sys.exit(main())
