"""A fake `gcloud`: TPUs are folders, and their hosts run the commands sent to them.

Everything lies in $FAKE_GCLOUD: calls.jsonl (the argument lists), resources.json, buckets.json, accounts.json, and
hosts/NODE-w-N, the home of each host. Commands run in `bash -c`, one host after the other, as `ssh` would run them.
faults.json, a list of {"match": ..., "message": ..., "code": ...}, makes calls fail whose arguments hold `match`;
unreachable.json lists hosts that ssh does not reach. Standard library only, so that it starts in no time.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["FAKE_GCLOUD"])
HOSTS = int(os.environ.get("FAKE_GCLOUD_HOSTS", "2"))
"""Hosts of a slice."""


def read(name, default):
    path = ROOT / name
    return json.loads(path.read_text()) if path.exists() else default


def write(name, value):
    (ROOT / name).write_text(json.dumps(value))


def fail(message, code=1):
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    sys.exit(code)


def split(argv):
    """(positional arguments, flags as a dict); flags have the form --name=value or --name."""
    flags = dict(a[2:].partition("=")[::2] for a in argv if a.startswith("--"))
    return [a for a in argv if not a.startswith("--")], flags


def nodes(resource):
    spec = resource["tpu"]["nodeSpec"][0]
    if "nodeId" in spec:
        return [spec["nodeId"]]
    many = spec["multisliceParams"]
    return [f"{many['nodeIdPrefix']}-{i}" for i in range(many["nodeCount"])]


def hosts(node):
    return [f"{node}-w-{i}" for i in range(HOSTS)]


def create(name, flags):
    resources = read("resources.json", {})
    if name in resources:
        fail(f"ALREADY_EXISTS: {name}")
    account = {"serviceAccount": {"email": flags["service-account"]}} if "service-account" in flags else {}
    node = {"acceleratorType": flags["accelerator-type"], "runtimeVersion": flags["runtime-version"], **account}
    spec = {"node": node}
    if "node-count" in flags:
        spec["multisliceParams"] = {"nodeCount": int(flags["node-count"]), "nodeIdPrefix": flags["node-prefix"]}
    else:
        spec["nodeId"] = flags["node-id"]
    # The states that later calls return, one after the other; the last one remains.
    states = os.environ.get("FAKE_GCLOUD_STATES", "ACTIVE").split(",")
    resources[name] = {"states": states, "tpu": {"nodeSpec": [spec]}, **({"spot": {}} if "spot" in flags else {})}
    write("resources.json", resources)
    print(f"Create request issued for: [{name}]", file=sys.stderr)
    for each in nodes(resources[name]):
        for host in hosts(each):
            (ROOT / "hosts" / host).mkdir(parents=True)


def describe(name):
    resources = read("resources.json", {})
    if name not in resources:
        fail(f"NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/{name}' was not found")
    states = resources[name].pop("states")
    print(json.dumps(resources[name] | {"state": {"state": states[0]}}, indent=2))
    resources[name]["states"] = states[1:] or states
    write("resources.json", resources)


def chosen(name, flags):
    listed = nodes(read("resources.json", {})[name])
    slices = listed if flags["node"] == "all" else [listed[int(flags["node"])]]
    for each in slices:
        found = hosts(each)
        yield from found if flags["worker"] == "all" else [found[int(flags["worker"])]]


def ssh(name, flags):
    worst = 0
    for host in chosen(name, flags):
        if host in read("unreachable.json", []):
            print(f"Failed to connect to {host}", file=sys.stderr)
            continue
        home = ROOT / "hosts" / host
        environment = os.environ | {"HOME": str(home), "HOSTNAME": host}
        done = subprocess.run(["bash", "-c", flags["command"]], cwd=home, env=environment, stdin=subprocess.DEVNULL)
        worst = worst or done.returncode
    sys.exit(worst)


def scp(source, target, flags):
    name, _, path = target.partition(":")
    for host in chosen(name, flags):
        shutil.copy(source, ROOT / "hosts" / host / path)


def bucket(verb, url, flags):
    buckets = read("buckets.json", {})
    if verb == "describe":
        if url not in buckets:
            fail(f"{url} not found: 404.")
        print("|".join(buckets[url]["settings"]))
    elif verb == "create":
        assert json.loads(Path(flags["lifecycle-file"]).read_text())
        kept = "uniform-bucket-level-access" in flags and "public-access-prevention" in flags
        settings = [flags["location"].upper(), str(kept), "enforced" if kept else "inherited"]
        buckets[url] = {"settings": settings, "roles": []}
    elif verb == "add-iam-policy-binding":
        binding = [flags["member"], flags["role"]]
        buckets[url]["roles"] += [] if binding in buckets[url]["roles"] else [binding]
    write("buckets.json", buckets)


def main(argv):
    with (ROOT / "calls.jsonl").open("a") as file:
        file.write(json.dumps(argv) + "\n")
    for fault in read("faults.json", []):
        if fault["match"] in " ".join(argv):
            fail(fault["message"], fault["code"])
    words, flags = split(argv)
    match words:
        case ["compute", "tpus", "queued-resources", "create", name]:
            create(name, flags)
        case ["compute", "tpus", "queued-resources", "describe", name]:
            describe(name)
        case ["compute", "tpus", "queued-resources", "delete", name]:
            resources = read("resources.json", {})
            for node in nodes(resources.pop(name)):
                for host in hosts(node):
                    shutil.rmtree(ROOT / "hosts" / host)
            write("resources.json", resources)
        case ["compute", "tpus", "queued-resources", "ssh", name]:
            ssh(name, flags)
        case ["compute", "tpus", "queued-resources", "scp", source, target]:
            scp(source, target, flags)
        case ["compute", "tpus", "tpu-vm", "describe", _]:
            print(HOSTS if "networkEndpoints" in flags["format"] else "READY")
        case ["storage", "buckets", verb, url]:
            bucket(verb, url, flags)
        case ["iam", "service-accounts", "describe", email]:
            if email not in read("accounts.json", []):
                fail(f"NOT_FOUND: Unknown service account {email}")
            print(email)
        case ["iam", "service-accounts", "create", name]:
            write("accounts.json", [*read("accounts.json", []), f"{name}@{flags['project']}.iam.gserviceaccount.com"])
        case _:
            fail(f"Invalid choice: {words}", 2)


if __name__ == "__main__":
    main(sys.argv[1:])
