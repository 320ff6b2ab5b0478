"""Owns plain processes, several of which play one contender: objects that live there, called from here.

No Ray and no pickled code: an object is named by its class, which the child imports.
"""

import contextlib
import importlib
import multiprocessing
import os
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

DEADLINE = 300.0
"""Seconds that a call may take."""


class Group:
    """An object of `kind` in each of so many processes, made as `kind(rank, ranks, *arguments)`.

    Args:
        kind: a class at the top of a module.
        ranks: how many.
        arguments: of each.
        environment: variables that are set before anything is imported there; a function of the rank, or a mapping.
    """

    def __init__(self, kind: type, ranks: int, *arguments: Any, environment: Any = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, kind.__module__, kind.__name__, (rank, ranks, *arguments)), daemon=True
            )
            with _variables(environment(rank) if callable(environment) else environment or {}):
                process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)
        self._answers()

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all at once; what each returned."""
        return self.call_each(method, [arguments] * len(self._connections))

    def call_each(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """The same with arguments of each one's own."""
        for connection, own in zip(self._connections, arguments, strict=True):
            connection.send((method, own))
        return self._answers()

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(10)
            process.kill()

    def _answers(self) -> list[Any]:
        answers, errors = [], []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(DEADLINE if not errors else 10):
                errors.append(f"rank {rank} does not answer")
                continue
            good, answer = connection.recv()
            (answers if good else errors).append(answer)
        if errors:
            raise RuntimeError("\n".join(errors))
        return answers


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    always = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "KERAS_BACKEND": "tensorflow"}
    with patch.dict(os.environ, {**always, **values}):
        yield


def _serve(connection: Connection, module: str, kind: str, arguments: tuple[Any, ...]) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # TensorFlow's greetings; what goes wrong is sent back
    target: Any = None
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            try:
                if target is None:
                    target, answer = getattr(importlib.import_module(module), kind)(*arguments), None
                else:
                    method, own = connection.recv()
                    answer = getattr(target, method)(*own)
            except EOFError:
                return
            except Exception:
                connection.send((False, traceback.format_exc()))
            else:
                connection.send((True, answer))
