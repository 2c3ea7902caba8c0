"""The launcher's command line: options that repeat or contradict the job."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from manifests.lint.commandline import TORCHRUN, Launch
from manifests.lint.registry import Hit, Severity, rule
from manifests.lint.subjects import PyTorchJob, Start

ERROR, WARNING = Severity.ERROR, Severity.WARNING
LOCAL = ("localhost", "127.0.0.1", "0.0.0.0", "::1", "[::1]")
MPI = ("mpirun", "mpiexec", "horovodrun")
HOSTS = {"host", "H", "hostfile", "machinefile", "hosts", "f"}
MEETING = ("nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "master_addr", "master_port")


@rule(
    "nproc-option",
    ERROR,
    Start,
    why="The number of processes on the launcher's command line overrides PET_NPROC_PER_NODE, set by the job. "
    "Two processes on one GPU end in NCCL's 'Duplicate GPU detected'; fewer than GPUs leave the rest idle, but "
    "allocated.",
    fix="Leave the option out and write the number in the job, or make it equal to the GPUs of the pod's limits.",
)
def nproc_option(start: Start) -> Iterator[Hit]:
    gpus = start.accelerators
    for launch in start.launches:
        written, total = launch.number("nproc_per_node"), launch.number("num_processes")
        if gpus and written is not None and written != gpus:
            yield Hit(launch.place, f"{launch.says('nproc_per_node')} for {gpus} GPUs")
        elif gpus and launch.options.get("nproc_per_node") == "cpu":
            yield Hit(launch.place, f"{launch.says('nproc_per_node')}, as many as the node has cores, for {gpus} GPUs")
        elif not gpus and written is not None and start.processes not in (None, written):
            yield Hit(launch.place, f"{launch.says('nproc_per_node')}, but the job says {start.processes}")
        elif (
            launch.launcher == "accelerate" and total is not None and gpus and start.pods and total != gpus * start.pods
        ):
            what = f"{launch.says('num_processes')} in all for {start.pods} pods of {gpus} GPUs"
            yield Hit(launch.place, what)
        elif launch.launcher in MPI and gpus and not launch.options.keys() & HOSTS and start.pods == 1:
            ranks = launch.number("np") or launch.number("n")
            if ranks is not None and ranks != gpus:
                yield Hit(launch.place, f"{launch.launcher} of {ranks} processes for {gpus} GPUs")


@rule(
    "torchrun-nnodes",
    ERROR,
    Start,
    why="An --nnodes on torchrun's command line overrides PET_NNODES, which the operator sets. If it differs "
    "from the number of pods, the job waits forever or runs split.",
    fix="Leave --nnodes out; torchrun reads PET_NNODES.",
)
def torchrun_nnodes(start: Start) -> Iterator[Hit]:
    pods, low = start.pods, start.fewest
    for launch in start.launches:
        low_written, _, high_written = launch.text("nnodes").partition(":")
        if not low_written or pods is None or not (low_written + high_written).isdigit():
            continue
        least, most = int(low_written), int(high_written or low_written)
        if low != pods and least == most == start.present:
            continue  # covered by nnodes-fixed
        if low != pods and (least, most) != (low, pods):
            yield Hit(launch.place, f"{launch.says('nnodes')} in a job of {low} to {pods} workers")
        elif low == pods and not least <= pods <= most:
            yield Hit(launch.place, f"{launch.says('nnodes')}, but the job has {pods} pod{'s' if pods > 1 else ''}")
        elif low == pods and most > pods:
            yield Hit(launch.place, f"{launch.says('nnodes')}, but the job never has more than {pods}")


@rule(
    "nnodes-fixed",
    WARNING,
    Start,
    why="A fixed --nnodes on torchrun's command line switches elasticity off: with one worker more or less than now "
    "the job waits.",
    fix="Leave --nnodes out; torchrun reads PET_NNODES, which the operator sets to minReplicas:maxReplicas.",
)
def nnodes_fixed(start: Start) -> Iterator[Hit]:
    for launch in start.launches:
        if start.fewest != start.pods and launch.number("nnodes") == start.present is not None:
            yield Hit(launch.place, f"{launch.says('nnodes')} in a job of {start.fewest} to {start.pods} workers")


@rule(
    "standalone-option",
    ERROR,
    Start,
    why="--standalone makes every pod's launcher a job of its own: each pod trains the whole model alone on rank 0, "
    "and all write the same checkpoints.",
    fix="Remove --standalone; the operator tells torchrun where the others are.",
)
def standalone_option(start: Start) -> Iterator[Hit]:
    for launch in start.launches:
        if (start.pods or 1) == 1:
            return
        if "standalone" in launch.options:
            yield Hit(launch.place, f"{launch.written['standalone']} in a job of {start.pods} pods")
        elif launch.launcher in MPI and start.role and not launch.options.keys() & HOSTS:
            yield Hit(launch.place, f"{launch.launcher} without hosts in each of {start.pods} pods")


@rule(
    "node-rank-option",
    ERROR,
    Start,
    why="One command line starts all pods of a kind, so that each says it has the same rank: they wait for the ranks "
    "that nobody has, or two take one another's place.",
    fix='Leave the option out; the operator sets PET_NODE_RANK (and RANK, for --machine_rank "$RANK") in each pod.',
)
def node_rank_option(start: Start) -> Iterator[Hit]:
    for launch in start.launches:
        rank, pods = launch.number("node_rank"), start.pods or 1
        if rank is None or launch.text("rdzv_backend") in ("c10d", "etcd", "etcd-v2"):  # which assign the ranks
            continue
        right = 1 if start.role == "Worker" and start.first.endswith("-master-0") else 0
        if (start.alike or 1) > 1:
            yield Hit(launch.place, f"{launch.says('node_rank')} in each of {start.alike} pods")
        elif rank != (right if pods > 1 else 0):
            yield Hit(launch.place, f"{launch.says('node_rank')} in the pod of rank {right if pods > 1 else 0}")


@rule(
    "endpoint-local",
    ERROR,
    Start,
    why="localhost is another machine in every pod: each waits at its own address for the others, or trains alone. "
    "The same happens with --rdzv_backend=c10d and no endpoint where there is no elasticPolicy to give one.",
    fix="Leave the option out, or name the first pod; the operator sets PET_MASTER_ADDR or PET_RDZV_ENDPOINT.",
)
def endpoint_local(start: Start) -> Iterator[Hit]:
    if (start.pods or 1) == 1:
        return
    for launch in start.launches:
        for option in ("rdzv_endpoint", "master_addr"):
            host = launch.options.get(option, "")  # the port may be a variable
            if host in LOCAL or host.rpartition(":")[0] in LOCAL:
                yield Hit(launch.place, f"{launch.says(option)} in a job of {start.pods} pods")
        backend = launch.text("rdzv_backend")
        if backend == "c10d" and not start.meets and "rdzv_endpoint" not in launch.options:
            yield Hit(launch.place, f"{launch.says('rdzv_backend')} without an endpoint in a job of {start.pods} pods")


@rule(
    "endpoint-of-nobody",
    ERROR,
    Start,
    why="All pods meet at the first one, whose name is that of the job with -master-0, or -worker-0 without a Master. "
    "At another name nobody listens.",
    fix="Leave the option out; the operator sets PET_MASTER_ADDR or PET_RDZV_ENDPOINT.",
)
def endpoint_of_nobody(start: Start) -> Iterator[Hit]:
    for launch in start.launches:
        for option in ("rdzv_endpoint", "master_addr"):
            host = launch.text(option).partition(":")[0].partition(".")[0]
            if start.first and host != start.first and _is_worker(host):
                yield Hit(launch.place, f"{launch.says(option)}, but the first pod is {start.first}")


@rule(
    "max-restarts-option",
    WARNING,
    Start,
    why="--max_restarts on torchrun's command line overrides elasticPolicy.maxRestarts.",
    fix="Write one of them.",
)
def max_restarts_option(start: Start) -> Iterator[Hit]:
    for launch in start.launches:
        written = launch.number("max_restarts")
        if written is not None and start.max_restarts not in (None, written):
            yield Hit(launch.place, f"{launch.says('max_restarts')}, but the job says {start.max_restarts}")


@rule(
    "launcher-option",
    ERROR,
    Start,
    why="torchrun ends with 'unrecognized arguments' and exit code 2 for an option before the script that it does not "
    "know.",
    fix="Correct it; the script's own options come after the script.",
)
def launcher_option(start: Start) -> Iterator[Hit]:
    for launch in start.launches:
        for option, written in launch.written.items() if launch.launcher == "torchrun" else ():
            if written.startswith("--") and option not in TORCHRUN and "$" not in written:
                nearest = get_close_matches(option, TORCHRUN, 1)
                yield Hit(launch.place, f"{written}" + (f"; did you mean --{nearest[0]}?" if nearest else ""))


@rule(
    "launch-differs",
    ERROR,
    PyTorchJob,
    why="Master and workers meet only if their launchers agree on the number of nodes and processes and on the place.",
    fix="Write the same command line for both, or leave these options out.",
)
def launch_differs(job: PyTorchJob) -> Iterator[Hit]:
    starts = list(job.starts)
    if len(starts) != 2 or any(len(start.launches) != 1 for start in starts):
        return
    (first,), (second,) = (start.launches for start in starts)
    for option in MEETING:
        one, other = first.text(option), second.text(option)
        if one and other and one != other:
            yield Hit(second.place, f"{second.says(option)}, but {first.says(option)} at the Master")


@rule(
    "no-launcher",
    ERROR,
    Start,
    why="One container per pod is started and no processes in it: the number of processes only sets "
    "PET_NPROC_PER_NODE, which torchrun reads. A script started by python alone uses one GPU of the pod.",
    fix="Start it with torchrun: command: [torchrun, train.py].",
)
def no_launcher(start: Start) -> Iterator[Hit]:
    several = max(start.processes or 1, start.accelerators)
    for launch in start.launches:
        if launch.launcher == "python" and several > 1:
            yield Hit(launch.place, f"python runs the script itself, for {several} processes or GPUs")


def fixes_processes(launch: Launch) -> bool:
    """Whether the command line sets the number of processes of a pod, even by a variable."""
    return any(option in launch.options for option in ("nproc_per_node", "num_processes", "np", "n"))


def _is_worker(host: str) -> bool:
    return host.rpartition("-")[2].isdigit() and host.rpartition("-")[0].endswith(("-master", "-worker"))
