"""python -m soak --seconds 3600"""

from __future__ import annotations

import sys

from soak.soak import main

sys.exit(main())
