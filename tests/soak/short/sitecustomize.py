"""In every process of a replica, maintenance children included: the grace of garbage collection, and how old an upload may be that is still
committed (half of it), from SOAK_GRACE_S. Servers have no setting for it: too short a grace loses what a slow writer is about to name."""

import functools
import os

import engine.config

grace_s = float(os.environ["SOAK_GRACE_S"])
engine.config.MaintenanceParams = functools.partial(engine.config.MaintenanceParams, grace_s=grace_s)
engine.config.CommitParams = functools.partial(engine.config.CommitParams, max_upload_age_s=grace_s / 2)
