"""scripts/tpu.sh and scripts/on_host.sh with a fake gcloud, whose hosts are folders that run the commands sent to them."""

import json
import shlex
import shutil
import subprocess
import time

import pytest

from tests.scripts.fake_cloud import ROOT, Cloud, make_project

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    make_project(root)
    return root


@pytest.fixture
def cloud(tmp_path, project):
    made = Cloud(tmp_path, project)
    yield made
    for pid in tmp_path.glob("google/hosts/*/glip_jax.state/child"):
        subprocess.run(["kill", "-KILL", pid.read_text().strip()], capture_output=True, check=False)


@pytest.fixture
def pod(cloud):
    cloud("create", "pod", "--type=v5litepod-8")
    cloud("push", "pod")
    return cloud


def test_create_requests_a_queued_resource(cloud):
    cloud("create", "one", "--type=v5litepod-64", "--spot", "--service-account=a@b")
    asked = cloud.calls()[-1]
    assert asked[:5] == ["compute", "tpus", "queued-resources", "create", "one"]
    assert {"--zone=us-west4-a", "--project=p", "--accelerator-type=v5litepod-64", "--node-id=one"} <= {*asked}
    assert {"--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--service-account=a@b", "--async"} <= {*asked}
    # Flags take precedence over the environment.
    cloud("create", "two", "--slices=3", "--zone=z", TPU_TYPE="v6e-16", TPU_ZONE="y")
    asked = cloud.calls()[-1]
    assert {"--node-count=3", "--node-prefix=two", "--zone=z", "--runtime-version=v2-alpha-tpuv6e"} <= {*asked}
    assert not [a for a in asked if a.startswith(("--node-id", "--spot", "--service-account"))]


def test_create_names_the_accelerator_type_of_a_v5e(cloud):
    output = cloud("create", "pod", "--type=v5e-64", code=2)
    assert output == "tpu.sh: create: v5e-64 is called v5litepod-64 by Google Cloud: --type=v5litepod-64\n"


def test_create_again_changes_nothing(cloud):
    cloud("create", "pod", "--type=v5litepod-64", "--spot", "--slices=2")
    before = json.loads((cloud.google / "resources.json").read_text())
    output = cloud("create", "pod", "--type=v5litepod-64", "--spot", "--slices=2")
    assert output == "pod exists with these settings: ACTIVE\n"
    output = cloud("create", "pod", "--type=v5litepod-16", "--service-account=a@b", code=2)
    assert "type is v5litepod-64 (requested: v5litepod-16)" in output
    assert "slices is 2 (requested: 1), spot is yes (requested: no), service-account is  (requested: a@b)" in output
    assert json.loads((cloud.google / "resources.json").read_text()) == before
    assert [c[3] for c in cloud.calls()].count("create") == 1


def test_create_waits_with_wait(cloud):
    output = cloud(
        "create", "pod", "--type=v4-8", "--wait", FAKE_GCLOUD_STATES="ACCEPTED,PROVISIONING,PROVISIONING,ACTIVE"
    )
    assert "pod: ACCEPTED\npod: PROVISIONING\npod: ACTIVE\n" in output
    output = cloud("create", "gone", "--type=v4-8", "--wait", code=2, FAKE_GCLOUD_STATES="PROVISIONING,SUSPENDED")
    assert "gone is SUSPENDED and will not come back; scripts/tpu.sh delete gone, then create it again" in output
    # What was preempted is not output to be there.
    assert "will not come back" in cloud("create", "gone", "--type=v4-8", code=2)
    assert "gone is SUSPENDED, expected ACTIVE" in cloud("push", "gone", code=2)


def test_push_copies_the_commit(pod):
    for host in pod.hosts():
        code = host / "glip_jax"
        assert (code / "old name.txt").read_text() == "of the first commit"
        assert (code / ".venv/made").read_text() == "requirements-tpu.txt\n"
        assert not [*host.glob("*.tar.gz")]
        (code / "runs").mkdir()
    (pod.root / "old name.txt").rename(pod.root / "new $name.txt")
    assert "files are changed or not in git" in pod("push", "pod", code=2)
    pod.commit()
    output = pod("push", "pod")
    assert output.count("pushed ") == 2
    for host in pod.hosts():
        assert (host / "glip_jax/new $name.txt").exists()
        assert not (host / "glip_jax/old name.txt").exists()
        assert (host / "glip_jax/runs").exists()


