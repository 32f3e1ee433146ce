"""A checkpoint's settings of one preprocessor: how a kind of media is prepared."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexjudge_fast.errors import UnsupportedCheckpointError


@dataclass(frozen=True)
class ProcessorConfig:
    """Absent and null fields take the default of whoever reads them.

    Args:
        where: the file, and what object in it, for messages.
        fields: as parsed.
    """

    where: str
    fields: Mapping[str, Any]

    def wrong(self, name: str, reason: str) -> UnsupportedCheckpointError:
        return UnsupportedCheckpointError(f"{self.where}: field {name}: {reason}")

    def count(self, name: str, default: int, most: int) -> int:
        """A whole number from 1 to `most`."""
        return self._count(name, self.fields.get(name), default, most)

    def _count(self, name: str, value: object, default: int, most: int) -> int:
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.wrong(name, f"{value!r:.50} is not a whole number from 1 to {most}")
        return value
