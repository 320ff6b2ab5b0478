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
from functools import partial
from pathlib import Path

EDITS_VERSION = "8"


@dataclass(frozen=True)
class Edit:
    """Replace `old`, which must stand exactly `count` times in `path`, by `new`.

    `former` is what earlier versions put there: uv builds again in the folder in which it has built before.
    """

    path: str
    old: str
    new: str
    reason: str
    count: int = 1
    former: tuple[str, ...] = ()

    def apply(self, source: Path) -> None:
        file = source / self.path
        text = file.read_text()
        for former in self.former:
            text = text.replace(former, self.old)
        if self.new in text:
            return  # configured a second time in the same folder
        if text.count(self.old) != self.count:
            raise SystemExit(
                f"dtrain: {self.path} has {text.count(self.old)} places to edit instead of {self.count}"
                f" ({self.reason}); is this Horovod 0.28.1?"
            )
        file.write_text(text.replace(self.old, self.new))


def _common(path: str, old: str, new: str, reason: str) -> Edit:
    """An edit to what all of Horovod shares, without the line breaks around both texts."""
    return Edit(f"horovod/common/{path}", old.strip("\n"), new.strip("\n"), reason)


_waking = partial(
    _common,
    reason="small steps wait for a thread that looks for work once a millisecond; idle ranks take a quarter of a core",
)
_waiting = partial(_common, reason="within a step ranks wait for each other, and nobody knows for whom")


WAKING = (
    _waking("tensor_queue.h", "#include <iostream>", "#include <chrono>\n#include <iostream>"),
    _waking(
        "tensor_queue.h",
        """
class TensorQueue {
public:
""",
        """
// Tells the background thread that there is something to do; and waits until it is told, or for `limit`.
void NotifyBackgroundThread();
void WaitForNotice(std::chrono::steady_clock::duration limit);

class TensorQueue {
public:
  bool HasTensors() const {
    std::lock_guard<std::mutex> guard(mutex_);
    return !tensor_table_.empty();
  }
""",
    ),
    _waking("tensor_queue.cc", "#include <assert.h>", "#include <assert.h>\n#include <condition_variable>"),
    _waking(
        "tensor_queue.cc",
        """
// Add a TensorTableEntry as well as its message to the queue.
""",
        """
namespace {
std::mutex notice_mutex;
std::condition_variable notice;
bool is_noticed = false;
} // namespace

void NotifyBackgroundThread() {
  {
    std::lock_guard<std::mutex> guard(notice_mutex);
    is_noticed = true;
  }
  notice.notify_one();
}

void WaitForNotice(std::chrono::steady_clock::duration limit) {
  std::unique_lock<std::mutex> lock(notice_mutex);
  notice.wait_for(lock, limit, [] { return is_noticed; });
  is_noticed = false;
}

// Add a TensorTableEntry as well as its message to the queue.
""",
    ),
    _waking(
        "tensor_queue.cc",
        """
  message_queue_.push(std::move(message));
  return Status::OK();
""",
        """
  message_queue_.push(std::move(message));
  NotifyBackgroundThread();
  return Status::OK();
""",
    ),
    _waking(
        "tensor_queue.cc",
        """
    message_queue_.push(std::move(messages[i]));
  }
""",
        """
    message_queue_.push(std::move(messages[i]));
  }
  NotifyBackgroundThread();
""",
    ),
    _waking(
        "operations.cc",
        """
    horovod_global.shut_down = true;
    horovod_global.background_thread.join();
""",
        """
    horovod_global.shut_down = true;
    NotifyBackgroundThread();
    horovod_global.background_thread.join();
""",
    ),
    _waking(
        "operations.cc",
        """
                            state.parameter_manager.CycleTimeMs() * 1000.)) -
                        start_time;
  if (sleep_duration > std::chrono::steady_clock::duration::zero()) {
    std::this_thread::sleep_for(sleep_duration);
  }
""",
        """
                            (is_idle ? 100. : state.parameter_manager.CycleTimeMs()) * 1000.)) -
                        start_time;
  if (sleep_duration > std::chrono::steady_clock::duration::zero()) {
    if (wakes) {
      WaitForNotice(sleep_duration);
    } else {
      std::this_thread::sleep_for(sleep_duration);
    }
  }
""",
    ),
    _waking(
        "operations.cc",
        """
  // This delay determines thread frequency and communication message latency
""",
        """
  // Without tensors the thread waits until there is one. It takes part in a cycle now and then all the same: the other
  // ranks wait for its word in each, and would take a long silence for its death.
  static const bool wakes = std::getenv("DTRAIN_STOCK_CYCLES") == nullptr;
  bool is_idle = wakes;
  for (auto id : state.process_set_table.Ids()) {
    is_idle = is_idle && !state.process_set_table.Get(id).tensor_queue.HasTensors();
  }
  // This delay determines thread frequency and communication message latency
""",
    ),
)
"""Work wakes the background thread. DTRAIN_STOCK_CYCLES=1 in a worker's environment has it as it was."""

