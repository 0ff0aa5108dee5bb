"""Memory that CPU inference frees stays with the process, so that the next layer does not wait for new pages.

glibc maps large buffers one by one and gives memory at the end of its heap back; the kernel clears every page that it
hands out again. In a fresh process that was a third of PVTv2-b0's time (8 images of 224 x 224: 126 and 137 ms, or 81 by
chance; 84 to 89 with what is below). Both limits rise to the largest mapped buffer, of at most 32 MiB, that was ever
freed, and to twice that: one that nobody touches raises them for good.
"""

from functools import cache

import torch

_LIMIT = 32 * 2**20


@cache
def keep_freed_pages() -> None:
    """Raises glibc's limits, once per process; does nothing under other allocators, or where MALLOC_* variables set
    limits."""
    torch.empty(_LIMIT - 2**16, dtype=torch.uint8, device='cpu')
