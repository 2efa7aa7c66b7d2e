"""Sources: only allowed addresses, recorded exactly, and no redirect to a private network."""

import json
import logging
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import boto3
import pytest

from adapters.errors import AdapterRejected, SourceRefused
from adapters.format.files import CONFIG, MAX_JSON_BYTES, ORIGIN, WEIGHTS
from adapters.format.files import FILES as ALL_FILES
from adapters.format.selection import NO_OTHER_FILES, Selection
from adapters.sources.address import parse_address
from adapters.sources.hub import _is_public
from adapters.sources.sources import Sources
from server.logs import set_up_logs
from tests.buckets import in_front_of, new_bucket, s3_server
from tests.hub import COMMIT, Site, publish, site, use_as_hub

LIMIT = 100_000
OTHER = "f" * 40
TOKEN = "hf_secret"


# Addresses


@pytest.mark.parametrize(
    ("address", "allowed", "within"),
    [
        ("hf://org/name", "hf://org/", True),
        ("hf://org/name@v1", "hf://org", True),
        ("hf://org/name@refs/pr/1", "hf://org/name", True),
        ("hf://org2/name", "hf://org/", False),
        ("hf://org/name2", "hf://org/name", False),
        ("hf://ORG/name", "hf://org/", False),
        ("s3://b/team", "s3://b/team", True),
        ("s3://b/team/legal/", "s3://b/team/", True),
        ("s3://b/team2", "s3://b/team", False),
        ("s3://b/tea", "s3://b/team", False),
        ("s3://b", "s3://b/team", False),
        ("gs://b/team", "s3://b/team", False),
        ("s3://b2/team", "s3://b", False),
    ],
)
def test_a_prefix_allows_whole_parts_only(address: str, allowed: str, within: bool) -> None:
    assert parse_address(address).within(parse_address(allowed)) is within


BAD_ADDRESSES = [
    "",
    "hf://",
    "s3://",
    "s3:///team",
    "org/name",
    "/srv/adapters",
    "file:///srv/adapters",
    "http://127.0.0.1/x",
    "S3://b/team",
    "s3://b//team",
    "s3://b/team//x",
    "s3://b/team/../other",
    "s3://b/team/..",
    "s3://b/./team",
    "s3://b/%2e%2e/other",
    "s3://b/team%2f..",
    "s3://b/team?versionId=1",
    "s3://b/team#x",
    "s3://b\\team",
    "s3://key:hunter2@b/team",
    "s3://b/team\n",
    "s3://b/te\u0430m",
    "s3://arn:aws:s3:us-east-1:1:accesspoint/x",
    "simplecache::s3://b/team",
    "hf://org/name/sub",
    "hf://org/../name",
    "hf://org/name@",
    "hf://org/name@../main",
    "hf://org/name@a//b",
    "hf://org/name@a?b",
    "hf://org/name@v1@v2",
]


@pytest.mark.parametrize("address", BAD_ADDRESSES)
def test_invalid_address_is_refused_unprinted(address: str, tmp_path: Path) -> None:
    with pytest.raises(SourceRefused, match="the source is not hf://OWNER/NAME") as caught:
        Sources(["hf://org/"], LIMIT).fetch(address, tmp_path)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError, match="nor a prefix of one"):
        Sources([address], LIMIT)


def test_invalid_allowed_entry_is_named() -> None:
    with pytest.raises(ValueError, match="'s3://b//team' is not"):
        Sources(["hf://org/", "s3://b//team"], LIMIT)
    with pytest.raises(ValueError, match="'hf://org/name@main' has a revision"):
        Sources(["hf://org/name@main"], LIMIT)


def test_disallowed_source_is_refused_without_a_request(tmp_path: Path) -> None:
    for allowed in ([], ["hf://org/other"], ["s3://b/team"]):
        with pytest.raises(SourceRefused, match="allows it with --allow-source hf://org/name, or"):
            Sources(allowed, LIMIT).fetch("hf://org/name@main", tmp_path)


# The hub


