"""What an agent and those who ask it agree on: the version, the limits, and how failures are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from autocompress.devices.blobs import Missing
from autocompress.errors import DeviceUnavailable, PolicyFailure, UsageError, one_line

PROTOCOL = 3
HEARTBEAT_S = 5.0
"""Between signs of life while a request is worked on: who hears nothing for much longer knows that the device is gone."""
MOST_REQUEST = 2**26
"""Bytes of a request that is not a file."""


def answered(work: Callable[[], Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    """What the work gives, or what went wrong in words that `raise_failure` understands."""
    try:
        answer = work()
    except Missing as missing:
        return {"failed": "missing", "digests": list(missing.args)}, None
    except PolicyFailure as failure:
        return {"failed": "policy", "message": failure.message}, None
    except DeviceUnavailable as gone:
        return {"failed": "device", "message": gone.message, "hint": gone.hint}, None
    except UsageError as error:
        return {"failed": "usage", "message": error.message, "hint": error.hint}, None
    except Exception as error:  # a request of another version, a bug: the agent lives on
        hint = "pack it again: autocompress agent --pack"
        return {"failed": "device", "message": f"the agent failed: {one_line(error)}", "hint": hint}, None
    return ({}, answer) if isinstance(answer, np.ndarray) else (answer, None)


def raise_failure(answer: dict[str, Any], names: dict[str, str] | None = None) -> None:
    """What the agent says that went wrong, with the names that files have here."""
    kind, message, hint = answer.get("failed"), str(answer.get("message", "")), str(answer.get("hint", ""))
    for digest, name in (names or {}).items():
        message = message.replace(digest, name)
    if kind == "policy":
        raise PolicyFailure(message)
    if kind == "usage":
        raise UsageError(message, hint=hint)
    if kind is not None:
        raise DeviceUnavailable(message or "the agent failed", hint=hint)
