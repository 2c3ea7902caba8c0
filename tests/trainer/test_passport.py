"""The passport of an export, its signature, and what `yaongi verify` finds when something was changed."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import former
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from made_run import make_run, save_checkpoint

from trainer import evaluate, export, passport
from trainer.checkpoints import checkpoint
from trainer.data.manifest import read_manifest
from trainer.pretrained import find

Answer = tuple[int, str, str]
BENCHMARK = {
    "task": "kmmlu",
    "metric": "acc",
    "value": 0.5,
    "stderr": 0.1,
    "num_fewshot": 5,
    "samples": 25,
    "version": "1",
}
KEYS: dict[str, Callable[[], Any]] = {
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "ecdsa": lambda: ec.generate_private_key(ec.SECP256R1()),
}


def write_key(folder: Path, name: str, key: Any, passphrase: bytes = b"") -> tuple[Path, Path]:
    """Files with the private and the public key."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    lock = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its data, its signed export, and two keys."""
    folder = tmp_path_factory.mktemp("made")
    spec, _ = make_run(folder, evaluate={"max_tokens": 50})
    evaluate.run(spec)
    run = Path(spec.run_dir)
    scores = json.loads((run / "eval.json").read_text())
    numbers = {"metrics": {"acc": {"value": 0.5, "stderr": 0.1}}, "num_fewshot": 5, "samples": 25, "version": 1}
    (run / "eval.json").write_text(json.dumps(scores | {"benchmarks": {"kmmlu": numbers}}))
    digest = scores["checkpoint_digest"]
    result = {"checkpoint_digest": digest, "device": "NVIDIA H200"}
    result |= {"tokens_per_second": 1.0, "seconds": 6.0, "world_size": 1, "restarts": 0}
    (run / "result.json").write_text(json.dumps(result))
    times = [
        {"started": 100.0 * n, "until": 100.0 * n + 3, "from_step": 0, "step": 6 * n, "seconds": {}} for n in (1, 2)
    ]
    (run / "goodput.json").write_text(json.dumps({"processes": times}))
    (run / "job.yaml").write_text("cluster: {target: kubernetes, image: 'r/trainer:1@sha256:0abc'}\n")
    with pytest.MonkeyPatch.context() as patch:
        private, _ = write_key(folder, "ours", KEYS["ed25519"]())
        write_key(folder, "other", KEYS["ed25519"]())
        patch.setenv("YAONGI_SIGNING_KEY", str(private))
        export.run(spec)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of the export with its run and data, to be changed; train.yaml names the data of the original."""
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run" / "export"


def marks(shown: str) -> dict[str, str]:
    """The table's marks by what was checked."""
    return {match[2]: match[1] for match in re.finditer(r"^([✓✗–]) +(begun with|[a-z]+) ", shown, re.M)}


def test_it_states_what_is_known_of_code_data_training_and_evaluation(made: Path) -> None:
    directory = made / "run" / "export"
    value = json.loads((directory / "passport.json").read_text())
    manifest = json.loads((directory / "manifest.json").read_text())
    shards, tokenizer = (read_manifest(made / "data" / kind) for kind in ("shards", "tokenizer"))
    assert value["format"] == 1 and value["name"] == manifest["name"] == "micro"
    assert value["parameters"] == manifest["parameters"]
    assert value["checkpoint"] == {"step": 12, "digest": manifest["checkpoint_digest"], "code_version": "test"}
    assert value["image"] == {"name": "r/trainer:1@sha256:0abc", "digest": "sha256:0abc"}
    assert value["begun_with"] is None
    data = value["data"]
    assert (data["shards"], data["tokenizer"]) == (shards.digest, tokenizer.digest)
    assert data["inputs"] == {"tokenizer": tokenizer.digest}
    assert data["tokens"] == 12 * 256
    assert data["sources"]["ko"] == {
        "weight": 0.5,
        "tokens": 12 * 156,
        "documents": 140,
        "domain": "en",
        "licence": "CC0-1.0",
        "origin": "random words",
        "revision": "1",
    }
    scores = json.loads((made / "run" / "eval.json").read_text())
    assert value["evaluation"] == {name: scores[name] for name in ("domains", "all")} | {"benchmarks": [BENCHMARK]}
    judged = {"judge": "m", "questions": "0a", "instructions": "own", "unscored": 1}
    graded = scores | {"logickor": judged | {"metrics": {}, "samples": 6}}
    found = passport._evaluation(graded, checkpoint.read_manifest(checkpoint.step_dir(made / "run", 12)))
    assert found is not None and found["judge"] == judged
    training = value["training"]
    assert (training["steps"], training["devices"], training["device"]) == (12, 1, "NVIDIA H200")
    assert training["hours"] == pytest.approx(6 / 3600, abs=1e-6)
    assert training["energy"]["kwh"] == pytest.approx(0.7 * 6 / 3600, abs=1e-6)
    assert "estimate, not measured: 1 × 700 W" in training["energy"]["basis"]
    assert {name: entry["sha256"] for name, entry in value["files"].items()} == {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith("passport.")
    }
    assert str(made) not in (directory / "passport.json").read_text(), "no place on this machine"


