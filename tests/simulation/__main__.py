"""python -m tests.simulation --seed S --steps N"""

from __future__ import annotations

import sys

from .runner import main

sys.exit(main())
