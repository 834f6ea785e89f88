"""What tiles and the choice of columns are weighed by on each kind of GPU: bytes, rows, rates. None is measured yet.

docs/linear_logps_gpu.md derives the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ._options import TileSizes, break_even

# Columns come in multiples: cuBLAS tiles are 128 or 256 wide, and rows start at whole cache lines.
COLUMNS = 128
MIB = 2**20


@dataclass(frozen=True)
class Rates:
    """What a GEMM of half precision and of float32 reaches, operations a second, and a copy, bytes a second."""

    half: float
    single: float
    bandwidth: float

    def of(self, size: int) -> float:
        """Operations a second on elements of size bytes."""
        return self.half if size == 2 else self.single


@dataclass(frozen=True)
class Policy:
    """Of one architecture.

    tile: bytes of the logits buffer. rows: of a tile at most. chunk: rows that choose their columns together.
    gathered: bytes of the kept rows of the weight and their product. total: bytes of dweight's float32 sum in the
    sampled backward, which goes over the vocabulary in blocks of that size. rates: None where time is no matter.
    """

    tile: int
    rows: int
    chunk: int
    gathered: int = 384 * MIB
    total: int = 512 * MIB
    rates: Rates | None = None

    def exact(self, rows: int, size: int) -> TileSizes:
        """For so many rows; size: bytes of a logit."""
        block = even(rows, self.rows, min(COLUMNS, self.rows))
        return TileSizes(block, self._columns(min(block, rows), size))

    def sampled(self, rows: int, width: int, size: int, part: int, logit: int = 0) -> TileSizes:
        """width: of the hidden states. part: rows that a row of column bounds is of, so that of a tile with several
        chunks each must have whole parts. logit: bytes of one where they are not an element's.
        """
        logit = logit or size
        several = self.chunk % part == 0
        block = even(rows, self.rows // self.chunk * self.chunk, self.chunk) if several else self.chunk
        chunk, width = max(1, min(rows, self.chunk)), max(1, width)
        kept = min(self._columns(chunk, logit), self.gathered // (width * (size + 4)) // COLUMNS * COLUMNS)
        # Wider types have no sum beside dweight itself.
        total = 0 if size > 2 else max(COLUMNS, self.total // (4 * width) // COLUMNS * COLUMNS)
        columns, kept = self._columns(min(block, rows), logit), max(COLUMNS, kept)
        return TileSizes(block, columns, self.chunk, kept, total, self.break_even(chunk, size))

    def fixed(self, size: TileSizes, logit: int) -> TileSizes:
        """size with columns that depend on no number of rows, and are sampled's too: as many as a quarter of a tile's
        rows leave room for, with which GEMMs of few rows still fill a GPU.
        """
        rows = max(1, self.rows // 4)
        return replace(size, rows=size.chunk if size.shared else rows, columns=self._columns(rows, logit))

    def break_even(self, rows: int, size: int) -> float:
        """Kept share f at which a chunk of rows costs as much sampled as exact; size: bytes of an element.

        Moved of a column, beside its weight in the GEMMs: read and written by the gather, written as a product in
        float32, half of which the GEMM hides, read again, and added, 2 size + 14 bytes an entry. With few rows a GEMM
        takes as long as its weight does to be read.
        """
        if self.rates is None:
            return TileSizes.break_even
        operations_a_byte = self.rates.of(size) / self.rates.bandwidth
        return break_even(max(rows, size * operations_a_byte / 2), (2 * size + 14) * operations_a_byte / 2)

    def ordered(self, operations: float, size: int) -> bool:
        """Whether rows are put in order for a step whose forward has so many operations.

        That is 50 launches for each halving, a quarter of a millisecond, and saves about a tenth of the step.
        """
        return self.rates is None or operations / self.rates.of(size) >= 2e-3

    def _columns(self, rows: int, size: int) -> int:
        return max(COLUMNS, self.tile // (max(1, rows) * size) // COLUMNS * COLUMNS)


def even(n: int, most: int, step: int) -> int:
    """Rows of each block, multiples of step, where n rows go in as few blocks of at most `most` as they fit in."""
    blocks = max(1, -(-n // most))
    rows = -(-max(1, n) // blocks)
    return min(most, rows + -rows % step)


# tile: what the GEMM writes and the pass reads again should not go through memory, so about the last cache (A100 40
# MB, H100 50, B200 126, MI300X 256). Wider tiles have fewer launches and, in the exact backward, read and write the
# float32 sum of dhidden less often: 8192 x 4096 on an H100 does so in half of the time of the tile's GEMMs, 8192 x
# 2048 in all of it. rows: a tile that has all rows makes its part of dweight in one GEMM. chunk: 1024 rows, where f
# times the bytes and operations of a row is smallest. rates: sustained, not the maker's: an H100 made 728 TF/s of
# 6NDV at V = 151,936, 0.74 of its data sheet, and copies 2.9 TB/s, 0.87; the others are about those shares of theirs,
# the operations of AMD's a half.
POLICIES = {
    "interpreter": Policy(0, 64, 48),
    "cuda:80": Policy(32 * MIB, 8192, 1024, rates=Rates(2.5e14, 1.7e13, 1.6e12)),
    "cuda:90": Policy(64 * MIB, 8192, 1024, rates=Rates(7.3e14, 5e13, 2.9e12)),
    "cuda:100": Policy(128 * MIB, 8192, 1024, rates=Rates(1.6e15, 6e13, 6.5e12)),
    "hip:gfx942": Policy(128 * MIB, 8192, 1024, rates=Rates(6e14, 9e13, 4e12)),
}