FILES = {CONFIG: b'{"r": 4}', WEIGHTS: b"w" * 1000}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with site() as here:
        use_as_hub(here, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        publish(here, FILES)
        yield here


@pytest.fixture
def sources() -> Sources:
    return Sources(["hf://org/"], LIMIT)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("origin", [False, True])
def test_branch_is_resolved_to_a_commit(hub: Site, sources: Sources, tmp_path: Path, origin: bool) -> None:
    files = {**FILES, ORIGIN: b"{}"} if origin else FILES
    publish(hub, files=files)
    hub.answers[f"/org/name/resolve/{COMMIT}/modeling.py"] = (200, {}, b"raise SystemExit")
    assert sources.fetch("hf://org/name", tmp_path).source == f"hf://org/name@{COMMIT}"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert hub.paths[0] == "/api/models/org/name/revision/main"
    assert sorted(hub.paths[1:]) == sorted(f"/org/name/resolve/{COMMIT}/{name}" for name in ALL_FILES)


def test_revision_is_resolved_first(hub: Site, sources: Sources, tmp_path: Path) -> None:
    publish(hub, revision="refs%2Fpr%2F1", commit=OTHER, files={CONFIG: b"{}", WEIGHTS: b"other"})
    assert sources.fetch("hf://org/name@refs/pr/1", tmp_path).source == f"hf://org/name@{OTHER}"
    assert (tmp_path / WEIGHTS).read_bytes() == b"other"


def test_commit_can_be_requested(hub: Site, sources: Sources, tmp_path: Path) -> None:
    publish(hub, FILES, revision=OTHER, commit=OTHER)
    assert sources.fetch(f"hf://org/name@{OTHER}", tmp_path).source == f"hf://org/name@{OTHER}"


def test_token_is_sent_to_the_hub(hub: Site, sources: Sources, tmp_path: Path) -> None:
    sources.fetch("hf://org/name", tmp_path)
    assert {headers["authorization"] for _, headers in hub.requests} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_repository_without_an_adapter_is_refused(hub: Site, sources: Sources, tmp_path: Path, name: str) -> None:
    del hub.answers[f"/org/name/resolve/{COMMIT}/{name}"]
    with pytest.raises(SourceRefused, match=f"hf://org/name@{COMMIT} has no {name}"):
        sources.fetch("hf://org/name", tmp_path)


@pytest.mark.parametrize(("file", "format"), [("adapters.safetensors", "mlx-lm"), ("q4/model.Q4_0.gguf", "GGUF")])
def test_repository_of_a_foreign_format_is_named(
    hub: Site, sources: Sources, tmp_path: Path, file: str, format: str
) -> None:
    hub.answers.clear()
    publish(hub, files={CONFIG: b"{}", file: b"x", "README.md": b""})
    with pytest.raises(SourceRefused, match=f"has no {WEIGHTS}; {file} is .*{format}"):
        sources.fetch("hf://org/name", tmp_path)


def test_ignored_files_of_a_repository_are_listed(hub: Site, sources: Sources, tmp_path: Path) -> None:
    publish(hub, files={**FILES, "README.md": b"", f"german/{CONFIG}": b"", f"german/{WEIGHTS}": b""})
    left = ("README.md", f"german/{CONFIG}", f"german/{WEIGHTS}")
    assert sources.fetch("hf://org/name", tmp_path).selection == Selection("", left, 3, ("german",))


@pytest.mark.parametrize("siblings", [None, {}, [1, {}, {"rfilename": 7}]])
def test_hub_without_a_file_list(hub: Site, sources: Sources, tmp_path: Path, siblings: object) -> None:
    answer = json.dumps({"sha": COMMIT, "siblings": siblings}).encode()
    hub.answers["/api/models/org/name/revision/main"] = (200, {}, answer)
    assert sources.fetch("hf://org/name", tmp_path).selection == NO_OTHER_FILES


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "is private"), (403, "gated"), (404, "does not exist"), (500, "status 500"), (206, "status 206")],
)
@pytest.mark.parametrize("step", ["/api/models/org/name/revision/main", f"/org/name/resolve/{COMMIT}/{CONFIG}"])
def test_hub_errors_are_reported(
    hub: Site, sources: Sources, tmp_path: Path, step: str, status: int, reason: str
) -> None:
    hub.answers[step] = (status, {}, b"secret page")
    expected = f"has no {CONFIG}" if status == 404 and "resolve" in step else reason
    with pytest.raises(SourceRefused, match=expected) as caught:
        sources.fetch("hf://org/name", tmp_path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "answer", [b"", b"<html>", b"[]", b"{}", b"null", b'{"sha": "main"}', b'{"sha": 1}', b"[" * 100_000]
)
def test_an_answer_without_a_commit_is_refused(hub: Site, sources: Sources, tmp_path: Path, answer: bytes) -> None:
    hub.answers["/api/models/org/name/revision/main"] = (200, {}, answer)
    with pytest.raises(SourceRefused, match="names no commit"):
        sources.fetch("hf://org/name", tmp_path)
    assert len(hub.requests) == 1


