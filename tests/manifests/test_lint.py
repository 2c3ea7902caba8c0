"""The linter with manifests that break one rule each, with ours and with well-known ones."""

from __future__ import annotations

import copy
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lint_cases import ALONG, CASES, OF_TEXT
from lint_manifests import ELASTIC, MASTER, NOT_ELASTIC, SIMPLE, changed, good, patches, rules_of

from manifests import generate
from manifests.kinds import KINDS
from manifests.lint import fields, schemas
from manifests.lint.check import lint
from manifests.lint.documents import Unreadable
from manifests.lint.fields import TRAINER_VERSIONS
from manifests.lint.page import PAGE, page
from manifests.lint.registry import FORMER, RULES
from manifests.render import job_objects, pvcs
from manifests.spec import job_from, preset_names
from manifests.trainjob import RELEASES, for_release
from manifests.yamltext import to_manifest
from trainer.specbase import deep_merge


def text(*objects: dict) -> str:
    return to_manifest(list(objects))


@pytest.mark.parametrize("release", TRAINER_VERSIONS)
def test_the_manifests_that_the_cases_change_break_no_rule(release):
    result = lint({"good.yaml": text(*good().values())}, release)
    assert result.findings == []
    assert (result.objects, result.jobs) == (4, 3)


def test_every_rule_has_cases():
    assert {rule for rule, *_ in CASES} | OF_TEXT == RULES.keys()
    assert len(RULES) >= 20


@pytest.mark.parametrize(("rule", "release", "changes"), CASES)
def test_each_rule_finds_what_breaks_it(rule, release, changes):
    """No other rule finds anything, except those that its case necessarily breaks too."""
    result = lint({"x": text(*changed(*changes))}, release)
    found = [finding for finding in result.findings if finding.rule == rule]
    assert found, f"{rule} says nothing"
    assert all(finding.what and finding.path and finding.line for finding in found)
    assert rules_of(result) - {rule} <= ALONG.get(rule, set())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            (("MAIN/image", "registry.example:5000/trainer@sha256:" + "0" * 64),), id="a digest without a tag"
        ),
        pytest.param((("MAIN/env/0", {"name": "TOKENIZERS_PARALLELISM", "value": "false"}),), id="no token"),
        pytest.param((("MAIN/env/0", {"name": "HF_TOKEN_PATH", "value": "/etc/token"}),), id="a token's path"),
        pytest.param((("MAIN/env/0", {"name": "GITHUB_TOKEN", "value": "/etc/token"}),), id="a file"),
        pytest.param((("MAIN/env/2", {"name": "LEVEL", "value": "$(NCCL_DEBUG)"}),), id="a reference backwards"),
        pytest.param((("MAIN/env/0", {"name": "TEXT", "value": "$$(RANK)"}),), id="an escaped reference"),
        pytest.param((("MAIN/args", ["$(MASTER_ADDR)"]),), id="a reference in args"),
        pytest.param((("MAIN/env/0", {"name": "PET_LOG_DIR", "value": "/tmp"}),), id="an option of torchrun's own"),
        pytest.param((("WORKER/restartPolicy", "OnFailure"), ("RUN/backoffLimit", 3)), id="bounded restarts"),
        pytest.param((("MAIN/resources/limits/nvidia.com\0gpu", 2),), id="a number of GPUs"),
        pytest.param((("MAIN/resources/requests/memory", "65536Mi"),), id="the limit in another unit"),
        pytest.param((("RUN/schedulingPolicy", {"minAvailable": 2}),), id="a gang of all"),
        pytest.param((("RUN/suspend", True),), id="suspended for a queue"),
        pytest.param(
            (("POD/terminationGracePeriodSeconds", 15), ("POD/nodeSelector", {"cloud.google.com/gke-spot": "true"})),
            id="a grace that spot nodes can give",
        ),
        pytest.param(
            (("TEMPLATE/metadata", {"labels": {"sidecar.istio.io/inject": "false"}}),), id="no sidecar, by label"
        ),
        pytest.param(
            (("ELASTIC/minReplicas", 1), ("ELASTIC/maxReplicas", 4), ("job/spec/nprocPerNode", "auto")), id="elastic"
        ),
    ],
)
def test_what_only_looks_like_a_trap_is_none(changes):
    assert lint({"x": text(*changed(*changes))}).findings == []


