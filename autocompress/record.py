"""Record: what all plain data of this package is, in memory and as JSON."""

from __future__ import annotations

import hashlib
import json
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from autocompress.errors import UsageError


class Record(BaseModel):
    """A frozen, validated value with a JSON form; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    cure: ClassVar[str] = "mend this field"
    """Of a file that holds no valid one."""

    def to_json(self) -> str:
        return self.model_dump_json(indent=1, by_alias=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote; raises UsageError that names the field."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UsageError(f"not a valid {cls.__name__}: {first_problem(error)}", hint=cls.cure) from None

    @property
    def digest(self) -> str:
        """16 hex digits of SHA-256 over the canonical JSON; equal in every process."""
        canonical = json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error as `field: message (got value)`."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "document"
    return f"{where}: {first['msg'].lower()} (got {first['input']!r:.80})"
