"""Clients that change what is served: adapters and their versions, aliases, API keys; and those that send nonsense."""

import random
from dataclasses import dataclass

import httpx2

from loadtests.soak.bad_requests import REFUSALS, bad_request
from loadtests.soak.caller import Caller
from loadtests.soak.world import ALIASES, CHURNED, FIXED, PROMPTS, World

CREATED = httpx2.codes.CREATED
GONE, CONFLICT = httpx2.codes.NOT_FOUND, httpx2.codes.CONFLICT
CHANGED = (200, GONE, CONFLICT)
MOST_VERSIONS = 8
"""Versions of a churned name from which a client deletes it. Otherwise its list would grow with the soak."""


@dataclass(frozen=True, slots=True)
class Changing:
    """The changes of one client."""

    caller: Caller
    world: World
    rng: random.Random

    def _name(self) -> str:
        return self.rng.choice(CHURNED)

    async def register(self) -> None:
        """Register a random content under a name that changes; often it has others already."""
        fields = {"activate": self.rng.choice(("true", "false")), "preload": self.rng.choice(("true", "false"))}
        upload = self.world.upload(self._name(), self.rng.randrange(self.world.contents), **fields)
        await self.caller.call("register", "POST", "/v1/adapters", (200, 201, CONFLICT), **upload)

    async def roll_back(self) -> None:
        """Make an earlier version active again, or a later one."""
        name = self._name()
        status, adapter = await self.caller.call("look up", "GET", f"/v1/adapters/{name}", (200, GONE))
        if status != httpx2.codes.OK or not adapter["versions"]:
            return
        body = {"version": self.rng.choice(adapter["versions"])}
        await self.caller.call("roll back", "POST", f"/v1/adapters/{name}/activate", CHANGED, json=body)

    async def delete(self) -> None:
        """Delete a version, or the whole name where it has many."""
        name = self._name()
        status, adapter = await self.caller.call("look up", "GET", f"/v1/adapters/{name}", (200, GONE))
        if status != httpx2.codes.OK:
            return
        versions = adapter["versions"]
        all_of_it = not versions or len(versions) > MOST_VERSIONS or self.rng.random() < 0.3
        reference = name if all_of_it else f"{name}@{self.rng.choice(versions)}"
        await self.caller.call("delete", "DELETE", f"/v1/adapters/{reference}", CHANGED)

    async def pin(self) -> None:
        """Pin a name to the device for a while."""
        name = self._name()
        pinned = await self.caller.call("pin", "POST", f"/v1/adapters/{name}/pin", CHANGED, json={"pinned": True})
        if pinned[0] == httpx2.codes.OK:
            await self.caller.call("pin", "POST", f"/v1/adapters/{name}/pin", CHANGED, json={"pinned": False})

    async def set_alias(self) -> None:
        """Set an alias, to one target or to two with weights."""
        fixed = f"{FIXED}{self.rng.randrange(self.world.contents)}"
        targets = [{"adapter": fixed, "weight": 3}, {"adapter": self._name(), "weight": 1}]
        body = {"targets": targets[: self.rng.randint(1, 2)]}
        path = f"/v1/aliases/{self.rng.choice(ALIASES)}"
        await self.caller.call("set alias", "PUT", path, (200, 201, GONE, CONFLICT), json=body)

    async def remove_alias(self) -> None:
        """Remove an alias."""
        path = f"/v1/aliases/{self.rng.choice(ALIASES)}"
        await self.caller.call("remove alias", "DELETE", path, (200, GONE))

    async def read(self) -> None:
        """Read lists and metrics, as dashboards do."""
        path = self.rng.choice(("/v1/adapters", "/v1/aliases", "/v1/models", "/metrics", "/version", "/readyz"))
        await self.caller.call("read", "GET", path)

    async def send_nonsense(self) -> None:
        """Send a bad request. Anything but a 4xx that says why is a violation."""
        method, path, content = bad_request(self.rng)
        await self.caller.call("bad request", method, path, REFUSALS, **content)

    async def key_comes_and_goes(self) -> None:
        """Make a key that sees one adapter, use it, rotate it, and revoke it."""
        number = self.rng.randrange(self.world.contents)
        wanted = {"name": f"soak-{self.rng.randrange(10**9)}", "scopes": ["infer"], "adapters": [f"{FIXED}{number}"]}
        status, key = await self.caller.call("make key", "POST", "/v1/keys", (CREATED,), json=wanted)
        if status != CREATED:
            return
        await self._use(key["secret"], number, 200)
        await self._use(key["secret"], (number + 1) % self.world.contents, GONE)
        path = f"/v1/keys/{key['id']}"
        status, turned = await self.caller.call("rotate key", "POST", f"{path}/rotate", json={})
        if status == httpx2.codes.OK:
            await self._use(turned["secret"], number, 200)
        await self.caller.call("revoke key", "DELETE", path)
        await self._use(key["secret"], number, httpx2.codes.UNAUTHORIZED)

    async def _use(self, secret: str, number: int, status: int) -> None:
        prompt = PROMPTS[0]
        body = self.world.question(prompt, f"{FIXED}{number}")
        headers = {"authorization": f"Bearer {secret}"}
        got, answer = await self.caller.call(
            "with key", "POST", "/v1/completions", (status,), json=body, headers=headers
        )
        if got == httpx2.codes.OK:
            text = answer["choices"][0]["text"]
            if (wrong := self.world.wrong(prompt, answer["adapter"], text)) is not None:
                self.caller.ledger.violate(f"with key: {wrong}")