LARGE = {"train": {"batch": {"tokens_per_step": 2**19}}, "cluster": {"gpus_per_node": 8, "nodes": 4, "queue": "team"}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("preset", "changes"), [*((name, {}) for name in preset_names()), ("h100-4b", LARGE)])
def test_our_own_jobs_are_clean(preset, changes, kind):
    job = job_from({"preset": preset}, deep_merge(changes, {"cluster": {"job": kind}}))
    for task in ("train", "evaluate", "export"):
        result = lint({task: text(*pvcs(job), *job_objects(job, task))})
        assert result.findings == []
        assert result.jobs == (2 if kind == "trainjob" else 1), "a TrainJob has a runtime beside it"


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_of_trainer_takes_our_trainjob_and_the_one_for_it(release):
    job = job_from({"preset": "h100-4b"}, deep_merge(LARGE, {"cluster": {"job": "trainjob"}}))
    for objects in (job_objects(job), for_release(job_objects(job), release)):
        assert lint({"x": text(*pvcs(job), *objects)}, release).findings == []


def test_our_examples_are_clean():
    for path, content in generate.files().items():
        result = lint({path: content})
        assert result.findings == []
        assert result.jobs or not path.startswith("examples/")


UNRESTRICTED = {
    "capabilities", "privilege-escalation", "run-as-non-root", "seccomp", "service-account-token", "writable-root"
}  # fmt: skip
CARELESS = {"clean-pod-policy", "no-deadline", "no-ttl", "restart-unbounded", "memory-limit", "istio-sidecar"}


def test_the_well_known_example_with_a_master():
    assert rules_of(lint({"simple": SIMPLE})) == UNRESTRICTED | CARELESS | {"master-init-container"}


def test_the_well_known_elastic_example():
    expected = UNRESTRICTED | CARELESS | {"elastic-autoscaler", "image-tag", "nproc-auto-cpu"}
    assert rules_of(lint({"elastic": ELASTIC})) == expected


def test_an_annotation_ignores_rules_for_its_object_only():
    ignoring = ELASTIC.replace("name: elastic", 'name: a, annotations: {yaongi/lint-ignore: "image-tag, no-ttl"}')
    result = lint({"one": ignoring, "other": ELASTIC})
    assert {f.rule for f in result.findings if f.source == "other"} - {
        f.rule for f in result.findings if f.source == "one"
    } == {"image-tag", "no-ttl"}


def test_fields_of_a_trainjob_depend_on_the_version():
    def unknown(version: str, **fields: object) -> list[str]:
        objects = good()
        objects["trainjob"]["spec"].update(fields)
        found = lint({"x": text(*objects.values())}, version).findings
        return [finding.what for finding in found if finding.rule == "unknown-field"]

    assert unknown("2.1", podTemplateOverrides=[]) == []
    assert "2.2 replaced it by runtimePatches" in unknown("2.2", podTemplateOverrides=[])[0]
    assert unknown("2.3", runtimePatches=[], activeDeadlineSeconds=5) == []
    (both,) = unknown("2.1", runtimePatches=[], activeDeadlineSeconds=5)
    assert "'runtimePatches'" in both and "'activeDeadlineSeconds'" in both
    assert "podTemplateOverrides, 2.2 by" in unknown("2.1", podSpecOverrides=[])[0]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("WORKER/replicas", "two", "replicas is the text 'two'"),
        ("ELASTIC/minReplicas", 1.5, "minReplicas is the number 1.5"),
        ("RUN/backoffLimit", False, "backoffLimit is the boolean false"),
        ("RUN/backoffLimit", [3], "backoffLimit is a list"),
        ("TRAINER/numNodes", "two", "numNodes is the text 'two'"),
        ("TRAINER/numProcPerNode", "auto", "numProcPerNode is the text 'auto'"),
        ("runtime/spec/mlPolicy/numNodes", "1", "numNodes is the text '1'"),
        ("REPLICATED/template/spec/backoffLimit", "none", "backoffLimit is the text 'none'"),
        ("REPLICATED/template/spec/template/spec/priority", "high", "priority is the text 'high'"),
    ],
)
def test_what_stands_for_a_number_is_told(path, value, said):
    found = lint({"x": text(*changed((path, value)))}).findings
    assert said in [finding.what for finding in found if finding.rule == "not-a-number"]


