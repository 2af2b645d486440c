"""The launchers: the output of a dry run, what they refuse, and that they are clean bash."""

import json
import math
import os
import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from readmes import READMES

from bltjax.distributed.topology import CHIPS

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("tpu_vm", "gke", "slurm")
IMAGE = "us-docker.pkg.dev/p/i/bltjax:1"
TRAIN = ["--", "train", "--config=configs/blt.py:1b", "--workdir=gs://b/run"]


def launched(launcher: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", f"launch/{launcher}.sh", *words], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | variables,
    )  # fmt: skip


def dry_run(launcher: str, *words: str) -> str:
    # With only the shell's own programs in PATH, nothing can be contacted.
    split = words.index("--") if "--" in words else len(words)
    done = launched(launcher, *words[:split], "--dry-run", *words[split:], PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_clean_bash():
    scripts = sorted(str(path) for path in (ROOT / "launch").glob("*.sh"))
    done = subprocess.run(
        ["shellcheck", "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_no_secrets():
    for path in (ROOT / "launch").iterdir():
        if path.is_file():
            found = re.search(r"(?i)(password|secret|token|api_key|BEGIN .*KEY)[\"']?\s*[:=]\s*\S",
                              path.read_text())  # fmt: skip
            assert not found, f"{path.name}: {found}"


QR = "gcloud compute tpus queued-resources"
ALL = "--node=all --worker=all"
STATE = f"{QR} describe b --zone=us-east5-a '--format=value(state.state)'\n"
CREATE = (
    f"{QR} create b --zone=us-east5-a --accelerator-type=v5p-256 --runtime-version=v2-alpha-tpuv5"
    " --node-count=2 --node-prefix=b --spot --scopes=cloud-platform\n"
    f"# every 60 s, until it says ACTIVE:\n{STATE}"
)
SETUP = (
    "bash -c 'git ls-files -z | tar -cz --null --files-from=- --file=\"$0\"' /tmp/bltjax-b.tar.gz\n"
    f"{QR} scp /tmp/bltjax-b.tar.gz b:bltjax.tar.gz --zone=us-east5-a {ALL}\n"
    f"{QR} ssh b --zone=us-east5-a {ALL} '--command=rm -rf bltjax/bltjax bltjax/configs && mkdir -p"
    " bltjax && tar -xzf bltjax.tar.gz -C bltjax && bash bltjax/launch/host.sh install'\n"
)
RUN = (
    f"{QR} ssh b --zone=us-east5-a {ALL} '--command=bash bltjax/launch/host.sh start train"
    " --config=configs/blt.py:1b --workdir=gs://b/run'\n"
)
WATCH = (
    f"# every 60 s, until every host has ended:\n{STATE}"
    f"{QR} ssh b --zone=us-east5-a {ALL} '--command=bash bltjax/launch/host.sh state'\n"
    f"{QR} ssh b --zone=us-east5-a --node=0 --worker=0 '--command=tail -n 2 bltjax/runs/host.log'\n"
)
DELETE = f"{QR} delete b --zone=us-east5-a --force --quiet\n"
SLICES = ["--topology", "v5p:4x4x8", "--slices", "2", "--spot"]


@pytest.mark.parametrize(
    ("action", "words", "printed"),
    [
        ("create", SLICES, CREATE),
        ("setup", [], SETUP),
        ("run", TRAIN, RUN),
        ("watch", [], WATCH),
        ("delete", [], DELETE),
        (
            "keep",
            SLICES + TRAIN,
            f"{CREATE}{SETUP}{RUN}{WATCH}# if that ends with 75, all over again, after:\n{DELETE}",
        ),
    ],
)
def test_tpu_vm(action, words, printed):
    assert dry_run("tpu_vm", action, "--name", "b", "--zone", "us-east5-a", *words) == printed


@pytest.mark.parametrize(
    ("topology", "accelerator", "machine", "hosts"),
    [
        ("v5e:1x1", "v5litepod-1", "ct5lp-hightpu-1t", 1),
        ("v5e:2x4", "v5litepod-8", "ct5lp-hightpu-8t", 1),
        ("v5e:16x16", "v5litepod-256", "ct5lp-hightpu-4t", 64),
        ("v6e:4x4", "v6e-16", "ct6e-standard-4t", 4),
        ("v4:2x2x1", "v4-8", "ct4p-hightpu-4t", 1),
        ("v5p:4x4x4", "v5p-128", "ct5p-hightpu-4t", 16),
        ("v5p:4x8x12", "v5p-768", "ct5p-hightpu-4t", 96),
        ("v5p:16x16x24", "v5p-12288", "ct5p-hightpu-4t", 1536),
        ("v4:4x4x148", "v4-4736", "ct4p-hightpu-4t", 592),  # 37 cubes: only in a line
    ],
)
def test_slices(topology, accelerator, machine, hosts):
    words = ["create", "--name", "b", "--topology", topology]
    assert f"--accelerator-type={accelerator} " in dry_run("tpu_vm", *words, "--zone", "us-east5-a")
    pool = dry_run("gke", *words, "--cluster", "c", "--location", "us-east5")
    assert f" --machine-type={machine} " in pool and f" --num-nodes={hosts} " in pool
    assert (f" --tpu-topology={topology.split(':')[1]} " in pool) == (hosts > 1)


def test_slices_are_those_that_plans_know():
    """The table in bash has the shapes of the table in Python, and no others."""
    tried = {
        f"{name}:{shape}" for name in ("v4", "v5e", "v5p", "v6e")
        for shape in (*CHIPS[name].shapes, "2x2x8", "3x3x3", "8x4x4", "2x8", "16x16x28", "32x32")
    }  # fmt: skip
    loop = """source launch/launching.sh
    fail() { exit 1; }
    for word in "$@"; do (slice "$word" && echo "$word $chips $hosts"); done"""
    words = ["bash", "-c", loop, "slices", *sorted(tried)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    found = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    offered = {f"{name}:{shape}" for name in ("v4", "v5e", "v5p", "v6e")
               for shape in CHIPS[name].shapes}  # fmt: skip
    assert found.keys() == offered
    for name, (chips, hosts) in found.items():
        sides = [int(side) for side in name.split(":")[1].split("x")]
        assert int(chips) == math.prod(sides)
        # In two dimensions up to 8 chips are one host.
        alone = len(sides) == 2 and int(chips) <= 8
        assert int(hosts) == (1 if alone else int(chips) // CHIPS[name.split(":")[0]].host_chips)


def test_gke():
    pool = "--cluster=c --location=us-east5-a"
    where = ["--cluster", "c", "--location", "us-east5-a", "--slices", "2", "--name", "b"]
    assert dry_run("gke", "create", *where, "--topology", "v6e:8x8", "--spot") == "".join(
        f"gcloud container node-pools create b-{n} {pool} --machine-type=ct6e-standard-4t"
        " --tpu-topology=8x8 --num-nodes=16 --spot --scopes=cloud-platform\n"
        for n in range(2)
    )
    assert dry_run("gke", "delete", *where) == "".join(
        f"gcloud container node-pools delete b-{n} {pool} --quiet\n" for n in range(2)
    )
    assert dry_run("gke", "image", "--image", IMAGE) == (
        f"docker build --file launch/Dockerfile --build-arg EXTRAS=tpu,gs --tag {IMAGE} .\n"
        f"docker push {IMAGE}\n"
    )
    of = "jobset.sigs.k8s.io/jobset-name=b"
    assert dry_run("gke", "watch", "--name", "b") == (
        f"kubectl get jobset b\nkubectl get pods --selector {of} --output wide\n"
        f"kubectl logs --follow --selector {of},jobset.sigs.k8s.io/job-index=0,"
        "batch.kubernetes.io/job-completion-index=0\n"
    )
    assert dry_run("gke", "stop", "--name", "b") == "kubectl delete jobset b\n"


def rendered(topology: str, *words: str) -> dict:
    options = ["--name", "b", "--topology", topology, "--slices", "2", "--image", IMAGE]
    text = dry_run("gke", "run", *options, *TRAIN, *words)
    first, *lines, last = text.splitlines()
    assert (first, last) == ("kubectl apply --filename - << 'MANIFEST'", "MANIFEST")
    return yaml.safe_load("\n".join(lines))


# What JobSet adds around a Kubernetes Job (jobset.x-k8s.io/v1alpha2), as far as it is used here;
# a field that is misspelt is one too many.
def only(required: set[str], given: dict) -> dict:
    assert given.keys() == required, given.keys() ^ required
    return given


@pytest.mark.parametrize("kubernetes", ["1.31", "1.34"])
def test_manifest_is_a_jobset_around_a_kubernetes_job(kubernetes):
    manifest = only({"apiVersion", "kind", "metadata", "spec"}, rendered("v5p:4x4x8"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "b"
    spec = only({"failurePolicy", "replicatedJobs"}, manifest["spec"])
    policy = only({"maxRestarts", "rules"}, spec["failurePolicy"])
    assert policy["maxRestarts"] == 50
    (rule,) = policy["rules"]
    assert rule == {
        "name": "anError",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    (job,) = spec["replicatedJobs"]
    assert only({"name", "replicas", "template"}, job)["replicas"] == 2
    inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "b"}}
    kubernetes_validate.validate(inner | only({"spec"}, job["template"]), kubernetes, strict=True)


def test_manifest_is_checked_indeed():
    (job,) = rendered("v5p:4x4x8")["spec"]["replicatedJobs"]
    inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "b"}, **job["template"]}
    inner["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(inner, "1.31", strict=True)


def test_manifest_says_what_was_asked_for():
    odd = '--config.data.train.text.path=gs://b/it\'s "a" $(HOME) ${NAME} \\ 字: #'
    (job,) = rendered("v6e:8x8", odd)["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 16
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "8x8",
    }
    (container,) = pod["containers"]
    # Kubernetes reads $$ as $, and would expand $(HOME).
    assert container["args"] == [*TRAIN[1:], odd.replace("$", "$$")]
    assert container["image"] == IMAGE
    tpus = {"google.com/tpu": 4}
    assert container["resources"] == {"requests": tpus, "limits": tpus}
    # The same handling of exit codes as in restart.sh: an error is not retried.
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": "bltjax", "operator": "In", "values": [1, 2]}
    assert container["name"] == "bltjax" and spec["backoffLimit"] == 0


def test_image_has_what_it_copies():
    """Every file of the image exists, and is not excluded from the build."""
    copied = re.findall(r"^COPY (.*) \S+$", (ROOT / "launch/Dockerfile").read_text(), re.MULTILINE)
    names = " ".join(copied).split()
    assert {"pyproject.toml", "bltjax", "configs"} <= set(names)
    kept = (ROOT / "launch/Dockerfile.dockerignore").read_text().splitlines()
    for name in names:
        assert (ROOT / name).exists() and f"!{name}" in kept, name


def test_slurm():
    words = ["--nodes", "4", "--cpus", "12", "--time", "24:00:00", "--partition", "gpu"]
    command = ["--", "train", "--config=configs/blt.py:1b", "--workdir=/shared/a run"]
    assert dry_run("slurm", *words, *command) == (
        "bash -euc 'source launch/environment.sh gpu,gs'\nmkdir -p runs\n"
        "sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --time=24:00:00"
        " --partition=gpu launch/slurm_job.sh train --config=configs/blt.py:1b"
        " '--workdir=/shared/a run'\n"
    )


def test_words_reach_a_host_as_they_were_written():
    odd = '--config.name=it\'s $HOME `id` "x" \\ *'
    *_, printed = dry_run(
        "tpu_vm", "run", "--name", "b", "--zone", "us-east5-a", *TRAIN, odd
    ).splitlines()
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    # Once as the shell here reads it, once as the shell of the host does.
    local = subprocess.run(
        ["bash", "-c", f"python3 -c '{show}' {printed}"], capture_output=True, text=True
    )
    (remote,) = [w for w in json.loads(local.stdout) if w.startswith("--command=")]
    remote = remote.removeprefix("--command=").replace("bash bltjax/launch/host.sh start ", "")
    there = subprocess.run(
        ["bash", "-c", f"python3 -c '{show}' {remote}"], capture_output=True, text=True
    )
    assert json.loads(there.stdout) == [*TRAIN[1:], odd]


def test_commands_that_readers_are_shown():
    cells = json.loads((ROOT / "launch/colab.ipynb").read_text())["cells"]
    texts = [path.read_text(encoding="utf-8") for path in READMES]
    texts += ["".join(cell["source"]) for cell in cells]
    commands = [
        command.replace("\\\n", " ")
        for text in texts
        for command in re.findall(
            r"^ *bash (launch/(?:tpu_vm|gke|slurm)\.sh (?:.*\\\n)*.*)$", text, re.MULTILINE
        )
    ]
    assert len(commands) == 4
    for command in commands:
        assert " --dry-run " in command
        done = subprocess.run(
            ["bash", "-c", f"bash {command}"], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        assert done.returncode == 0 and "configs/blt.py:1b" in done.stdout, done.stderr


TPU = ["create", "--name", "b", "--zone", "us-east5-a"]
RUN_TPU = ["run", "--name", "b", "--zone", "us-east5-a"]


@pytest.mark.parametrize(
    ("launcher", "words", "message"),
    [
        ("tpu_vm", ["start"], "start is not an action"),
        ("tpu_vm", [*TPU, "--slice", "2"], "there is no option --slice"),
        ("tpu_vm", [*TPU, "--topology"], "--topology needs a value"),
        ("tpu_vm", TPU, "--topology is missing; it looks like v5p:4x4x4"),
        ("tpu_vm", [*TPU, "--topology", "v7:2x2"], "chip v7; there are v4, v5e, v5p and v6e"),
        ("tpu_vm", [*TPU, "--topology", "v5e:4x2"], "v5e has no slice of 4x2; there are 1x1, 2x2"),
        ("tpu_vm", [*TPU, "--topology", "v5p:4x4"], "v5p has no slice of 4x4"),
        ("tpu_vm", [*TPU, "--topology", "v5p:8x4x4"], "multiples of 4 in rising order"),
        ("tpu_vm", [*TPU, "--topology", "v5p:16x16x32"], "up to 6144 chips"),
        ("tpu_vm", [*TPU, "--topology", "v5p:4x4x16"], "v5p-512 is a slice of 4x8x8, not 4x4x16"),
        ("tpu_vm", [*TPU, "--topology", "v5e:4x4", "--slices", "0"], "--slices is 0, not 1 to 64"),
        ("tpu_vm", [*TPU, "--topology", "v5e:4x4", "--slices", "x"], "--slices is x, not 1 to 64"),
        ("tpu_vm", [*TPU, "--topology", "v5e:4x4", "--spot", "--reserved"], "exclude each other"),
        ("tpu_vm", ["delete", "--name", "B;ls", "--zone", "us-east5-a"], "--name is B;ls; it"),
        ("tpu_vm", ["delete", "--name", "b", "--zone", "here"], "--zone is here; it looks like"),
        ("tpu_vm", ["delete", "--zone", "us-east5-a"], "--name is missing; it looks like"),
        ("tpu_vm", ["watch", "--name", "b", "--zone", "us-east5-a", *TRAIN], "runs nothing"),
        ("tpu_vm", RUN_TPU, "nothing to run: write -- and a verb"),
        ("tpu_vm", [*RUN_TPU, "--", "--config=x"], "begins with --config=x, not with a verb"),
        ("tpu_vm", [*RUN_TPU, "--", "train", "--config=configs/no.py"], "configs/no.py: no such"),
        ("tpu_vm", [*RUN_TPU, "--", "train", "--workdir=/tmp/x"], "hosts share no disk, and lose"),
        ("tpu_vm", [*RUN_TPU, "--", "train", "--workdir", "gs://b"], "with ="),
        ("gke", ["run", "--name", "b", "--topology", "v5e:4x4", *TRAIN], "--image is missing"),
        ("gke", ["image", "--image", "x y"], "--image is x y; it looks like"),
        ("gke", ["create", "--name", "b", "--topology", "v5e:4x4"], "--cluster is missing"),
        ("gke", ["run", "--name", "b", "--topology", "v5e:3x3"], "v5e has no slice of 3x3"),
        ("slurm", ["--nodes", "two", *TRAIN], "--nodes is two, not 1 to 4096"),
        ("slurm", ["--time", "1 day", *TRAIN], "--time is 1 day; it looks like 24:00:00"),
        ("slurm", ["--partition", "a b", *TRAIN], "--partition is a b; it looks like"),
        ("slurm", [], "nothing to run"),
    ],
)
def test_refused(launcher, words, message):
    done = launched(launcher, *words)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"{launcher}.sh: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_help(launcher):
    done = launched(launcher, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: bash launch/{launcher}.sh ")
    script = (ROOT / "launch" / f"{launcher}.sh").read_text()
    options = {option for match in re.findall(r"^ {8}(--[-|a-z_]+)\)", script, re.MULTILINE)
               for option in match.split("|")}  # fmt: skip
    assert len(options - {"--"}) > 5
    for option in options - {"--"}:
        assert option in done.stdout, f"{option} is not in the usage of {launcher}.sh"
    assert max(map(len, done.stdout.splitlines())) <= 100
