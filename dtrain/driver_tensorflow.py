"""Owns TensorFlow's first import in the user's own process: quiet, and off the GPUs, which are the workers'.

Must stay importable without TensorFlow: it is what imports it.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

_NATIVE_LOG_LINE = re.compile(
    rb"^(WARNING: All log messages before absl::InitializeLog|[IWE]\d{4} \d\d:\d\d:\d\d).*\n?", re.M
)


def import_tensorflow() -> None:
    """Import TensorFlow without its start-up lines on the terminal, and hide the GPUs from this process."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # or it calls a machine without a GPU an error
    with contextlib.nullcontext() if "tensorflow" in sys.modules else _without_native_log_lines():
        import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # the user's own code has initialised them already
        tf.config.set_visible_devices([], "GPU")


@contextlib.contextmanager
def _without_native_log_lines() -> Iterator[None]:
    """Keep log lines off stderr that TensorFlow writes past Python, and before it reads its settings.

    Whatever else comes to stderr meanwhile, from any thread, is written when this ends.
    """
    with tempfile.TemporaryFile() as held, contextlib.ExitStack() as stack:
        try:
            stderr = os.dup(2)
        except OSError:  # there is none
            yield
            return
        stack.callback(os.close, stderr)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            held.seek(0)
            os.write(2, _NATIVE_LOG_LINE.sub(b"", held.read()))
