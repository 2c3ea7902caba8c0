"""What Kubernetes' messages mean and how to fix the cause: one table for each place where a pod can get stuck.

The launcher, `yaongi status` and `yaongi why` all use these tables. The messages are those of Kubernetes 1.34:
scheduler, admission, kubelet, containerd. A message that matches no rule is shown as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.exitcodes import MEANING, ExitCode


@dataclass(frozen=True)
class Rule:
    """`fix` may use the groups of `pattern`; `hopeless`: waiting does not help."""

    pattern: str
    fix: str
    hopeless: bool = False


@dataclass(frozen=True)
class Obstacle:
    """Why a pod does not run: the cluster's message, and what to do about it ("" if no rule matches).

    `hopeless`: waiting does not help; `pulling`: its image is the reason.
    """

    text: str
    fix: str = ""
    hopeless: bool = False
    pulling: bool = False

    def __str__(self) -> str:
        return f"{self.text}; {self.fix}" if self.fix else self.text


# First the causes that no node can solve, then what nodes lack; the scheduler counts the nodes by reason.
SCHEDULING = (
    Rule(
        r'persistentvolumeclaim "([^"]+)" not found',
        r"create the claim '\1' or name one that exists (storage.datasets_pvc, storage.checkpoints_pvc)",
    ),
    Rule(
        r"unbound immediate PersistentVolumeClaims",
        "a claim has no volume yet: check its storage class and provisioner with kubectl describe pvc",
    ),
    Rule(
        r"didn't find available persistent volumes to bind",
        "a claim waits for its first pod, but its storage class has no volume that these nodes can use: make one, or "
        "use a class with a provisioner",
    ),
    Rule(
        r"volume node affinity conflict|didn't match PersistentVolume's node affinity",
        "a volume lies in another zone or on another node than the pod may run on: use ReadWriteMany storage, or "
        "nodes beside the volume",
    ),
    Rule(
        r"Insufficient (\S*gpu\S*?)(?:,|\.?\s)",
        r"wait for \1, add nodes, or ask for fewer (cluster.gpus_per_node, cluster.nodes); if no node offers any, "
        "install the device plugin",
    ),
    Rule(
        r"Insufficient cpu",
        "wait for running pods to end, add nodes, or ask for less (cluster.cpus_per_node)",
    ),
    Rule(
        r"Insufficient memory",
        "wait for running pods to end, add nodes, or ask for less (cluster.memory_gib_per_node)",
    ),
    Rule(r"Insufficient (\S+?)(?:,|\.?\s)", r"wait for \1, add nodes that offer it, or ask for less"),
    Rule(r"Too many pods", "the nodes run as many pods as their kubelets allow: wait or add nodes"),
    Rule(
        r"pod anti-affinity rules|pod topology spread",
        "the pods must not share nodes with others and there are too few nodes for that: add nodes or relax the rule",
    ),
    Rule(r"pod affinity rules", "no node runs the pods that these must be next to: relax the affinity"),
    Rule(
        r"node affinity/selector",
        "label a node as the pods ask, or change what they ask (cluster.node_selector)",
    ),
    Rule(
        r"untolerated taint(?:\(s\)| \{([^}]*)\})?",
        "if these nodes are meant for the job, tolerate their taint (cluster.tolerations; kubectl describe nodes "
        "shows it)",
    ),
    Rule(r"were unschedulable", "nodes are cordoned: kubectl uncordon NODE, or wait for their maintenance to end"),
    Rule(
        r"[Pp]od ?group|minMember|gang",
        "all workers must fit at once: wait for running jobs to end, add nodes, or ask for fewer (cluster.nodes)",
    ),
)

CREATION = (
    Rule(
        r"exceeded quota: (\S+?),",
        r"wait for other pods to end, have the quota raised (kubectl describe quota \1), or ask for less",
    ),
    Rule(
        r"failed quota: (\S+?): must specify (.+)",
        r"quota \1 wants every container to state \2; give the job's resources, or set a LimitRange's defaults",
        hopeless=True,
    ),
    Rule(
        r"violates PodSecurity",
        "give pod and containers the securityContext that is named (jobs of yaongi have it), or run in a namespace "
        "with a looser pod-security.kubernetes.io/enforce",
        hopeless=True,
    ),
    Rule(
        r'serviceaccount "([^"]+)" not found',
        r"create it (kubectl create serviceaccount \1) or name one that exists in the pods",
        hopeless=True,
    ),
    Rule(
        r"failed calling webhook .*kueue-webhook-service",
        "Kueue, which checks every pod and job of the cluster, in a queue or not, does not answer: its administrator "
        "must start it (kubectl get pods -n kueue-system) or remove its webhook configurations",
    ),
    Rule(
        r"failed calling webhook \"([^\"]+)\"",
        r"the admission webhook \1 does not answer: its owner must start it or remove its configuration",
    ),
    Rule(  # Kueue looks for the owner of every pod, in a cache that may not have it yet
        r'denied the request: (\S+) "([^"]+)" not found',
        r"its webhook has not seen \1 \2 yet: the next attempt succeeds",
    ),
    Rule(
        r"denied (?:the )?request",
        "change the job as the policy wants, or ask its owner for an exception",
        hopeless=True,
    ),
    Rule(
        r"(?:maximum|minimum) .* usage per|max limit to request ratio",
        "a LimitRange bounds what a pod may ask for (kubectl describe limitrange): ask for an amount within it",
        hopeless=True,
    ),
    Rule(r"no PriorityClass with name (\S+)", r"create the priority class \1 or name another", hopeless=True),
    Rule(r"Invalid value|is invalid", "the pod template is not valid: fix the field that is named", hopeless=True),
)

# Waiting does not help if the image is absent; other pull errors (a registry that is down) may pass.
IMAGE = (
    Rule(r"[Cc]ouldn't parse image name|invalid reference format", "correct cluster.image", hopeless=True),
    Rule(
        r"localhost/\S*.*(?:connection refused|not found|does not exist)",
        "check cluster.image: a localhost/ image is served by no registry and must be loaded into every node",
        hopeless=True,
    ),
    Rule(
        r"denied|unauthorized|authentication required|403 Forbidden",
        "check cluster.image, and if its registry is private give the pods' service account an imagePullSecret",
        hopeless=True,
    ),
    Rule(
        r"not found|does not exist|manifest unknown",
        "check cluster.image: its registry answers but has no such name or tag",
        hopeless=True,
    ),
    Rule(r"no such host", "check cluster.image: the nodes cannot resolve the name of its registry"),
    Rule(r"ErrImageNeverPull|Never", "load the image into every node, or let it be pulled", hopeless=True),
    Rule(
        r"connection refused|timeout|timed out|unreachable|deadline exceeded|EOF|50\d ",
        "check cluster.image, and that the nodes can reach its registry, which does not answer",
    ),
)

CONFIG = (
    Rule(
        r"references non-existent (\S+) key: (\S+)",
        r"add the key \2 to the \1 that the volume names",
        hopeless=True,
    ),
    Rule(r"couldn't find key (\S+) in (\S+) [^/\s]+/(\S+)", r"add the key '\1' to \2 '\3'", hopeless=True),
    Rule(
        r'(secret|configmap) "([^"]+)" not found',
        r"create the \1 '\2' in the job's namespace, or mark the reference as optional",
        hopeless=True,
    ),
    Rule(
        r"runAsNonRoot",
        "the image runs as root, which the pod forbids: set runAsUser to a numeric user that the image can run as",
        hopeless=True,
    ),
    Rule(
        r"Multi-Attach error",
        "the volume is attached to another node: use ReadWriteMany storage, or wait until the other pod has gone",
    ),
    Rule(
        r"exec: |no such file or directory|executable file not found",
        "the image lacks the command, or is the wrong image: check cluster.image and the command",
        hopeless=True,
    ),
    Rule(r"timed out|deadline exceeded|mount failed", "check the storage behind the volume: kubectl describe pod"),
)


def fix_for(rules: Sequence[Rule], message: str, *, several: bool = False) -> tuple[str, bool]:
    """The fix for `message`, and whether waiting is hopeless; ("", False) if no rule matches.

    Args:
        several: join the fixes of the first two matching rules; the scheduler names all reasons at once.
    """
    found = [(rule, match) for rule in rules if (match := re.search(rule.pattern, f"{message} "))]
    # A resource may match its own rule and the rule for any resource.
    unique = {match.start(): (rule, match) for rule, match in reversed(found)}
    ordered = [pair for pair in found if pair in unique.values()][: 2 if several else 1]
    fixes = [match.expand(rule.fix) for rule, match in ordered]
    return "; or ".join(fixes), any(rule.hopeless for rule, _ in ordered)


def exit_meaning(code: int | None, reason: str) -> str:
    """The meaning of a container's exit code; the kubelet's reason first if it is more specific."""
    if reason == "OOMKilled":
        return "out of memory; raise cluster.memory_gib_per_node or lower train.batch.micro_batch_rows"
    if reason in ("StartError", "ContainerCannotRun"):
        return "the container's command could not be started; check cluster.image and the command"
    if code in list(ExitCode):
        return MEANING[ExitCode(code)]
    return reason or "unknown exit code"
