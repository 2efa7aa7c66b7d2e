"""``manylora ray``."""

from bases import interrupts
from bases.command_line import Given, single_command
from server.ray.settings import RaySettings, make_ray_settings


def run_ray(given: Given) -> int:
    """Serve until SIGINT or SIGTERM. Raises ConfigError."""
    settings = make_ray_settings(given)
    from server.ray.serve import serve

    with interrupts.sigint_raises():
        serve(settings)
    return 0


ray = single_command(RaySettings, run_ray)