@pytest.mark.parametrize("kind", KEYS)
def test_the_envelope_is_what_the_standards_say(kind: str, made: Path, copy: Path, yaongi, monkeypatch) -> None:
    """The signature is checked without the library that makes it."""
    key = KEYS[kind]()
    private, public = write_key(copy.parent, kind, key)
    monkeypatch.setenv("YAONGI_SIGNING_KEY", str(private))
    code, said, _ = yaongi("sign", str(copy))
    assert code == 0 and said.startswith(f"signed {copy}/passport.json with key ")
    envelope = json.loads((copy / "passport.dsse.json").read_text())
    kind_of_payload, payload = envelope["payloadType"], base64.b64decode(envelope["payload"])
    assert kind_of_payload == "application/vnd.in-toto+json"
    header = f"DSSEv1 {len(kind_of_payload)} {kind_of_payload} {len(payload)} ".encode()
    (signature,) = (base64.b64decode(entry["sig"]) for entry in envelope["signatures"])
    how = () if kind == "ed25519" else (ec.ECDSA(hashes.SHA256()),)
    key.public_key().verify(signature, header + payload, *how)
    with pytest.raises(InvalidSignature):
        key.public_key().verify(signature, header + payload + b" ", *how)

    statement = json.loads(payload)
    value = json.loads((copy / "passport.json").read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    files = {path.name for path in copy.rglob("*") if path.is_file()} - {"passport.dsse.json"}
    assert {Path(entry["name"]).name for entry in statement["subject"]} == files
    for entry in statement["subject"]:
        assert entry["digest"] == {"sha256": hashlib.sha256((copy / entry["name"]).read_bytes()).hexdigest()}
    del value["files"]
    assert statement["predicate"] == value
    code, shown, _ = yaongi("verify", str(copy), "--key", str(public))
    assert code == 0 and marks(shown)["signature"] == "✓" and kind in shown
    text = b"".join(path.read_bytes() for path in copy.iterdir() if path.is_file())
    assert private.read_bytes().splitlines()[1] not in text, "the private key stays out"


def test_an_export_in_its_run_verifies_in_all_points(made: Path, yaongi) -> None:
    code, shown, error = yaongi("verify", str(made / "run"), "--key", str(made / "ours.pub.pem"))
    wanted = ("passport", "files", "manifest", "spec", "shards", "tokenizer", "ledger", "signature")
    assert (code, error, marks(shown)) == (0, "", dict.fromkeys(wanted, "✓"))
    code, shown, _ = yaongi("verify", str(made / "run" / "export"))
    assert code == 0 and marks(shown)["signature"] == "–" and "give --key PUBLIC.pem" in shown


def test_a_copy_elsewhere_says_what_it_cannot_check(made: Path, tmp_path: Path, yaongi) -> None:
    shutil.copytree(made / "run" / "export", tmp_path / "model")
    (tmp_path / "model" / ".nfs0001").touch()
    code, shown, _ = yaongi("verify", "model", "--key", str(made / "ours.pub.pem"))
    found = marks(shown)
    assert code == 0 and {what for what, mark in found.items() if mark == "–"} == {
        *("spec", "shards", "tokenizer", "ledger")
    }
    assert shown.count("not here, not checked") == 4


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=1))


