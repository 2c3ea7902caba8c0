"""Parse a container's command line: the launcher and its options, or a script started without one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from manifests.lint.place import Place
from manifests.lint.shell import Command, commands


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SHELL = re.compile(r"(.*/)?(ba|da|a|z|k|c)?sh")
PYTHON = re.compile(r"(.*/)?python[0-9.]*")
# Programs that only start another program, with their options that take a value.
WRAPPERS = {
    "env": "-u -C -S --unset --chdir",
    "exec": "-a",
    "nice": "-n",
    "nohup": "",
    "numactl": "",
    "setsid": "",
    "stdbuf": "-i -o -e",
    "sudo": "-u -g",
    "tini": "-p -e",
    "dumb-init": "",
    "time": "",
    "timeout": "-k -s",
    "catchsegv": "",
}
# Programs whose subcommand starts another program: `uv run torchrun`.
RUNNERS = {
    ("uv", "run"): "--with --python -p --project --directory --extra --group --env-file",
    ("poetry", "run"): "",
    ("pipenv", "run"): "",
    ("pdm", "run"): "",
    ("conda", "run"): "-n --name -p --prefix --cwd",
    ("micromamba", "run"): "-n --name -p --prefix --cwd",
}
MODULES = {
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "accelerate.commands.launch": "accelerate",
    "deepspeed.launcher.runner": "deepspeed",
    "colossalai.cli": "colossalai",
}
LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "mpirun", "mpiexec", "horovodrun", "colossalai", "tune", "axolotl")
# Options of torchrun (torch 2.13, plus use_env of torch.distributed.launch).
TORCHRUN = _names(
    "duplicate_stderr_filters duplicate_stdout_filters event_log_handler help local_addr local_rank "
    "local_ranks_filter log_dir logs_specs master_addr master_port max_restarts module monitor_interval nnodes "
    "no_python node_rank nproc_per_node numa_binding rdzv_backend rdzv_conf rdzv_endpoint rdzv_id redirects role "
    "run_path shutdown_timeout signals_to_handle standalone start_method tee use_env virtual_local_rank"
)
FLAGS = {
    "torchrun": _names("help module no_python run_path standalone use_env virtual_local_rank m h"),
    "accelerate": _names(
        "m module no_python multi_gpu use_deepspeed use_fsdp use_megatron_lm cpu quiet q debug same_network tpu "
        "use_xpu use_mps_device standalone enable_cpu_affinity use_cpu mps"
    ),
    "deepspeed": _names("module no_python no_local_rank force_multi save_pid enable_each_rank_log no_ssh"),
}
# Another launcher's option → torchrun's option of the same meaning; each with the thing it counts.
SYNONYMS = {
    "accelerate": {
        "num_machines": "nnodes",
        "machine_rank": "node_rank",
        "main_process_ip": "master_addr",
        "main_process_port": "master_port",
    },
    "deepspeed": {"num_nodes": "nnodes", "num_gpus": "nproc_per_node"},
}
_SPAWNS = re.compile(
    r"--?(.*[._-])?(devices|gpus|num[_-]gpus|ngpus?|nproc([_-]per[_-]node)?|world[_-]size|spawn)(=.*)?"
)
_HARMLESS = _names(
    "[ [[ test apt apt-get awk break cat cd chmod chown continue cp curl cut date declare dirname done echo esac "
    "eval exit export false fi free gcloud git grep head hf hostname huggingface-cli id if kill ldconfig ln local "
    "ls lscpu mkdir mount mv nslookup nvidia-smi pip pip3 ping popd printenv printf ps pushd pwd read readonly "
    "return rm rsync sed set shift shopt sleep sort stat sync tail tar tee touch tr trap true ulimit umask uname "
    "unset unzip uv wait wandb wc wget whoami aws gsutil df du find nc apk yum dnf case in tensorboard "
    "source . conda micromamba module"
)
_REFERENCE = re.compile(r"\$(?:\{(\w+)\}|\((\w+)\)|(\w+))")


@dataclass(frozen=True)
class Launch:
    """One start of training.

    Attributes:
        launcher: torchrun (under any name), accelerate, deepspeed, mpirun, …, or python for a bare script.
        options: the launcher's options, in torchrun's spelling if it has them, with _ for -; "" for a flag. Variables
            that no manifest defines (of the image or the operator) are left as `$NAME`.
        written: names of the options as written.
        place: the element of command or args.
    """

    launcher: str
    place: Place
    options: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)

    def number(self, option: str) -> int | None:
        value = self.options.get(option, "")
        return int(value) if value.isascii() and value.isdigit() else None

    def text(self, option: str) -> str:
        """Empty also for a value that is unknown."""
        value = self.options.get(option, "")
        return "" if "$" in value or "`" in value else value

    def says(self, option: str) -> str:
        """The option as written, with its value."""
        name = self.written.get(option, option)
        value = self.options.get(option, "")
        return f"{name} {value}".strip()


def launches(command: Place, args: Place, env: Place) -> list[Launch]:
    """How training is started; empty if the image, a script or an unknown program decides.

    Args:
        env: the container's variables; references to literal values are resolved.
    """
    places = [place for part in (command, args) for place in part.each()]
    if not places or (not list(command.each()) and not _is_program(places[0].text)):
        return []
    known = {entry["name"].text: entry["value"].text for entry in env.each() if entry["value"].text}
    exported: dict[str, str] = {}  # by the script itself; the operators' variables override those of env
    found: list[tuple[Launch, Command]] = []
    ends_opaque = False
    for start, place in _starts(places):
        words = _unwrapped(start.words, start.assignments)
        # An export affects the following commands.
        if start.words[:1] == ["export"] or not words:
            exported |= dict(word.split("=", 1) for word in start.words if "=" in word) | start.assignments
            continue
        launch = _launch(words, known | exported, exported | start.assignments, place)
        if launch:
            found.append((launch, start))
            ends_opaque = False
        elif words[0].rpartition("/")[2] not in _HARMLESS and not PYTHON.fullmatch(words[0]):
            ends_opaque = True
    by_launcher = [launch for launch, _ in found if launch.launcher != "python"]
    several = found[1:] and any(start.in_background for _, start in found)
    if by_launcher or ends_opaque or several or any(start.in_loop for _, start in found):
        return by_launcher
    return [launch for launch, _ in found[-1:]]


def unexpanded(command: Place, args: Place, env: Place) -> Iterator[tuple[Place, str]]:
    """References in a command line without a shell that stay literal, with their elements.

    Only $(NAME) is replaced, and only if the container has that variable.
    """
    places = [place for part in (command, args) for place in part.each()]
    words = _unwrapped([place.text for place in places], {})
    if not words or not (PYTHON.fullmatch(words[0]) or words[0].rpartition("/")[2] in LAUNCHERS):
        return
    names = {entry["name"].text for entry in env.each()}
    for place in places:
        if "-c" in words[1:2]:  # Python code as an argument
            return
        for found in re.finditer(r"(?<!\$)\$(?:\((\w+)\)|\{?[A-Za-z_]\w*\}?)", place.text):
            if found[1] is None or found[1] not in names:
                yield place, found[0]


def _starts(places: list[Place]) -> Iterator[tuple[Command, Place]]:
    """The simple commands of a container, including those in `sh -c`."""
    words = [place.text for place in places]
    unwrapped = _unwrapped(words, {})
    at = len(words) - len(unwrapped)
    if unwrapped and SHELL.fullmatch(unwrapped[0]):
        for number in range(at + 1, len(words)):
            if re.fullmatch(r"-\w*c", words[number]) and number + 1 < len(words):
                script = next((n for n in range(number + 1, len(words)) if not words[n].startswith(("-", "+"))), None)
                if script is not None:
                    yield from _scripted(words[script], places[script])
                return
            if not words[number].startswith(("-", "+")) and words[number - 1] not in ("-o", "-O", "+o"):
                break
        yield Command(words=["script"]), places[0]
        return
    yield Command(words=words), places[0]


def _scripted(script: str, place: Place, depth: int = 0) -> Iterator[tuple[Command, Place]]:
    for command in commands(script):
        words = _unwrapped(command.words, {})
        inner = next((n + 1 for n, word in enumerate(words) if re.fullmatch(r"-\w*c", word)), None)
        if words and SHELL.fullmatch(words[0]) and inner and inner < len(words) and depth < 3:
            yield from _scripted(words[inner], place, depth + 1)
        else:
            yield command, place


def _is_program(word: str) -> bool:
    name = word.rpartition("/")[2]
    return bool(
        PYTHON.fullmatch(word)
        or SHELL.fullmatch(word)
        or name in LAUNCHERS
        or name in WRAPPERS
        or name in ("uv", "conda")
    )


def _unwrapped(words: list[str], assignments: dict[str, str]) -> list[str]:
    """Remove wrappers that only start the next program; assignments of `env` are added to the given ones."""
    rest = list(words)
    while rest:
        name = rest[0].rpartition("/")[2]
        if (runner := RUNNERS.get((name, rest[1] if len(rest) > 1 else ""))) is not None:
            rest = _without_options(rest[2:], runner.split())
        elif name in WRAPPERS:
            rest = _without_options(rest[1:], WRAPPERS[name].split())
            while name in ("env", "sudo") and rest and re.match(r"[A-Za-z_]\w*=", rest[0]):
                key, _, value = rest.pop(0).partition("=")
                assignments[key] = value
            if name == "timeout":
                rest = rest[1:]
        else:
            break
    return rest


def _without_options(words: list[str], with_value: Iterable[str]) -> list[str]:
    at = 0
    while at < len(words) and words[at].startswith("-"):
        if words[at] == "--":
            return words[at + 1 :]
        at += 2 if words[at] in with_value else 1
    return words[at:]


def _launch(words: list[str], known: Mapping[str, str], exported: Mapping[str, str], place: Place) -> Launch | None:
    name, rest = words[0].rpartition("/")[2], words[1:]
    if PYTHON.fullmatch(words[0]):
        at = 0
        while at < len(rest) and re.fullmatch(r"-([uOBsSEIqvbdxi]+|OO|[WX].*)", rest[at]):
            at += 2 if rest[at] in ("-W", "-X") else 1
        module = rest[at + 1] if rest[at : at + 1] == ["-m"] and len(rest) > at + 1 else ""
        script = rest[at] if len(rest) > at else ""
        if module == "accelerate" or script.endswith("/accelerate"):
            name, rest = "accelerate", rest[at + (2 if module else 1) :]
        elif module in MODULES:
            name, rest = MODULES[module], rest[at + 2 :]
        elif re.search(r"(^|/)torch/distributed/(run|launch)\.py$", script) or script.endswith("/torchrun"):
            name, rest = "torchrun", rest[at + 1 :]
        elif script.endswith(".py") and not any(_SPAWNS.fullmatch(word) for word in rest[at:]):
            return Launch("python", place)
        else:
            return None
    if name not in LAUNCHERS:
        return None
    if name in ("accelerate", "colossalai", "tune", "axolotl"):
        verbs = ("launch", "run", "train")
        verb = next((n for n, word in enumerate(rest) if word in verbs), None)
        rest = rest if verb is None else rest[verb + 1 :]
    options, written = _options(name, rest, known)
    for key, value in exported.items():  # torchrun reads options missing on its command line from here
        if name == "torchrun" and key.startswith("PET_") and key[4:].lower() not in options:
            options[key[4:].lower()] = _resolved(value, known)
            written[key[4:].lower()] = key
    return Launch(name, place, options, written)


def _options(name: str, words: list[str], known: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The launcher's options: those before the script."""
    options: dict[str, str] = {}
    written: dict[str, str] = {}
    at = 0
    while at < len(words) and words[at].startswith("-") and words[at] != "--":
        said, has_value, value = words[at].partition("=")
        option = said.lstrip("-").replace("-", "_")
        at += 1
        if name == "torchrun" and said.startswith("--") and option not in TORCHRUN:
            whole = [known for known in TORCHRUN if known.startswith(option)]
            option = whole[0] if len(whole) == 1 else option  # argparse accepts any unique prefix
        if not has_value and option not in FLAGS.get(name, ()) and at < len(words):
            takes = name in FLAGS or not words[at].startswith("-")
            value, at = (words[at], at + 1) if takes else ("", at)
        option = SYNONYMS.get(name, {}).get(option, option)
        options[option], written[option] = _resolved(value, known), said
    return options, written


def _resolved(text: str, known: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        return known.get(found[1] or found[2] or found[3], found[0])

    return _REFERENCE.sub(value, text)
