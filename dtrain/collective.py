"""Owns how ranks exchange tensors: the Collective protocol, Horovod's version and one for a single process.

The only user of horovod at run time. Every call is collective: all ranks must make it, in the same order, with the
same name, shapes and dtypes. Nothing here is ever pickled or unpickled.

Horovod's operations are not stateful: an all-reduce whose inputs are constants may be folded away while a graph is
optimised, and the ranks then wait for each other for ever. Never all-reduce a constant inside a tf.function.
"""

import contextlib
import ctypes
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import tensorflow as tf

from dtrain.errors import LostPeer
from dtrain.types import Array, Compression, Membership
from dtrain.wire import SHORTENED, sum_in_16_bits


class Collective(Protocol):
    """What a rank needs of its group. `name` tells operations apart; two in flight must not share one."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def is_alone(self) -> bool:
        """Whether this rank is the only one, and stays so."""

    @property
    def is_waiting(self) -> bool:
        """Whether this rank waits for others right now, outside of a tf.function; for another thread to look at."""

    @property
    def waited(self) -> float:
        """Seconds so far in which this rank has waited for others outside of tf.functions, and exchanged with them."""

    @property
    def waited_in_all(self) -> float | None:
        """Seconds so far in which this rank had something to exchange that others had not yet, wherever that was.

        None: nobody counts them.
        """

    def all_reduce(
        self, tensors: Sequence[tf.Tensor], name: str, compression: Compression | None = None
    ) -> list[tf.Tensor]:
        """Sum each tensor over ranks. Works eagerly and inside a tf.function; differentiable without `compression`.

        Args:
            compression: floats travel as such of 16 bits.
        """

    def all_gather_slices(self, slices: tf.IndexedSlices, name: str) -> tf.IndexedSlices:
        """Concatenate the rows of a sparse gradient over ranks, in rank order, unmerged."""

    def all_gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Concatenate the rows of all ranks, in rank order; they may have different numbers of them.

        Differentiable: what comes back to a rank's rows is the sum over the ranks.
        """

    def broadcast(self, arrays: Sequence[Array], name: str, root: int = 0) -> list[Array]:
        """Return `root`'s arrays, bit for bit, on all ranks. The others' give shapes and dtypes. Eager only."""

    def broadcast_json(self, value: Any, name: str, root: int = 0) -> Any:
        """Return `root`'s value (anything JSON can say) on all ranks. Eager only."""

    def all_gather_json(self, value: Any, name: str) -> list[Any]:
        """Return every rank's value, in rank order, on all ranks. Eager only."""

    def close(self) -> None:
        """Leave the group. Must not fail when other ranks are gone."""


class LocalCollective:
    """The group of one process: every operation returns what it was given."""

    rank = 0
    waited = waited_in_all = 0.0
    is_alone = True
    world_size = 1
    is_waiting = False

    def all_reduce(
        self, tensors: Sequence[tf.Tensor], name: str, compression: Compression | None = None
    ) -> list[tf.Tensor]:
        return list(tensors)

    def all_gather_slices(self, slices: tf.IndexedSlices, name: str) -> tf.IndexedSlices:
        return slices

    def all_gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        return tensor

    def broadcast(self, arrays: Sequence[Array], name: str, root: int = 0) -> list[Array]:
        return list(arrays)

    def broadcast_json(self, value: Any, name: str, root: int = 0) -> Any:
        return value

    def all_gather_json(self, value: Any, name: str) -> list[Any]:
        return [value]

    def close(self) -> None:
        pass


