"""Every target, in the order in which the layers stand."""

from __future__ import annotations

from .arrays import LINES, NPY, NPZ, UPLOAD
from .bodies import BASE64, BODIES
from .databases import DATABASE
from .events import EVENT, TASK
from .models import MODEL
from .objects import CODEC, ENVELOPE, FLAT, MANIFEST, MARKER, PATCH, QUANTISED, TOMBSTONES
from .plaid import PLAID
from .questions import CONDITION, KEYWORDS
from .requests import REQUEST
from .target import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        *(ENVELOPE, MANIFEST, TOMBSTONES, PATCH, MARKER, FLAT, QUANTISED, CODEC, DATABASE, CONDITION, KEYWORDS),
        *(NPY, NPZ, LINES, UPLOAD, PLAID, MODEL, BODIES, BASE64, REQUEST, EVENT, TASK),
    )
}
