"""One Ray and one set of plain processes for the whole session: starting them is what costs."""

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # the session's Ray runs workers in this environment
os.environ.setdefault("RAY_worker_niceness", "0")  # as in a local Ray that dtrain starts

import cloudpickle
import pytest
import warm
from ranks import Ranks

cloudpickle.register_pickle_by_value(warm)  # the workers do not have the tests' folder on their path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="compare with plain Keras for all N, models and dtypes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What starts Ray, ranks or whole programs is slow: `make test-fast` leaves it out."""
    if not config.getoption("--full"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    slow = {"local_ray", "ranks", "environment", "nodes", "machines"}
    programs = {"test_cli.py", "test_examples.py", "test_cluster_local.py", "test_horovod_build.py", "test_mlflow.py"}
    for item in items:
        if slow & set(getattr(item, "fixturenames", ())) or item.path.name in programs:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


LONGEST = (
    *("test_features", "test_recovery", "test_scenarios", "test_resume", "test_streams", "test_callbacks"),
    *("test_nodes", "test_failures", "test_elastic", "test_cli", "test_link"),
)
"""Files that take the most time come first, so that processes side by side end together; then the rest, by name."""


POOL = Ranks(3)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Plain processes that play up to 3 ranks."""
    yield POOL
    POOL.close()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "ranks" not in getattr(item, "fixturenames", ()):
        POOL.rest()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray with room for more workers than this machine has cores; Trainers use it as they find it."""
    import logging

    import ray

    beside_others = partial(ray._private.parameter.RayParams, dashboard_agent_listen_port=0)  # else none takes jobs
    with patch("ray._private.parameter.RayParams", beside_others):
        ray.init(address="local", num_cpus=8, namespace="dtrain", log_to_driver=False, logging_level=logging.WARNING)
    yield
    ray.shutdown()


@contextmanager
def s3() -> Iterator[str]:
    """A bucket on a server of this process's own."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()


@contextmanager
def gs() -> Iterator[str]:
    """The same of Google's kind; by its JSON API, since the server speaks no gRPC."""
    import fsspec
    from gcp_storage_emulator.server import create_server

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch, create_server("127.0.0.1", port, True, "bucket"):
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        yield "gs://bucket"


@pytest.fixture(scope="session", params=[s3, gs])
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of one."""
    import fsspec

    with request.param() as url:
        fsspec.get_filesystem_class(url.partition(":")[0]).clear_instance_cache()  # of another server before
        yield url


@pytest.fixture(params=["local", "file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for files of each kind; a bucket is slow, and has tests of its own."""
    urls = {"local": str(tmp_path / "store"), "file": (tmp_path / "store").as_uri()}
    return urls.get(request.param, f"memory://{uuid.uuid4().hex}")


@pytest.fixture(scope="module")
def one_worker(local_ray: None) -> Iterator[Any]:
    """A Trainer whose worker is given one model after the other (see warm.py)."""
    with warm.new_trainer(1) as trainer:
        yield trainer


@pytest.fixture(scope="module")
def two_workers(local_ray: None) -> Iterator[Any]:
    with warm.new_trainer(2) as trainer:
        yield trainer


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty folder, so that ./dtrain_runs and ./mlflow.db are the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
