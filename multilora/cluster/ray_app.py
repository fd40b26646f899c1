"""The cluster as a Ray Serve application: a registry, replicas with an engine each, and ingresses before them.

What the three do is in modules that know nothing of Ray; here they become deployments, and Serve starts, watches,
scales and replaces them. Reached through `multilora.cluster.build_app`.
"""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorDiedError, RayActorError, RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

import multilora
from multilora.cluster.asgi_exchange import answers
from multilora.cluster.cluster_config import ClusterConfig
from multilora.cluster.cluster_table import ClusterTable, TableChange
from multilora.cluster.ingress import Ingress, ReplicaLostError
from multilora.cluster.ray_router import NEWS, AdapterRequestRouter, Heard, PromptRead
from multilora.cluster.replica_server import ReplicaServer
from multilora.cluster.route_request import RouteRequest
from multilora.cluster.shared_registry import SharedRegistry
from multilora.cluster.spool_sweep import sweep
from multilora.errors import ConfigError, MultiloraError, StorageFailed, from_wire
from multilora.front.records import AdapterRecord
from multilora.front.state_directory import StateDirectory
from multilora.server.key_ring import KeyRing

logger = logging.getLogger(__name__)

ABSENT = "multilora.absent"
MANY = 100_000
"""Requests that Serve lets a replica have: its engine has a queue of its own, with a limit of its own."""
QUIET = {"enable_access_log": False}
HEALTH_SECONDS = 5.0
"""Between two health checks, and for the answer to one."""
LOCK_SECONDS = 30.0
"""For a predecessor of the registry to let go of its state directory."""
PROBE_SECONDS = 2.0
"""For a sign of life of a replica that is waited for."""
SCALING = "multilora.cluster.autoscaling:ReplicaScaling"
SPOOL = "spool"
"""A directory in the state directory, with one for each replica."""
SWEEP_SECONDS = 300.0
"""Between two looks for what replicas have left there."""
STARTED = "started"
"""A file in the state directory: there was a registry before."""


class RegistryDeployment:
    """One process has the registry, whose records are in the state directory."""

    async def __init__(self, config: ClusterConfig):  # type: ignore[misc]
        state = _opened(Path(config.state_dir) / "registry")
        marker = Path(config.state_dir) / STARTED
        restarted = marker.exists()
        marker.touch()
        self._actors: dict[str, Any] = {}
        first = int(time.time() * 1000)
        self._registry = SharedRegistry(
            state, config.engine.lora_paths, self._is_dead, restarted=restarted, first=first
        )
        self._sweeping = asyncio.create_task(self._sweep(Path(config.state_dir) / SPOOL))

    async def perform(self, method: str, *arguments: Any, **options: Any) -> tuple[str, Any]:
        """A method of `SharedRegistry`: the kind of its error or "", and its message or the result."""
        try:
            return "", await getattr(self._registry, method)(*arguments, **options)
        except MultiloraError as e:
            return e.kind, e.message

    async def join(self, member: str, actor: Any) -> TableChange:
        """See `SharedRegistry.join`. actor: the member's handle, by which its death is seen."""
        self._actors[member] = actor
        return await self._registry.join(member)

    async def _sweep(self, spool: Path) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            replicas = await self._registry.members()
            try:
                gone = await asyncio.to_thread(sweep, spool, self._registry.used_folders(), replicas)
            except OSError as e:
                logger.warning("what replicas have left cannot be deleted: %s", e)
                continue
            if gone:
                logger.info("deleted %d folders that replicas have left", len(gone))

    async def _is_dead(self, member: str) -> bool:
        actor = self._actors.get(member)
        if actor is None:
            return False
        try:
            await asyncio.wait_for(actor.is_allocated.remote(), PROBE_SECONDS)
        except ActorDiedError:
            del self._actors[member]
            return True
        except (RayActorError, TimeoutError):
            return False
        return False