@pytest.mark.parametrize(
    ("release", "path", "value"),
    [("2.3", "WORKER/replicas", 2.0), ("2.1", "TRAINER/numProcPerNode", "2"), ("2.3", "RUN/backoffLimit", None)],
)
def test_what_the_cluster_takes_for_a_number_is_one(release, path, value):
    assert not {rule for rule in rules_of(lint({"x": text(*changed((path, value)))}, release)) if "a-number" in rule}


def test_words_for_the_number_of_processes_are_those_of_trainer_2_1():
    for word, rules in (("auto", set()), ("gpu", set()), ("eight", {"trainjob-num-proc"})):
        assert rules_of(lint({"x": text(*changed(("TRAINER/numProcPerNode", word)))}, "2.1")) == rules


@pytest.mark.parametrize(
    ("command", "args"),
    [
        (["torchrun", "--nproc_per_node=2", "--nnodes", "2", "train.py", "--standalone", "--node_rank=0"], []),
        (["torchrun", "--nproc-per-node", "gpu", "--nnodes=2:2", "-m", "train"], []),
        (["python", "-m", "torch.distributed.run", "--nproc_per_node=$(PET_NPROC_PER_NODE)", "train.py"], []),
        (["bash", "-c", "torchrun --nproc_per_node ${GPUS:-4} --node_rank $RANK train.py"], []),
        (["torchrun", "--rdzv_endpoint=job-worker-0:23456", "--rdzv_backend=c10d", "train.py"], []),
        (["sh", "-c", "echo python train.py # torchrun --standalone"], []),
        (["sh", "-c", "cat <<EOF > run.sh\ntorchrun --standalone train.py\nEOF\nexec launcher"], []),
        (["sh", "-c", "for i in 0 1; do python train.py --rank $i & done; wait"], []),
        (["sh", "-c", "python download.py && torchrun train.py"], []),
        (["bash", "run.sh", "python", "train.py"], []),
        (["python", "train.py", "--devices", "2"], []),
        (["python", "-m", "pip", "list"], []),
        (["python", "-c", "import torch"], []),
        (["sleep", "infinity"], []),
        ([], ["--nproc_per_node=8"]),
        ([], ["train.py"]),
        (["sh", "-c", '"'], []),
        (["sh", "-c"], []),
        (["accelerate", "launch", "--num_processes=4", "--num_machines=2", "train.py"], []),
        (["mpirun", "--allow-run-as-root", "-np", "4", "--hostfile", "h", "python", "train.py"], []),
        (["python", "-c", "print('$HOME')"], []),
        (["python", "-m", "launcher", "$$HOME", "$(MASTER_ADDR)", "^a$"], []),
    ],
)
def test_command_lines_that_are_right_or_cannot_be_known(command, args):
    changes = [("MAIN/command", command), ("MAIN/args", args), ("WORKER/restartPolicy", "OnFailure")]
    assert lint({"x": text(*changed(*changes, ("RUN/backoffLimit", 3)))}).findings == []


