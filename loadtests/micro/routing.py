"""Simulates a cluster's routing: ``python -m loadtests.micro.routing [--trace FILE] [--json FILE] [--plot FILE]``.

Replicas with a device and a host cache each, both least recently used first out, serve requests of a trace in virtual
time: a request loads its adapter if it must, then takes its seconds beside the others of its replica. The router sees
residency as old as Ray's statistics are, and the loads as they are. The policy is the server's own; three plainer ones
are compared with it.

The trace is a file as ``manylora bench --trace`` takes it, with arrivals; without one, it is drawn: adapters by Zipf,
arrivals by a Poisson process, and a popularity that drifts.

Unlike the other load tests this one imports the server: it measures one part of it.
"""

import argparse
import heapq
import json
import random
import sys
from bisect import bisect
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from loadtests.workload.trace import read_trace
from server.ray.policy import SPILL_FACTOR, SPILL_REQUESTS, Place, Policy, weight

DEVICE, HOST = 16, 500
"""Adapters that fit on a device and in its host cache, by the defaults for adapters of 2 MB."""
HOST_SECONDS, DISK_SECONDS = 0.005, 0.25
"""Seconds of a load from host memory, and from a shared store."""
RUNNING = 32
"""Requests that a replica computes at once; the seconds of each grow with their number beyond it."""
STALE_SECONDS = 1.0
"""How old the residency is that the router knows."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: its arrival and its own computing, in seconds, and the number of its adapter."""

    at: float
    seconds: float
    adapter: int


@dataclass
class Replica:
    """A simulated replica."""

    id: str
    load: int = 0
    device: OrderedDict[str, None] = field(default_factory=OrderedDict)
    host: OrderedDict[str, None] = field(default_factory=OrderedDict)
    shown: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
    """What the router knows of device and host."""
    busy: float = 0.0
    """Seconds of computing that it was given."""

    @property
    def place(self) -> Place:
        return Place(self.id, self.load, *self.shown)

    def use(self, content: str) -> str:
        """Bring an adapter to the device; return where it was: ``device``, ``host`` or ``disk``."""
        where = "device" if content in self.device else "host" if content in self.host else "disk"
        for cache, room in ((self.device, DEVICE), (self.host, HOST)):
            cache[content] = None
            cache.move_to_end(content)
            if len(cache) > room:
                cache.popitem(last=False)
        return where


Route = Callable[[str, Sequence[Replica]], Replica]


def routes(policy: Policy, draw: random.Random) -> dict[str, Route]:
    """Return the ways of choosing a replica that are compared, by name."""

    def ours(content: str, replicas: Sequence[Replica]) -> Replica:
        best = policy.rank([content], [replica.place for replica in replicas])[0]
        return next(replica for replica in replicas if replica.id == best.id)

    return {
        "random": lambda content, replicas: draw.choice(replicas),
        "fewest requests": lambda content, replicas: min(draw.sample(replicas, 2), key=lambda each: each.load),
        "hash of the adapter": lambda content, replicas: max(replicas, key=lambda each: weight(content, each.id)),
        "manylora": ours,
    }