class RegistryHandle:
    """See `RegistryCalls`: the registry by its deployment's handle."""

    def __init__(self, handle: Any):
        self._handle = handle

    async def join(self, member: str) -> TableChange:
        actor = ray.get_runtime_context().current_actor
        change: TableChange = await self._answer(self._handle.join.remote(member, actor))
        return change

    async def leave(self, member: str) -> None:
        await self._perform("leave", member)

    async def members(self) -> Sequence[str]:
        """Names of the replicas that there are."""
        names: Sequence[str] = await self._perform("members")
        return names

    async def changes(self, member: str | None, seq: int) -> TableChange | None:
        change: TableChange | None = await self._perform("changes", member, seq)
        return change

    async def save(self, record: AdapterRecord, *, replace: bool) -> int:
        version: int = await self._perform("save", record, replace=replace)
        return version

    async def remove(self, name: str) -> None:
        await self._perform("remove", name)

    async def label_weights(self, weight_version: str) -> None:
        await self._perform("label_weights", weight_version)

    async def share(self, member: str, served: dict[str, float]) -> dict[str, float]:
        others: dict[str, float] = await self._perform("share", member, served)
        return others

    async def _perform(self, method: str, *arguments: Any, **options: Any) -> Any:
        kind, result = await self._answer(self._handle.perform.remote(method, *arguments, **options))
        if kind:
            raise from_wire(kind, result)
        return result

    async def _answer(self, response: Any) -> Any:
        try:
            return await response
        except (RayError, DeploymentUnavailableError) as e:
            raise StorageFailed(f"the cluster's registry does not answer: {type(e).__name__}") from e