def test_what_one_pod_may_say_is_no_trap():
    alone = (("WORKER/replicas", 1), ("ELASTIC/minReplicas", 1), ("ELASTIC/maxReplicas", 1))
    bounded = (("WORKER/restartPolicy", "OnFailure"), ("RUN/backoffLimit", 3))
    for option in ("--standalone", "--node_rank=0", "--rdzv_endpoint=localhost:29500", "--master_addr=127.0.0.1"):
        command = ("MAIN/command", ["torchrun", option, "train.py"])
        assert lint({"x": text(*changed(command, *alone, *bounded))}).findings == [], option


def test_torchrun_with_a_master_sets_the_world_size_itself():
    changes = [NOT_ELASTIC, MASTER, ("job/spec/nprocPerNode", ...)]
    changes += [("MAIN/command", ["torchrun", "train.py"]), ("WORKER/restartPolicy", "Never")]
    changes += [("MASTER/template/spec/containers/0/command", ["torchrun", "train.py"])]
    assert rules_of(lint({"x": text(*changed(*changes))})) == {"master-init-container"}


@pytest.mark.parametrize(("name", "value"), [("EOS_TOKEN", "</s>"), ("MAX_TOKEN", "2048"), ("API_TOKEN", "<yours>")])
def test_tokens_of_a_tokenizer_are_no_secrets(name, value):
    assert lint({"x": text(*changed(("MAIN/env/0", {"name": name, "value": value})))}).findings == []


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("RUN/cleanPodPolicy", 5, "not-a-string"),
        ("RUN", "Running", "wrong-type"),
        ("WORKER/restartPolicy", ["ExitCode"], "not-a-string"),
        ("MAIN/name", ..., "missing-field"),
        ("MAIN/name", "My_Container", "bad-name"),
        ("POD/containers", [], "out-of-range"),
        ("POD/containers/0", "pytorch", "wrong-type"),
        ("POD/volumes/0/name", ..., "missing-field"),
        ("POD/volumes/0/persistentVolumeClaims", {"claimName": "a"}, "unknown-field"),
        ("MAIN/volumeMounts", "shm", "wrong-type"),
        ("MAIN/volumeMounts/1/mountPath", ..., "missing-field"),
        ("trainjob/spec/runtimeRef/name", 5, "not-a-string"),
    ],
)
def test_what_only_follows_from_a_mistake_of_structure_is_not_told_too(path, value, rule):
    objects = changed((path, ...), (path, value)) if path == "POD/containers/0" else changed((path, value))
    assert [finding.rule for finding in lint({"x": text(*objects)}).findings if finding.severity == "error"] == [rule]


def test_a_misspelt_field_is_not_missed_too_but_what_else_is_wrong_is_told():
    misspelt = (("RUN/cleanPodPolicy", ...), ("RUN/cleanPodPolcy", "Running"))
    assert rules_of(lint({"x": text(*changed(*misspelt))})) == {"unknown-field"}
    both = changed(*misspelt, ("RUN/ttlSecondsAfterFinished", -1), ("POD/hostNetwork", True))
    assert rules_of(lint({"x": text(*both)})) == {"unknown-field", "negative-number", "host-namespace"}