@pytest.mark.parametrize(("name", "limit"), [(WEIGHTS, LIMIT), (CONFIG, MAX_JSON_BYTES), (ORIGIN, MAX_JSON_BYTES)])
def test_a_file_past_its_limit_is_refused(hub: Site, sources: Sources, tmp_path: Path, name: str, limit: int) -> None:
    publish(hub, files={**FILES, name: b"1" * (limit + 1)})
    with pytest.raises(AdapterRejected, match=f"{name}: is larger than {limit} bytes"):
        sources.fetch("hf://org/name", tmp_path)
    assert (tmp_path / name).stat().st_size <= limit


def test_truncated_file_is_refused(hub: Site, sources: Sources, tmp_path: Path) -> None:
    hub.answers[f"/org/name/resolve/{COMMIT}/{WEIGHTS}"] = (200, {"content-length": "5000"}, b"w" * 1000)
    with pytest.raises(SourceRefused, match=r"the download failed \(RemoteProtocolError\)"):
        sources.fetch("hf://org/name", tmp_path)


def test_a_compressed_file_is_refused(hub: Site, sources: Sources, tmp_path: Path) -> None:
    # A decompression bomb could only be counted after decompressing it.
    hub.answers[f"/org/name/resolve/{COMMIT}/{WEIGHTS}"] = (200, {"content-encoding": "gzip"}, b"w")
    with pytest.raises(SourceRefused, match="compresses"):
        sources.fetch("hf://org/name", tmp_path)


def test_a_hub_that_is_down_is_refused(hub: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(SourceRefused, match=r"hf://org/name: the download failed \(ConnectError\)"):
        Sources(["hf://org"], LIMIT).fetch("hf://org/name", tmp_path)


def test_offline_mode_is_respected(
    hub: Site, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceRefused, match="HF_HUB_OFFLINE"):
        sources.fetch("hf://org/name", tmp_path)
    assert not hub.requests


# Redirects


def test_a_redirect_within_the_hub_is_followed(hub: Site, sources: Sources, tmp_path: Path) -> None:
    cache = f"/api/resolve-cache/models/org/name/{COMMIT}/{CONFIG}?etag=1"
    hub.redirect(f"/org/name/resolve/{COMMIT}/{CONFIG}", cache)
    hub.answers[cache] = (200, {}, b'{"cached": 1}')
    sources.fetch("hf://org/name", tmp_path)
    assert (tmp_path / CONFIG).read_bytes() == b'{"cached": 1}'


@pytest.mark.parametrize("step", ["/api/models/org/name/revision/main", f"/org/name/resolve/{COMMIT}/{CONFIG}"])
def test_moved_repository_is_refused(hub: Site, sources: Sources, tmp_path: Path, step: str) -> None:
    there = step.replace("org/name", "evil/twin")
    hub.redirect(step, there)
    hub.answers[there] = hub.answers["/api/models/org/name/revision/main"]
    with pytest.raises(SourceRefused, match="has moved"):
        sources.fetch("hf://org/name", tmp_path)
    assert there not in hub.paths


def test_an_answer_about_another_repository_is_refused(hub: Site, sources: Sources, tmp_path: Path) -> None:
    answer = json.dumps({"id": "evil/twin", "sha": COMMIT}).encode()
    hub.answers["/api/models/org/name/revision/main"] = (200, {}, answer)
    with pytest.raises(SourceRefused, match="has moved"):
        sources.fetch("hf://org/name", tmp_path)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "user@127.0.0.1"],
)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_redirect_to_this_machine_is_not_followed(
    hub: Site, sources: Sources, tmp_path: Path, host: str, name: str
) -> None:
    with site() as inside:
        port = inside.url.rpartition(":")[2]
        hub.redirect(f"/org/name/resolve/{COMMIT}/{name}", f"http://{host}:{port}/latest/meta-data")
        with pytest.raises(SourceRefused, match=r"not a public address|cannot be resolved"):
            sources.fetch("hf://org/name", tmp_path)
        assert inside.requests == []


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest",
        "http://10.0.0.1/",
        "http://192.168.1.1/",
        "http://100.64.0.1/",
        "http://[fe80::1]/",
    ],
)
def test_a_redirect_to_a_private_network_is_not_followed(
    hub: Site, sources: Sources, tmp_path: Path, target: str
) -> None:
    hub.redirect(f"/org/name/resolve/{COMMIT}/{WEIGHTS}", target)
    with pytest.raises(SourceRefused, match="not a public address"):
        sources.fetch("hf://org/name", tmp_path)


