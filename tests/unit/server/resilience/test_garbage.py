"""What the collector does with the garbage of requests, in a process that has made much before it serves."""

import subprocess
import sys

SCRIPT = """
import gc
import sys
from collections import deque
from server.garbage import keep_start_from_collector

class Request:
    ended = 0

    def __init__(self):
        self.myself = self

    def __del__(self):
        Request.ended += 1

start = [[] for _ in range(1_000_000)]
gc.collect()
if sys.argv[1] == "kept":
    keep_start_from_collector()
most, running = 0, deque(maxlen=10_000)  # requests are old once they end
for number in range(200_000):
    running.append(Request())
    most = max(most, number + 1 - Request.ended)
print(most)
"""


def most_requests(start: str) -> int:
    """Return how many requests were in memory at most, of which 10,000 ran."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, start], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_garbage_of_requests_is_freed_although_the_start_has_made_much() -> None:
    assert most_requests("kept") < 150_000
    assert most_requests("looked at") > 190_000, "the collector does not wait any more: nothing need be kept from it"
