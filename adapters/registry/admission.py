"""Admission: whether stored content may be served on this base, found out by a dry load, once for each base."""

import time

from adapters.errors import AdapterRejected
from adapters.format.spec import AdapterId, AdapterSpec
from adapters.registry.contents import Admission, Contents
from adapters.registry.database import storable
from adapters.registry.hooks import RegistryHooks
from adapters.registry.registration import RegistrationOptions
from adapters.store.store import AdapterStore


class AdmissionControl:
    """Checks of stored content on one base. Each method may take as long as a dry load."""

    def __init__(self, contents: Contents, store: AdapterStore, hooks: RegistryHooks) -> None:
        self._contents = contents
        self._store = store
        self._hooks = hooks

    def admit(self, spec: AdapterSpec, options: RegistrationOptions) -> Admission:
        """Return the result of the dry load, which is skipped if this content has passed it on this base before.

        Raises AdapterRejected if the content cannot be served.
        """
        known = self._contents.admission(spec.id, self._hooks.base)
        if known and known.refused is None:
            if options.preload:
                self._hooks.dry_load(spec, True)
            return known
        receipt = {
            "checked": int(time.time()),
            "base_fingerprint": self._hooks.base,
            "trained_on": spec.base_fingerprint,
            "base_mismatch_allowed": options.allow_base_mismatch,
            "unknown_fields_allowed": [storable(name) for name in spec.unknown_fields],
            "probe": dict(self._hooks.dry_load(spec, options.preload)),
        }
        return Admission(self._hooks.base, receipt)

    def recheck(self, content: AdapterId) -> None:
        """Check content that another base has admitted, and record whether this base can serve it."""
        try:
            allowed = self._mismatch_allowed(content)
            spec = self._store.inspect(content, any_base=allowed)
            admission = self.admit(spec, RegistrationOptions(allow_base_mismatch=allowed))
        except AdapterRejected as error:
            receipt = {"checked": int(time.time()), "base_fingerprint": self._hooks.base}
            admission = Admission(self._hooks.base, receipt, refused=str(error))
        self._contents.admit(content, admission)

    def _mismatch_allowed(self, content: AdapterId) -> bool:
        """Return whether this very base, under another fingerprint, accepted it although it was trained on another."""
        known = [self._contents.admission(content, base) for base in self._hooks.equivalents]
        return any(each.receipt.get("base_mismatch_allowed", False) for each in known if each is not None)