@pytest.mark.parametrize("target", ["ftp://example.org/x", "file:///etc/passwd", "gopher://127.0.0.1/"])
def test_a_redirect_to_another_protocol_is_not_followed(
    hub: Site, sources: Sources, tmp_path: Path, target: str
) -> None:
    hub.redirect(f"/org/name/resolve/{COMMIT}/{WEIGHTS}", target)
    with pytest.raises(SourceRefused, match="not https"):
        sources.fetch("hf://org/name", tmp_path)
    assert not (tmp_path / WEIGHTS).exists()


@pytest.mark.parametrize("target", ["http://[::1/", "http://host:port/", "http://exa mple/"])
def test_malformed_redirect_is_refused(hub: Site, sources: Sources, tmp_path: Path, target: str) -> None:
    hub.redirect(f"/org/name/resolve/{COMMIT}/{WEIGHTS}", target)
    with pytest.raises(SourceRefused, match="hf://org/name"):
        sources.fetch("hf://org/name", tmp_path)


def test_number_of_redirects_is_limited(hub: Site, sources: Sources, tmp_path: Path) -> None:
    step = f"/org/name/resolve/{COMMIT}/{CONFIG}"
    hub.redirect(step, step)
    with pytest.raises(SourceRefused, match="more than 5 redirects"):
        sources.fetch("hf://org/name", tmp_path)
    assert hub.paths.count(step) == 6


