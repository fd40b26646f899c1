"""The adapters that a server has at its start: those of --lora-paths, and those that its --state-dir remembers.

What clients have done since the first start counts more than --lora-paths: a name that one of them has loaded,
replaced or unloaded is not loaded from there. What is remembered and cannot be loaded now is logged, not served, and
stays remembered.
"""

import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import TypeVar

from multilora.engine.messages import AdapterInfo
from multilora.errors import MultiloraError
from multilora.front.access import SEPARATOR, acting_for, owner_of
from multilora.front.adapter_manager import MAX_LOADS, AdapterManager
from multilora.front.effects import EngineLoad, EngineUnload, Gather, Lane, RunBlocking, Steps
from multilora.front.records import AdapterRecord, Records
from multilora.front.registry import AdapterRegistry
from multilora.lora_path import LoraPath

logger = logging.getLogger(__name__)

T = TypeVar("T")


def load_at_start(
    manager: AdapterManager, registry: AdapterRegistry, records: Records, lora_paths: Sequence[LoraPath]
) -> Steps[None]:
    """Load both. Raises the first error of --lora-paths, and StorageFailed."""
    saved = yield from RunBlocking(Lane.STATE, records.read)
    known = {record.name for record in saved.adapters}
    if saved.adapters and not registry.enabled:
        logger.warning("%d adapters of --state-dir are not served: LoRA is not enabled", len(known))
        return
    records.startup |= {entry.lora_name: entry.lora_path for entry in lora_paths}
    registry.skip_versions(saved.next_version)
    if saved.weight_version is not None:
        registry.label_weights(saved.weight_version)
    yield from RunBlocking(Lane.STATE, lambda: manager.spool.sweep([record.local for record in saved.adapters]))
    wanted = []
    for entry in lora_paths:
        if entry.lora_name in known or saved.unloaded.get(entry.lora_name) == entry.lora_path:
            logger.info("adapter %r of --lora-paths: clients have changed it since", entry.lora_name)
        else:
            wanted.append(entry)
    yield from manager.load_many(wanted, all_or_none=True, recorded=False)
    adapters = [record for record in saved.adapters if not record.parts]
    yield from Gather([_restore(manager, registry, records, record) for record in adapters], MAX_LOADS)
    for record in saved.adapters:
        if record.parts:
            _compose(registry, record)
    if saved.adapters:
        served = sum(name in known for name in registry.loaded())
        logger.info("%d of the %d adapters of --state-dir are served again", served, len(known))


def _restore(
    manager: AdapterManager, registry: AdapterRegistry, records: Records, record: AdapterRecord
) -> Steps[None]:
    """Load an adapter as the version that it was. If its files have changed since, it is another one."""
    try:
        version = registry.begin_load(
            record.name, record.path, record.pinned, weight_version=record.weight_version, version=record.version
        )
        try:
            info = yield from as_its_tenant(registry, record, fetch_again(manager, record))
            if record.has_old_mark:
                logger.warning("adapter %r: an old mark does not tell whether its files changed", record.name)
                mark = partial(records.mark, record.name, record.version, info.fingerprint)
                yield from RunBlocking(Lane.STATE, mark)
        except BaseException:
            registry.fail_load(version)
            raise
        if not record.is_of_other_files(info.fingerprint):
            registry.commit_load(version, info)
            return
        logger.warning("adapter %r has changed since it was loaded; it gets another version", record.name)
        registry.fail_load(version)
        manager.forget_tokens(version)
        yield from EngineUnload(version)
        options = {"pinned": record.pinned, "weight_version": record.weight_version}
        name = record.name.removeprefix(f"{owner_of(record.name)}{SEPARATOR}")
        load = manager.load(name, record.path, any_url=True, **options)  # type: ignore[arg-type]
        yield from as_its_tenant(registry, record, load)
    except MultiloraError as e:
        logger.error("adapter %r of --state-dir is not served: %s", record.name, e)


def as_its_tenant(registry: AdapterRegistry, record: AdapterRecord, steps: Steps[T]) -> Steps[T]:
    """Do `steps` as the tenant would, whose adapter it is: it may read no other files now than then. At each step,
    as others are done in between."""
    owner = owner_of(record.name)
    if not owner:
        return (yield from steps)
    value, error = None, None
    while True:
        with acting_for(registry.tenants[owner]):
            try:
                effect = steps.throw(error) if error is not None else steps.send(value)
            except StopIteration as stop:
                found: T = stop.value
                return found
        try:
            value, error = (yield effect), None
        except BaseException as e:  # noqa: BLE001 - thrown into the work
            value, error = None, e


def fetch_again(manager: AdapterManager, record: AdapterRecord) -> Steps[AdapterInfo]:
    """Into the engine, and its tokens to the front, as the version that the record says."""
    local = record.local
    if not os.path.isdir(local):
        local = yield from manager.localize(record.path, record.version)
    manager.spool.adopt(record.version, owner_of(record.name))
    info = yield from EngineLoad(record.version, local, record.pinned)
    yield from manager.add_tokens(info, local)
    return info


def _compose(registry: AdapterRegistry, record: AdapterRecord) -> None:
    try:
        version = registry.begin_compose(
            record.name, record.parts, weight_version=record.weight_version, version=record.version
        )
        registry.commit_load(version, None)
    except MultiloraError as e:
        logger.error("composition %r of --state-dir is not served: %s", record.name, e)
