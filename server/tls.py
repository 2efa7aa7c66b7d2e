"""Certificate: the TLS certificate that the server shows, read again when its files change."""

import logging
import ssl
from pathlib import Path

from bases.errors import ConfigError
from server.config import Settings

log = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int, int], ...]
"""Of each file: device, inode, time of the last change in nanoseconds."""


class Certificate:
    """A certificate with its chain and its private key, from PEM files."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises ConfigError if a file cannot be read, or the key is not the certificate's."""
        self._files = (certificate, key)
        self._stamp = self._look()
        self.context = _make_context(*self._files)
        """For connections to this server: TLS 1.2 or newer, HTTP/1.1."""

    def refresh(self) -> None:
        """Use what is in the files now for new connections; keep what there is, and log it, if that is no use.

        Whoever renews a certificate writes two files, one after the other: until both match, the old ones stay.
        """
        try:
            stamp = self._look()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            _make_context(*self._files)  # tried first: a context would keep one half of a pair that does not match
            self.context.load_cert_chain(*self._files)
        except (ConfigError, ssl.SSLError, OSError) as error:
            log.error("The changed TLS certificate is not used: %s", error)
        else:
            log.info("The TLS certificate has changed and is used for new connections")

    def _look(self) -> Stamp:
        try:
            found = [path.stat() for path in self._files]
        except OSError:
            return ()  # reading the files says why
        return tuple((each.st_dev, each.st_ino, each.st_mtime_ns) for each in found)


def load_certificate(settings: Settings) -> Certificate | None:
    """Return the certificate that ``settings`` name, or None to serve plain HTTP. Raises ConfigError."""
    match settings.tls_cert, settings.tls_key:
        case None, None:
            return None
        case Path() as certificate, Path() as key:
            return Certificate(certificate, key)
        case None, _:
            raise ConfigError("--tls-key: needs --tls-cert, the certificate of that key")
    raise ConfigError("--tls-cert: needs --tls-key, the private key of that certificate")


def _make_context(certificate: Path, key: Path) -> ssl.SSLContext:
    if b"-----BEGIN CERTIFICATE-----" not in _read("--tls-cert", certificate):
        raise ConfigError(f"--tls-cert: {certificate} has no certificate in PEM format")
    private = _read("--tls-key", key)
    if b"PRIVATE KEY-----" not in private:
        raise ConfigError(f"--tls-key: {key} has no private key in PEM format")
    if b"ENCRYPTED" in private:
        raise ConfigError(f"--tls-key: {key} is encrypted; give the key without a password")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"--tls-key: {key} is not the key of the certificate in {certificate}") from error
        reason = (error.reason or str(error)).replace("_", " ").lower()
        raise ConfigError(f"--tls-cert: {certificate} and {key} cannot be used: {reason}") from error
    return context


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be read: {error.strerror or error}") from error
