"""``doctor``: what works on this machine."""

from __future__ import annotations

from fourbit.cli import screen
from fourbit.cli.common import Json

_MARKS = {"ok": "ok", "missing": "--", "broken": "!!", "unknown": "??"}


def doctor(json: Json = False) -> None:
    """Say what fourbit finds on this machine, what is missing, and what to do about it."""
    from fourbit.diagnosis import doctor as diagnose

    diagnosis = diagnose()
    if json:
        screen.say_json(diagnosis.as_dict())
        return
    width = max(len(finding.subject) for finding in diagnosis.findings)
    for finding in diagnosis.findings:
        screen.say(f"{_MARKS[finding.status]}  {finding.subject:<{width}}  {finding.found}")
        if finding.advice is not None:
            screen.say(f"{'':{width + 4}}  -> {finding.advice}")
    screen.say("")
    screen.say(
        "CUDA tensors can be used"
        if diagnosis.cuda_works
        else "CUDA tensors cannot be used on this machine; those on the CPU can"
    )