def test_push_of_a_changed_tree(pod):
    (pod.root / "not in git.txt").write_text("x")
    index = (pod.root / ".git/index").read_bytes()
    assert "-dirty" in pod("push", "pod", "--dirty")
    assert (pod.hosts()[0] / "glip_jax/not in git.txt").read_text() == "x"
    assert (pod.root / ".git/index").read_bytes() == index


def test_push_fails_if_the_environment_fails(pod):
    (pod.hosts()[1] / "pip fails").write_text("")
    output = pod("push", "pod", code=1)
    assert "worker pod-w-1: the environment could not be made" in output
    assert "pip speaks" in output
    output = pod("run", "pod", "--", "x", code=2)
    assert "worker pod-w-1: nothing pushed, or the push is incomplete" in output


def test_push_fails_if_a_host_is_missed(pod):
    (pod.google / "unreachable.json").write_text('["pod-w-1"]')
    output = pod("push", "pod", code=1)
    assert "1 of 2 hosts of pod answered" in output
    assert "Failed to connect to pod-w-1" in output
    (pod.google / "unreachable.json").write_text("[]")
    (pod.root / "more").write_text("")
    pod.commit()
    (pod.google / "unreachable.json").write_text('["pod-w-1"]')
    pod("push", "pod", code=1)
    (pod.google / "unreachable.json").write_text("[]")
    pod.plan(0)
    assert "not every host has the same code; scripts/tpu.sh push pod" in pod("run", "pod", "--", "x", code=2)


AWKWARD = [
    "a b",
    "it's",
    '"',
    "$HOME",
    "*",
    "`id`",
    "x\ny",
    "",
    "\\",
    "~",
    "-n",
    "--",
    "é",
    "!!",
    "a  b",
    "#",
    "x;y&z|<>",
]


def test_arguments_arrive_unchanged(pod):
    pod.plan(0)
    output = pod("run", "pod", "--", *AWKWARD)
    assert output.count(": started\n") == 2
    pod.wait_for("ended with exit code 0, restarts 0, last: step 20/100  loss 1.5", "exit")
    for host in pod.hosts():
        assert (host / "arguments").read_text() == "".join(f"{a}\0" for a in ["--distributed", *AWKWARD])
        assert (host / "requirements").read_text() == "requirements-tpu.txt\n"


def test_a_run_is_restarted_after_exit_code_75(pod):
    pod.plan(75, 75, 2, 0)
    pod("run", "pod", "--", "--workdir=gs://b/runs/one")
    pod.wait_for("ended with exit code 2, restarts 2", "exit")
    for host in pod.hosts():
        assert (host / "plan").read_text() == "0\n"
        assert (host / "glip_jax.state/log").read_text().count("step 20/100") == 3


def test_transient_errors_are_retried_three_times_per_step(pod):
    pod.plan(69, 76, 75, 76, 137, 139, 69, 0)
    pod("run", "pod", "--", "x")
    pod.wait_for("ended with exit code 69, restarts 6", "exit")
    for host in pod.hosts():
        assert (host / "plan").read_text() == "0\n"


@pytest.mark.slow
def test_one_run_at_a_time_and_stop_saves(pod):
    pod.plan("wait", 0)
    pod("run", "pod", "--", "x")
    output = pod.wait_for("running since", "child")
    assert "pod: ACTIVE, 1 x v5litepod-8, spot: no\npod: READY\n" in output
    assert "a run is alive on 2 of 2 hosts of pod; scripts/tpu.sh stop pod ends it" in pod(
        "run", "pod", "--", "x", code=2
    )
    assert "a run is alive on 2 of 2 hosts" in pod("delete", "pod", code=2)
    assert "the code beneath it stays as it is" in pod("push", "pod", code=1)
    for host in pod.hosts():
        while "waiting" not in (host / "glip_jax.state/log").read_text():
            time.sleep(0.05)
    output = pod("stop", "pod")
    assert output.count("ended with exit code 75, restarts 0") == 2
    assert "saved" in pod("logs", "pod", "--worker=1")
    assert pod("stop", "pod").count("ended with exit code 75") == 2
    assert (pod.hosts()[0] / "plan").read_text() == "0\n"  # not restarted
    pod("delete", "pod")
    assert "does not exist" in pod("delete", "pod")
    assert "does not exist" in pod("status", "pod")