WAITING = (
    _waiting(
        "tensor_queue.h",
        "  mutable std::mutex mutex_;",
        "  mutable std::mutex mutex_;\n\n"
        "  // Since when there have been tensors in the table.\n  std::chrono::steady_clock::time_point waits_since_;",
    ),
    _waiting(
        "tensor_queue.cc",
        """
#include "logging.h"
""",
        """
#include <atomic>
#include <chrono>

#include "logging.h"

namespace {
std::atomic<int64_t> nanoseconds_waited{0};
} // namespace

// For so long, all in all, this rank had tensors that other ranks did not have yet.
extern "C" double horovod_seconds_waited() {
  return 1e-9 * nanoseconds_waited.load();
}
""",
    ),
    _waiting(
        "tensor_queue.cc",
        """
  tensor_table_.emplace(e.tensor_name, std::move(e));
""",
        """
  if (tensor_table_.empty()) {
    waits_since_ = std::chrono::steady_clock::now();
  }
  tensor_table_.emplace(e.tensor_name, std::move(e));
""",
    ),
    _waiting(
        "tensor_queue.cc",
        """
    tensor_table_.emplace(entries[i].tensor_name, std::move(entries[i]));
""",
        """
    if (tensor_table_.empty()) {
      waits_since_ = std::chrono::steady_clock::now();
    }
    tensor_table_.emplace(entries[i].tensor_name, std::move(entries[i]));
""",
    ),
    _waiting(
        "tensor_queue.cc",
        """
        // Clear the tensor table of this tensor.
        tensor_table_.erase(iter);
""",
        """
        // Clear the tensor table of this tensor.
        tensor_table_.erase(iter);
        if (tensor_table_.empty()) {
          std::chrono::nanoseconds waited = std::chrono::steady_clock::now() - waits_since_;
          nanoseconds_waited += waited.count();
        }
""",
    ),
)
"""A rank knows how long it has waited for others: the one that waits least is the one that they wait for."""

SCHEDULING = Edit(
    path="horovod/tensorflow/mpi_ops.cc",
    old=" : public AsyncOpKernel {\npublic:\n",
    new=(
        " : public AsyncOpKernel {\npublic:\n"
        "  // It only queues what is to be exchanged."
        " What TensorFlow takes for expensive comes last in a single thread.\n"
        "  bool IsExpensive() override {\n"
        '    return std::getenv("DTRAIN_STOCK_SCHEDULING") != nullptr;\n'
        "  }\n\n"
    ),
    reason="with one thread across operations, gradients are sent only when all are computed",
    count=9,
)
"""Gradients are on their way while others are computed. DTRAIN_STOCK_SCHEDULING=1 has it as it was."""

CACHED_GROUPS = _common(
    "controller.cc",
    """
              // Cached message
              auto bit = response_cache_.peek_cache_bit(tensor_name);
              responses.push_back(response_cache_.get_response(bit));
""",
    """
              // Cached message
              auto bit = response_cache_.peek_cache_bit(tensor_name);
              responses.push_back(response_cache_.peek_response(bit));
""",
    "where groups are not fused, only the first rank's cache changed its order: once it was full, ranks did not agree",
)

_METADATA = r'"\"gpu_operations\": \"$ENV{{HOROVOD_GPU_OPERATIONS}}\",\n\"dtrain_edits\": \"{}\"\n}}"'

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
        path="horovod/common/gloo/gloo_context.cc",
        old="void GlooContext::Finalize() {\n  if (!enabled_) {\n    return;\n  }\n\n",
        new=(
            "void GlooContext::Finalize() {\n"
            "  // That of a process set is never enabled, and has connections all the same.\n"
        ),
        reason=(
            "a process set's own context is never enabled, so its connections stayed open when a rank gave up, and"
            " others waited for it until their timeout"
        ),
    ),
    *WAKING,
    *WAITING,
    SCHEDULING,
    CACHED_GROUPS,
    Edit(
        path="CMakeLists.txt",
        old=r'"\"dummy\": \"none\"\n}"',
        new=_METADATA.format(EDITS_VERSION),
        former=tuple(map(_METADATA.format, range(2, int(EDITS_VERSION)))),
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
