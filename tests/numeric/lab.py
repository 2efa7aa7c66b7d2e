"""What parity tests of one architecture share: adapters on disk, the oracle's answers, and a way to make engines."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from server.compute.backend import Backend
from tests.numeric.drive import Drive, settings
from tests.numeric.oracle import Oracle
from tests.tiny import save_variants, tiny_model


@dataclass(frozen=True)
class Lab:
    """Made once a session, because saving adapters and running the oracle takes most of these tests' time."""

    architecture: str
    folders: Mapping[str, Path]
    oracle: Oracle
    device: str

    def drive(self, root: Path, backend: Backend | None = None, **changes: object) -> Drive:
        """A fresh model and engine; ``changes`` are fields of Settings."""
        model = tiny_model(self.architecture).to(self.device)
        return Drive(model, self.folders, settings(root, device=self.device, **changes), backend=backend)


def make_lab(architecture: str, root: Path, device: str = "cpu") -> Lab:
    """Save the adapter variants of ``architecture`` under ``root`` and load them into an oracle on ``device``."""
    folders = save_variants(architecture, root)
    return Lab(architecture, folders, Oracle(tiny_model(architecture).to(device), folders), device)
