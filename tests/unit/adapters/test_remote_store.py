"""The remote store: content is complete or absent on every file system, and errors are clear."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from adapters.errors import AdapterError, AdapterRejected, RegistryUnavailable, StoreFull
from adapters.format.content import content_id
from adapters.format.files import CONFIG, MAX_JSON_BYTES, OPTIONAL, ORIGIN, WEIGHTS
from adapters.format.spec import AdapterId
from adapters.format.training_record import CARD, record_folder
from adapters.store.remote_store import RemoteStore
from tests.buckets import in_front_of, new_bucket, s3_server
from tests.unit.adapters.registries import ids_in

MIB = 1 << 20
NOBODY = AdapterId("0" * 64)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(endpoint: str) -> Iterator[str]:
    with new_bucket(endpoint) as name:
        yield name


@pytest.fixture(params=["file", "memory", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> RemoteStore:
    if request.param == "s3":
        return RemoteStore(f"s3://{request.getfixturevalue('bucket')}/adapters")
    if request.param == "file":
        return RemoteStore(f"file://{tmp_path}/remote")
    return RemoteStore(f"memory://{tmp_path.name}/adapters")


def content(folder: Path, *, size: int = 1000, origin: bool = False, seed: int = 0) -> tuple[Path, AdapterId]:
    """Write a folder of an adapter's files, return it and its id. The remote store does not read the content."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({"r": seed}))
    (folder / WEIGHTS).write_bytes(bytes([seed]) * size)
    if origin:
        (folder / ORIGIN).write_text("{}")
    return folder, content_id(folder)


def fetched(remote: RemoteStore, adapter_id: AdapterId, staging: Path, limit: int = MIB) -> AdapterId:
    staging.mkdir()
    remote.get(adapter_id, staging, limit)
    return content_id(staging)


def put_file(remote: RemoteStore, adapter_id: AdapterId, name: str, data: bytes) -> None:
    """Write one file into the store, as another program would."""
    options = {"auto_mkdir": True} if remote.url.startswith("file:") else {}
    with fsspec.open(f"{remote.url}/{adapter_id}/{name}", "wb", **options) as file:
        file.write(data)


@pytest.mark.parametrize("origin", [False, True])
def test_get_returns_what_was_put(remote: RemoteStore, tmp_path: Path, origin: bool) -> None:
    folder, adapter_id = content(tmp_path / "source", origin=origin)
    record = record_folder("legal")
    (folder / record).mkdir(parents=True)
    (folder / record / CARD).write_text("shown, and not part of the content")
    (folder / "notes.txt").write_text("neither")
    assert not remote.has_record(adapter_id, record)
    remote.put(adapter_id, folder, record)
    assert fetched(remote, adapter_id, tmp_path / "copy") == adapter_id
    manifest = {ORIGIN} if origin else set()
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {CONFIG, WEIGHTS} | manifest
    assert remote.has_record(adapter_id, record)
    (tmp_path / "shown").mkdir()
    remote.get_shown(adapter_id, record, tmp_path / "shown")
    assert {path.name for path in (tmp_path / "shown").iterdir()} == {CARD} | manifest
    assert list(ids_in(remote)) == [adapter_id]


def test_large_files_are_uploaded_in_parts(bucket: str, tmp_path: Path) -> None:
    remote = RemoteStore(f"s3://{bucket}")
    folder, adapter_id = content(tmp_path / "source", size=21 * MIB + 7)
    remote.put(adapter_id, folder)
    assert fetched(remote, adapter_id, tmp_path / "copy", 22 * MIB) == adapter_id


def test_unknown_content_is_an_error(remote: RemoteStore, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"{NOBODY} is not in the store") as caught:
        fetched(remote, NOBODY, tmp_path / "copy")
    assert type(caught.value) is AdapterError
    assert list((tmp_path / "copy").iterdir()) == []
    assert list(ids_in(remote)) == []


@pytest.mark.parametrize("name", ["../0", "x", "A" * 64, ""])
def test_invalid_ids_are_refused(remote: RemoteStore, tmp_path: Path, name: str) -> None:
    for call in (
        lambda: remote.get(AdapterId(name), tmp_path, MIB),
        lambda: remote.delete(AdapterId(name)),
        lambda: remote.put(AdapterId(name), content(tmp_path / "source")[0]),
    ):
        with pytest.raises(AdapterError, match="is not an adapter id"):
            call()


def test_put_again_replaces_a_damaged_copy(remote: RemoteStore, tmp_path: Path) -> None:
    folder, adapter_id = content(tmp_path / "source", origin=True)
    remote.put(adapter_id, folder)
    remote.put(adapter_id, folder)
    assert fetched(remote, adapter_id, tmp_path / "copy") == adapter_id
    put_file(remote, adapter_id, WEIGHTS, b"damaged")
    assert fetched(remote, adapter_id, tmp_path / "damaged") != adapter_id
    remote.put(adapter_id, folder)
    assert fetched(remote, adapter_id, tmp_path / "healed") == adapter_id
    assert list(ids_in(remote)) == [adapter_id]


