"""python -m crash --store s3 --seconds 300"""

from __future__ import annotations

import sys

from crash.arena import main

sys.exit(main())
