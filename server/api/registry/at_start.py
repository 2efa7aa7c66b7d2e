"""``--adapter``: register the adapters that the settings name, from folders or from addresses, at the start."""

from collections.abc import Callable
from pathlib import Path
from time import time

from adapters.errors import AdapterError, UnknownAdapter
from adapters.registry.names import check_name
from adapters.registry.registry import Registry
from adapters.sources.address import parse_address
from adapters.sources.folder_states import FolderState, FolderStates
from adapters.sources.sources import Sources
from adapters.sources.watched_folder import folder_signature
from adapters.store.store import AdapterStore
from bases.errors import ConfigError
from server.config import Settings
from server.errors import ServerError

STATES = "--adapter"
"""Root of their states. Those of watched folders begin with a slash."""


def check_adapters(settings: Settings) -> None:
    """Check names, folders and addresses, without a request to a hub or bucket. Raises ConfigError."""
    for name, place in settings.adapter.items():
        try:
            check_name(name)
            if isinstance(place, str):
                _source(place, limit=0)
        except (AdapterError, ValueError) as error:
            raise ConfigError(f"--adapter: {name}={place}: {error}") from error
        if isinstance(place, Path) and not place.is_dir():
            raise ConfigError(f"--adapter: {name}={place}: there is no such folder")


class NamedAdapters:
    """Registers the adapters that the settings name."""

    def __init__(self, registry: Registry, store: AdapterStore, states: FolderStates) -> None:
        """``states`` remembers what each name was last registered from."""
        self._registry = registry
        self._store = store
        self._states = states

    def register(self, settings: Settings, report: Callable[[str], None]) -> None:
        """Register all of them. ``report`` receives lines about the progress. Raises ConfigError."""
        known = self._states.load(STATES)
        for name, place in settings.adapter.items():
            try:
                signature = place if isinstance(place, str) else f"{place}:{folder_signature(str(place))}"
                if self._is_current(name, signature, known.get(f"{STATES}/{name}")):
                    report(f"adapter {name} was registered from {place} before")
                    continue
                report(f"registering adapter {name} from {place}")
                if isinstance(place, Path):
                    self._registry.register_folder(name, place)
                else:
                    self._fetch(name, place)
                self._states.save(f"{STATES}/{name}", FolderState(signature, None, int(time())))
            except (AdapterError, ServerError) as error:
                raise ConfigError(f"--adapter: {name}={place}: {error}") from error

    def _is_current(self, name: str, signature: str, state: FolderState | None) -> bool:
        """Whether the name exists and was registered from just this: then a restart undoes no roll-back."""
        if state is None or state.signature != signature:
            return False
        try:
            self._registry.entry(name)
        except UnknownAdapter:
            return False
        return True

    def _fetch(self, name: str, address: str) -> None:
        with self._store.stage() as staging:
            fetched = _source(address, self._store.limit).fetch(address, staging)
            self._registry.register(name, staging, fetched.source, selection=fetched.selection)


def _source(address: str, limit: int) -> Sources:
    """Return what may fetch this address and no other: who starts the server allows it by naming it.

    Raises SourceRefused, and ValueError if an extra is needed that is not installed.
    """
    return Sources([str(parse_address(address))], limit)
