"""A directory store whose root is not what it should be: said as it is, never an empty store or a missing object."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import EngineError, NotFound, Unavailable
from engine.store.objects import open_store


async def test_a_root_that_has_become_a_file_is_no_empty_store(tmp_path: Path) -> None:
    root = tmp_path / "root"
    store = open_store(str(root))
    await store.put_if_absent("a/b", b"bytes")
    (root).rename(tmp_path / "elsewhere")
    with pytest.raises(NotFound):  # a root that is not there yet is an empty store
        await store.get("a/b")
    assert [line async for line in store.list("")] == []
    root.write_text("a file")
    attempts = (
        store.get("a/b"),
        store.get_ranges("a/b", [(0, 1)]),
        store.put_if_absent("a/c", b"bytes"),
        store.replace_if_unchanged("a/b", b"bytes", "etag"),
        store.delete(["a/b"]),
        anext(store.list("")),
        anext(store.list_folders("a/")),
    )
    for attempt in attempts:
        with pytest.raises(Unavailable, match="not a folder"):
            await attempt


async def test_a_name_below_an_object_is_still_just_missing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    await store.put_if_absent("a/b", b"bytes")
    with pytest.raises(NotFound):
        await store.get("a/b/c")
    assert [line async for line in store.list("a/b/")] == []
    await store.delete(["a/b/c"])


@pytest.mark.parametrize("root", ["/proc/tartan/store", "{}/file/store"])
async def test_a_root_that_cannot_be_made_is_named(root: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    where = root.format(tmp_path)
    with pytest.raises(EngineError) as raised:
        await open_store(where).put_if_absent("probe-1", b"bytes")
    assert isinstance(raised.value, Unavailable)
    assert "cannot be created" in str(raised.value)
    assert where in str(raised.value)
