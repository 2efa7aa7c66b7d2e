"""Policy: which replica serves a request. Pure: it knows no Ray, no clock and no network.

A request goes to a replica that holds its adapters, on the device rather than in host memory. One that no replica holds
goes to its home, by rendezvous hashing: each pair of an adapter and a replica has a number, and the replica with the
largest is the home. If a replica goes, only its adapters get other homes, each the replica with its next number; if one
comes, it becomes the home of its share and nothing else moves. A replica with too many requests takes no further ones
while others have fewer: its adapters spill over to those next in the order, always the same ones for one adapter, so
that a popular adapter has few copies.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b

SPILL_FACTOR, SPILL_REQUESTS = 1.25, 8
"""Defaults of :class:`Policy`."""


@dataclass(frozen=True, slots=True)
class Place:
    """A replica, as the router sees it."""

    id: str
    load: int
    """Requests that it has and has not answered."""
    device: Collection[str] = frozenset()
    """Contents of adapters that are on its device."""
    host: Collection[str] = frozenset()
    """Contents in its host memory, from where a load takes milliseconds."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Ranks replicas for a request."""

    spill_factor: float = SPILL_FACTOR
    """A replica is overloaded with more than this many times the mean of all, ..."""
    spill_requests: int = SPILL_REQUESTS
    """... and more than this many requests: fewer run together in one batch, so that it pays to keep them together."""

    def rank(self, contents: Sequence[str], places: Sequence[Place], salt: str = "") -> list[Place]:
        """Return the places, the best first.

        ``contents``: what the request needs on the device; the first, if no place has any, decides its home. Without
        contents the place with the fewest requests is best. ``salt`` breaks ties among those: any text that differs
        between requests.
        """
        if not contents:
            return sorted(places, key=lambda place: (place.load, -weight(salt, place.id)))
        limit = self.limit(sum(place.load for place in places), len(places))

        def cost(place: Place) -> tuple[int, int, int, float]:
            overload = place.load if place.load >= limit else 0
            cold = sum(content not in place.device and content not in place.host for content in contents)
            off_device = sum(content not in place.device for content in contents)
            return overload, cold, off_device, -weight(contents[0], place.id)

        return sorted(places, key=cost)

    def limit(self, total: int, places: int) -> float:
        """Return how many requests a place may have, of ``total`` at all ``places``, before others take its next one.

        The next one counts as well. Some place always has fewer.
        """
        return max(self.spill_factor * (total + 1) / max(places, 1), self.spill_requests)


def weight(content: str, place: str) -> float:
    """Return the number of a pair, in [0, 1): the same one in every process. Half a surrogate is text, too."""
    digest = blake2b(f"{content}\0{place}".encode(errors="surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest) / (1 << 48)