class HorovodCollective:
    """A place in a group of processes that Horovod joins over Gloo; the group may be formed anew around it.

    Until it has joined one, what the ranks would agree on is what this one says: so a newcomer gets ready alone, to
    be what the others are. One that is left alone is a group of one.

    Args:
        membership: this process's place.
    """

    def __init__(self, membership: Membership) -> None:
        import horovod.tensorflow as hvd

        self._hvd = hvd
        self._clock = _clock_of_waiting()
        self.is_alone = False
        self._is_member = False
        self.is_waiting = False
        self.waited = 0.0
        self._take(membership)

    def join(self, membership: Membership, rendezvous: str, interface: str, timeout: float = 60.0) -> None:
        """Leave the group that there was, and form one with all that meet at `rendezvous`. Traced graphs stay good.

        Args:
            membership: this process's place in it.
            rendezvous: where it meets, as `dtrain.rendezvous.RendezvousServer` gives it.
            interface: the network interface that the group talks over; "lo" when all ranks are on one machine.
            timeout: seconds after which a silent peer counts as gone.

        A failure inside Horovod's start aborts the process (SIGABRT); it cannot be caught here.
        """
        self.close()
        os.environ.update(horovod_environment(membership, rendezvous, interface, timeout))
        self._hvd.init()
        self._is_member = True
        self._take(membership)

    def leave(self, membership: Membership) -> None:
        """Leave the group that there was, to be in this place of another, which is yet to be formed."""
        self.close()
        self._take(membership)

    def _take(self, membership: Membership) -> None:
        self.rank = membership.rank
        self.world_size = membership.world_size

    def all_reduce(
        self, tensors: Sequence[tf.Tensor], name: str, compression: Compression | None = None
    ) -> list[tf.Tensor]:
        if self.world_size == 1:
            return list(tensors)
        by_dtype: dict[tf.DType, list[int]] = defaultdict(list)
        for index, tensor in enumerate(tensors):
            by_dtype[tensor.dtype].append(index)
        reduced: list[Any] = [None] * len(tensors)
        for dtype, indices in by_dtype.items():
            group = [tensors[index] for index in indices]
            shortened = compression if dtype in SHORTENED else None
            with self._exchange():
                sums = self._sum(group, f"{name}.{dtype.name}", shortened)
            for index, tensor in zip(indices, sums, strict=True):
                tensor.set_shape(tensors[index].shape)
                reduced[index] = tensor
        return reduced

    def _sum(self, group: Sequence[tf.Tensor], name: str, compression: Compression | None) -> list[tf.Tensor]:
        """The same of tensors of one dtype. A grouped all-reduce is one node: all of it arrives, or none."""
        if compression is None:
            sums: list[tf.Tensor] = self._hvd.grouped_allreduce(
                group, op=self._hvd.Sum, name=name, ignore_name_scope=True
            )
            return sums
        all_to_all = partial(self._hvd.alltoall, name=f"{name}.parts", ignore_name_scope=True)
        all_gather = partial(self._hvd.allgather, name=f"{name}.sums", ignore_name_scope=True)
        return sum_in_16_bits(group, compression, self.world_size, all_to_all, all_gather)

    def all_gather_slices(self, slices: tf.IndexedSlices, name: str) -> tf.IndexedSlices:
        if self.world_size == 1:
            return slices
        values = self._hvd.allgather(slices.values, name=f"{name}.values", ignore_name_scope=True)
        indices = self._hvd.allgather(slices.indices, name=f"{name}.indices", ignore_name_scope=True)
        return tf.IndexedSlices(values, indices, dense_shape=slices.dense_shape)

    def all_gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        if self.world_size == 1:
            return tensor
        rows = tf.shape(tensor)[0]
        counts = self._hvd.allgather(rows[None], name=f"{name}.rows", ignore_name_scope=True)
        start = tf.reduce_sum(counts[: self.rank])

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def gather(own: tf.Tensor) -> Any:
            def gradient(every: tf.Tensor) -> tf.Tensor:
                (summed,) = self.all_reduce([every], f"{name}.gradient")  # Horovod's own gradient is a mean
                return summed[start : start + rows]

            gathered = self._hvd.allgather(own, name=name, ignore_name_scope=True)
            gathered.set_shape([None, *own.shape[1:]])
            return gathered, gradient

        return gather(tensor)

    def broadcast(self, arrays: Sequence[Array], name: str, root: int = 0) -> list[Array]:
        if not arrays or not self._is_member:
            return list(arrays)
        own = np.concatenate([_as_bytes(array) for array in arrays])
        received = self._broadcast_bytes(own, name, root)
        ends = np.cumsum([array.nbytes for array in arrays])
        parts = np.split(received, ends[:-1])
        return [part.view(array.dtype).reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def broadcast_json(self, value: Any, name: str, root: int = 0) -> Any:
        if not self._is_member:
            return value
        own = np.frombuffer(json.dumps(value).encode(), np.uint8)
        length = self._broadcast_bytes(np.array([own.size], np.int64).view(np.uint8), f"{name}.length", root)
        size = int(length.view(np.int64)[0])
        received = self._broadcast_bytes(own if self.rank == root else np.zeros(size, np.uint8), name, root)
        return json.loads(received.tobytes())

    def all_gather_json(self, value: Any, name: str) -> list[Any]:
        if not self._is_member:
            return [value] * self.world_size
        own = np.frombuffer(json.dumps(value).encode() + b"\n", np.uint8)  # JSON itself has no line breaks
        with self._exchange():
            every: bytes = self._hvd.allgather(tf.constant(own), name=name).numpy().tobytes()
        return [json.loads(line) for line in every.splitlines()]

    @property
    def waited_in_all(self) -> float | None:
        return self._clock() if self._clock is not None else None

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Goes round what waits for the other ranks, eagerly."""
        self.is_waiting, began = True, time.perf_counter()
        try:
            yield
        finally:
            self.is_waiting = False
            self.waited += time.perf_counter() - began

    def close(self) -> None:
        if self._is_member:
            self._hvd.shutdown()
        self._is_member = False

    def _broadcast_bytes(self, data: Array, name: str, root: int) -> Array:
        with self._exchange():
            received: Array = self._hvd.broadcast(tf.constant(data), root, name=name).numpy()
        return received


def horovod_environment(membership: Membership, rendezvous: str, interface: str, timeout: float) -> dict[str, str]:
    """The environment variables that Horovod's start reads."""
    place = membership
    return {
        "HOROVOD_RANK": str(place.rank),
        "HOROVOD_SIZE": str(place.world_size),
        "HOROVOD_LOCAL_RANK": str(place.local_rank),
        "HOROVOD_LOCAL_SIZE": str(place.local_size),
        "HOROVOD_CROSS_RANK": str(place.cross_rank),
        "HOROVOD_CROSS_SIZE": str(place.cross_size),
        "HOROVOD_HOSTNAME": f"node{place.cross_rank}",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": rendezvous,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": "1",  # the port rides in the address, in front of the secret
        "HOROVOD_GLOO_IFACE": interface,
        "HOROVOD_GLOO_TIMEOUT_SECONDS": str(max(1, round(timeout))),
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_DISABLE_GROUP_FUSION": "1",  # or how a sum is rounded would hang on what is there at that moment
        "HOROVOD_LOG_LEVEL": os.environ.get("HOROVOD_LOG_LEVEL", "fatal"),
    }


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that the group broke or another rank failed, rather than that this rank went wrong."""
    text = str(error)
    is_broken = isinstance(error, tf.errors.OpError) and ("Horovod" in text or "horovod" in text)
    return is_broken or isinstance(error, LostPeer)


def _clock_of_waiting() -> Callable[[], float] | None:
    """Of Horovod's that one of dtrain's edits adds (_horovod_cmake.py); None: it was built without."""
    clock = getattr(ctypes.CDLL(None), "horovod_seconds_waited", None)
    if clock is not None:
        clock.restype = ctypes.c_double
    return cast(Callable[[], float] | None, clock)


def _as_bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
