#!/usr/bin/env bash
# Two Ray nodes on this one machine, to try out what a cluster does: start | stop | status.
#
# Ray's token authentication is on: Ray's own ports are open on every interface, whatever --node-ip-address says. The
# dashboard is on 127.0.0.1. State lies in a private folder, DTRAIN_LOCAL_CLUSTER or else one under XDG_RUNTIME_DIR or
# ~/.cache; `stop` ends what `start` recorded there and nothing else. RAY names the ray program, else it is looked for
# on PATH and in ../.venv.
set -euo pipefail
umask 077 # token, logs and sockets are nobody else's business

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
state=${DTRAIN_LOCAL_CLUSTER:-${XDG_RUNTIME_DIR:-$HOME/.cache}/dtrain-local-cluster}
cpus=${DTRAIN_LOCAL_CPUS:-2}
memory=$((100 * 1024 * 1024)) # bytes of object store a node

fail() {
  echo "local.sh: $*" >&2
  exit 1
}

find_ray() {
  if [[ -n ${RAY:-} ]]; then
    echo "$RAY"
  elif command -v ray >/dev/null; then
    command -v ray
  elif [[ -x $here/../.venv/bin/ray ]]; then
    echo "$here/../.venv/bin/ray"
  else
    fail "there is no ray program; run 'uv sync', or set RAY"
  fi
}

# A pid alone may have been given to another process since: it is ours while it started when ours did.
started_at() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

alive() {
  local pid at
  [[ -r $state/$1.pid ]] && read -r pid at <"$state/$1.pid" && [[ $(started_at "$pid") == "$at" ]]
}

pid_of() { cut -d' ' -f1 "$state/$1.pid"; }

# ray start --block in a session of its own, so that all it starts can be told from everything else.
launch() {
  local name=$1
  shift
  setsid "$ray" start --block --disable-usage-stats --num-cpus="$cpus" --object-store-memory="$memory" \
    --temp-dir="$(temporary)" "$@" >"$state/$name.log" 2>&1 </dev/null &
  echo "$! $(started_at $!)" >"$state/$name.pid"
}

# Ray puts Unix sockets below it, whose paths must be short, so it cannot lie in the state folder.
temporary() { cat "$state/temporary"; }

await() { # await NAME SECONDS COMMAND...: until the command succeeds
  local name=$1 deadline=$((SECONDS + $2))
  shift 2
  until "$@"; do
    if ! alive "$name" || ((SECONDS > deadline)); then
      tail -n 20 "$state/$name.log" >&2
      stop >&2
      fail "the $name node did not start; its last output is above"
    fi
    sleep 0.2
  done
}

running() { grep -q 'Ray runtime started' "$state/$1.log"; }

free_port() {
  "$(dirname -- "$ray")/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start() {
  if alive head || alive second; then fail "it runs already; '$0 status' says where, '$0 stop' ends it"; fi
  ray=$(find_ray)
  mkdir -p "$state"
  chmod 700 "$state"
  rm -f "$state"/*.pid "$state"/*.log
  mktemp -d /tmp/dtrain.XXXXXX >"$state/temporary"
  export RAY_AUTH_MODE=token # Ray would start without, and only warn, where there is no token yet
  "$ray" get-auth-token --generate >/dev/null

  local address
  address=127.0.0.1:$(free_port)
  echo "$address" >"$state/address"
  launch head --head --port="${address#*:}" --dashboard-host=127.0.0.1 --dashboard-port="$(free_port)" \
    --ray-client-server-port="$(free_port)" --dashboard-agent-listen-port=0
  await head 90 running head
  launch second --address="$address" --dashboard-agent-listen-port=0
  await second 90 running second
  status
}

status() {
  if ! alive head && ! alive second; then
    echo "not running"
    return 1
  fi
  local name
  for name in head second; do
    if alive "$name"; then echo "# $name node: pid $(pid_of "$name"), $cpus CPUs"; else echo "# $name node: gone"; fi
  done
  cat <<END
# For the shell that trains:
export RAY_ADDRESS=$(cat "$state/address")
export RAY_AUTH_MODE=token
# then, for example:
#   python examples/quickstart.py
#   dtrain fit MODULE:FACTORY --data MODULE:LOADER --num-workers $((2 * cpus))
END
}

# All processes of a node's session; Ray gives some of them process groups of their own.
session() { ps -o pid= --sid "$1" | tr -d ' '; }

stop() {
  local name pid left deadline
  for name in second head; do # the head last: a node without one takes long to give up
    if [[ ! -r $state/$name.pid ]]; then continue; fi
    pid=$(pid_of "$name")
    if alive "$name"; then kill -TERM "$pid" 2>/dev/null || true; fi
    # A session outlives its leader, and the kernel gives its number to nobody meanwhile; so if there is another
    # process of that number now, our session is empty.
    deadline=$((SECONDS + 10))
    while { alive "$name" || [[ ! -e /proc/$pid ]]; } && left=$(session "$pid") && [[ -n $left ]]; do
      if ((SECONDS > deadline)); then
        # shellcheck disable=SC2086  # one pid a word
        kill -KILL $left 2>/dev/null || true
      fi
      sleep 0.1
    done
    rm -f "$state/$name.pid"
  done
  if [[ -r $state/temporary ]]; then rm -rf -- "$(temporary)"; fi
  rm -f "$state/temporary" "$state/address"
  echo "stopped"
}

case ${1:-} in
  start | stop | status) "$1" ;;
  *)
    echo "usage: $0 start | stop | status" >&2
    exit 2
    ;;
esac
