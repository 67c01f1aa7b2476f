"""The state machines on a real interpreter with real Lambda processes: what `make sfn-local` does."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "infra/local/stepfunctions.py"


@pytest.mark.slow
def test_search_build_and_damage_on_localstack() -> None:
    needs = runpy.run_path(str(SCRIPT))["Needs"]
    try:
        needs.found()
    except FileNotFoundError as error:
        pytest.skip(f"{error} sets it up (localstack-core 4.14.0, aws-sam-cli, awslambdaric)")
    pytest.importorskip("aioboto3", reason="the extra aws is not installed (aioboto3)")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "partial answer" in done.stdout
