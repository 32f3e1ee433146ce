"""How fast blocks are expanded, in million weights a second."""

import time

import torch

from flexjudge_fast.ops.dequantize import dequantize
from flexjudge_fast.weights.formats import QUANT_FORMATS

ROWS, COLUMNS, REPEATS = 100_000, 768, 5


def main() -> None:
    print("format   threads   million weights/s")
    for found in QUANT_FORMATS:
        row_bytes = COLUMNS // found.block_size * found.block_bytes
        blocks = torch.randint(0, 256, (ROWS, row_bytes), dtype=torch.uint8)
        for threads in (1, torch.get_num_threads()):
            torch.set_num_threads(threads)
            times = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                dequantize(blocks, found.name)
                times.append(time.perf_counter() - start)
            print(f"{found.name:8} {threads:7} {ROWS * COLUMNS / 1e6 / sorted(times)[REPEATS // 2]:19.0f}")


if __name__ == "__main__":
    main()
