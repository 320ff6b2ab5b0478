"""Claims about how Horovod is built (_horovod_cmake.py, horovod_build.py) and about the one that is installed."""

import os
import socket
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dtrain import _horovod_cmake, horovod_build
from dtrain._horovod_cmake import EDITS, EDITS_VERSION, Edit, apply_edits
from dtrain.errors import ConfigError, DtrainError
from dtrain.horovod_build import Built, built, install_horovod, problem_of, tensorflow_version
from dtrain.rendezvous import RendezvousServer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


# --- the two ways of building agree -----------------------------------------------------------------------------------


def test_uv_and_the_command_build_with_the_same_variables(project: dict[str, Any]) -> None:
    uv = project["tool"]["uv"]["extra-build-variables"]["horovod"]
    ours = horovod_build.build_variables()
    assert Path(ours["HOROVOD_CMAKE"]).is_absolute()
    assert os.access(ours["HOROVOD_CMAKE"], os.X_OK)
    assert ours | {"HOROVOD_CMAKE": Path(ours["HOROVOD_CMAKE"]).name} == uv


def test_a_cached_wheel_of_other_edits_or_another_tensorflow_is_never_handed_back(project: dict[str, Any]) -> None:
    uv = project["tool"]["uv"]["extra-build-variables"]["horovod"]
    locked = {p["name"]: p["version"] for p in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    assert uv["DTRAIN_EDITS"] == EDITS_VERSION
    assert uv["DTRAIN_TF"] == locked["tensorflow"] == tensorflow_version()
    assert locked["horovod"] == horovod_build.VERSION
    assert f"horovod=={horovod_build.VERSION}" in project["project"]["dependencies"]


def test_the_console_script_that_the_build_names_is_ours(project: dict[str, Any]) -> None:
    name = project["tool"]["uv"]["extra-build-variables"]["horovod"]["HOROVOD_CMAKE"]
    assert project["project"]["scripts"][name] == "dtrain._horovod_cmake:main"


# --- the edits --------------------------------------------------------------------------------------------------------


def test_an_edit_is_made_once_and_only_in_its_place(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before old after")
    edit = Edit(path="a.txt", old="old", new="new", reason="a test")
    edit.apply(tmp_path)
    edit.apply(tmp_path)  # CMake may configure twice
    assert file.read_text() == "before new after"


def test_what_a_former_version_has_edited_is_edited_anew(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("before new 1 after")
    Edit(path="a.txt", old="old", new="new 2", former=("new 1",), reason="a test").apply(tmp_path)
    assert (tmp_path / "a.txt").read_text() == "before new 2 after"


@pytest.mark.parametrize("text", ["nothing", "old old"])
def test_an_edit_without_its_place_stops_the_build(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(SystemExit, match=r"a\.txt .* instead of 1 \(a test\)"):
        Edit(path="a.txt", old="old", new="new", reason="a test").apply(tmp_path)


def test_the_edits_are_made_at_the_configure_call_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(edit.new in edit.old for edit in EDITS)  # or it would seem to be made already
    source = tmp_path / "source"
    olds, news = ({edit.path: [] for edit in EDITS} for _ in range(2))
    for edit in EDITS:
        (source / edit.path).parent.mkdir(parents=True, exist_ok=True)
        olds[edit.path] += [edit.old] * edit.count
        news[edit.path] += [edit.new] * edit.count
    for path, parts in olds.items():
        (source / path).write_text("\n\n".join(parts))
    calls: list[list[str]] = []
    monkeypatch.setattr(os, "execvp", lambda program, arguments: calls.append([program, *arguments]))
    monkeypatch.setattr(sys, "argv", ["cmake", "--build", "."])
    _horovod_cmake.main()
    assert all((source / path).read_text() == "\n\n".join(parts) for path, parts in olds.items())
    monkeypatch.setattr(sys, "argv", ["cmake", str(source), "-DX=1"])
    _horovod_cmake.main()
    assert all((source / path).read_text() == "\n\n".join(parts) for path, parts in news.items())
    assert calls == [
        ["cmake", "cmake", "--build", "."],
        ["cmake", "cmake", str(source), "-DX=1", "-DCMAKE_POLICY_VERSION_MINIMUM=3.5"],
    ]
    apply_edits(source)
    assert all((source / path).read_text() == "\n\n".join(parts) for path, parts in news.items())


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_command_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("ran"))
    monkeypatch.setattr(horovod_build.shutil, "which", lambda name: f"/usr/bin/{name}")  # uv may be in .tools only
    install_horovod(dry_run=True)
    printed = capsys.readouterr().out
    assert "HOROVOD_WITH_GLOO=1" in printed
    assert "--no-build-isolation" in printed
    assert printed.rstrip().endswith("horovod==0.28.1")


@pytest.mark.parametrize("pip", [True, False])
def test_pip_is_used_where_it_is_and_uv_elsewhere(monkeypatch: pytest.MonkeyPatch, pip: bool) -> None:
    monkeypatch.setattr(horovod_build.importlib.util, "find_spec", lambda name: object() if pip else None)
    monkeypatch.setattr(horovod_build.shutil, "which", lambda name: f"/usr/bin/{name}")
    command = horovod_build.install_command()
    start = [sys.executable, "-m", "pip", "install"] if pip else ["/usr/bin/uv", "pip", "install", "--python"]
    assert command[: len(start)] == start
    assert {"--no-build-isolation", "--no-binary", "--no-deps", "horovod==0.28.1"} <= set(command)
    assert {"--no-cache-dir", "--force-reinstall"} <= set(command) or {"--no-cache", "--reinstall"} <= set(command)


def test_without_pip_and_uv_the_error_says_how_to_get_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horovod_build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(horovod_build.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"neither pip nor uv; run: .* -m ensurepip$"):
        horovod_build.install_command()


@pytest.mark.parametrize(
    ("gpu", "missing", "command"),
    [
        (False, {"g++"}, "sudo apt-get install g++"),
        (False, {"make", "cmake"}, "sudo apt-get install make cmake"),
        (True, {"nvcc"}, "sudo apt-get install nvidia-cuda-toolkit"),
    ],
)
def test_missing_tools_are_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, missing: set[str], command: str
) -> None:
    monkeypatch.setattr(horovod_build.shutil, "which", lambda name: None if name in missing else f"/usr/bin/{name}")
    with pytest.raises(ConfigError, match=f"{command.replace('+', '[+]')}$"):
        install_horovod(gpu=gpu, dry_run=True)


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horovod_build, "_is_installed", lambda name: name != "wheel")
    with pytest.raises(ConfigError, match="pip install wheel$"):
        install_horovod(dry_run=True)


def test_a_failed_build_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horovod_build, "install_command", lambda: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(DtrainError, match="exit code 3"):
        install_horovod()


def test_nccl_is_taken_from_its_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in ("include", "lib"):
        (tmp_path / "nvidia/nccl" / folder).mkdir(parents=True)
    (tmp_path / "nvidia/nccl/__init__.py").touch()
    (tmp_path / "nvidia/nccl/lib/libnccl.so.2").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with horovod_build._nccl(gpu=True) as variables:
        assert variables["HOROVOD_GPU_OPERATIONS"] == "NCCL"
        assert variables["HOROVOD_NCCL_INCLUDE"] == str(tmp_path / "nvidia/nccl/include")
        library = Path(variables["HOROVOD_NCCL_LIB"], "libnccl.so")
        assert library.resolve() == tmp_path / "nvidia/nccl/lib/libnccl.so.2"
    assert not library.parent.exists()
    with horovod_build._nccl(gpu=False) as variables:
        assert variables == {}


GOOD = Built(tensorflow="2.21.0", edits=EDITS_VERSION, gpu_operations="", library=True)


@pytest.mark.parametrize(
    ("horovod", "tensorflow", "gpu", "problem"),
    [
        (GOOD, "2.21.0", False, None),
        (replace(GOOD, edits=None), "2.21.0", False, None),  # works on one node: the doctor's business
        (replace(GOOD, gpu_operations="NCCL"), "2.21.0", True, None),
        (GOOD, None, False, "TensorFlow is not installed; run: pip install tensorflow"),
        (None, "2.21.0", False, "Horovod is not installed; run: dtrain install-horovod"),
        (replace(GOOD, tensorflow=None), "2.21.0", False, "run: dtrain install-horovod"),
        (replace(GOOD, library=False), "2.21.0", False, "run: dtrain install-horovod"),
        (GOOD, "2.22.0", False, "built against TensorFlow 2.21.0 but 2.22.0 is installed; run: dtrain install-horovod"),
        (GOOD, "2.21.0", True, "without NCCL, which use_gpu=True needs; run: dtrain install-horovod --gpu"),
    ],
)
def test_what_is_wrong_with_a_horovod(
    horovod: Built | None, tensorflow: str | None, gpu: bool, problem: str | None
) -> None:
    found = problem_of(horovod, tensorflow, gpu=gpu)
    assert found is problem is None or (found is not None and problem is not None and found.endswith(problem))


# --- the library that is installed ------------------------------------------------------------------------------------


def test_the_installed_horovod_says_that_it_was_built_with_this_tensorflow_and_these_edits() -> None:
    horovod = built()
    assert horovod == Built(tensorflow=tensorflow_version(), edits=EDITS_VERSION, gpu_operations="", library=True)


def test_reading_what_was_built_imports_neither_horovod_nor_tensorflow() -> None:
    script = (
        "import sys; from dtrain.horovod_build import built, tensorflow_version; built(), tensorflow_version()\n"
        "assert not {'horovod', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_edit_1_the_xla_ops_are_left_out() -> None:
    assert b"HorovodAllreduce" in library().read_bytes()
    assert b"CallbackHVDAllreduce" not in library().read_bytes()  # the custom call of xla_mpi_ops.cc


RANK = """
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import horovod.tensorflow as hvd
hvd.init()
hvd.shutdown()
"""


@pytest.mark.timeout(120)
def test_edit_2_every_scope_advertises_the_address_of_the_chosen_interface(tmp_path: Path) -> None:
    interface, address = interface_that_the_host_name_does_not_name()
    with RendezvousServer(address) as server:
        scope = server.new_scope()
        environment = os.environ | {
            "HOROVOD_SIZE": "2",
            "HOROVOD_LOCAL_SIZE": "2",
            "HOROVOD_CROSS_RANK": "0",
            "HOROVOD_CROSS_SIZE": "1",
            "HOROVOD_HOSTNAME": "node",
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": scope.address,
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(scope.port),
            "HOROVOD_GLOO_IFACE": interface,
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK],
                env=environment | {"HOROVOD_RANK": rank, "HOROVOD_LOCAL_RANK": rank},
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for rank in ("0", "1")
        ]
        outputs = [rank.communicate(timeout=100)[0].decode() for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
        stored = dict(server._scopes[scope.secret])
    advertised = {name: ipv4_of(value) for name, value in stored.items() if name.rpartition("/")[2].isdigit() and value}
    assert {"global/0", "global/1"} <= set(advertised)
    assert sum(name.startswith("global_process_set_hash_") for name in advertised) == 2
    assert set(advertised.values()) == {address}, advertised


def interface_that_the_host_name_does_not_name() -> tuple[str, str]:
    """Without edit 2 a process set advertises what the host name resolves to: any other address tells them apart."""
    try:
        named = {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    except OSError:
        named = set()
    for interface, addresses in psutil.net_if_addrs().items():
        ipv4 = [a.address for a in addresses if a.family == socket.AF_INET]
        if ipv4 and psutil.net_if_stats()[interface].isup and ipv4[0] not in named:
            return interface, ipv4[0]
    pytest.skip("every interface has the address that the host name resolves to")


def ipv4_of(value: bytes) -> str:
    """The address in a Gloo address: a sockaddr_storage."""
    assert int.from_bytes(value[:2], sys.byteorder) == socket.AF_INET
    return socket.inet_ntoa(value[4:8])


def library() -> Path:
    spec = horovod_build.importlib.util.find_spec("horovod")
    assert spec is not None and spec.origin is not None
    (library,) = (Path(spec.origin).parent / "tensorflow").glob("mpi_lib*.so")
    return library


def _idle_share(collective: Any) -> float:
    """What part of a core this rank takes while it has nothing to do."""
    import time

    collective.all_gather_json(0, "before")
    started, used = time.perf_counter(), time.process_time()
    time.sleep(2)
    return (time.process_time() - used) / (time.perf_counter() - started)


def test_a_rank_that_has_nothing_to_do_does_nothing(ranks: Any) -> None:
    """A fifth of a core where Horovod's thread looks for work once a millisecond."""
    assert max(ranks.run(2, _idle_share)) < 0.08