@pytest.mark.slow
def test_a_killed_run_is_detected_and_delete_can_be_forced(pod):
    pod.plan("wait")
    pod("run", "pod", "--", "x")
    pod.wait_for("running since", "child")
    for host in pod.hosts():
        state = host / "glip_jax.state"
        subprocess.run(["kill", "-KILL", (state / "pid").read_text().strip()], check=True)
        # The run itself is still alive.
        assert "running since" in pod("status", "pod")
        subprocess.run(["kill", "-KILL", (state / "child").read_text().strip()], check=True)
    assert pod("status", "pod").count("ended without an exit code") == 2
    (pod.google / "unreachable.json").write_text('["pod-w-1"]')
    assert "1 of 2 hosts of pod answered" in pod("delete", "pod", code=2)
    pod("delete", "pod", "--force")
    assert {"--force", "--quiet"} <= {*pod.calls()[-1]}


@pytest.mark.slow
def test_all_slices_are_reached(cloud):
    cloud.environment["FAKE_GCLOUD_HOSTS"] = "1"
    cloud("create", "pod", "--type=v5litepod-8", "--slices=2")
    assert cloud("status", "pod").count(": nothing pushed\n") == 2
    assert "run: not every host has the same code" in cloud("run", "pod", "--", "x", code=2)
    assert cloud("push", "pod").count("pushed") == 2
    assert "no run yet" in cloud("status", "pod")
    cloud.plan(0)
    cloud("run", "pod", "--", "x")
    cloud.wait_for("ended with exit code 0", "exit")
    cloud("logs", "pod", "--slice=1", "--follow", code=0, PATH=_without_tail(cloud))
    assert {"--node=1", "--worker=0", "--command=bash glip_jax/scripts/on_host.sh log --follow"} <= {*cloud.calls()[-1]}


def _without_tail(cloud):
    """A PATH whose `tail` does not follow for ever."""
    folder = cloud.path / "short"
    folder.mkdir()
    (folder / "tail").write_text("#!/bin/sh\nexit 0\n")
    (folder / "tail").chmod(0o755)
    return f"{folder}:{cloud.environment['PATH']}"


def test_bucket(cloud):
    output = cloud("bucket", "gs://bucket")
    assert "glip-jax@p.iam.gserviceaccount.com reads gs://bucket and writes gs://bucket-runs" in output
    buckets = json.loads((cloud.google / "buckets.json").read_text())
    member = "serviceAccount:glip-jax@p.iam.gserviceaccount.com"
    assert buckets["gs://bucket"] == {
        "settings": ["US-WEST4", "True", "enforced"],
        "roles": [[member, "roles/storage.objectViewer"]],
    }
    roles = ["roles/storage.objectUser", "roles/storage.legacyBucketReader"]
    assert buckets["gs://bucket-runs"]["roles"] == [[member, role] for role in roles]
    output = cloud("bucket", "gs://bucket")
    assert output.count("exists") == 3
    assert json.loads((cloud.google / "buckets.json").read_text()) == buckets
    assert "US-WEST4|True|enforced (requested: EU|True|enforced)" in cloud(
        "bucket", "gs://bucket", "--location=eu", code=2
    )


def test_the_lifecycle_deletes_no_permanent_objects():
    rules = json.loads((ROOT / "gcs/lifecycle.json").read_text())["rule"]
    for rule in rules:
        if rule["action"]["type"] == "Delete":
            assert rule["condition"]["matchesPrefix"] == ["tmp/"]
        else:
            assert rule["action"]["type"] == "AbortIncompleteMultipartUpload"


