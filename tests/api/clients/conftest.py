"""What the official clients' tests ask, by the server of the demo model."""

import pytest


@pytest.fixture(params=["smollm2-135m-instruct", "red"])
def model(request: pytest.FixtureRequest) -> str:
    """The base, then an adapter."""
    name: str = request.param
    return name