class ReplicaDeployment:
    """One engine, and the application before it."""

    async def __init__(self, config: ClusterConfig, registry: Any):  # type: ignore[misc]
        self._name = serve.get_replica_context().replica_id.unique_id
        spool = Path(config.state_dir) / SPOOL / self._name
        self._server = await ReplicaServer.start(self._name, config.engine, RegistryHandle(registry), spool)
        self._number = 0

    async def answer(
        self, request: RouteRequest, only: str | None, scope: dict[str, Any], body: bytes
    ) -> AsyncGenerator[list[dict[str, Any]], None]:
        """See `SendTo`. The first two are for the router; which asks another one where the one meant is gone."""
        if only not in (None, self._name):
            yield [{"type": ABSENT}]
            return
        prompt, unread = request.prompt, True
        yield [self._state(1, prompt)]
        async for some in self._server.handle(scope, body, prompt):
            messages = [dict(message) for message in some]
            if unread and answers(some):
                unread = False
                messages.append(self._state())
            yield messages
        yield [self._state()]

    def _state(self, requests: int = 0, prompt: int = 0) -> dict[str, Any]:
        """What there is to do here. requests, prompt: what comes to it now."""
        server = self._server
        load, prompt = float(server.open_requests + requests), server.prompt_tokens + prompt
        return {"type": "multilora.replica", "name": self._name, "load": load, "prompt": prompt}

    def record_routing_stats(self) -> dict[str, Any]:
        """What routers are told of this replica."""
        self._number += 1
        found = self._server.report()
        report = found.report
        told = {"load": report.load, "device": dict(report.device), "host": dict(report.host)}
        return told | {
            "prompt": report.prompt,
            "room": report.adapter_bytes,
            "sizes": found.sizes,
            "number": self._number,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaler is told."""
        return {"pressure": self._server.pressure()}

    async def check_health(self) -> None:
        """Raises if this replica has to be replaced."""
        self._server.check()

    async def __del__(self) -> None:
        if hasattr(self, "_server"):
            await self._server.close()


class IngressDeployment:
    """ASGI, as Serve's proxies hand it on."""

    async def __init__(self, config: ClusterConfig, replicas: Any, registry: Any):  # type: ignore[misc]
        self._replicas = replicas.options(stream=True, method_name="answer")
        self._calls = RegistryHandle(registry)
        self._table = ClusterTable()
        self._ingress = Ingress(config, KeyRing(config.engine), self._table, self._send, self._calls.members)
        self._numbers = itertools.count(1)
        self._following = asyncio.create_task(self._follow())

    def __serve_build_asgi_app__(self) -> Ingress:
        """What Serve's proxies hand requests to."""
        return self._ingress

    async def _follow(self) -> None:
        while True:
            try:
                change = await self._calls.changes(None, self._table.seq)
            except MultiloraError as e:
                logger.warning("names may be old here: %s", e)
                await asyncio.sleep(1)
                continue
            if change is not None:
                self._table.apply(change)

    async def _send(
        self, request: RouteRequest, only: str | None, scope: dict[str, Any], body: bytes
    ) -> AsyncGenerator[list[Any], None]:
        # in a context of its own: calls of one request share its id, by which Serve's router tells them apart
        request = dataclasses.replace(request, number=next(self._numbers))
        response = contextvars.Context().run(self._replicas.remote, request, only, scope, body)
        done, unread = False, True
        try:
            async for some in response:
                last = some[-1]
                if last["type"] == ABSENT:
                    raise ReplicaLostError
                if last["type"] == "multilora.replica":
                    NEWS.append(Heard(last["name"], last["load"], last["prompt"]))
                if unread and answers(some):
                    unread = False
                    NEWS.append(PromptRead(request.number))
                yield some
            done = True
        except (RayActorError, BackPressureError, DeploymentUnavailableError) as e:
            done = True
            raise ReplicaLostError from e
        finally:
            if not done:
                with contextlib.suppress(concurrent.futures.CancelledError):
                    response.cancel()


def _opened(path: Path) -> StateDirectory:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return StateDirectory(path)
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def application(config: ClusterConfig) -> serve.Application:
    """The three deployments, bound to each other. How many replicas there are is not among what they are made of, so
    that another number restarts none of them."""
    common = dataclasses.replace(config, min_replicas=1, max_replicas=1, ingresses=1)
    registry = _deployment(RegistryDeployment, "registry", common, _registry_options()).bind(common)
    replicas = _deployment(ReplicaDeployment, "replica", common, _replica_options(config)).bind(common, registry)
    options = {"num_replicas": config.ingresses, "max_ongoing_requests": MANY, "ray_actor_options": {"num_cpus": 0}}
    ingress = _deployment(serve.ingress()(IngressDeployment), "ingress", common, options)
    return ingress.bind(common, replicas, registry)


def _deployment(made_of: type, name: str, common: ClusterConfig, options: dict[str, Any]) -> Any:
    """The version is that of what its processes are made of: while it stays, so do they. Serve's own would be another
    one with every call; it has no public word for that."""
    content = f"{multilora.__version__} {common!r}"
    version = blake2b(content.encode(), digest_size=8).hexdigest()
    fixed = {"name": name, "version": version, "logging_config": QUIET, "_internal": True}
    return serve.deployment(made_of).options(**fixed, **options)


def _registry_options() -> dict[str, Any]:
    return {
        "num_replicas": 1,
        "max_ongoing_requests": MANY,
        "ray_actor_options": {"num_cpus": 0},
        "health_check_period_s": HEALTH_SECONDS,
        "health_check_timeout_s": HEALTH_SECONDS,
    }


def _replica_options(config: ClusterConfig) -> dict[str, Any]:
    """One bundle, so that the GPUs of all ranks are of one host."""
    router = RequestRouterConfig(
        request_router_class=AdapterRequestRouter,
        request_router_kwargs={"factor": config.factor, "slack": config.slack, "copies": config.copies},
        request_routing_stats_period_s=config.report_seconds,
    )
    options: dict[str, Any] = {
        "max_ongoing_requests": MANY,
        "request_router_config": router,
        "health_check_period_s": HEALTH_SECONDS,
        "health_check_timeout_s": 2 * HEALTH_SECONDS,
        "graceful_shutdown_timeout_s": float(config.engine.drain_seconds),
        "graceful_shutdown_wait_loop_s": 0.5,
        "ray_actor_options": {"num_cpus": config.cpus, "num_gpus": config.gpus},
    }
    if config.gpus > 1:
        bundle = {"CPU": config.cpus, "GPU": float(config.gpus)}
        options |= {"placement_group_bundles": [bundle], "placement_group_strategy": "STRICT_PACK"}
    if not config.autoscales:
        return options | {"num_replicas": config.max_replicas}
    targets = {"target_requests": config.target_requests, "target_pressure": config.target_pressure}
    return options | {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.target_requests,
            policy=AutoscalingPolicy(policy_function=SCALING, policy_kwargs=targets),
        )
    }
