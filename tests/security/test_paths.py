"""Names that lead elsewhere: every route and every command that takes a name, every call of a store, and links in a directory.

A store lies in a folder between folders that are none of its business. An audit hook sees each file that Python opens, lists, makes,
renames or removes anywhere below their parent, wherever a name or a link led.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer.main
from typer.testing import CliRunner

from engine.errors import EngineError, InvalidRequest, NotFound, Unavailable
from engine.format import names
from engine.store.base import ObjectStore
from engine.store.cache import CachedStore
from engine.store.objects import StoreOptions, open_store
from handler.app import create_app
from handler.cli import app as command
from handler.routes.table import ENDPOINTS
from security.payloads import NAMES, ODD_BUT_LAWFUL
from security.raw import JSON, Answer, ask
from serving import client_of

SYSTEM = ("/etc/passwd", "/proc/self/environ", "/dev/zero", "/outside", "/etc/CURRENT")
SECRET = "what nobody may see"
_watching: list[Watch] = []


class Watch:
    """The folders around a store, and what was done to them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, folder / "store"
        self.allowed = [self.store]
        self.seen: list[tuple[str, str]] = []
        for name in ("outside", "private", "storehouse"):
            (folder / name).mkdir()
            (folder / name / "CURRENT").write_text(SECRET)
            (folder / name / "secret.txt").write_text(SECRET)
        self.before = self.contents()

    def contents(self) -> dict[str, str]:
        """Everything beside the store."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            if not any(path.is_relative_to(allowed) for allowed in self.allowed):
                found[str(path)] = path.read_text() if path.is_file() else "a folder"
        return found

    def event(self, event: str, arguments: tuple[Any, ...]) -> None:
        for argument in arguments:
            if not isinstance(argument, (str, bytes, os.PathLike)):
                continue
            given = os.fsdecode(argument)
            if "\0" in given:
                continue
            path = os.path.realpath(given)
            is_beside = path.startswith(f"{self.folder}/") and not any(
                path == str(allowed) or path.startswith(f"{allowed}/") for allowed in self.allowed
            )
            if is_beside or path in SYSTEM:
                self.seen.append((event, given))

    def check(self) -> None:
        assert self.seen == []
        assert self.contents() == self.before


_EVENTS = frozenset(("open", "os.listdir", "os.scandir", "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.truncate", "os.link", "os.symlink", "shutil.copyfile",
                     "shutil.rmtree", "sqlite3.connect", "os.chmod", "os.utime", "glob.glob"))  # fmt: skip


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in _EVENTS:
        watch = _watching.pop()  # not while we look ourselves
        try:
            watch.event(event, arguments)
        finally:
            _watching.append(watch)


sys.addaudithook(_hook)


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    made = Watch(tmp_path)
    yield made
    _watching.clear()
    made.check()


def watched(watch: Watch) -> None:
    _watching.append(watch)


def test_the_watch_sees_what_it_should(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    watch.store.mkdir()
    (watch.store / "link").symlink_to(tmp_path / "outside")
    watched(watch)
    (watch.store / "fine").write_text("x")
    assert watch.seen == []
    (watch.store / "link/secret.txt").read_text()
    os.listdir(watch.store / "../private")
    (tmp_path / "storehouse/new").write_text("x")
    _watching.clear()
    assert [event for event, _ in watch.seen] == ["open", "os.listdir", "open"]
    with pytest.raises(AssertionError):
        watch.check()
    watch.seen.clear()
    with pytest.raises(AssertionError):
        watch.check()


# Routes

BODY_NAMES: dict[str, tuple[str, ...]] = {
    "create_index": ("name",),
    "branch": ("name",),
    "put_alias": ("index",),
    "add_pin": ("pin",),
    "rollback": ("pin",),
    "shard": ("job.index", "job.life"),
}
"""Where bodies carry names that become names of objects."""


async def filled(watch: Watch, **settings: Any) -> httpx.AsyncClient:
    api = client_of(open_store(str(watch.store), StoreOptions(fsync=False)), model="hashing", **settings)
    assert (await api.post("/indices", json={"name": "inside"})).status_code == 200
    body = {"documents": [{"embeddings": [[0.1, 0.2, 0.3, 0.4]]}], "metadata": [{"year": 2000}]}
    assert (await api.post("/indices/inside/update", json=body)).status_code == 202
    assert (await api.post("/indices/inside/pins", json={"pin": "kept"})).status_code == 200
    return api


def in_a_line(path: str) -> str:
    """As it can stand in a request line: what is no printable ASCII is percent-encoded, what is stays as it is."""
    return "".join(c if "\x21" <= c <= "\x7e" and c not in "?#" else "".join(f"%{byte:02x}" for byte in c.encode()) for c in path)


def with_name(body: Any, place: str, name: str) -> Any:
    outer, _, inner = place.partition(".")
    return {**body, outer: with_name(body[outer], inner, name) if inner else name}


def test_bodies_with_names_are_all_known() -> None:
    """A body that gets a field for a name is put into BODY_NAMES, or here, with the reason."""
    harmless = {"UpdateTextsRequest.pool_factor"}
    import msgspec

    suspicious = {"name", "index", "pin", "alias", "path", "file", "url", "uri", "model", "upload", "source", "target", "folder", "bucket", "life", "job", "endpoint", "host"}
    for endpoint in ENDPOINTS:
        if endpoint.body is None:
            continue
        found = {field.encode_name for field in msgspec.structs.fields(endpoint.body)} & suspicious
        known = {place.partition(".")[0] for place in BODY_NAMES.get(endpoint.name, ())}
        assert found == known, (endpoint.name, found, harmless)


STEP = pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])


@STEP
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
async def test_no_route_leads_out_of_the_store(watch: Watch, step: int, cached: bool) -> None:
    if cached and step > 1:
        step = 9
    if cached:
        watch.allowed.append(watch.folder / "cache")
    api = await filled(watch, **({"cache_dir": str(watch.folder / "cache")} if cached else {}))
    app = create_app(runtime=api.runtime)  # type: ignore[attr-defined]
    everything = sorted(path for path in watch.store.rglob("*") if ".tartan" not in path.parts)
    watched(watch)
    for number, endpoint in enumerate(ENDPOINTS):
        slots = [part for part in LAWFUL if part in endpoint.path]
        body = b"" if endpoint.body is None else json.dumps(endpoint.request_example).encode()
        for name in NAMES[number % step :: step]:
            for slot in slots if name.strip("/") not in ("", "inside") else ():  # slashes too many are overlooked: those are lawful paths
                path = endpoint.path.replace(slot, name)
                for other, lawful in LAWFUL.items():
                    path = path.replace(other, lawful)
                for spelt in {in_a_line(path), in_a_line(path.replace("%", "%25"))}:
                    answer = await ask(app, endpoint.method, spelt, JSON, body=body, is_raw=True)
                    assert_refused(endpoint.method, answer, name, endpoint.path)
            for place in BODY_NAMES.get(endpoint.name, ()):
                path = endpoint.path.replace("{name}", "inside").replace("{alias}", "live")
                sent = json.dumps(with_name(endpoint.request_example, place, name)).encode()
                answer = await ask(app, endpoint.method, path, JSON, body=sent)
                assert answer.status in (400, 404, 422), (endpoint.path, place, name, answer)
    _watching.clear()
    assert sorted(path for path in watch.store.rglob("*") if ".tartan" not in path.parts) == everything


LAWFUL = {"{name}": "inside", "{alias}": "live", "{pin}": "kept", "{file}": "favicon.png", "{upload}": names.fresh_id()}


def assert_refused(method: str, answer: Answer, name: str, path: str) -> None:
    """Refused in the contract's form; but a delete of an index that cannot exist succeeds, as NextPlaid's does."""
    assert answer.status < 500, (path, name, answer)
    assert SECRET.encode() not in answer.body
    if answer.status < 400:
        assert (method, path) == ("DELETE", "/indices/{name}") and json.loads(answer.body) == {"deleted": True, "name": name_of(answer)}, (path, name, answer)
    else:
        assert set(json.loads(answer.body)) == {"code", "message"}


def name_of(answer: Answer) -> str:
    found: str = json.loads(answer.body)["name"]
    assert found not in ("inside", "live")
    return found


async def test_names_that_mean_something_elsewhere_are_names_like_any_other(watch: Watch) -> None:
    api = await filled(watch)
    watched(watch)
    for name in ODD_BUT_LAWFUL:
        assert (await api.post("/indices", json={"name": name})).status_code == 200
        assert (await api.put(f"/aliases/x-{name[:100]}", json={"index": name})).status_code == 200
        assert (await api.post("/indices/inside/pins", json={"pin": name})).status_code == 200
        assert (await api.delete(f"/indices/inside/pins/{name}")).status_code == 200
        assert (await api.delete(f"/indices/{name}")).json() == {"deleted": True, "name": name}
    assert (await api.get("/indices")).json() == ["inside"]


# Stores


@pytest.mark.parametrize("kind", ["directory", "cached", "memory"])
async def test_no_call_of_a_store_leads_out_of_it(watch: Watch, kind: str) -> None:
    store: ObjectStore = open_store("memory://" if kind == "memory" else str(watch.store), StoreOptions(fsync=False))
    if kind == "cached":
        watch.allowed.append(watch.folder / "cache")
        store = CachedStore(store, str(watch.folder / "cache"), budget_bytes=1 << 20, cacheable=lambda name: True)
    await store.put_if_absent("inside/CURRENT", b"ours")
    watched(watch)
    for name in NAMES:
        for asked in (name, f"{name}/CURRENT", f"inside/{name}", f"inside/segments/{name}/data", f"inside/{name}/../../outside/CURRENT"):
            if asked.rstrip("/") == "inside/CURRENT" or (asked.endswith("/CURRENT") and asked.count("/") == 1 and name.isidentifier()):
                continue
            for call in (
                lambda asked=asked: store.get(asked),
                lambda asked=asked: store.get_if_changed(asked, "x"),
                lambda asked=asked: store.get_ranges(asked, [(0, 4)]),
                lambda asked=asked: store.replace_if_unchanged(asked, b"planted", "x"),
            ):
                with pytest.raises((InvalidRequest, NotFound)):
                    await call()
            if not _is_lawful(asked):
                with pytest.raises(InvalidRequest):
                    await store.put_if_absent(asked, b"planted")
                with pytest.raises(InvalidRequest):
                    await store.delete(["inside/x", asked])
                assert await _path_of(store, asked) is None
        for prefix in (f"{name}/", f"inside/{name}/", f"{name}"):
            try:
                assert {line.name async for line in store.list(prefix)} <= {"inside/CURRENT"}
                assert {folder async for folder in store.list_folders(prefix)} <= {"inside"}
            except (InvalidRequest, NotFound):
                pass
    _watching.clear()
    assert [line.name async for line in store.list("")] == ["inside/CURRENT"]


def _is_lawful(name: str) -> bool:
    from engine.store.base import check_name

    try:
        check_name(name)
    except InvalidRequest:
        return False
    return True


async def _path_of(store: ObjectStore, name: str) -> str | None:
    try:
        return await store.local_path(name)
    except InvalidRequest:
        return None


# Links


async def test_a_link_in_a_directory_leads_nowhere(watch: Watch) -> None:
    """Whoever can make links in the folder, but has fewer rights than the server, gets no more by them."""
    api = await filled(watch)
    store: ObjectStore = api.runtime.counting  # type: ignore[attr-defined]
    outside = watch.folder / "outside"
    (watch.store / "linked").symlink_to(outside)
    (watch.store / "inside/pins/evil").symlink_to(outside / "secret.txt")
    (watch.store / "inside/uploads").symlink_to(outside)
    (watch.store / "file").mkdir()
    (watch.store / "file/CURRENT").symlink_to(outside / "CURRENT")
    (watch.store / "dangling").symlink_to(watch.folder / "not-there-yet")
    watched(watch)
    assert (await api.get("/indices")).json() == ["inside"]
    assert SECRET not in (await api.get("/health")).text
    assert [line["pin"] for line in (await api.get("/indices/inside/pins")).json()["pins"]] == ["kept"]
    for name in ("linked", "file", "dangling"):
        for method, path, body in (
            ("GET", f"/indices/{name}", None),
            ("GET", f"/indices/{name}/export", None),
            ("POST", f"/indices/{name}/update", {"documents": [{"embeddings": [[0.1, 0.2, 0.3, 0.4]]}]}),
            ("DELETE", f"/indices/{name}", None),
            ("POST", "/indices", {"name": name}),
            ("POST", "/indices/inside/branch", {"name": name}),
        ):
            answer = await api.request(method, path, json=body)
            assert SECRET not in answer.text
            assert (answer.status_code, "link" in answer.text or answer.json().get("code")) != (200, True), (method, path, answer.text)
    for name in ("linked/CURRENT", "linked/secret.txt", "linked/new", "file/CURRENT", "inside/pins/evil", "inside/uploads/new", "dangling/new"):
        for call in (store.get(name), store.get_ranges(name, [(0, 4)]), store.put_if_absent(name, b"planted"), store.delete([name]), store.local_path(name)):
            with pytest.raises(Unavailable) as caught:
                await call
            assert caught.value.code == "store-denied"
    _watching.clear()
    assert not (watch.folder / "not-there-yet").exists()
    assert (watch.store / "linked").is_symlink()  # not even the link is taken away
    assert [line["year"] for line in (await api.get("/indices/inside/metadata")).json()["metadata"]] == [2000]


async def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    store = open_store(str(tmp_path / "store"), StoreOptions(fsync=False))
    await store.put_if_absent("a/CURRENT", b"x")
    assert (tmp_path / "disk/a/CURRENT").read_bytes() == b"x"
    assert [line.name async for line in store.list("")] == ["a/CURRENT"]


# Commands

TAKES: dict[str, list[list[str]]] = {
    "index": [["{source}", "--name", "NAME"]],
    "import": [["{folder}/private", "--name", "NAME"]],
    "search": [["NAME", "weft"]],
    "recall": [["NAME", "--queries", "1"]],
    "info": [["NAME"]],
    "export": [["NAME"]],
    "delete": [["NAME", "--yes"]],
    "generations": [["NAME"]],
    "pin add": [["NAME", "p"], ["inside", "NAME"]],
    "pin list": [["NAME"]],
    "pin remove": [["NAME", "p"], ["inside", "NAME"]],
    "rollback": [["NAME", "0"], ["inside", "--pin", "NAME"]],
    "branch": [["NAME", "new"], ["inside", "NAME"]],
    "backup": [["NAME", "--to", "{backup}"], ["inside", "--to", "{backup}", "--as-of", "NAME"]],
    "restore": [["{backup}", "NAME"], ["{backup}", "inside", "--name", "NAME"]],
    "undelete": [["NAME"]],
    "drill": [["NAME", "--to", "{backup}"]],
    "compact": [["NAME"]],
    "gc": [["NAME"]],
    "verify": [["NAME"]],
    "build-status": [["NAME"], ["inside", "--give-up", "NAME"]],
    "cost": [["NAME"]],
}
WITHOUT = {"list", "doctor", "smoke", "serve", "version", "key mint"}
"""Commands that take no name of an index, pin, branch or build."""


def _commands(group: Any, before: str = "") -> Iterator[str]:
    for name, found in group.commands.items():
        if hasattr(found, "commands"):
            yield from _commands(found, f"{before}{name} ")
        else:
            yield f"{before}{name}"


def test_every_command_is_known_here() -> None:
    assert set(_commands(typer.main.get_command(command))) == TAKES.keys() | WITHOUT


@STEP
def test_no_command_leads_out_of_the_store(watch: Watch, step: int) -> None:
    backup, source = watch.folder / "backup", watch.folder / "d.jsonl"
    watch.allowed += [backup, source]
    source.write_text(json.dumps({"title": "weft", "text": "warp"}) + "\n")
    run = CliRunner()
    store = ["--store", str(watch.store)]
    for made in (["index", str(source), "--name", "inside"], ["backup", "inside", "--to", str(backup)]):
        assert run.invoke(command, [*made, *store]).exit_code == 0
    places = {"folder": str(watch.folder), "backup": str(backup), "source": str(source)}
    before = sorted(str(path) for path in watch.store.rglob("*") if ".tartan" not in path.parts)
    number = 0
    for name, forms in TAKES.items():
        if name == "import":
            continue  # reads the folder that it is told to
        for form in forms:
            number += 1
            for hostile in NAMES[number % 79 :: 79] if step > 1 else NAMES:
                if "\0" in hostile or hostile.startswith("-") or (not hostile and name in ("backup", "gc", "verify", "compact", "index")):
                    continue  # no argument of a process holds NUL; an option is an option
                _watching[:] = [watch]
                arguments = [hostile if part == "NAME" else part.format(**places) for part in form]
                done = run.invoke(command, [*name.split(), *arguments, *store])
                _watching.clear()
                assert done.exit_code in (1, 2), (name, arguments, done.output)
                assert done.exception is None or isinstance(done.exception, SystemExit), (name, arguments, done.exception)
                assert SECRET not in done.output and "Traceback" not in done.output
    assert sorted(str(path) for path in watch.store.rglob("*") if ".tartan" not in path.parts) == before


async def test_a_forged_copy_cannot_reach_beside_itself(watch: Watch) -> None:
    """A backup from elsewhere whose manifest names things of others: the rules of a manifest refuse it before anything is read."""
    import msgspec

    from engine.format.envelope import Kind, build_body
    from engine.format.manifest import decode_manifest, encode_manifest
    from engine.transfer.backup import restore

    api = await filled(watch)
    store: ObjectStore = api.runtime.counting  # type: ignore[attr-defined]
    manifest = decode_manifest((await store.get("inside/CURRENT")).data, name="inside/CURRENT")
    for changes in ({"id": "../../outside"}, {"home": "../outside"}, {"home": "/etc"}, {"home": ".tartan"}, {"home": "_aliases"}, {"id": "x/../../../outside"}):
        forged = msgspec.structs.replace(manifest, segments=(msgspec.structs.replace(manifest.segments[0], **changes),))
        with pytest.raises(ValueError, match="rules"):
            encode_manifest(forged)
        source = open_store("memory://")
        await source.put_if_absent("inside/CURRENT", build_body(Kind.MANIFEST, forged))
        watched(watch)
        with pytest.raises(EngineError) as caught:
            await restore(source, "inside", store, "copy")
        _watching.clear()
        assert caught.value.code == "malformed"
    assert (await api.get("/indices")).json() == ["inside"]
