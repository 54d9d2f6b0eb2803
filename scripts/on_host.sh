#!/usr/bin/env bash
# Runs on each host of a TPU, called by scripts/tpu.sh. The code is in ~/glip_jax, everything else in ~/glip_jax.state.
#   scripts/on_host.sh unpack ARCHIVE REVISION   unpacks a tar.gz to ~/glip_jax and creates the environment
#   scripts/on_host.sh ready                     prints whether a run can start, and the revision
#   scripts/on_host.sh start ARGS...             scripts/pretrain.sh ARGS, detached; restarted after exit code 75, and after a
#                                                pause after 69 or 76, at most three times without a new step
#   scripts/on_host.sh status | stop             the state and the last step; SIGTERM, and wait until it has saved
#   scripts/on_host.sh log [--follow]            the last 200 lines of its log
# Responses are lines that begin with "worker HOST: ", so that the caller can count the hosts that responded.
set -euo pipefail
code=$HOME/glip_jax state=$HOME/glip_jax.state
# Seconds that `stop` waits: writing a checkpoint to a bucket may take minutes.
stop_seconds=${GLIP_JAX_STOP_SECONDS:-300}
# Seconds to wait after 69, 76 or a signal: the other hosts must detect it too (--heartbeat), and an unavailable bucket needs time.
pause=${GLIP_JAX_RESTART_SECONDS:-60}
export LC_ALL=C

say() {
    printf 'worker %s: %s\n' "$HOSTNAME" "$*"
}

fail() {
    say "$*"
    exit 1
}

# The kernel releases a lock with the last process that holds it, however that ended; a pid file would be stale after a kill.
# The loop and all processes that it started hold it.
alive() {
    [ -e "$state/lock" ] && ! flock -n "$state/lock" true
}

since() {
    cat "$state/started" 2>/dev/null || echo "an unknown time"
}

last_step() {
    # Progress bars end their lines with a carriage return.
    { tail -c 100000 "$state/log" 2>/dev/null || true; } | tr '\r' '\n' | grep '^step ' | tail -n 1 | cut -c 1-100 || true
}

unpack() {
    local archive=$1 revision=$2 file
    ! alive || fail "a run is alive since $(since), and the code beneath it stays as it is; stop it first"
    mkdir -p "$code" "$state"
    # The revision is written last, so that `ready` detects an incomplete push.
    rm -f "$state/revision"
    # Files of an earlier push that are not in this one are removed; .venv, runs and other files stay. The list contains
    # both until everything is unpacked, so an incomplete push loses nothing.
    touch "$state/files"
    tar -tzf "$archive" | grep -v '/$' | sort >"$state/files.new"
    comm -23 "$state/files" "$state/files.new" | while IFS= read -r file; do rm -f -- "$code/$file"; done
    sort -u "$state/files" "$state/files.new" >"$state/files.both"
    mv "$state/files.both" "$state/files"
    tar -xzf "$archive" -C "$code"
    mv "$state/files.new" "$state/files"
    cd "$code"
    # In a separate shell that exits at the first error; the output of pip goes to stderr.
    bash -euo pipefail -c '
        source scripts/environment.sh
        if ! find_python >/dev/null 2>&1; then
            # Ubuntu 22.04 of TPU hosts has Python 3.10. uv installs another version without root.
            python3 -m pip install --quiet --user uv
            python3 -m uv python install 3.12
            PYTHON=$(python3 -m uv python find 3.12)
            export PYTHON
        fi
        environment requirements-tpu.txt' >&2 || fail "the environment could not be made (the output of pip is above)"
    rm -f "$HOME"/glip_jax-*.tar.gz
    echo "$revision" >"$state/revision"
    say "pushed $revision"
}

ready() {
    if alive; then
        say "running since $(since)"
    elif [ ! -e "$state/revision" ]; then
        say "nothing pushed, or the push is incomplete"
    else
        say "ready $(cat "$state/revision")"
    fi
}

