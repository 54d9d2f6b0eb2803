#!/usr/bin/env bash
# Trains on Cloud TPUs: queued resources, spot, several slices. The only file that uses gcloud.
#   scripts/tpu.sh create NAME --type=v5litepod-64 [--spot] [--slices=N] [--version=V] [--service-account=EMAIL] [--wait]
#   scripts/tpu.sh push NAME [--dirty]     the commit HEAD (or the tree as it is) to every host, and creates the environment there
#   scripts/tpu.sh run NAME -- ARGS...     scripts/pretrain.sh --distributed ARGS on every host, detached; restarted after exit code 75
#   scripts/tpu.sh logs NAME [--slice=N] [--worker=N] [--follow]
#   scripts/tpu.sh status NAME             the queued resource, and the run of every host with its last step
#   scripts/tpu.sh stop NAME               SIGTERM to all hosts, which save and exit; waits for them
#   scripts/tpu.sh delete NAME [--force]   without confirmation; refused while a run is alive, unless forced
#   scripts/tpu.sh bucket gs://NAME [--location=REGION] [--account=ID]   buckets NAME to read and NAME-runs to write, and an account with only these rights
# All take --project=P and --zone=Z (bucket: for its region), and --dry-run, which prints the commands without running them.
# TPU_PROJECT, TPU_ZONE, TPU_TYPE, TPU_VERSION, TPU_SERVICE_ACCOUNT are defaults of flags.
# Every command can be repeated: existing resources are left unchanged and reported.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
    echo "tpu.sh: $*" >&2
    exit 2
}

# Quotes a word for a shell, so that it arrives unchanged, also through ssh.
quote() {
    local apostrophe="'" escaped="'\\''"
    case $1 in
    '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s'" "${1//$apostrophe/$escaped}" ;;
    *) printf '%s' "$1" ;;
    esac
}

quoted() {
    local word between=""
    for word in "$@"; do
        printf '%s' "$between"
        quote "$word"
        between=" "
    done
}

# Runs a command; with --dry-run prints it in a form that can be pasted.
act() {
    if [ -n "$dry" ]; then
        quoted "$@"
        echo
    else
        "$@"
    fi
}

# look WHAT COMMAND...: sets `answer` to the output of the command; returns 1 if WHAT does not exist; exits after other errors.
look() {
    local what=$1 status=0
    shift
    answer=""
    if [ -n "$dry" ]; then
        act "$@"
        return 0
    fi
    answer=$("$@" 2>"$scratch/faults") || status=$?
    [ "$status" != 0 ] || return 0
    # Compute reports NOT_FOUND, storage "not found: 404".
    if grep -qE 'NOT_FOUND|not found: 404' "$scratch/faults"; then
        return 1
    fi
    cat "$scratch/faults" >&2
    echo "tpu.sh: $what cannot be queried (exit code $status, above)" >&2
    exit "$status"
}

# The value of a KEY in the JSON of `look`; only keys that are unambiguous are used.
field() {
    printf '%s\n' "$answer" | sed -n 's/^ *"'"$1"'": *"\{0,1\}\([^",{]*\)"\{0,1\},\{0,1\}$/\1/p'
}

