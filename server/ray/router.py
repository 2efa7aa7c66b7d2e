"""AdapterRouter: the policy as Ray's request router. Ray makes one in each process that calls the engines."""

import logging
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.ray.exchange import Call, Feed
from server.ray.policy import Place, Policy

_log = logging.getLogger(__name__)


class AdapterRouter(RequestRouter):
    """Ranks replicas by what they report to hold (``record_routing_stats``) and by how many requests they have."""

    def initialize_state(self, **policy: Any) -> None:
        """Take the fields of :class:`Policy`, which are the ``request_router_kwargs`` of the deployment."""
        self._policy = Policy(**policy)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas in the order in which to try them, each for itself: a full one is passed over.

        Never raises: the task of Ray that asks would end, and this request and others would wait for ever.
        """
        try:
            return self._ranked(candidate_replicas, pending_request)
        except Exception:
            _log.exception("A request goes to any replica, because they could not be ranked")
            return [[replica] for replica in candidate_replicas]

    def _ranked(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None
    ) -> list[list[RunningReplica]]:
        argument = pending_request.args[0] if pending_request is not None and pending_request.args else None
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if isinstance(argument, Feed):
            replica = by_id.get(argument.replica)
            return [] if replica is None else [[replica]]
        contents = argument.contents if isinstance(argument, Call) else ()
        salt = "" if pending_request is None else pending_request.metadata.internal_request_id
        places = [self._place(id_, replica) for id_, replica in by_id.items()]
        return [[by_id[place.id]] for place in self._policy.rank(contents, places, salt)]

    def _place(self, id_: str, replica: RunningReplica) -> Place:
        """What is known of a replica: its load by what this router has sent and heard, else as it last reported it."""
        stats = replica.routing_stats or {}
        load = self.replica_queue_len_cache.get(replica.replica_id)
        if load is None:
            load = stats.get("requests", 0)
        return Place(id_, load, stats.get("device", frozenset()), stats.get("host", frozenset()))