start() {
    [ -e "$state/revision" ] || fail "nothing pushed, or the push is incomplete"
    exec 9>"$state/lock"
    flock -n 9 || fail "running since $(since)"
    rm -f "$state/exit" "$state/child"
    date -u '+%Y-%m-%d %H:%M:%S UTC' >"$state/started"
    echo 0 >"$state/restarts"
    cd "$code"
    # A new session, so that it survives the end of ssh; it inherits the lock as file descriptor 9.
    GLIP_JAX_REQUIREMENTS=requirements-tpu.txt setsid bash scripts/on_host.sh supervise "$@" >>"$state/log" 2>&1 </dev/null &
    echo $! >"$state/pid"
    say "started"
}

# The restart loop; SIGTERM is forwarded to the run, which is then not restarted.
supervise() {
    local code=0 child="" interrupted="" stopping="" restarts=0 tries=0 step="" reached
    trap 'interrupted=1 stopping=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM
    trap '' HUP
    echo $$ >"$state/pid"
    while [ -z "$stopping" ]; do
        echo "=== $(date -u '+%Y-%m-%d %H:%M:%S UTC') revision $(cat "$state/revision"), start $((restarts + 1))"
        bash scripts/pretrain.sh "$@" &
        child=$!
        echo "$child" >"$state/child"
        [ -z "$stopping" ] || kill -TERM "$child" 2>/dev/null || true
        code=0
        wait "$child" || code=$?
        # A signal interrupts `wait`, not the run.
        while [ -n "$interrupted" ]; do
            interrupted="" code=0
            wait "$child" || code=$?
        done
        child=""
        echo "=== $(date -u '+%Y-%m-%d %H:%M:%S UTC') exit code $code"
        case $code in
        75) tries=0 ;;
        69 | 76 | 132 | 134 | 135 | 136 | 137 | 139 | 143)
            # An unavailable bucket, or a process that died on another host (76, or 134 by jax's heartbeat) or on this one (by a
            # signal: out of memory, a driver error, SIGTERM while it started) may be transient; an error that repeats at the
            # same step is not.
            reached=$(last_step)
            [ "$reached" = "$step" ] || tries=0
            step=$reached
            [ "$((++tries))" -le 3 ] || break
            [ -n "$stopping" ] || {
                sleep "$pause" &
                child=$!
                wait "$child" || true
                child=""
            }
            ;;
        *) break ;;
        esac
        [ -n "$stopping" ] || echo "$((++restarts))" >"$state/restarts"
    done
    echo "$code" >"$state/exit"
}

status() {
    local step restarts
    step=$(last_step)
    restarts=$(cat "$state/restarts" 2>/dev/null || echo 0)
    if alive; then
        say "running since $(since), restarts $restarts, last: ${step:-no step yet}"
    elif [ -e "$state/exit" ]; then
        say "ended with exit code $(cat "$state/exit"), restarts $restarts, last: ${step:-no step}"
    elif [ -e "$state/started" ]; then
        say "ended without an exit code (killed, or the host was restarted), restarts $restarts, last: ${step:-no step}"
    elif [ -e "$state/revision" ]; then
        say "no run yet, revision $(cat "$state/revision")"
    else
        say "nothing pushed, or the push is incomplete"
    fi
}

stop() {
    if ! alive; then
        status
        return 0
    fi
    # If the loop was killed, the run itself gets the signal.
    kill -TERM "$(cat "$state/pid")" 2>/dev/null || kill -TERM "$(cat "$state/child")" 2>/dev/null || true
    flock -w "$stop_seconds" "$state/lock" true || fail "still running $stop_seconds s after SIGTERM"
    status
}

log() {
    [ -e "$state/log" ] || fail "no log yet"
    if [ "${1:-}" = --follow ]; then
        exec tail -n 200 -F "$state/log"
    fi
    tail -n 200 "$state/log"
}

case "${1:-}" in
unpack | ready | start | supervise | status | stop | log) "$@" ;;
-h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
*)
    echo "on_host.sh: expected unpack, ready, start, status, stop or log, found: ${1:-nothing}" >&2
    exit 2
    ;;
esac
