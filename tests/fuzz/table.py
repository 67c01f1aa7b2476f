"""Every target, in the order in which the layers stand."""

from __future__ import annotations

from .arrays import LINES, NPY, NPZ, UPLOAD
from .bodies import BASE64, BODIES
from .codecs import CODEC
from .databases import DATABASE
from .encoders import ENCODER
from .events import EVENT, TASK
from .models import MODEL
from .objects import ENVELOPE, MANIFEST, MARKER, PATCH, TOMBSTONES
from .plaid import PLAID
from .questions import CONDITION, KEYWORDS
from .requests import REQUEST
from .segments import FLAT, QUANTISED
from .shards import SHARDS
from .target import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        *(ENVELOPE, MANIFEST, TOMBSTONES, PATCH, MARKER, FLAT, QUANTISED, CODEC, DATABASE, CONDITION, KEYWORDS),
        *(NPY, NPZ, LINES, UPLOAD, PLAID, MODEL, ENCODER, BODIES, BASE64, REQUEST, EVENT, TASK, SHARDS),
    )
}