# Sets found, its_state, its_type, its_version, its_slices, its_spot, its_account and nodes.
describe() {
    local number
    found=yes its_state="" nodes=()
    look "queued resource $name" gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format="json(state.state,spot,tpu.nodeSpec[].nodeId,tpu.nodeSpec[].multisliceParams.nodeCount,tpu.nodeSpec[].node.acceleratorType,tpu.nodeSpec[].node.runtimeVersion,tpu.nodeSpec[].node.serviceAccount.email)" || found=""
    if [ -n "$dry" ]; then
        its_state=ACTIVE nodes=("$name")
        return 0
    fi
    its_state=$(field state)
    its_type=$(field acceleratorType | head -n 1)
    its_version=$(field runtimeVersion | head -n 1)
    its_account=$(field email | head -n 1)
    its_spot=no
    ! printf '%s\n' "$answer" | grep -q '^ *"spot":' || its_spot=yes
    its_slices=$(field nodeCount | head -n 1)
    while IFS= read -r number; do
        [ -z "$number" ] || nodes+=("$number")
    done < <(field nodeId)
    if [ "${#nodes[@]}" = 0 ]; then
        for ((number = 0; number < ${its_slices:-0}; number++)); do nodes+=("$name-$number"); done
    fi
    its_slices=${its_slices:-${#nodes[@]}}
}

need_active() {
    describe
    [ -n "$found" ] || die "$command: no queued resource $name in $zone; scripts/tpu.sh create creates one"
    [ "$its_state" = ACTIVE ] || die "$command: $name is $its_state, expected ACTIVE; scripts/tpu.sh create $name --wait waits for it"
}

# Sets `workers`, the number of hosts of all slices.
count_workers() {
    local node
    workers=0
    for node in "${nodes[@]}"; do
        look "TPU $node" gcloud compute tpus tpu-vm describe "$node" "${place[@]}" --format="value(networkEndpoints.len())" ||
            die "$command: the queued resource $name names the TPU $node, which does not exist; scripts/tpu.sh status $name"
        workers=$((workers + ${answer:-0}))
    done
}

# on_hosts ARGS...: runs on_host.sh ARGS on every host and sets `answers`; returns 1 unless all hosts responded and succeeded.
on_hosts() {
    local remote status=0
    remote="if [ -f glip_jax/scripts/on_host.sh ]; then bash glip_jax/scripts/on_host.sh $(quoted "$@"); else echo \"worker \$(hostname): nothing pushed\"; fi"
    everywhere "$remote" || status=$?
    return "$status"
}

everywhere() {
    local status=0 count ssh=(gcloud compute tpus queued-resources ssh "$name" "${place[@]}" --node=all --worker=all --command="$1")
    answers=""
    if [ -n "$dry" ]; then
        act "${ssh[@]}"
        return 0
    fi
    # The progress output of gcloud is shown for long operations, otherwise only after an error.
    if [ -n "$loud" ]; then
        answers=$("${ssh[@]}") || status=$?
    else
        answers=$("${ssh[@]}" 2>"$scratch/faults") || status=$?
    fi
    # gcloud skips hosts that it cannot reach, so responses are counted.
    answers=$(printf '%s\n' "$answers" | grep '^worker ' | sort -V || true)
    count=$(printf '%s' "$answers" | grep -c '' || true)
    if [ "$count" != "$workers" ]; then
        [ -n "$loud" ] || cat "$scratch/faults" >&2
        [ -z "$answers" ] || printf '%s\n' "$answers" >&2
        echo "tpu.sh: $count of $workers hosts of $name answered; the output of gcloud is above" >&2
        [ "$status" != 0 ] || status=1
    fi
    return "$status"
}

# Sets `running`, the number of hosts with a live run, and `answers`; returns 1 if not all hosts responded.
ask_ready() {
    count_workers
    on_hosts ready || return 1
    running=$(printf '%s\n' "$answers" | grep -c ': running since ' || true)
}

runtime_of() {
    case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
    esac
}

create() {
    local differences="" request spot_wanted=no
    [ -n "$type" ] || die "create: no --type (or TPU_TYPE), e.g. --type=v5litepod-64"
    [[ $type != v5e-* ]] || die "create: $type is called v5litepod-${type#v5e-} by Google Cloud: --type=v5litepod-${type#v5e-}"
    version=${version:-$(runtime_of "$type")}
    [ -z "$spot" ] || spot_wanted=yes
    describe
    request=(gcloud compute tpus queued-resources create "$name" "${place[@]}" --accelerator-type="$type" --runtime-version="$version")
    if [ "$slices" -gt 1 ]; then
        request+=(--node-count="$slices" --node-prefix="$name")
    else
        request+=(--node-id="$name")
    fi
    [ -z "$spot" ] || request+=(--spot)
    # Rights are granted by the account, not limited by scopes.
    [ -z "$account_email" ] || request+=(--service-account="$account_email" --scopes=https://www.googleapis.com/auth/cloud-platform)
    # Without --async gcloud would wait for the whole request; --wait of this script polls instead.
    request+=(--async)
    if [ -n "$dry" ]; then
        echo "# if none of that name exists:"
        act "${request[@]}"
    elif [ -n "$found" ]; then
        differ() { [ "$2" = "$3" ] || differences="$differences, $1 is $2 (requested: $3)"; }
        differ type "$its_type" "$type"
        differ version "$its_version" "$version"
        differ slices "$its_slices" "$slices"
        differ spot "$its_spot" "$spot_wanted"
        [ -z "$account_email" ] || differ service-account "$its_account" "$account_email"
        [ -z "$differences" ] || die "create: $name exists with other settings: ${differences#, }; choose another name, or delete it first"
        echo "$name exists with these settings: $its_state"
    else
        "${request[@]}"
        echo "$name: requested $slices x $type"
    fi
    if [ -n "$dry" ]; then
        return 0
    fi
    [ -n "$wait" ] || case "$its_state" in
    FAILED | SUSPEND*) die "create: $name is $its_state and will not come back; scripts/tpu.sh delete $name, then create it again" ;;
    *) return 0 ;;
    esac
    wait_until_active
}

wait_until_active() {
    local before="" missing=0
    while :; do
        describe
        # A recent request may not be listed yet.
        [ -n "$found" ] || [ $((++missing)) -lt 10 ] || die "create: $name does not exist any more"
        [ "$its_state" = "$before" ] || echo "$name: ${its_state:-requested}"
        before=$its_state
        case $its_state in
        ACTIVE) return 0 ;;
        FAILED | SUSPEND* | DELETING) die "create: $name is $its_state and will not come back; scripts/tpu.sh delete $name, then create it again" ;;
        esac
        sleep "${TPU_POLL_SECONDS:-30}"
    done
}