def forge(directory: Path) -> None:
    """Change the weights and every digest of them, but not the signature."""
    flip(directory / "model.safetensors")
    sha256 = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    edit(directory / "manifest.json", lambda value: value["sha256"].update({"model.safetensors": sha256}))
    own = hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()
    size = (directory / "manifest.json").stat().st_size

    def rewrite(value: dict[str, Any]) -> None:
        value["files"]["model.safetensors"]["sha256"] = sha256
        value["files"]["manifest.json"] |= {"sha256": own, "bytes": size}

    edit(directory / "passport.json", rewrite)


def strip(directory: Path) -> None:
    edit(directory / "passport.dsse.json", lambda value: value.update(signatures=[]))


def swap_signature(directory: Path) -> None:
    """A valid form, a wrong value."""
    wrong = base64.b64encode(bytes(64)).decode()
    edit(directory / "passport.dsse.json", lambda value: value["signatures"][0].update(sig=wrong))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a weight": (lambda d: flip(d / "model.safetensors"), "files: model.safetensors was changed"),
    "cut": (lambda d: (d / "README.md").write_bytes(b""), "files: README.md has 0 bytes instead of "),
    "missing": (lambda d: (d / "tokenizer.json").unlink(), "files: tokenizer.json is missing"),
    "more": (lambda d: (d / "transformers/x.py").touch(), "files: transformers/x.py does not belong to the export"),
    "several": (
        lambda d: [flip(d / name) for name in ("config.json", "README.md")],
        "files: README.md was changed (and 1 more)",
    ),
    "manifest": (
        lambda d: edit(d / "manifest.json", lambda value: value.update(step=99)),
        "files: manifest.json has ",
    ),
    "passport": (
        lambda d: edit(d / "passport.json", lambda value: value["data"]["sources"]["ko"].update(licence="MIT")),
        "shards: ",
    ),
    "ledger": (
        lambda d: edit(d / "passport.json", lambda value: value["data"].update(tokens=5)),
        "ledger: 5 tokens are not the sum of those of the sources",
    ),
    "forged with all digests": (forge, "signature: it is of another passport or other files"),
    "signature": (swap_signature, "signature: invalid: key "),
    "no signature in the envelope": (strip, "signature: "),
    "envelope cut": (lambda d: (d / "passport.dsse.json").write_text("{"), "signature: "),
    "envelope removed": (lambda d: (d / "passport.dsse.json").unlink(), "signature: there is none, and --key demands"),
    "passport removed": (lambda d: (d / "passport.json").unlink(), "/passport.json: cannot be read"),
    "passport cut": (lambda d: (d / "passport.json").write_text('{"format"'), "/passport.json: not a passport; "),
    "no passport but JSON": (lambda d: (d / "passport.json").write_text("[1]"), "/passport.json: not a passport; "),
    "passport without files": (
        lambda d: edit(d / "passport.json", lambda value: value.pop("files")),
        "/passport.json: not a passport (files: Field required)",
    ),
    "passport that leaves the folder": (
        lambda d: edit(d / "passport.json", lambda value: value["files"].update({"../x": {"bytes": 1, "sha256": ""}})),
        "'../x' leaves the export",
    ),
    "later passport": (
        lambda d: edit(d / "passport.json", lambda value: value.update(format=2)),
        "/passport.json: written by a later yaongi (format 2, this one reads 1)",
    ),
    "manifest cut": (lambda d: (d / "manifest.json").write_text("{"), "manifest.json: is not a JSON object"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_was_changed_is_named_in_one_line(what: str, made: Path, copy: Path, yaongi) -> None:
    damage, said = DAMAGE[what]
    damage(copy)
    code, _, error = yaongi("verify", str(copy), "--key", str(made / "ours.pub.pem"))
    assert code == 66 and error.count("\n") == 1 and said in error, error


def test_other_data_and_another_checkpoint_are_noticed(made: Path, copy: Path, tmp_path: Path, yaongi) -> None:
    train = copy.parent / "train.yaml"
    shutil.copytree(made / "data", tmp_path / "data")
    train.write_text(train.read_text().replace(str(made / "data"), str(tmp_path / "data")))
    assert yaongi("verify", str(copy))[0] == 0
    shard = tmp_path / "data" / "shards" / "ko-train.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert "does not verify: shards: " in yaongi("verify", str(copy))[2]
    shutil.rmtree(tmp_path / "data" / "shards")
    shutil.copytree(tmp_path / "data" / "tokenizer", tmp_path / "data" / "shards")
    assert "holds tokenizer, expected shards" in yaongi("verify", str(copy))[2]
    shutil.rmtree(tmp_path / "data" / "shards")
    assert yaongi("verify", str(copy))[0] == 0, "data that is not here is not checked"

    edit(copy.parent / "checkpoints" / "step-00000012" / "checkpoint.json", lambda value: value.update(step=13))
    code, _, error = yaongi("verify", str(copy))
    assert code == 66 and "does not verify: ledger: " in error and error.count("\n") == 1


def test_a_later_evaluation_changes_nothing_and_a_longer_run_is_told(made: Path, copy: Path, yaongi) -> None:
    (copy.parent / "eval.json").unlink()
    train = copy.parent / "train.yaml"
    train.write_text(train.read_text().replace("steps: 12\n", "steps: 24\n", 1))
    code, shown, _ = yaongi("verify", str(copy), "--key", str(made / "ours.pub.pem"))
    assert code == 0 and marks(shown)["spec"] == "–" and "a run that was made longer" in shown


def test_another_key_is_refused(made: Path, yaongi) -> None:
    code, shown, error = yaongi("verify", str(made / "run"), "--key", str(made / "other.pub.pem"))
    assert code == 66 and marks(shown)["signature"] == "✗" and "signature: by key " in error
    for path in (made / "ours.pem", made / "nothing.pem"):
        code, _, error = yaongi("verify", str(made / "run"), "--key", str(path))
        assert code == 2 and error.startswith(f"error: --key: {path}: ") and error.count("\n") == 1


def test_a_private_key_that_cannot_be_used_ends_before_any_work(tmp_path: Path, yaongi, monkeypatch) -> None:
    spec, _ = make_run(tmp_path)
    (tmp_path / "text.pem").write_text("hunter2")
    locked, _ = write_key(tmp_path, "locked", KEYS["ed25519"](), b"secret")
    unfit, _ = write_key(tmp_path, "rsa", rsa.generate_private_key(65537, 1024))
    for path in (tmp_path / "text.pem", locked, unfit, tmp_path / "nothing.pem"):
        monkeypatch.setenv("YAONGI_SIGNING_KEY", str(path))
        with pytest.raises(Exception, match=f"^YAONGI_SIGNING_KEY: {path}: .*Ed25519") as caught:
            export.run(spec)
        assert caught.value.code == 2 and "\n" not in str(caught.value) and "hunter2" not in str(caught.value)
        assert not (Path(spec.run_dir) / "export").exists()
    for written in ((tmp_path / "rsa.pem").read_text(), "-----BEGIN PRIVATE KEY-----hunter2"):
        monkeypatch.setenv("YAONGI_SIGNING_KEY", written)
        with pytest.raises(Exception, match=r"^YAONGI_SIGNING_KEY holds a key instead of its path; save") as caught:
            export.run(spec)
        assert "BEGIN" not in str(caught.value) and "hunter2" not in str(caught.value)
    monkeypatch.delenv("YAONGI_SIGNING_KEY")
    export.run(spec)
    assert not (Path(spec.run_dir) / "export" / "passport.dsse.json").exists()
    assert yaongi("sign", spec.run_dir)[2].startswith("error: YAONGI_SIGNING_KEY is not set; set it to the path")
    value = json.loads((Path(spec.run_dir) / "export" / "passport.json").read_text())
    assert value["training"]["device"] is None and value["image"] is None and value["evaluation"] is None
    code, _, error = yaongi("verify", spec.run_dir, "--key", str(tmp_path / "locked.pub.pem"))
    assert code == 66 and error.endswith("signature: there is none, and --key demands one\n")


def test_only_what_is_whole_is_signed(made: Path, copy: Path, yaongi, monkeypatch) -> None:
    monkeypatch.setenv("YAONGI_SIGNING_KEY", str(made / "ours.pem"))
    flip(copy / "config.json")
    before = (copy / "passport.dsse.json").read_bytes()
    code, _, error = yaongi("sign", str(copy))
    assert code == 66 and error == f"error: {copy} is not signed: config.json was changed\n"
    assert (copy / "passport.dsse.json").read_bytes() == before


def test_the_chain_names_the_passport_of_the_first_model(made: Path, tmp_path: Path, yaongi) -> None:
    first = tmp_path / "first"
    shutil.copytree(made / "run", first)
    sha256 = hashlib.sha256((first / "export" / "passport.json").read_bytes()).hexdigest()
    digest = json.loads((first / "export" / "manifest.json").read_text())["checkpoint_digest"]
    for number, begun in enumerate((first / "export", first, first / "checkpoints" / "step-00000012")):
        assert find(begun).digest == digest
        spec, _ = make_run(tmp_path / str(number), init_from=str(begun))
        export.run(spec)
        value = json.loads((Path(spec.run_dir) / "export" / "passport.json").read_text())
        assert value["begun_with"] == {"name": spec.begun_with, "digest": digest, "passport_sha256": sha256}
        code, shown, _ = yaongi("verify", spec.run_dir)
        assert code == 0 and marks(shown)["begun with"] == "✓"
    shutil.rmtree(first)
    code, shown, _ = yaongi("verify", spec.run_dir)
    assert code == 0 and marks(shown)["begun with"] == "–"
    export.run(spec)
    value = json.loads((Path(spec.run_dir) / "export" / "passport.json").read_text())
    assert value["begun_with"] == {"name": spec.begun_with, "digest": None, "passport_sha256": None}


def test_exports_of_before_have_none_and_verify_by_their_manifest(tmp_path: Path, made: Path, yaongi) -> None:
    run = former.unpack(tmp_path)
    code, shown, _ = yaongi("verify", former.RUN)
    assert code == 0 and marks(shown) == {"passport": "–", "files": "✓", "signature": "–"}
    assert yaongi("verify", former.RUN, "--key", str(made / "ours.pub.pem"))[0] == 66
    flip(run / "export" / "model.safetensors")
    code, _, error = yaongi("verify", former.RUN)
    assert code == 66 and error.endswith("does not verify: files: model.safetensors was changed\n")


def test_a_checkpoint_without_a_cursor_has_no_ledger(tmp_path: Path, yaongi) -> None:
    spec, model = make_run(tmp_path)
    checkpoint = save_checkpoint(spec, model, 16)
    assert passport.ledger(checkpoint) == {"ko": 16 * 156, "en": 16 * 100}
    assert passport.ledger(checkpoint.model_copy(update={"cursor": {}})) is None


def test_a_manifest_without_digests_is_refused(tmp_path: Path, yaongi) -> None:
    export_dir = former.unpack(tmp_path) / "export"
    edit(export_dir / "manifest.json", lambda value: value.pop("sha256"))
    code, _, error = yaongi("verify", str(export_dir))
    assert code == 66 and "manifest.json: is not that of an export" in error and error.count("\n") == 1


def test_verifying_needs_no_torch(made: Path) -> None:
    program = "import sys; from pipelines import checks; checks.checks(__import__('pathlib').Path(sys.argv[1]), None)"
    program += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program, str(made / "run" / "export")], check=True)
