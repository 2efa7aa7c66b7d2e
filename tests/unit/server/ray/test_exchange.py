"""What the application of a call receives while its body is fed."""

import asyncio
from typing import Any

from starlette.types import Message

from server.ray.exchange import DISCONNECT, Call, Inbox


def part(body: bytes, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def in_time(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 5))


def test_a_feed_waits_for_the_application() -> None:
    async def feed_three() -> None:
        inbox = Inbox(Call({}, None))
        parts = [part(b"a"), part(b"b"), part(b"c", more=False)]

        async def feed_all() -> None:
            for message in parts:
                await inbox.feed(message)

        feeding = asyncio.ensure_future(feed_all())
        await asyncio.sleep(0.01)
        assert not feeding.done()
        assert [await inbox.receive() for _ in parts] == parts
        await feeding
        assert inbox.complete
        inbox.disconnect()
        assert await inbox.receive() == DISCONNECT

    in_time(feed_three())


def test_a_feed_ends_with_its_call() -> None:
    async def leave() -> None:
        inbox = Inbox(Call({}, None))
        await inbox.feed(part(b"a"))
        feeding = asyncio.ensure_future(inbox.feed(part(b"b")))
        await asyncio.sleep(0.01)
        assert not feeding.done(), "there is no room"
        inbox.disconnect()
        await feeding
        await inbox.feed(part(b"c"))
        assert await inbox.receive() == DISCONNECT

    in_time(leave())


def test_an_application_that_waits_for_a_body_hears_that_the_client_has_gone() -> None:
    async def leave() -> None:
        inbox = Inbox(Call({}, None))
        receiving = asyncio.ensure_future(inbox.receive())
        await asyncio.sleep(0.01)
        inbox.disconnect()
        assert await receiving == DISCONNECT

    in_time(leave())
