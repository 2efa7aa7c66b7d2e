"""HTTPS: a certificate of the operator's, renewed while the server runs."""

import logging
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from openai import OpenAI

from adapters.cli.client import AdapterClient
from server.api import serve
from server.api.serve import DrainingServer, startup_message
from server.config import Settings
from server.doctor import _connections_problem
from server.listener import bind
from tests.api.live import Live, enduring_model, events, request, tiny_service, wait_for
from tests.api.operation.test_http import asking, read_all
from tests.api.operation.test_start import refused

NONE = serialization.NoEncryption()


def write_pair(folder: Path, *, encryption: serialization.KeySerializationEncryption = NONE) -> tuple[Path, Path]:
    """Write a self-signed certificate for 127.0.0.1, and its key, to ``folder``."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "manylora")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    folder.mkdir(exist_ok=True)
    (folder / "tls.crt").write_bytes(certificate.public_bytes(pem))
    (folder / "tls.key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, encryption))
    return folder / "tls.crt", folder / "tls.key"


@contextmanager
def https(root: Path, certificate: Path, key: Path, **changes: object) -> Iterator[Live]:
    """Serve over HTTPS; the client trusts the certificate as it is now."""
    import threading

    server = DrainingServer(tiny_service(root, enduring_model(), tls_cert=certificate, tls_key=key, **changes))
    listener = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, verify=trusting(certificate), timeout=60) as http:
            yield Live(server._service, server, thread, http)
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
    assert not thread.is_alive()


def trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("secure")
    with https(root, *write_pair(root / "pair"), request_timeout_seconds=1, write_timeout_seconds=1) as live:
        yield live


@contextmanager
def connected(live: Live, context: ssl.SSLContext | None = None) -> Iterator[ssl.SSLSocket]:
    """A TLS connection; by default the client trusts the server's certificate."""
    context = context or trusting(live.service.settings.tls_cert)
    host, port = live.http.base_url.host, live.http.base_url.port
    with socket.socket() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.settimeout(60)
        plain.connect((host, port))
        with context.wrap_socket(plain, server_hostname=host) as client:
            yield client


def test_clients_speak_https(secure: Live) -> None:
    assert secure.text(max_tokens=5)
    with secure.http.stream("POST", "/v1/completions", json=request(stream=True)) as response:
        assert events(response)
    with httpx.Client(verify=trusting(secure.service.settings.tls_cert)) as http:
        client = OpenAI(base_url=f"{secure.http.base_url}/v1", api_key="x", http_client=http)
        assert [model.id for model in client.models.list()] == ["tiny"]


def test_the_projects_own_client_speaks_https(secure: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(secure.service.settings.tls_cert))
    with AdapterClient(str(secure.http.base_url)) as client:
        assert client.list().adapters == []


def test_the_startup_message_says_https(secure: Live) -> None:
    with bind("127.0.0.1", 0) as listener:
        assert f"on https://127.0.0.1:{listener.getsockname()[1]}; try" in startup_message(secure.service, listener)


def test_a_client_that_does_not_trust_the_certificate_sends_nothing(secure: Live) -> None:
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(f"{secure.http.base_url}/v1/models")


def test_plain_http_is_refused(secure: Live) -> None:
    url = str(secure.http.base_url).replace("https", "http", 1)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/v1/models")
    assert secure.text(max_tokens=2)
    wait_for(lambda: len(secure.server.connections) <= 1)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
def test_old_versions_of_tls_are_refused(secure: Live) -> None:
    old = trusting(secure.service.settings.tls_cert)
    old.set_ciphers("DEFAULT@SECLEVEL=0")
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionResetError)), connected(secure, old):
        pass
    recent = trusting(secure.service.settings.tls_cert)
    recent.maximum_version = ssl.TLSVersion.TLSv1_2
    with connected(secure, recent) as client:
        assert client.version() == "TLSv1.2"


def test_slow_clients_are_ended_here_too(secure: Live) -> None:
    with connected(secure) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 408 ")


def test_a_stream_that_nobody_reads_is_aborted_here_too(secure: Live) -> None:
    with connected(secure) as client:
        client.sendall(asking(max_tokens=15_000, n=8, logprobs=5, stream=True))
        wait_for(lambda: secure.service.engine.stats().running > 0)
        wait_for(lambda: secure.idle() and len(secure.server.connections) <= 1)


def test_a_client_that_leaves_ends_its_stream(secure: Live, caplog: pytest.LogCaptureFixture) -> None:
    before = secure.sampled()
    with connected(secure) as client:
        client.sendall(asking(max_tokens=15_000, stream=True))
        wait_for(lambda: secure.sampled() > before + 50)
    wait_for(secure.idle)
    assert secure.sampled() < before + 15_000
    assert not caplog.records, "asyncio knows no half-closed TLS, and would say so for each connection"


def test_handshakes_that_do_not_begin_count_as_connections(secure: Live) -> None:
    address = (secure.http.base_url.host, secure.http.base_url.port)
    before = len(secure.server.connections)
    with socket.create_connection(address), socket.create_connection(address):
        wait_for(lambda: len(secure.server.connections) == before + 2)
    wait_for(lambda: len(secure.server.connections) == before)


def test_a_renewed_certificate_is_shown_to_new_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serve, "CERTIFICATE_TICKS", 1)
    caplog.set_level(logging.INFO, "server.tls")
    first = write_pair(tmp_path / "pair")
    second = write_pair(tmp_path / "renewed")
    with https(tmp_path, *first) as live:
        with connected(live) as client:
            old = client.getpeercert(binary_form=True)
        second[0].replace(first[0])  # for a moment, certificate and key do not match
        wait_for(lambda: "is not the key of the certificate" in caplog.text)
        trust = trusting(first[0])
        trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
        with connected(live, trust) as client:
            assert client.getpeercert(binary_form=True) == old
        second[1].replace(first[1])
        wait_for(lambda: "is used for new connections" in caplog.text)
        with connected(live) as client:
            assert client.getpeercert(binary_form=True) != old


def test_certificates_that_are_refused_at_start(tmp_path: Path) -> None:
    certificate, key = write_pair(tmp_path / "pair")
    _, other = write_pair(tmp_path / "other")
    _, encrypted = write_pair(tmp_path / "locked", encryption=serialization.BestAvailableEncryption(b"sesame"))
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    missing = tmp_path / "missing.pem"
    for message, files in (
        ("--tls-cert: needs --tls-key", {"tls_cert": certificate}),
        ("--tls-key: needs --tls-cert", {"tls_key": key}),
        (f"--tls-key: {other} is not the key of", {"tls_cert": certificate, "tls_key": other}),
        (f"--tls-key: {encrypted} is encrypted", {"tls_cert": certificate, "tls_key": encrypted}),
        (f"--tls-key: {certificate} has no private key", {"tls_cert": certificate, "tls_key": certificate}),
        (f"--tls-cert: {key} has no certificate", {"tls_cert": key, "tls_key": key}),
        (f"--tls-cert: {broken} and .* cannot be used", {"tls_cert": broken, "tls_key": key}),
        (f"--tls-cert: {missing} cannot be read: No such file", {"tls_cert": missing, "tls_key": key}),
        (f"--tls-key: {missing} cannot be read: No such file", {"tls_cert": certificate, "tls_key": missing}),
    ):
        refused(message, data_dir=tmp_path, **files)
        problem = _connections_problem(Settings(data_dir=tmp_path, **files))
        assert problem is not None
        assert re.match(message, problem), "doctor says the same"