def test_a_redirect_to_a_public_address_is_followed_without_the_token(
    hub: Site, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests reach no public address, so a proxy answers for it.
    with site() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        hub.redirect(f"/org/name/resolve/{COMMIT}/{WEIGHTS}", "http://u:p@93.184.216.34:8080/blob?Signature=1")
        proxy.answers["http://93.184.216.34:8080/blob?Signature=1"] = (200, {}, b"from afar")
        assert sources.fetch("hf://org/name", tmp_path).source == f"hf://org/name@{COMMIT}"
        assert (tmp_path / WEIGHTS).read_bytes() == b"from afar"
        [(_, headers)] = proxy.requests
        assert headers["host"] == "93.184.216.34:8080"
        assert "authorization" not in headers
        assert "cookie" not in headers


def test_signed_url_is_not_printed(
    hub: Site,
    sources: Sources,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    set_up_logs("debug", "json")  # the libraries that fetch would log each address
    with site() as proxy, caplog.at_level(logging.DEBUG):
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        hub.redirect(f"/org/name/resolve/{COMMIT}/{WEIGHTS}", "http://93.184.216.34/blob?Signature=hunter2")
        proxy.answers["http://93.184.216.34/blob?Signature=hunter2"] = (418, {}, b"")
        with pytest.raises(SourceRefused, match="status 418") as caught:
            sources.fetch("hf://org/name", tmp_path)
    assert "hunter2" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert "hunter2" not in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("64:ff9b::5db8:d822", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("fe80::1", False),
        ("fec0::1", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
    ],
)
def test_is_public(address: str, public: bool) -> None:
    assert _is_public(ip_address(address)) is public


# Buckets


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(endpoint: str) -> Iterator[str]:
    with new_bucket(endpoint) as name:
        yield name


def upload(bucket: str, files: dict[str, bytes] = FILES, endpoint: str | None = None) -> dict[str, dict[str, str]]:
    """Upload files under ``team/legal``; return S3's metadata of each."""
    client = boto3.client("s3", endpoint_url=endpoint)
    answers = {
        name: client.put_object(Bucket=bucket, Key=f"team/legal/{name}", Body=data) for name, data in files.items()
    }
    client.close()
    return answers


def test_bucket_source_contains_etags(bucket: str, tmp_path: Path) -> None:
    put = upload(bucket, {**FILES, ORIGIN: b"{}", "README.md": b"hello"})
    source = Sources([f"s3://{bucket}/team"], LIMIT).fetch(f"s3://{bucket}/team/legal/", tmp_path).source
    etags = ",".join(put[name]["ETag"].strip('"') for name in (CONFIG, WEIGHTS, ORIGIN))
    assert source == f"s3://{bucket}/team/legal#etag={etags}"
    assert names(tmp_path) == sorted([CONFIG, WEIGHTS, ORIGIN])
    assert (tmp_path / WEIGHTS).read_bytes() == FILES[WEIGHTS]


def test_bucket_source_contains_versions(bucket: str, tmp_path: Path) -> None:
    client = boto3.client("s3")
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    client.close()
    put = upload(bucket)
    source = Sources([f"s3://{bucket}"], LIMIT).fetch(f"s3://{bucket}/team/legal", tmp_path).source
    assert source == f"s3://{bucket}/team/legal#version={put[CONFIG]['VersionId']},{put[WEIGHTS]['VersionId']}"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_prefix_without_an_adapter_is_refused(bucket: str, tmp_path: Path, name: str) -> None:
    upload(bucket, {other: data for other, data in FILES.items() if other != name})
    with pytest.raises(SourceRefused, match=f"s3://{bucket}/team/legal has no {name}"):
        Sources([f"s3://{bucket}"], LIMIT).fetch(f"s3://{bucket}/team/legal", tmp_path)


@pytest.mark.parametrize(
    ("file", "format"), [("adapter_model.bin", "pickle"), ("lit_model.pth.lora", "LitGPT"), ("optimizer.pt", None)]
)
def test_prefix_of_a_foreign_format_is_named(bucket: str, tmp_path: Path, file: str, format: str | None) -> None:
    upload(bucket, {CONFIG: b"{}", file: b"x"})
    with pytest.raises(SourceRefused) as refused:
        Sources([f"s3://{bucket}"], LIMIT).fetch(f"s3://{bucket}/team/legal", tmp_path)
    plain = f"s3://{bucket}/team/legal has no {WEIGHTS}"
    assert str(refused.value).startswith(f"{plain}; {file} is a" if format else plain)
    assert format is None or format in str(refused.value)


def test_file_size_limit_applies_to_buckets(bucket: str, tmp_path: Path) -> None:
    upload(bucket, {CONFIG: b"{}", WEIGHTS: b"w" * (LIMIT + 1)})
    with pytest.raises(AdapterRejected, match=f"{WEIGHTS}: is larger than {LIMIT} bytes"):
        Sources([f"s3://{bucket}"], LIMIT).fetch(f"s3://{bucket}/team/legal", tmp_path)


def test_unreachable_bucket_is_refused(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(SourceRefused, match=r"cannot be read \(EndpointConnectionError\)"):
        Sources([f"s3://{bucket}"], LIMIT).fetch(f"s3://{bucket}/team/legal", tmp_path)


@pytest.mark.parametrize("read", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("changed", [{WEIGHTS: b"v" * 1000}, {CONFIG: b'{"r": 8}'}, {ORIGIN: b"{}"}])
def test_overwrite_during_download_is_detected(
    bucket: str, endpoint: str, tmp_path: Path, read: str, changed: dict[str, bytes]
) -> None:
    upload(bucket)
    overwritten = threading.Event()

    def overwrite(method: str, path: str) -> None:
        if method == "GET" and path.endswith(read) and not overwritten.is_set():
            overwritten.set()
            upload(bucket, changed, endpoint)

    with in_front_of(endpoint, overwrite) as front, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", front)
        sources = Sources([f"s3://{bucket}"], LIMIT)
        (tmp_path / "first").mkdir()
        with pytest.raises(SourceRefused, match=r"changed while it was read|cannot be read \(FileExpired"):
            sources.fetch(f"s3://{bucket}/team/legal", tmp_path / "first")
        assert overwritten.is_set()
        (tmp_path / "second").mkdir()
        sources.fetch(f"s3://{bucket}/team/legal", tmp_path / "second")
    for name, data in {**FILES, **changed}.items():
        assert (tmp_path / "second" / name).read_bytes() == data
