"""Owns how a process is set up for TensorFlow and Keras, before any of the user's code runs in it."""

import logging
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from dtrain.errors import ConfigError
from dtrain.types import WorkerSettings


def set_up_tensorflow(settings: WorkerSettings) -> None:
    """Set threads, determinism, Keras's settings and seeds; must come before TensorFlow's first operation.

    Raises:
        ConfigError: Keras runs on another backend here.
    """
    if keras.backend.backend() != "tensorflow":
        raise ConfigError(
            f"KERAS_BACKEND={keras.backend.backend()!r}: dtrain trains with the TensorFlow backend; unset it,"
            " or set KERAS_BACKEND=tensorflow"
        )
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    tf.config.threading.set_intra_op_parallelism_threads(settings.intra_threads)
    tf.config.threading.set_inter_op_parallelism_threads(settings.inter_threads)
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    if settings.deterministic:
        tf.config.experimental.enable_op_determinism()
    write_keras_settings(settings.keras)
    keras.utils.set_random_seed(settings.seed)


def write_keras_settings(values: Mapping[str, Any]) -> None:
    """Set in Keras what the driver has set there: floatx, epsilon, image_data_format, dtype_policy."""
    if values:
        keras.config.set_floatx(values["floatx"])
        keras.config.set_epsilon(values["epsilon"])
        keras.config.set_image_data_format(values["image_data_format"])
        keras.config.set_dtype_policy(values["dtype_policy"])
