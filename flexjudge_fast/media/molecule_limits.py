"""How large a molecule may be, and how long reading it may take; what is over a limit is refused."""

from dataclasses import dataclass

from flexjudge_fast.errors import MediaError

_MOST_WITH_HYDROGEN = 4  # times max_atoms


@dataclass(frozen=True)
class MoleculeLimits:
    """Checked before parsing (length), on what was parsed, and while atoms are placed.

    Args:
        max_bytes: of the text, or of an RDKit molecule in its binary form.
        max_atoms: heavy atoms; of a molecule of hydrogen alone, all.
        min_attempts, max_attempts: to place the atoms, from distances and as often from random places: as
            many as heavy atoms, within these bounds. What is small and needs many is impossible.
        max_memory_bytes: of the process that reads, all in all.
        parse_timeout: seconds until the molecule is understood.
        timeout: seconds of wall-clock and of processor time for all of it, the atoms' places included.
    """

    max_bytes: int = 1 << 18
    max_atoms: int = 512
    min_attempts: int = 10
    max_attempts: int = 50
    max_memory_bytes: int = 512 << 20
    parse_timeout: float = 0.8
    timeout: float = 30.0

    def attempts(self, num_heavy: int) -> int:
        """How often atoms are placed before they are given up."""
        return min(max(num_heavy, self.min_attempts), self.max_attempts)

    def check_file(self, num_bytes: int) -> None:
        """MediaError: there is no text, or too much."""
        if num_bytes == 0:
            raise MediaError("it is empty")
        if num_bytes > self.max_bytes:
            raise MediaError(f"{num_bytes:,} bytes are more than the {self.max_bytes:,} allowed")

    def check_atoms(self, num_heavy: int, num_all: int) -> None:
        """MediaError: there is no atom, or too many."""
        if num_all <= 0:
            raise MediaError("it has no atoms")
        if num_heavy > self.max_atoms:
            raise MediaError(f"{num_heavy} heavy atoms are more than the {self.max_atoms} allowed")
        if num_all > _MOST_WITH_HYDROGEN * self.max_atoms:
            most = _MOST_WITH_HYDROGEN * self.max_atoms
            raise MediaError(f"{num_all} atoms with hydrogen are more than the {most} allowed")
