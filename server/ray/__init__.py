"""Several engines behind one address: replicas on Ray Serve, and requests that go where their adapter already is.

``manylora ray`` starts it, or ``serve run server.ray:app`` in a cluster whose machines have manylora installed. A
request passes Ray's proxy, the :mod:`gateway <server.ray.gateway>`, which reads the adapter's name, the
:mod:`router <server.ray.router>`, which asks the :mod:`policy <server.ray.policy>` for a replica, and then the same
application that ``manylora serve`` serves, in the replica. Only ``router``, ``application``, ``replica`` and ``serve``
import Ray.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application


def app(options: dict[str, Any]) -> "Application":
    """Build the application for ``serve run server.ray:app replicas=2 ...``: options of ``manylora ray``, by field."""
    from server.ray.application import build
    from server.ray.settings import make_ray_settings

    return build(make_ray_settings(options))