push() {
    local changes revision tree archive remote
    changes=$(git -C "$root" status --porcelain | wc -l)
    revision=$(git -C "$root" rev-parse --short=12 HEAD) tree=HEAD
    archive=$scratch/glip_jax.tar.gz
    # Printed commands may be pasted after this script has ended and its scratch folder is removed.
    [ -z "$dry" ] || archive=${TMPDIR:-/tmp}/glip_jax.tar.gz
    if [ "$changes" != 0 ]; then
        [ -n "$dirty" ] || die "push: $((changes)) files are changed or not in git; commit them, or push the tree as it is with --dirty"
        revision=$revision-dirty
        [ -z "$dry" ] || echo "# HEAD stands for the tree as it is, which is written to git without a commit:"
        if [ -z "$dry" ]; then
            # A separate index leaves that of the user unchanged. Ignored files are not included.
            cp "$(git -C "$root" rev-parse --absolute-git-dir)/index" "$scratch/index"
            tree=$(cd "$root" && export GIT_INDEX_FILE=$scratch/index && git add --all && git write-tree)
            # The name of the revision identifies the changes.
            revision=$revision-${tree:0:12}
        fi
    fi
    need_active
    count_workers
    act git -C "$root" archive --format=tar.gz --output="$archive" "$tree"
    # on_host.sh is taken from the archive that it unpacks; unpack refuses while a run is alive. The archive is named after the
    # revision, so a host that did not receive it cannot use an older one.
    remote="bash -c \"\$(tar -xzOf glip_jax-$revision.tar.gz scripts/on_host.sh)\" on_host.sh unpack \"\$HOME/glip_jax-$revision.tar.gz\" $revision"
    act gcloud compute tpus queued-resources scp "$archive" "$name:glip_jax-$revision.tar.gz" "${place[@]}" --node=all --worker=all
    loud=yes
    everywhere "$remote" || {
        [ -z "$answers" ] || printf '%s\n' "$answers"
        echo "tpu.sh: push: not every host of $name has $revision; the same command resumes" >&2
        exit 1
    }
    [ -n "$dry" ] || printf '%s\n' "$answers"
}

run() {
    local not_ready
    [ "${#arguments[@]}" -gt 0 ] || die "run: nothing after --; expected e.g. run $name -- --config=configs/glip_tiny.py --workdir=gs://BUCKET/runs/one"
    need_active
    ask_ready || exit 1
    if [ -z "$dry" ]; then
        if [ "$running" != 0 ]; then
            printf '%s\n' "$answers"
            die "run: a run is alive on $running of $workers hosts of $name; scripts/tpu.sh stop $name ends it"
        fi
        not_ready=$(printf '%s\n' "$answers" | grep -vc ': ready ' || true)
        if [ "$not_ready" != 0 ] || [ "$(printf '%s\n' "$answers" | sed 's/.*: ready //' | sort -u | wc -l)" -gt 1 ]; then
            printf '%s\n' "$answers"
            die "run: not every host has the same code; scripts/tpu.sh push $name"
        fi
    fi
    on_hosts start --distributed "${arguments[@]}" || {
        printf '%s\n' "$answers"
        echo "tpu.sh: run: not every host started, and those that did wait for the others; scripts/tpu.sh stop $name, then run again" >&2
        exit 1
    }
    [ -z "$dry" ] || return 0
    printf '%s\n' "$answers"
    echo "logs: scripts/tpu.sh logs $name --follow    state: scripts/tpu.sh status $name"
}