NODE = "runtime/spec/template/spec/replicatedJobs/0/template/spec/template/spec"
SHM = {
    "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}],
    "containers": [{"name": "node", "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}]}],
}


@pytest.mark.parametrize(
    ("version", "field", "value"),
    [
        ("2.0", "podSpecOverrides", [{"targetJobs": [{"name": "node"}], **SHM}]),
        ("2.1", "podTemplateOverrides", [{"targetJobs": [{"name": "node"}], "spec": SHM}]),
        ("2.2", "runtimePatches", patches(SHM)),
        ("2.3", "runtimePatches", patches(SHM)),
    ],
)
def test_a_trainjob_is_judged_with_its_overrides_merged_into_the_runtime(version, field, value):
    bare = [
        (f"{NODE}/containers/0/volumeMounts/1", ...),
        (f"{NODE}/volumes/1", ...),
    ]
    assert rules_of(lint({"x": text(*changed(*bare))}, version)) == {"dev-shm"}
    merged = changed(*bare, (f"trainjob/spec/{field}", value))
    assert lint({"x": text(*merged)}, version).findings == []
    other = json.loads(json.dumps(value).replace('"name": "node"', '"name": "other"', 1))
    assert "dev-shm" in rules_of(lint({"x": text(*changed(*bare, (f"trainjob/spec/{field}", other)))}, version))


def test_volumes_that_jobset_makes_are_there_from_trainer_2_2_on():
    claims = [{"templates": [{"metadata": {"name": "scratch"}, "spec": {"accessModes": ["ReadWriteMany"]}}]}]
    changes = [("runtime/spec/template/spec/volumeClaimPolicies", claims)]
    changes += [(f"{NODE}/containers/0/volumeMounts/0", {"name": "scratch", "mountPath": "/scratch"})]
    objects = changed(*changes)
    assert lint({"x": text(*objects)}, "2.2").findings == []
    assert rules_of(lint({"x": text(*objects)}, "2.1")) == {"unknown-field"}


def test_the_fields_of_kubernetes_are_those_of_its_own_schemas():
    written = fields.KUBERNETES.read_text(encoding="utf-8")
    assert written == schemas.text(schemas.kubernetes()), "run: python -m manifests.lint.schemas"


def test_annotations_may_have_the_former_names_of_rules():
    was = ("job/metadata/annotations", {"yaongi/lint-ignore": "unknown-pod-field, env-not-a-string"})
    assert lint({"x": text(*changed(was, ("MAIN/args", [5]), ("MAIN/volumeMount", [])))}).findings == []
    assert set(FORMER.values()) <= RULES.keys()


@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_dropped_replaced_or_retyped_no_rule_fails(seed):
    rng = random.Random(seed)
    junk = [
        None,
        0,
        -1,
        1.5,
        True,
        "",
        "x",
        "1Gi",
        "sh -c '",
        [],
        {},
        [None],
        ["x"],
        [{}],
        [[1]],
        {"a": None},
        {"": ""},
    ]
    starts = [
        ["sh", "-c", "$("],
        ["torchrun", "--nnodes=:", "--nproc_per_node"],
        ["bash", "-c", "a <<E\n"],
        "torchrun",
        [{}],
    ]
    for _ in range(50):
        objects = list(good().values())
        for _ in range(rng.randint(1, 4)):
            place = rng.choice(objects)
            while True:
                key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
                if not (isinstance(place[key], dict | list) and place[key]) or rng.random() < 0.2:
                    break
                place = place[key]
            if rng.random() < 0.3:
                del place[key]
            else:
                place[key] = copy.deepcopy(rng.choice(starts if key in ("command", "args") else junk))
            objects = [o for o in objects if o] or [good()["job"]]
        known = [o for o in objects if isinstance(o.get("kind"), str) and "apiVersion" in o]
        result = lint({"x": text(*known)}, rng.choice(TRAINER_VERSIONS)) if known else None
        assert result is None or all(finding.line > 0 and finding.what for finding in result.findings)


JUNK = st.sampled_from([None, 0, -1, True, "", "x", [], {}, [None], ["x"], [{}], {"a": None}, 1.5, "1Gi", [[1]]])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_no_shape_of_a_manifest_makes_a_rule_fail(data):
    objects = list(good().values())
    place = data.draw(st.sampled_from(objects))
    while isinstance(place, dict | list) and place:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not place[key] or not isinstance(place[key], dict | list) or data.draw(st.integers(0, 3)) == 0:
            break
        place = place[key]
    place[key] = data.draw(JUNK)
    if isinstance(objects[0].get("kind"), str) and "apiVersion" in objects[0]:
        try:
            lint({"x": text(*objects)})
        except Unreadable:  # kind itself was hit
            assert not all(isinstance(o.get("kind"), str) and "apiVersion" in o for o in objects)


def test_the_page_is_what_the_rules_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m manifests.lint.page"