@dataclass
class Figures:
    """What became of a trace."""

    where: list[str] = field(default_factory=list)
    """Where each request found its adapter: ``device``, ``host`` or ``disk``."""
    delays: list[float] = field(default_factory=list)
    """Seconds that each took longer than at an idle replica that has its adapter."""
    unbalance: float = 0.0
    """Busiest replica's seconds of computing over the mean."""
    distinct: int = 0

    def to_json(self) -> dict[str, float]:
        """Return the figures: reads of the whole trace, the others of its second half, when caches are warm."""
        half = len(self.where) // 2
        found, delays = Counter(self.where[half:]), sorted(self.delays[half:])
        return {
            "on the device": found["device"] / len(delays),
            "on device or host": 1 - found["disk"] / len(delays),
            "reads per distinct adapter": self.where.count("disk") / self.distinct,
            "busiest / mean": self.unbalance,
            "delay, median (s)": delays[len(delays) // 2],
            "delay, p99 (s)": delays[len(delays) * 99 // 100],
        }


def simulate(requests: Sequence[Request], replicas: int, route: Route, kill_at: float | None = None) -> Figures:
    """Serve the requests; at ``kill_at`` seconds a replica dies and an empty one with another id takes its place."""
    cluster = [Replica(f"replica-{number}") for number in range(replicas)]
    figures, ends = Figures(distinct=len({request.adapter for request in requests})), list[tuple[float, int, Replica]]()
    refreshed = 0.0
    for number, request in enumerate(requests):
        while ends and ends[0][0] <= request.at:
            heapq.heappop(ends)[2].load -= 1
        if kill_at is not None and request.at >= kill_at:
            cluster[0], kill_at = Replica("replacement"), None
        if request.at - refreshed >= STALE_SECONDS:
            refreshed = request.at
            for replica in cluster:
                replica.shown = frozenset(replica.device), frozenset(replica.host)
        content = f"adapter-{request.adapter}"
        replica = route(content, cluster)
        where = replica.use(content)
        figures.where.append(where)
        load = {"device": 0.0, "host": HOST_SECONDS, "disk": DISK_SECONDS}[where]
        slower = max(1.0, (replica.load + 1) / RUNNING)
        replica.load += 1
        replica.busy += request.seconds
        figures.delays.append(load + request.seconds * (slower - 1))
        heapq.heappush(ends, (request.at + load + request.seconds * slower, number, replica))
    mean = sum(replica.busy for replica in cluster) / replicas
    figures.unbalance = max(replica.busy for replica in cluster) / mean
    return figures


def drawn(count: int, adapters: int, replicas: int, zipf: float, busy: float, seed: int) -> Iterator[Request]:
    """Draw requests that keep ``busy`` (0 to 1) of all places for running requests taken, on average.

    Each second one of the adapters changes its rank with another, so that popularity drifts.
    """
    draw = random.Random(seed)
    heights = list(accumulate((rank + 1) ** -zipf for rank in range(adapters)))
    order = draw.sample(range(adapters), adapters)
    mean_seconds = 4.0
    rate = busy * replicas * RUNNING / mean_seconds
    at, drifted = 0.0, 0.0
    for _ in range(count):
        at += draw.expovariate(rate)
        if at - drifted >= 1:
            drifted, one, other = at, draw.randrange(adapters), draw.randrange(adapters)
            order[one], order[other] = order[other], order[one]
        rank = bisect(heights, draw.random() * heights[-1])
        yield Request(at, draw.lognormvariate(0.0, 0.8) * mean_seconds / 1.377, order[min(rank, adapters - 1)])


def recorded(path: Path, tokens_per_second: float = 30.0) -> list[Request]:
    """Read a trace with arrivals, without its requests to the base; each takes the time of its output tokens."""
    return [
        Request(each.at, each.output_tokens / tokens_per_second, each.adapter)
        for each in read_trace(path).requests
        if each.at is not None and each.adapter is not None
    ]


def plot(figures: dict[str, dict[str, float]], path: Path) -> None:
    """Draw hit rates and balance of each way."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "manylora"  # the same picture for the same figures
    from matplotlib import pyplot

    names = list(figures)
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 2.8), sharey=True, layout="constrained")
    shown = {
        "on device or host": "requests that find their adapter in memory",
        "busiest / mean": "work of the busiest replica / mean",
        "delay, p99 (s)": "99th percentile of the delay (s, logarithmic)",
    }
    colors = ["#b0b7c3"] * (len(names) - 1) + ["#2f6fde"]
    for axis, (key, title) in zip(axes, shown.items(), strict=True):
        axis.bar_label(axis.barh(names, [figures[name][key] for name in names], color=colors), fmt="%.2f", padding=3)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.2)
    axes[0].invert_yaxis()
    axes[2].set_xscale("log")
    axes[2].set_xlim(left=0.01, right=100 * axes[2].get_xlim()[1])
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    """Simulate and print a table."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.micro.routing", description="Simulate routing.")
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the adapters' popularity")
    parser.add_argument("--busy", type=float, default=0.6, help="part of the replicas' places that is taken")
    parser.add_argument("--spill-factor", type=float, default=SPILL_FACTOR)
    parser.add_argument("--spill-requests", type=int, default=SPILL_REQUESTS)
    parser.add_argument("--kill", action="store_true", help="one replica dies half-way")
    parser.add_argument("--trace", type=Path, help="requests of this file instead of drawn ones")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--plot", type=Path, help="also draw them here")
    args = parser.parse_args()
    if args.trace:
        requests = recorded(args.trace)
    else:
        requests = list(drawn(args.requests, args.adapters, args.replicas, args.zipf, args.busy, seed=1))
    policy = Policy(args.spill_factor, args.spill_requests)
    figures: dict[str, dict[str, float]] = {}
    for name, route in routes(policy, random.Random(2)).items():
        kill_at = requests[len(requests) // 2].at if args.kill else None
        figures[name] = simulate(requests, args.replicas, route, kill_at).to_json()
        print(f"{name}:", ", ".join(f"{what} {value:.3f}" for what, value in figures[name].items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    if args.plot:
        plot(figures, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
