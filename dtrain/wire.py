"""Owns how dense gradients travel between ranks: in buckets, and in 16 bits where the user wants that.

A bucket is on its way while the backward pass still computes the next one, unless gradients are accumulated: those are
summed when all are there. What is updated waits for all buckets.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import tensorflow as tf

from dtrain.types import Compression

BUCKET_BYTES = 8 * 2**20
"""A bucket is full when it has so many bytes. Smaller ones cost a round of messages each."""

_WIRE_TYPES = {"fp16": tf.float16, "bf16": tf.bfloat16}
SHORTENED = tf.float32, tf.float64
"""Numbers that may travel as others of 16 bits."""


def buckets(gradients: Sequence[tf.Tensor]) -> list[list[int]]:
    """The numbers of those that travel together, in the order in which they are complete.

    A large one travels alone: Horovod copies what travels together into one buffer, and out again.

    Args:
        gradients: in the order of a model's variables; so they are computed from the last to the first.
    """
    found: list[list[int]] = []
    open_one, filled = list[int](), 0
    for index in reversed(range(len(gradients))):
        size = gradients[index].dtype.size * (gradients[index].shape.num_elements() or 0)
        if size >= BUCKET_BYTES:
            found.append([index])
            continue
        open_one.append(index)
        filled += size
        if filled >= BUCKET_BYTES:
            found.append(open_one)
            open_one, filled = [], 0
    return [*found, open_one] if open_one else found


def in_order(buckets: Sequence[Sequence[tf.Tensor]]) -> None:
    """Have the gradients of each bucket computed before what only later ones need; works while tracing.

    With one thread across operations TensorFlow else goes down through all the layers before it computes the gradients
    of any weights, and those of the last layers last. Only what was made after all that has a state and is behind
    a bucket's gradients waits for them: TensorFlow orders what has a state as it was made, when a function is complete,
    and that must not close a circle.
    """
    graph = tf.compat.v1.get_default_graph()
    if tf.executing_eagerly() or any(gradient.graph is not graph for bucket in buckets for gradient in bucket):
        return
    made = {operation: number for number, operation in enumerate(graph.get_operations())}
    known: set[tf.Operation] = set()
    for earlier, later in pairwise(buckets):
        known |= _ancestors(earlier, known)
        newest = max((made[operation] for operation in known if operation._is_stateful), default=-1)
        next_ones = [operation for operation in _ancestors(later, known) if made[operation] > newest]
        with tf.control_dependencies(None), tf.control_dependencies(earlier):  # nothing else, whoever calls
            gate = tf.no_op()
        for operation in next_ones:
            if any(given.op in known for given in operation.inputs):
                operation._add_control_inputs([gate])


def _ancestors(tensors: Sequence[tf.Tensor], known: set[tf.Operation]) -> set[tf.Operation]:
    """The operations of this graph that tensors are computed by, without those that are known."""
    found: set[tf.Operation] = set()
    left = [tensor.op for tensor in tensors]
    while left:
        operation = left.pop()
        if operation not in known and operation not in found:
            found.add(operation)
            left += [*(given.op for given in operation.inputs), *operation.control_inputs]
    return found


def sum_in_16_bits(
    tensors: Sequence[tf.Tensor],
    compression: Compression,
    world_size: int,
    all_to_all: Callable[[tf.Tensor], tf.Tensor],
    all_gather: Callable[[tf.Tensor], tf.Tensor],
) -> list[tf.Tensor]:
    """Sums over ranks of floats that travel as such of 16 bits, but are added up as what they are.

    Each rank adds up one part of the numbers, and sends it to the others: so a number is rounded twice, whatever the
    number of ranks, and all ranks have the same bits.

    Args:
        tensors: all of one dtype.
        all_to_all: takes a vector, which is as long as those of the others, and returns the parts for this rank.
        all_gather: takes a vector and returns those of all ranks.
    """
    sizes = [tf.size(tensor) for tensor in tensors]
    flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)
    padded = tf.pad(flat, [[0, -tf.size(flat) % (2 * world_size)]])
    parts = _unpacked(all_to_all(_packed(padded, compression)), compression, flat.dtype)
    total = tf.reduce_sum(tf.reshape(parts, [world_size, -1]), 0)
    every = _unpacked(all_gather(_packed(total, compression)), compression, flat.dtype)
    sums = tf.split(every[: tf.size(flat)], sizes)
    return [tf.reshape(value, tf.shape(tensor)) for value, tensor in zip(sums, tensors, strict=True)]


def _packed(numbers: tf.Tensor, compression: Compression) -> tf.Tensor:
    """Two of them in each integer: not every library that carries them knows floats of 16 bits."""
    return tf.bitcast(tf.reshape(tf.cast(numbers, _WIRE_TYPES[compression]), [-1, 2]), tf.int32)


def _unpacked(integers: tf.Tensor, compression: Compression, dtype: tf.DType) -> tf.Tensor:
    return tf.cast(tf.reshape(tf.bitcast(integers, _WIRE_TYPES[compression]), [-1]), dtype)