logs() {
    local follow_flag=() remote
    need_active
    [ -z "$follow" ] || follow_flag=(--follow)
    remote=$(quoted bash glip_jax/scripts/on_host.sh log ${follow_flag[@]+"${follow_flag[@]}"})
    act gcloud compute tpus queued-resources ssh "$name" "${place[@]}" --node="$slice" --worker="$worker" --command="$remote"
}

status() {
    local node
    describe
    if [ -z "$found" ]; then
        echo "$name does not exist in $zone"
        return 0
    fi
    [ -n "$dry" ] || echo "$name: $its_state, $its_slices x $its_type, spot: $its_spot"
    if [ "$its_state" = ACTIVE ]; then
        for node in "${nodes[@]}"; do
            look "TPU $node" gcloud compute tpus tpu-vm describe "$node" "${place[@]}" --format="value(state)" || answer="does not exist"
            [ -n "$dry" ] || echo "$node: $answer"
        done
        count_workers
        on_hosts status || exit 1
        [ -n "$dry" ] || printf '%s\n' "$answers"
    fi
}

stop() {
    need_active
    count_workers
    on_hosts stop || {
        printf '%s\n' "$answers"
        exit 1
    }
    [ -n "$dry" ] || printf '%s\n' "$answers"
}

delete() {
    describe
    if [ -z "$found" ]; then
        echo "$name does not exist in $zone"
        return 0
    fi
    if [ "$its_state" = ACTIVE ] && [ -z "$force" ]; then
        ask_ready || die "delete: whether a run is alive on $name is not known (see above); --force deletes it all the same"
        [ "${running:-0}" = 0 ] || die "delete: a run is alive on $running of $workers hosts of $name; scripts/tpu.sh stop $name saves and ends it, --force deletes it all the same"
    fi
    # --force of gcloud also deletes the TPUs of the request.
    act gcloud compute tpus queued-resources delete "$name" --zone="$zone" --project="$project" --force --quiet
}

bucket() {
    local each email=$account@$project.iam.gserviceaccount.com bucket=$name
    location=${location:-${zone:+${zone%-*}}}
    [ -n "$location" ] || die "bucket: no --location, and no --zone (or TPU_ZONE) to take it from; reading from another region costs money and time"
    for each in "$bucket" "$bucket-runs"; do
        make_bucket "$each"
    done
    if look "account $email" gcloud iam service-accounts describe "$email" --project="$project" --format="value(email)" && [ -z "$dry" ]; then
        echo "$email exists"
    else
        [ -z "$dry" ] || echo "# if none of that name exists:"
        act gcloud iam service-accounts create "$account" --project="$project" --display-name="glip_jax training"
    fi
    # Repeated bindings have no effect. Two buckets, because listing cannot be granted for a part of one by conditions on names.
    act gcloud storage buckets add-iam-policy-binding "$bucket" --member="serviceAccount:$email" --role=roles/storage.objectViewer --format=none
    act gcloud storage buckets add-iam-policy-binding "$bucket-runs" --member="serviceAccount:$email" --role=roles/storage.objectUser --format=none
    # Orbax reads the type of the bucket (storage.buckets.get), which objectUser does not allow.
    act gcloud storage buckets add-iam-policy-binding "$bucket-runs" --member="serviceAccount:$email" --role=roles/storage.legacyBucketReader --format=none
    [ -n "$dry" ] || echo "$email reads $bucket and writes $bucket-runs; scripts/tpu.sh create NAME --service-account=$email"
}

