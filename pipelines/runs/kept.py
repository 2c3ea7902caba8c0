"""The objects of stopped cluster jobs: one file per job in the workdir, until `yaongi resume` creates it again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from components.volume import made
from manifests.kinds import Object
from manifests.names import SPEC_FILE
from pipelines.options import again
from pipelines.runs.standing import Standing, of_directory
from pipelines.runs.view import View
from trainer.files import atomic_write


@dataclass(frozen=True)
class Kept:
    """A stopped job; `namespace` is "" if its file does not name it."""

    name: str
    namespace: str
    file: Path

    def objects(self) -> list[Object]:
        """The objects that the job needs, then the job."""
        return list(yaml.safe_load_all(self.file.read_text(encoding="utf-8")))

    def view(self) -> View:
        """Has numbers only if the volume is mounted here."""
        run_dir = run_dir_of(self.objects())
        standing = of_directory(Path(run_dir)) if run_dir else Standing()
        place = f" -n {self.namespace}" if self.namespace else ""
        where = f"namespace {self.namespace}" if self.namespace else "cluster"
        go_on = f"continue: yaongi resume {self.name}{place}{again(self.file.parent.parent)}"
        return View(self.name, where, "stopped", go_on, standing, [("kept in", str(self.file))])


def keep(workdir: Path, namespace: str, objects: list[Object]) -> Kept:
    """Store the objects of a job, which is the last of them."""
    name = objects[-1]["metadata"]["name"]
    file = _folder(workdir) / f"{namespace}.{name}.yaml"  # neither name has a dot
    made(file.parent)
    atomic_write(file, yaml.safe_dump_all(objects).encode())
    return Kept(name, namespace, file)


def kept(workdir: Path, namespace: str = "") -> list[Kept]:
    """The stopped jobs, of one namespace if given."""
    found = []
    for file in sorted(_folder(workdir).glob("*.yaml")):
        if file.name.startswith("._"):  # macOS metadata
            continue
        place, _, name = file.stem.rpartition(".")
        if not namespace or place in ("", namespace):
            found.append(Kept(name, place, file))
    return found


def run_dir_of(objects: Iterable[Object]) -> str:
    """The run directory, as the pods of the job in `objects` see it; "" if it mounts no spec."""
    specs = [item["data"][SPEC_FILE] for item in objects if SPEC_FILE in item.get("data", {})]
    return yaml.safe_load(specs[0])["run_dir"] if specs else ""


def _folder(workdir: Path) -> Path:
    return workdir / "stopped"
