"""Owns how data, as they come to a rank, become what it is fed with; and that the ranks have the same.

Data that are read by rows become a Loader, data in batches a StreamLoader.
"""

import functools
from typing import Any

import numpy as np
import tensorflow as tf

from dtrain.collective import Collective
from dtrain.data.given import Given, batch_plan, kind_of_batches
from dtrain.data.loader import Loader
from dtrain.data.sampler import Sampler
from dtrain.data.source import DataSource, leaves, map_tree
from dtrain.data.stream import Batches, Gather, StreamLoader, checksum_of, raise_together
from dtrain.errors import ConfigError, DataError
from dtrain.keras_internals import KerasInput
from dtrain.types import Array, Batching, BatchPlan, Purpose, Tree

OpenFeed = Loader | StreamLoader


def open_feed(
    data: Given, plan: BatchPlan | Batching, collective: Collective, purpose: Purpose = "train", first_epoch: int = 0
) -> OpenFeed:
    """Open data. Collective where each rank makes its own.

    Args:
        data: the same on all ranks.
        plan: a Batching where it takes the data to make a plan; of data in batches only steps, shuffle and seed.
        collective: this rank's group.
        purpose: what they are opened for.
        first_epoch: the fit's `initial_epoch`.

    Raises:
        ConfigError: `batch_size` is given and the data come in batches.
        DataError: it is no data, or not the same on all ranks.
        LostPeer: another rank failed to open its own.
    """
    if isinstance(data, DataSource):
        return _loader(data, plan, collective, first_epoch)
    if isinstance(data, Batches):
        return _stream_loader(data, data.name, "tf.data.Dataset", plan, collective, purpose, first_epoch)
    error: Exception | None = None
    try:
        made = data.make()
        if isinstance(made, DataSource):
            feed: OpenFeed = _loader(made, plan, collective, first_epoch)
        else:
            order = functools.partial(_order_of_batches, plan.seed) if purpose == "train" and plan.shuffle else None
            source = KerasInput(made, data.make, data.class_weight, order)
            kind = kind_of_batches(made) or "batches"
            feed = _stream_loader(source, data.name, kind, plan, collective, purpose, first_epoch)
    except Exception as raised:
        error = raised
    if collective.world_size > 1:
        gather = functools.partial(_gather, collective)
        raise_together(gather, error, f"opening {data.name}")
        _check_same(data.name, feed, gather)
    elif error is not None:
        raise error
    return feed


def to_tensors(data: Tree) -> Tree:
    """Arrays as tensors, sharing memory where they can."""
    return map_tree(tf.convert_to_tensor, data)


def _loader(source: DataSource, plan: BatchPlan | Batching, collective: Collective, first_epoch: int) -> Loader:
    rows = batch_plan(source, plan) if isinstance(plan, Batching) else plan
    return Loader(source, rows, collective.rank, collective.world_size, to_tensors, first_epoch=first_epoch)


def _stream_loader(
    source: Batches | KerasInput,
    name: str,
    kind: str,
    plan: BatchPlan | Batching,
    collective: Collective,
    purpose: Purpose,
    first_epoch: int,
) -> StreamLoader:
    if isinstance(plan, BatchPlan) or plan.batch_size is not None:
        raise ConfigError(
            f"batch_size={plan.batch_size!r} must not be given where {name} brings batches of its own: what it brings"
            " is the mini-batch of the whole job"
        )
    return StreamLoader(
        source,
        collective.rank,
        collective.world_size,
        functools.partial(_gather, collective),
        purpose=purpose,
        steps=plan.steps,
        convert=to_tensors,
        first_epoch=first_epoch,
        name=name,
        kind=kind,
    )


def _gather(collective: Collective, value: Any) -> list[Any]:
    return collective.all_gather_json(value, "input")


def _check_same(name: str, feed: OpenFeed, gather: Gather) -> None:
    """Refuse what each rank made for itself if it is not the same; batches are compared as they come."""
    own: list[Any]
    if isinstance(feed, Loader):
        rows = len(feed.source)
        sample = feed.source.read(np.unique(np.array([0, rows // 2, rows - 1], np.int64)))
        own = [f"{rows} rows", checksum_of(sample, len(next(leaves(sample))[1]))]
    else:
        own = [f"{feed.num_batches or 'an unknown number of'} batches", 0]
    every = gather(own)
    for rank, (size, checksum) in enumerate(every):
        if size != every[0][0]:
            raise DataError(
                f"{name} differs between workers: it has {size} on rank {rank}, {every[0][0]} on rank 0; every worker"
                " must get the whole data, the same everywhere"
            )
        if checksum != every[0][1]:
            raise DataError(
                f"{name} differs between workers: its rows on rank {rank} are other than rank 0's; every worker must"
                " get the same data in the same order: seed what is random in the function"
            )


def _order_of_batches(seed: tuple[int, ...], number: int, count: int) -> Array:
    """The order in which pass `number` takes `count` batches: as a Sampler takes rows."""
    return Sampler(BatchPlan(count, count, shuffle=True, seed=seed)).batch(number, 0)