make_bucket() {
    local found wanted="${location^^}|True|enforced"
    if look "bucket $1" gcloud storage buckets describe "$1" --project="$project" --format="value[separator='|'](location,uniform_bucket_level_access,public_access_prevention)" && [ -z "$dry" ]; then
        found=$answer
        [ "$found" = "$wanted" ] || die "bucket: $1 exists with other settings: location|uniform access|public access prevention is $found (requested: $wanted)"
        echo "$1 exists with these settings; its lifecycle is unchanged (to set it: gcloud storage buckets update $1 --lifecycle-file=gcs/lifecycle.json)"
        return 0
    fi
    [ -z "$dry" ] || echo "# if none of that name exists:"
    act gcloud storage buckets create "$1" --project="$project" --location="$location" --uniform-bucket-level-access \
        --public-access-prevention --soft-delete-duration=7d --lifecycle-file="$root/gcs/lifecycle.json"
}

command=${1:-}
case "$command" in
-h | --help)
    sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
create) allowed="type spot slices version service-account wait" ;;
push) allowed="dirty" ;;
run | status | stop) allowed="" ;;
logs) allowed="slice worker follow" ;;
delete) allowed="force" ;;
bucket) allowed="location account" ;;
*) die "unknown command '$command'; there are create, push, run, logs, status, stop, delete, bucket (--help explains them)" ;;
esac
shift

project=${TPU_PROJECT:-} zone=${TPU_ZONE:-} type=${TPU_TYPE:-} version=${TPU_VERSION:-} account_email=${TPU_SERVICE_ACCOUNT:-}
name="" dry="" spot="" slices=1 wait="" dirty="" slice=0 worker=0 follow="" force="" location="" account=glip-jax arguments=()
while [ $# -gt 0 ]; do
    flag=${1%%=*} value=${1#*=}
    case " project zone dry-run $allowed " in
    *" ${flag#--} "*) known=yes ;;
    *) known="" ;;
    esac
    case $1 in
    --)
        [ "$command" = run ] || die "$command: nothing may follow --"
        shift
        arguments=("$@")
        break
        ;;
    --dry-run | --spot | --wait | --dirty | --follow | --force)
        [ -n "$known" ] || die "$command: unknown flag $1; scripts/tpu.sh --help lists them"
        case $1 in
        --dry-run) dry=yes ;;
        --spot) spot=yes ;;
        --wait) wait=yes ;;
        --dirty) dirty=yes ;;
        --follow) follow=yes ;;
        --force) force=yes ;;
        esac
        ;;
    --*=*)
        [ -n "$known" ] || die "$command: unknown flag $flag; scripts/tpu.sh --help lists them"
        [ -n "$value" ] || die "$command: $flag is empty"
        case $flag in
        --project) project=$value ;;
        --zone) zone=$value ;;
        --type) type=$value ;;
        --version) version=$value ;;
        --service-account) account_email=$value ;;
        --slices) slices=$value ;;
        --slice) slice=$value ;;
        --worker) worker=$value ;;
        --location) location=$value ;;
        --account) account=$value ;;
        *) die "$command: $flag takes no value, found $1" ;;
        esac
        ;;
    -*)
        [ -z "$known" ] || die "$command: expected $1=VALUE"
        die "$command: unknown flag $1; scripts/tpu.sh --help lists them"
        ;;
    *)
        [ -z "$name" ] || die "$command: one name at a time, found $name and $1$([ "$command" != run ] || echo '; what pretrain.sh is given stands after --')"
        name=$1
        ;;
    esac
    shift
done

[ -n "$name" ] || die "$command: no name, expected scripts/tpu.sh $command $([ "$command" = bucket ] && echo gs://NAME || echo NAME)"
if [ "$command" = bucket ]; then
    [[ $name =~ ^gs://[a-z0-9][a-z0-9._-]*[a-z0-9]$ ]] || die "bucket: expected gs://NAME of small letters, digits and dashes, found $name"
else
    [[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "$command: expected a name of small letters, digits and dashes, found $name"
    [ -n "$zone" ] || die "$command: no --zone (or TPU_ZONE), e.g. --zone=us-west4-a"
fi
[ -n "$project" ] || die "$command: no --project (or TPU_PROJECT)"
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "$command: --slices is $slices, expected a number of at least 1"
[[ $slice =~ ^[0-9]+$ && $worker =~ ^[0-9]+$ ]] || die "$command: --slice is $slice and --worker is $worker, expected numbers from 0 on"
if [ -z "$dry" ]; then
    type -P gcloud >/dev/null || die "gcloud is not on the PATH: install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install), then gcloud auth login"
fi

place=(--zone="$zone" --project="$project")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
loud=""
"$command"