@pytest.mark.parametrize(
    "command",
    [
        ["create", "pod", "--type=v5litepod-64", "--slices=2", "--spot"],
        ["push", "pod"],
        ["run", "pod", "--", *AWKWARD],
        ["logs", "pod", "--follow"],
        ["status", "pod"],
        ["stop", "pod"],
        ["delete", "pod"],
        ["bucket", "gs://bucket"],
    ],
    ids=lambda c: c[0],
)
def test_dry_run_prints_commands_and_runs_none(cloud, command):
    cloud.environment["FAKE_GCLOUD_HOSTS"] = "1"
    there = command[0] not in ("create", "bucket")
    if there:
        cloud("create", "pod", "--type=v5litepod-8")
        # push and run come to their last command only where all is ready for them.
        if command[0] != "push":
            cloud("push", "pod")
            cloud.plan("wait" if command[0] == "stop" else 0)
    before = cloud.calls()
    where = command.index("--") if "--" in command else len(command)
    output = cloud(*command[:where], "--dry-run", *command[where:])
    assert cloud.calls() == before
    printed = [c for c in _commands(output) if c[0] == "gcloud"]
    assert printed
    # The same calls are made by the command itself, each at least once.
    if command[0] != "logs":
        cloud(*command)
        made = cloud.calls()[len(before) :]
        for call in printed:
            if "scp" not in call:  # its archive lies in another temporary folder each time
                assert call[1:] in made, call


def _commands(output):
    """The commands of a dry run as argument lists, as a shell reads them."""
    return [c for c in (shlex.split(line, comments=True) for line in _lines(output)) if c]


def _lines(output):
    """Lines of commands; a quoted newline is no end of one."""
    line = ""
    for part in output.splitlines():
        line += part
        try:
            shlex.split(line, comments=True)
        except ValueError:
            line += "\n"
            continue
        yield line
        line = ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "unknown command ''; there are create, push"),
        (["destroy", "pod"], "unknown command 'destroy'"),
        (["create", "pod", "--typ=v4-8"], "create: unknown flag --typ"),
        (["delete", "pod", "--type=v4-8"], "delete: unknown flag --type"),
        (["status", "pod", "--force"], "status: unknown flag --force"),
        (["create", "pod", "--type"], "create: expected --type=VALUE"),
        (["create", "pod", "--spot=yes"], "create: --spot takes no value"),
        (["create", "pod"], "create: no --type (or TPU_TYPE)"),
        (["create", "pod", "--type=v4-8", "--slices=two"], "--slices is two, expected a number"),
        (["create", "pod; rm -rf", "--type=v4-8"], "expected a name of small letters"),
        (["create", "--type=v4-8"], "create: no name"),
        (["run", "pod"], "run: nothing after --"),
        (["run", "pod", "x"], "what pretrain.sh is given stands after --"),
        (["push", "pod", "--", "x"], "push: nothing may follow --"),
        (["push", "pod"], "push: no queued resource pod"),
        (["bucket", "b"], "bucket: expected gs://NAME"),
    ],
)
def test_invalid_commands_give_a_one_line_error(cloud, arguments, expected):
    output = cloud(*arguments, code=2)
    assert expected in output
    assert output.startswith("tpu.sh: ")
    assert output.count("\n") == 1


def test_zone_and_project_are_required(cloud):
    assert "no --zone (or TPU_ZONE)" in cloud("status", "pod", code=2, TPU_ZONE="")
    assert "no --project (or TPU_PROJECT)" in cloud("status", "pod", code=2, TPU_PROJECT="")


def test_without_gcloud(cloud):
    commands = cloud.path / "few"
    commands.mkdir()
    for name in ("bash", "dirname", "sed"):
        (commands / name).symlink_to(shutil.which(name) or "")
    output = cloud("status", "pod", code=2, PATH=str(commands))
    assert output.startswith("tpu.sh: gcloud is not on the PATH: install the Google Cloud CLI")
    assert output.count("\n") == 1


def test_errors_of_gcloud_are_shown(pod):
    pod.fault("describe pod", "PERMISSION_DENIED: tpu.queuedResources.get", 7)
    output = pod("status", "pod", code=7)
    assert "PERMISSION_DENIED: tpu.queuedResources.get" in output
    assert "queued resource pod cannot be queried" in output
    pod.fault("create", "RESOURCE_EXHAUSTED: quota", 9)
    assert "RESOURCE_EXHAUSTED: quota" in pod("create", "other", "--type=v4-8", code=9)
    pod.fault("ssh", "Could not fetch the key", 5)
    assert "Could not fetch the key" in pod("status", "pod", code=1)


def test_help(cloud):
    output = cloud("--help")
    assert output.startswith("Trains on Cloud TPUs")
    assert output.rstrip().endswith("and reported.")
