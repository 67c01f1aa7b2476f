"""What measures. `python -m benchmarks.run --help`; README.md has the protocol and the dated results."""

import os

# Read by the libraries when they are imported, so it stands before any numpy: one BLAS thread for everybody, as in production.
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
