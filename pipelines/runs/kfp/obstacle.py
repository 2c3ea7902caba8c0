"""Why a step of a pipeline does not start, from the message that Argo puts into its node: `Reason: message`."""

from __future__ import annotations

import re

from components.diagnose.causes import CONFIG, IMAGE, SCHEDULING, Obstacle, fix_for
from components.diagnose.explain import CONFIG_WAITING, IMAGE_WAITING

USUAL = {"", "PodInitializing", "ContainerCreating", "Pending"}
REASON = re.compile(r"(?P<reason>\w+): (?P<message>.*)", re.S)
IN_QUOTES = re.compile(r'image "([^"]+)"')
OF_THE_TRAINING = re.compile(r" \(cluster\.[^)]*\)")  # fields of the training job, which change nothing for a step
LONGEST_CHARACTERS = 400


def obstacle(message: str) -> Obstacle | None:
    """What keeps a pending pod from starting; None if it is just on its way."""
    if message in USUAL:
        return None
    match = REASON.fullmatch(message)
    reason, said = (match["reason"], match["message"]) if match else ("", message)
    said = " ".join(said.split())
    if reason in USUAL - {""}:
        return None
    if reason == "Unschedulable":
        said = re.split(r" preemption: | no new claims to deallocate", said)[0].removesuffix(" not found").rstrip(".")
        fix, hopeless = fix_for(SCHEDULING, said, several=True)
        return Obstacle(f"cannot be scheduled: {said}", OF_THE_TRAINING.sub("", fix), hopeless)
    if reason in IMAGE_WAITING:
        named = IN_QUOTES.search(said)
        image = f"image '{named[1]}'" if named else "its image"
        fix, hopeless = fix_for(IMAGE, f"{named[1] if named else ''} {reason} {said}")
        fix = (fix or "check cluster.image").replace("cluster.image", "--image (in the form: image)")
        cause = said.rpartition(": ErrImagePull: ")[2][-LONGEST_CHARACTERS:]
        return Obstacle(f"{image} cannot be pulled ({reason}: {cause})", fix, hopeless, pulling=True)
    if reason in CONFIG_WAITING:
        fix, hopeless = fix_for(CONFIG, said)
        return Obstacle(f"container cannot be made ({reason}: {said})", fix, hopeless)
    return Obstacle(message[:LONGEST_CHARACTERS])
