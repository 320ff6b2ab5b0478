"""The cmake that builds Horovod: makes our edits to its sources, then hands over to the real cmake.

Horovod's setup.py runs the program that HOROVOD_CMAKE names, first as `cmake <source folder> -D...`, then as
`cmake --build .`. pyproject.toml names this module's console script there, so the edits are made on the way,
whoever builds (uv, pip, `dtrain install-horovod`). This file imports nothing but the standard library, and
promises to change nothing but the sources it is pointed at; an edit whose place is not found stops the build.

`EDITS_VERSION` goes into the build variables of pyproject.toml (a test compares them): change it with the edits,
or a cached wheel without them would be handed back. It also goes into horovod/metadata.json, where Horovod notes the
TensorFlow that it was built against, so that an installed Horovod can be asked what it is.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

EDITS_VERSION = "2"


@dataclass(frozen=True)
class Edit:
    """Replace `old`, which must stand exactly `count` times in `path`, by `new`."""

    path: str
    old: str
    new: str
    reason: str
    count: int = 1

    def apply(self, source: Path) -> None:
        file = source / self.path
        text = file.read_text()
        if text.count(self.new) and not text.count(self.old):
            return  # configured a second time in the same folder
        if text.count(self.old) != self.count:
            raise SystemExit(
                f"dtrain: {self.path} has {text.count(self.old)} places to edit instead of {self.count}"
                f" ({self.reason}); is this Horovod 0.28.1?"
            )
        file.write_text(text.replace(self.old, self.new))


EDITS = (
    Edit(
        path="horovod/tensorflow/CMakeLists.txt",
        old='list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")\n',
        new="# xla_mpi_ops.cc is left out: TensorFlow's wheel lacks headers that it needs\n",
        reason="TensorFlow's wheel lacks headers that xla_mpi_ops.cc needs",
    ),
    Edit(
        path="horovod/common/gloo/gloo_context.cc",
        old=(
            "  attr device_attr;\n"
            "  device_attr.iface = gloo_iface_;\n"
            "  device_attr.ai_family = AF_UNSPEC;\n"
            "  auto dev = CreateDevice(device_attr);\n"
            "\n"
            "  global_ctx = global_context.ctx;\n"
        ),
        new=(
            "  attr device_attr;\n"
            "  device_attr.iface = global_context.gloo_iface_;\n"
            "  device_attr.ai_family = AF_UNSPEC;\n"
            "  auto dev = CreateDevice(device_attr);\n"
            "\n"
            "  global_ctx = global_context.ctx;\n"
        ),
        reason="a process set's own interface is empty, so every rank would advertise what its host name resolves to",
    ),
    Edit(
        path="CMakeLists.txt",
        old=r'"\"dummy\": \"none\"\n}"',
        new=(
            r'"\"gpu_operations\": \"$ENV{HOROVOD_GPU_OPERATIONS}\",\n'
            rf'\"dtrain_edits\": \"{EDITS_VERSION}\"\n}}"'
        ),
        reason="an installed Horovod says what it was built with",
    ),
)


def apply_edits(source: Path) -> None:
    for edit in EDITS:
        edit.apply(source)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments and Path(arguments[0]).is_dir():  # the configure call
        apply_edits(Path(arguments[0]))
        arguments.append("-DCMAKE_POLICY_VERSION_MINIMUM=3.5")  # CMake 4 refuses the bundled projects without it
    os.execvp("cmake", ["cmake", *arguments])


if __name__ == "__main__":
    main()
