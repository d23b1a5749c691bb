"""The lengths of rows: percentiles, a histogram, and what fits into windows of some sizes."""

import numpy as np

from minimind.data.packing import best_fit
from minimind.inspection.tokens import ratio

WINDOWS = (256, 512, 1024, 2048)
PERCENTILES = (50, 90, 95, 99, 100)
PARTS = ("prompt", "chosen", "rejected")  # of a pair, whose lengths are reported each
BINS = 16  # of the histogram
BATCH = 8  # rows padded to the longest of them, where padding is estimated


def padding_share(lengths: np.ndarray) -> float:
    """The share of padding where random batches of 8 rows are padded to their longest."""
    batches = -(-len(lengths) // BATCH)
    padded = np.zeros(batches * BATCH, np.int64)
    padded[: len(lengths)] = np.random.default_rng(0).permutation(lengths)
    rows = np.minimum(BATCH, len(lengths) - BATCH * np.arange(batches))
    total = int((padded.reshape(-1, BATCH).max(1) * rows).sum())
    return round(1 - int(lengths.sum()) / max(total, 1), 4)


def percentiles(lengths: np.ndarray) -> dict[str, int]:
    """Lengths -> {"50": the length that half of them do not exceed, ...}."""
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf").astype(int).tolist()
    return dict(zip(map(str, PERCENTILES), values, strict=True))


def describe(lengths: np.ndarray) -> dict:
    """The mean of some lengths and their percentiles."""
    return {"mean": round(float(lengths.mean()), 1), "percentiles": percentiles(lengths)}


def suggested(shares: dict[str, int]) -> int:
    """The smallest multiple of 64 into which 99 % fit."""
    return -(-shares["99"] // 64) * 64


def describe_lengths(lengths: np.ndarray, of: str = "row") -> dict:
    """Rows' lengths in tokens -> percentiles, histogram, and what fits into windows of some sizes.

    `windows`: for the usual sizes of --max_length and for each percentile, the share of rows and of
    tokens that fit uncut, the rows after best-fit packing, the share of padding in these, and in
    batches of 8 unpacked rows. `suggested_max_length` is the smallest multiple of 64 into which
    99 % of the rows fit.
    """
    shares = percentiles(lengths)
    longest = shares["100"]
    # The last bin takes the tail: with even bins one long row would squeeze all others into the
    # first.
    width = max(-(-shares["99"] // (BINS - 1)), 1)
    edges = [*range(0, longest, width)][:BINS]
    counts = np.histogram(lengths, [*edges, longest + 1])[0]
    windows = []
    for size in sorted({*WINDOWS, *shares.values()}):
        fitting = lengths[lengths <= size]
        tokens, packed = int(fitting.sum()), len(best_fit(fitting, size))
        windows.append(
            {
                "max_length": size,
                "rows_share": ratio(len(fitting), len(lengths)),
                "tokens_share": ratio(tokens, lengths.sum()),
                "packed_rows": packed,
                "packed_padding": round(1 - tokens / max(packed * size, 1), 4),
                "unpacked_padding": padding_share(fitting),
            }
        )
    return {
        "of": of,
        **describe(lengths),
        "histogram": {"edges": [*edges, longest], "counts": counts.tolist()},
        "windows": windows,
        "suggested_max_length": suggested(shares),
    }
