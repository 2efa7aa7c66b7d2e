"""Cards: what is shown of an adapter besides what it does, from the files that its trainer left beside its weights."""

from adapters.errors import AdapterError, RegistryUnavailable, StoreFull
from adapters.format.training_record import read_card, read_log, read_manifest, read_samples
from adapters.registry.snapshot import Version
from adapters.store.store import AdapterStore
from server.api.http.pagination import JsonObject


def card(store: AdapterStore, version: Version, *, samples: bool) -> JsonObject | None:
    """Return the card of a version, each part of it null if there is none; None if its content is gone. Reads files.

    ``samples``: whether the caller may read held-out rows. Raises RegistryUnavailable and StoreFull.
    """
    try:
        with store.shown(version.content, version.adapter) as (content, record):
            log = read_log(record)
            return {
                "markdown": read_card(record),
                "manifest": read_manifest(content),
                "curves": None if log is None or log.first_time is None else log.curves(),
                "samples": read_samples(record) if samples else None,
            }
    except (RegistryUnavailable, StoreFull):
        raise
    except AdapterError:
        return None
