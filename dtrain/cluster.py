"""Owns the connection to Ray: a local one by default, a cluster by address; what it has, and its object store."""

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from unittest.mock import patch

import cloudpickle
import ray
import ray.cloudpickle

from dtrain.errors import ConfigError
from dtrain.interrupts import handlers_kept

log = logging.getLogger("dtrain")

NICENESS = "RAY_worker_niceness"
NAMESPACE = "dtrain"
METADATA_TRIES, METADATA_SECONDS = 5, 0.2
"""So often what a job is to show is written, and so long after it is looked at again."""


def check_address(address: str | None) -> str | None:
    """The address to connect to; None: a local Ray.

    Raises:
        ConfigError: it is a ray:// address.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address and address.startswith("ray://"):
        raise ConfigError(
            f"address={address!r}: through Ray Client the workers could not reach this process; run the script on the"
            " cluster (ray job submit --address http://HEAD:8265 -- python script.py), or give the address HEAD:6379"
            " on a machine of the cluster"
        )
    return None if address == "local" else address


ANSWER_SECONDS = 10.0
"""How long a cluster's head may take to accept a connection."""

_holders: weakref.WeakSet[Any] = weakref.WeakSet()
"""Who uses the connection that `connect` made; empty where it was made elsewhere."""


def connect(address: str | None, holder: object) -> None:
    """Connect to Ray unless this process is connected already.

    Workers' output stays in Ray's logs: what the user is to see travels with the progress.

    Args:
        address: of a cluster; None: a local Ray.
        holder: for whom; a connection made here lasts until all its holders have called `disconnect`.

    Raises:
        ConfigError: there is no cluster at `address`.
    """
    if ray.is_initialized():
        if _holders:
            _holders.add(holder)
        return
    if address is not None:
        check_answers(address)
    _holders.clear()
    # A local Ray tells each time that it protects itself with a token; that it does not is still told.
    logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(_is_no_token_notice)
    umask = os.umask(0o077)  # Ray writes the token file as any other
    try:
        with handlers_kept(), _workers_like_this_process() if address is None else contextlib.nullcontext():
            ray.init(
                address=address or "local",
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.WARNING,
                configure_logging=False,
            )
    except (ConnectionError, ValueError) as error:
        raise _no_cluster(address, error) from error
    finally:
        os.umask(umask)
    _holders.add(holder)
    # What Ray prints of a worker's death, whatever log_to_driver says; dtrain's own error tells more. No public switch.
    ray._private.worker._worker_logs_enabled = False


def check_answers(address: str) -> None:
    """Refuse an address, host:port, at which nobody listens: Ray tries for minutes. Other forms are Ray's to say.

    Raises:
        ConfigError: with what to do.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str | None, error: Exception) -> ConfigError:
    return ConfigError(
        f"address={address!r}: no Ray cluster answers there ({error}); start one with 'ray start --head', or leave"
        " address and RAY_ADDRESS unset for a local Ray"
    )


@contextlib.contextmanager
def _workers_like_this_process() -> Iterator[None]:
    """Keep Ray from starting every worker by `uv run` in a copy of the working directory, and from making it wait.

    On one machine the workers run in the script's own environment; on a cluster that copy may be what the user wants.
    Ray gives workers a niceness of 15: beside other programs small steps then take twice as long as without Ray.
    """
    settings = {NICENESS: os.environ.get(NICENESS, "0")}
    in_script = patch.object(ray._private.ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", False)
    with in_script, patch.dict(os.environ, settings):
        yield


def _is_no_token_notice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Token authentication is enabled")


def disconnect(holder: object) -> None:
    """Let go of the connection that `connect` made; with its last holder it ends, and a local Ray with it."""
    if holder in _holders:
        _holders.remove(holder)
        if not _holders:
            ray._private.worker._worker_logs_enabled = True
            ray.shutdown()


def address() -> str | None:
    """The address of the cluster that this process is connected to."""
    return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else None


def add_job_metadata(metadata: Mapping[str, str]) -> None:
    """Add to the metadata that Ray's dashboard and job list show of this job, if it was submitted through Ray.

    Ray has no public way to do so once a job runs; where its own one does not work, the job is shown without. Ray
    itself writes all of it now and then, as it was a moment before: so it is looked at again.
    """
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    job_id = submitted.get("metadata", {}).get("job_submission_id")
    if job_id is None:
        return
    from ray.dashboard.modules.job.common import JobInfoStorageClient

    async def add() -> None:
        storage = JobInfoStorageClient(ray._private.worker.global_worker.gcs_client)
        for _ in range(METADATA_TRIES):
            info = await storage.get_info(job_id)
            if info is None or metadata.items() <= (info.metadata or {}).items():
                return
            info.metadata = {**(info.metadata or {}), **metadata}
            await storage.put_info(job_id, info)
            await asyncio.sleep(METADATA_SECONDS)

    try:
        asyncio.run(add())
    except (RuntimeError, ConnectionError, TimeoutError, AttributeError) as error:
        log.warning("Ray's job list will not show the run: %s", error)


def check_resources(num_workers: int, per_worker: Mapping[str, float], strategy: str = "PACK", spares: int = 0) -> None:
    """Refuse what the cluster could never give, whoever else uses it.

    Raises:
        ConfigError: with a table of what is asked for and what there is.
    """
    wanted = num_workers + spares
    asked = {name: wanted * amount for name, amount in per_worker.items()}
    total = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    by_node = [min(_workers_that_fit(node, per_worker), wanted) for node in nodes]
    if strategy == "STRICT_PACK":
        fits = max(by_node, default=0)
    elif strategy == "STRICT_SPREAD":
        fits = sum(min(count, 1) for count in by_node)
    else:
        fits = sum(by_node)
    if fits >= wanted:
        return
    rows = [f"  {name:<12} asked {amount:g}, the cluster has {total.get(name, 0):g}" for name, amount in asked.items()]
    what = f"num_workers={num_workers} and spares={spares} do" if spares else f"num_workers={num_workers} does"
    raise ConfigError(
        f"{what} not fit: with {_pairs(per_worker)} each and placement_strategy={strategy!r},"
        f" this cluster of {len(nodes)} node(s) has room for {fits}\n"
        + "\n".join(rows)
        + f"\nuse num_workers={max(fits - spares, 1)}, smaller resources_per_worker"
        ' (such as {"CPU": 0.5}), or a larger cluster'
    )


def who_is_using() -> str:
    """One line on the actors that hold the cluster's resources, for a message while waiting."""
    from ray.util.state import list_actors

    with contextlib.suppress(Exception):
        alive = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
        names = Counter((actor.name or actor.class_name).split(":rank")[0] for actor in alive)
        return ", ".join(f"{name} ({count} actors)" for name, count in names.most_common(3)) or "others"
    return "others"


def put(value: Any) -> Any:
    """Put a value into the object store once, for all workers to read in place.

    Modules that travel by value do so here too: Ray's copy of cloudpickle has a list of its own of them.
    """
    for name in cloudpickle.list_registry_pickle_by_value():
        ray.cloudpickle.register_pickle_by_value(sys.modules[name])
    return ray.put(value)


def _workers_that_fit(node: Mapping[str, float], per_worker: Mapping[str, float]) -> int:
    counts = (int(node.get(name, 0.0) / amount + 1e-9) for name, amount in per_worker.items() if amount)
    return min(counts, default=sys.maxsize)  # any number of those that ask for nothing


def _pairs(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={amount:g}" for name, amount in resources.items())
