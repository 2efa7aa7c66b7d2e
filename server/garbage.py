"""What Python's garbage collector looks at: objects that refer to each other, which nothing else frees.

Requests leave some: an error refers to its traceback, this to its frames, and one of these to the error. Those that
outlive two collections of young objects are looked at again only when they number a quarter of all old ones. A start
makes 580,000 that stay, so the garbage of thousands of requests is kept before any is freed; and the collection that
frees it stops all threads for 0.3 s.
"""

import gc


def keep_start_from_collector() -> None:
    """Let the collector look no more at what exists now. Call it when the start is over.

    Then it frees the garbage of requests soon, and needs milliseconds for it.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # counts the old objects, of which there are none now
