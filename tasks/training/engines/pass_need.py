"""Memory of a pass at its peak."""

from typing import NamedTuple


class Need(NamedTuple):
    """Memory of a pass at its peak."""

    fixed_bytes: float
    bytes_per_token: float

    def count_tokens(self, free_bytes: float) -> int:
        """Return how many tokens fit."""
        return int((free_bytes - self.fixed_bytes) / self.bytes_per_token)

    def __str__(self) -> str:
        """Say it in the units of a person."""
        return f"{self.fixed_bytes / 2**30:.1f} GiB and {self.bytes_per_token / 2**20:.2f} MiB a token"
