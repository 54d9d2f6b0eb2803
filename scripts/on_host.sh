#!/usr/bin/env bash
# What scripts/tpu.sh has each host of a TPU do. Code lies in ~/glip_jax there, everything else in ~/glip_jax.state.
#   scripts/on_host.sh unpack ARCHIVE REVISION   the files of a tar.gz become ~/glip_jax, then the environment is made
#   scripts/on_host.sh ready                     says whether a run could start, and of which revision
#   scripts/on_host.sh start ARGS...             scripts/pretrain.sh ARGS, detached; again as often as it ends with exit code 75,
#                                                and after a pause with 69 or 76, three times at most without a new step
#   scripts/on_host.sh status | stop             how it stands, with its last step; SIGTERM, and wait until it has saved
#   scripts/on_host.sh log [--follow]            the last 200 lines of its log
# Answers are lines that begin with "worker HOST: ", so that the caller can count who answered.
set -euo pipefail
code=$HOME/glip_jax state=$HOME/glip_jax.state
# How long `stop` waits: a checkpoint to a bucket may take minutes.
patience=${GLIP_JAX_STOP_SECONDS:-300}
# How long after 69 or 76: the other hosts must notice, too, and a bucket that does not answer wants time.
pause=${GLIP_JAX_RESTART_SECONDS:-60}
export LC_ALL=C

say() {
    printf 'worker %s: %s\n' "$HOSTNAME" "$*"
}

fail() {
    say "$*"
    exit 1
}

# The kernel drops a lock with the last process that holds it, whatever that died of; a file with a pid would lie after a kill.
# It is on the loop and all that the loop started.
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
    # Until the end there is no revision, so `ready` knows a push that was cut short.
    rm -f "$state/revision"
    # Files that a push brought and this one does not are removed; .venv, runs and what else lies there stay. The list
    # holds both until all is unpacked: a push that is cut short forgets nothing.
    touch "$state/files"
    tar -tzf "$archive" | grep -v '/$' | sort >"$state/files.new"
    comm -23 "$state/files" "$state/files.new" | while IFS= read -r file; do rm -f -- "$code/$file"; done
    sort -u "$state/files" "$state/files.new" >"$state/files.both"
    mv "$state/files.both" "$state/files"
    tar -xzf "$archive" -C "$code"
    mv "$state/files.new" "$state/files"
    cd "$code"
    # In a shell of its own, which ends at the first fault; what pip says is for people, not for the count.
    bash -euo pipefail -c '
        source scripts/environment.sh
        if ! find_python >/dev/null 2>&1; then
            # Ubuntu 22.04, which is on the hosts of TPUs, has Python 3.10. That of uv needs no rights of root.
            python3 -m pip install --quiet --user uv
            python3 -m uv python install 3.12
            PYTHON=$(python3 -m uv python find 3.12)
            export PYTHON
        fi
        environment requirements-tpu.txt' >&2 || fail "the environment could not be made (what pip said is above)"
    rm -f "$HOME"/glip_jax-*.tar.gz
    echo "$revision" >"$state/revision"
    say "pushed $revision"
}

ready() {
    if alive; then
        say "running since $(since)"
    elif [ ! -e "$state/revision" ]; then
        say "nothing pushed, or not to the end"
    else
        say "ready $(cat "$state/revision")"
    fi
}

start() {
    [ -e "$state/revision" ] || fail "nothing pushed, or not to the end"
    exec 9>"$state/lock"
    flock -n 9 || fail "running since $(since)"
    rm -f "$state/exit" "$state/child"
    date -u '+%Y-%m-%d %H:%M:%S UTC' >"$state/started"
    echo 0 >"$state/restarts"
    cd "$code"
    # Another session than that of ssh, whose end it must survive; the lock goes along as file 9.
    GLIP_JAX_REQUIREMENTS=requirements-tpu.txt setsid bash scripts/on_host.sh supervise "$@" >>"$state/log" 2>&1 </dev/null &
    echo $! >"$state/pid"
    say "started"
}

# The loop around a run; SIGTERM to it reaches the run, and then it does not start again.
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
        # A signal ends `wait`, not the run.
        while [ -n "$interrupted" ]; do
            interrupted="" code=0
            wait "$child" || code=$?
        done
        child=""
        echo "=== $(date -u '+%Y-%m-%d %H:%M:%S UTC') exit code $code"
        case $code in
        75) tries=0 ;;
        69 | 76 | 132 | 134 | 135 | 136 | 137 | 139)
            # A bucket does not answer, or a process died, elsewhere or here (by a signal: want of memory, a fault in a
            # driver): that may pass. What comes again at the same step does not.
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
        say "ended without an exit code (killed, or the host started anew), restarts $restarts, last: ${step:-no step}"
    elif [ -e "$state/revision" ]; then
        say "no run yet, revision $(cat "$state/revision")"
    else
        say "nothing pushed, or not to the end"
    fi
}

stop() {
    if ! alive; then
        status
        return 0
    fi
    # Without the loop, which somebody may have killed, the run itself is told.
    kill -TERM "$(cat "$state/pid")" 2>/dev/null || kill -TERM "$(cat "$state/child")" 2>/dev/null || true
    flock -w "$patience" "$state/lock" true || fail "still running $patience s after SIGTERM"
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
