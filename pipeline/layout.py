"""How the rows of a run are arranged: units are committed, shards are published."""

from __future__ import annotations

from dataclasses import dataclass

from hired.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows 0 to ``num_rows``, in units of ``rows_per_unit``, in shards of ``units_per_shard``.

    A unit is lost or done as a whole; a shard becomes one output file.
    """

    num_rows: int
    rows_per_unit: int
    units_per_shard: int

    def __post_init__(self) -> None:
        if min(self.num_rows, self.rows_per_unit, self.units_per_shard) < 1:
            raise ConfigurationError(f"nothing can be arranged as {self}")

    @classmethod
    def of(cls, num_rows: int, rows_per_unit: int, rows_per_file: int) -> Layout:
        """The layout whose shards hold about ``rows_per_file`` rows: a whole number of units."""
        rows_per_unit = min(rows_per_unit, rows_per_file)
        return cls(num_rows, rows_per_unit, rows_per_file // rows_per_unit)

    @property
    def rows_per_shard(self) -> int:
        return self.rows_per_unit * self.units_per_shard

    @property
    def num_units(self) -> int:
        return -(-self.num_rows // self.rows_per_unit)

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    def unit_rows(self, unit: int) -> range:
        return self._cut(unit * self.rows_per_unit, self.rows_per_unit)

    def shard_rows(self, shard: int) -> range:
        return self._cut(shard * self.rows_per_shard, self.rows_per_shard)

    def shard_units(self, shard: int) -> range:
        first = shard * self.units_per_shard
        return range(first, min(first + self.units_per_shard, self.num_units))

    def shard_of_unit(self, unit: int) -> int:
        return unit // self.units_per_shard

    def _cut(self, start: int, length: int) -> range:
        return range(start, min(start + length, self.num_rows))
