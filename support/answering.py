"""As many questions answered side by side as the memory holds."""

from collections.abc import Callable, Iterator, Sequence

import psutil
import torch
from tqdm import tqdm

from support.errors import out_of_memory

MOST_ROWS = {"cuda": 128, "cpu": 64}  # more give hardly more answers a second (measured on the CPU)


def rows_that_fit(model, tokens: int) -> int:
    """How many rows of so many tokens can be answered side by side: their keys and values fit into half the free memory.

    The other half is for activations, and for the copy while a batch shrinks.
    """
    config, device = model.config, model.device
    if device.type == "cuda":  # what torch's allocator keeps for itself is free as well
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + kept
    else:
        free = psutil.virtual_memory().available
    row = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize * tokens
    return max(1, min(MOST_ROWS[device.type], free // 2 // row))


def in_batches(answer: Callable, numbers: Sequence[int], size: int, done) -> Iterator[tuple[list[int], list]]:
    """Yield batches of the numbers, `size` at most, with what `answer` makes of each; those that are `done` are left out.

    A batch that the memory does not hold is halved, and so are those after it.
    """
    start = 0
    while start < len(numbers):
        batch = list(numbers[start : start + size])
        if not all(number in done for number in batch):
            try:
                found = answer(batch)
            except Exception as error:
                if not out_of_memory(error) or len(batch) == 1:
                    raise
                size = (len(batch) + 1) // 2
                tqdm.write(f"too little memory for {len(batch)} questions side by side: going on with {size}")
                continue
            yield batch, found
        start += len(batch)
