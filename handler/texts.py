"""An encoder as a source of documents wants it: a function that waits, and a name for what it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from handler.runtime import load_encoder
from handler.settings import LEXICAL_MODEL, Settings

if TYPE_CHECKING:
    from engine.transfer.content import Background
    from engine.transfer.text_lines import Encode


async def document_encoder(settings: Settings, background: Background, pool_factor: int | None) -> tuple[Encode, str]:
    """(encode, the encoder's name and settings) of the model that the settings name, else of the built-in one."""
    if settings.model in ("", "none"):
        settings = msgspec.structs.replace(settings, model=LEXICAL_MODEL)
    encoder = await load_encoder(settings)
    about = encoder.info

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return background.run(encoder.encode_documents(texts, pool_factor))

    return encode, f"{about.name} int8={about.quantized} dim={about.embedding_dim} length={about.document_length} pool={pool_factor}"