def test_partial_upload_does_not_exist(remote: RemoteStore, tmp_path: Path) -> None:
    folder, adapter_id = content(tmp_path / "source", origin=True)
    for name in (ORIGIN, WEIGHTS):
        put_file(remote, adapter_id, name, (folder / name).read_bytes())
        with pytest.raises(AdapterError, match="is not in the store"):
            fetched(remote, adapter_id, tmp_path / f"before-{name}")
    assert list(ids_in(remote)) == [adapter_id], "a sweep must see it"
    remote.put(adapter_id, folder)
    assert fetched(remote, adapter_id, tmp_path / "after") == adapter_id


def test_interrupted_upload_leaves_no_config(tmp_path: Path) -> None:
    remote = RemoteStore(f"file://{tmp_path}/remote")
    folder, adapter_id = content(tmp_path / "source")
    # A folder in the place of the weights file cannot be overwritten.
    (tmp_path / "remote" / adapter_id / WEIGHTS / "x").mkdir(parents=True)
    with pytest.raises(RegistryUnavailable, match="IsADirectoryError"):
        remote.put(adapter_id, folder)
    with pytest.raises(AdapterError, match="is not in the store"):
        fetched(remote, adapter_id, tmp_path / "copy")


def test_delete_is_idempotent(remote: RemoteStore, tmp_path: Path) -> None:
    folder, adapter_id = content(tmp_path / "source", origin=True)
    other, other_id = content(tmp_path / "other", seed=1)
    remote.put(adapter_id, folder)
    remote.put(other_id, other)
    remote.delete(adapter_id)
    remote.delete(adapter_id)
    assert list(ids_in(remote)) == [other_id]
    with pytest.raises(AdapterError, match="is not in the store"):
        fetched(remote, adapter_id, tmp_path / "copy")
    assert fetched(remote, other_id, tmp_path / "other-copy") == other_id


def test_partial_upload_can_be_deleted(remote: RemoteStore) -> None:
    put_file(remote, NOBODY, WEIGHTS, b"half")
    remote.delete(NOBODY)
    assert list(ids_in(remote)) == []


def test_foreign_files_in_the_store_are_not_listed(remote: RemoteStore, tmp_path: Path) -> None:
    folder, adapter_id = content(tmp_path / "source")
    remote.put(adapter_id, folder)
    put_file(remote, AdapterId("notes"), "README.md", b"hello")
    assert list(ids_in(remote)) == [adapter_id]


@pytest.mark.parametrize(("name", "limit"), [(WEIGHTS, 10_000), (CONFIG, MAX_JSON_BYTES), (ORIGIN, MAX_JSON_BYTES)])
def test_file_above_its_limit_is_not_downloaded(remote: RemoteStore, tmp_path: Path, name: str, limit: int) -> None:
    folder, adapter_id = content(tmp_path / "source", origin=True)
    remote.put(adapter_id, folder)
    put_file(remote, adapter_id, name, b"1" * limit)
    fetched(remote, adapter_id, tmp_path / "fits", 10_000)
    put_file(remote, adapter_id, name, b"1" * (limit + 1))
    with pytest.raises(AdapterRejected, match=f"{name}: is larger than {limit} bytes"):
        fetched(remote, adapter_id, tmp_path / "does-not", 10_000)


def test_get_makes_no_list_request(bucket: str, endpoint: str, tmp_path: Path) -> None:
    folder, adapter_id = content(tmp_path / "source")
    RemoteStore(f"s3://{bucket}/adapters").put(adapter_id, folder)
    asked: list[tuple[str, str]] = []
    with in_front_of(endpoint, lambda *request: asked.append(request)) as front, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", front)
        fetched(RemoteStore(f"s3://{bucket}/adapters"), adapter_id, tmp_path / "copy")
    at = f"/{bucket}/adapters/{adapter_id}"
    assert asked == [
        ("GET", f"{at}/{CONFIG}"),
        *(("GET", f"{at}/{name}") for name in OPTIONAL),
        ("HEAD", f"{at}/{WEIGHTS}"),
        ("GET", f"{at}/{WEIGHTS}"),
    ]


