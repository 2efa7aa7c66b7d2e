"""Options from the environment, among variables that Kubernetes sets and others that are misspelt."""

import os
import re
from typing import Any

from pydantic_settings import BaseSettings, EnvSettingsSource

from bases.errors import ConfigError

_SERVICE_LINK = re.compile(
    r"MANYLORA_([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?)"
)
"""Variables that Kubernetes sets in every pod for a service named manylora or manylora-NAME."""
_LINK_PORT = re.compile(r"MANYLORA_([A-Z0-9_]+_)?PORT")
_LINK_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
"""MANYLORA_PORT is an option, too: only a value such as tcp://10.0.0.1:80 is from Kubernetes."""
_OLD_DATA_DIR = "MANYLORA_DATA"
"""The earlier name of MANYLORA_DATA_DIR, still read where that one is not set."""


class Environment(EnvSettingsSource):
    """The environment, without the variables that Kubernetes sets for services."""

    def __call__(self) -> dict[str, Any]:
        """Return the values by field."""
        values = super().__call__()
        if (old := self.env_vars.get(_OLD_DATA_DIR.lower())) is not None:
            values.setdefault("data_dir", old)
        if _is_service_link("MANYLORA_PORT", str(values.get("port"))):
            del values["port"]
        return values


def check_names(options: type[BaseSettings]) -> None:
    """Raise ConfigError, one line per variable, for those that are named like an option and are none."""
    prefix = options.model_config["env_prefix"]
    clients = {f"{prefix}URL", f"{prefix}API_KEY"}  # read by `manylora adapters` and `manylora train`
    keys = {f"{prefix}API_KEYS"}  # read by startup.py: as an option it would be seen in the list of processes
    known = {f"{prefix}{field}".upper() for field in options.model_fields} | clients | keys | {_OLD_DATA_DIR}
    present = {name for name in os.environ if name.upper().startswith(prefix)}
    unknown = sorted(name for name in present.difference(service_links()) if name.upper() not in known)
    if unknown:
        raise ConfigError("\n".join(f"{name}: there is no such option" for name in unknown))


def service_links() -> list[str]:
    """Names of the variables that Kubernetes has set for the address of a service."""
    return sorted(name for name, value in os.environ.items() if _is_service_link(name, value))


def _is_service_link(name: str, value: str) -> bool:
    return bool(_SERVICE_LINK.fullmatch(name) or (_LINK_PORT.fullmatch(name) and _LINK_ADDRESS.match(value)))