def test_changes_of_another_server_are_visible_at_once(remote: RemoteStore, tmp_path: Path) -> None:
    folder, adapter_id = content(tmp_path / "source")
    other = RemoteStore(remote.url)
    assert list(ids_in(remote)) == []
    other.put(adapter_id, folder)
    assert list(ids_in(remote)) == [adapter_id]
    assert fetched(remote, adapter_id, tmp_path / "copy") == adapter_id
    other.delete(adapter_id)
    assert list(ids_in(remote)) == []
    with pytest.raises(AdapterError, match="is not in the store"):
        fetched(remote, adapter_id, tmp_path / "again")


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_concurrent_put_and_get(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    # Without fsspec's memory://: its readers of one file share one position.
    place = f"file://{tmp_path}/remote" if kind == "file" else f"s3://{request.getfixturevalue('bucket')}"
    remote = RemoteStore(place)
    folders = [content(tmp_path / f"source-{i}", size=300_000, seed=i) for i in range(6)]

    def there_and_back(i: int) -> bool:
        folder, adapter_id = folders[i % len(folders)]
        remote.put(adapter_id, folder)
        return fetched(remote, adapter_id, tmp_path / f"copy-{i}") == adapter_id

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(there_and_back, range(24)))


def test_unreachable_server_is_reported_quickly(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    remote = RemoteStore(f"s3://{bucket}/adapters")
    folder, adapter_id = content(tmp_path / "source")
    began = time.monotonic()
    for call in (
        lambda: remote.put(adapter_id, folder),
        lambda: remote.get(adapter_id, tmp_path, MIB),
        lambda: remote.delete(adapter_id),
        lambda: list(ids_in(remote)),
    ):
        with pytest.raises(RegistryUnavailable) as caught:
            call()
        assert str(caught.value).endswith("does not answer as it should: EndpointConnectionError")
    assert time.monotonic() - began < 20


def test_missing_bucket_is_an_error(bucket: str, tmp_path: Path) -> None:
    remote = RemoteStore("s3://no-such-bucket/adapters")
    folder, adapter_id = content(tmp_path / "source")
    for call in (
        lambda: remote.put(adapter_id, folder),
        lambda: remote.get(adapter_id, tmp_path, MIB),
        lambda: remote.delete(adapter_id),
        lambda: list(ids_in(remote)),
    ):
        with pytest.raises(RegistryUnavailable, match="s3://no-such-bucket/adapters does not answer as it should"):
            call()


def test_error_messages_contain_no_key(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(RegistryUnavailable) as caught:
        list(ids_in(RemoteStore(f"s3://{bucket}/adapters")))
    assert str(caught.value) == f"the store s3://{bucket}/adapters does not answer as it should: NoCredentialsError"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_store_is_reported(tmp_path: Path) -> None:
    folder, adapter_id = content(tmp_path / "source")
    remote = RemoteStore(f"file://{tmp_path}/remote")
    entry = tmp_path / "remote" / adapter_id
    entry.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        # Name the temporary file so that it is a link to /dev/full.
        patch.setattr("secrets.token_hex", lambda _: "part")
        (entry / f"{WEIGHTS}.part").symlink_to("/dev/full")
        with pytest.raises(StoreFull, match="No space left on device"):
            remote.put(adapter_id, folder)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "bucket/adapters",
        "/srv/adapters",
        "s3://",
        "s3://key:secret@bucket/adapters",
        "s3://bucket/adapters?versionId=1",
        "s3://bucket/a b",
        "simplecache::s3://bucket/adapters",
        "s3://bucket/../adapters",
        "nosuch://bucket",
    ],
)
def test_invalid_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"must be an address|not known") as caught:
        RemoteStore(url)
    assert "secret" not in str(caught.value)


def test_missing_extra_is_named_at_startup() -> None:
    # In a separate process, where s3fs cannot be imported.
    script = "import sys; sys.modules['s3fs'] = None\nfrom adapters.store.remote_store import RemoteStore\nRemoteStore('s3://bucket')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        'ValueError: s3:// needs a package that is not installed; run: pip install "manylora[s3]"'
    )


def test_import_loads_no_client_library() -> None:
    clients = "{'fsspec', 's3fs', 'botocore', 'aiohttp'}"
    script = f"import sys, adapters.store.remote_store; print({clients} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


PEAK = """
import sys
from pathlib import Path
from adapters.store.remote_store import RemoteStore

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) >> 10

remote, small, large, staging = RemoteStore(sys.argv[1]), *(Path(path) for path in sys.argv[2:])
(staging / "small").mkdir()
(staging / "large").mkdir()
remote.put("0" * 64, small)
remote.get("0" * 64, staging / "small", 1 << 30)
before = peak()
remote.put("1" * 64, large)
remote.get("1" * 64, staging / "large", 1 << 30)
print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_large_content_is_streamed(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    place = f"file://{tmp_path}/remote" if kind == "file" else f"s3://{request.getfixturevalue('bucket')}"
    small, _ = content(tmp_path / "small", size=1)
    large, large_id = content(tmp_path / "large", size=128 * MIB)
    staging = tmp_path / "staging"
    staging.mkdir()
    arguments = [sys.executable, "-c", PEAK, place, str(small), str(large), str(staging)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=True, env=dict(os.environ))
    assert content_id(staging / "large") == large_id
    assert int(done.stdout) < 56, "MiB more than for a small one"
