"""The process a run lives in: memory allocator, threads, distributed group."""

import ctypes
import os
import sys

import torch
from torch import distributed

# mallopt's parameter numbers (glibc malloc.h) and values: keep freed memory instead of returning it to the system at
# every iteration. An iteration of 85 ms took 64 ms with them (two CPU cores).
_MALLOC_SETTINGS = {-1: 2**31 - 1, -2: 64 * 2**20, -3: 32 * 2**20}  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def keep_freed_memory() -> bool:
    """Ask glibc's malloc to keep its memory. False where there is no mallopt (other systems, musl)."""
    if not sys.platform.startswith('linux'):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:
        return False
    accepted = [mallopt(number, value) == 1 for number, value in _MALLOC_SETTINGS.items()]  # all are tried
    return all(accepted)


def share_threads() -> None:
    """Divide the cores among the ranks of this machine (torchrun sets one thread per rank)."""
    ranks = int(os.environ.get('LOCAL_WORLD_SIZE', '1'))
    if ranks > 1 and not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // ranks))
        os.environ.setdefault('MKL_NUM_THREADS', str(max(1, cores // ranks)))  # mmengine warns without it


def start(launcher: str = 'none') -> None:
    """Prepare this process; with launcher='pytorch' (torchrun) also join the group: NCCL on GPUs, gloo on CPUs.

    The group is made here and not by mmengine, which calls torch.cuda.set_device without asking for a GPU.
    """
    if launcher not in ('none', 'pytorch'):
        raise ValueError(f"launcher must be 'none' or 'pytorch', got {launcher=}")
    keep_freed_memory()
    share_threads()
    if launcher == 'none' or distributed.is_initialized():
        return
    missing = [name for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR') if name not in os.environ]
    if missing:
        raise ValueError(
            f"launcher='pytorch' needs torchrun ({', '.join(missing)} not set): "
            'torchrun --nproc_per_node=2 tools/train.py CONFIG --launcher pytorch'
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        distributed.init_process_group('nccl')
    else:
        distributed.init_process_group('gloo')


def stop() -> None:
    """Leave the group, all ranks together unless an error is on its way: who leaves early can abort the others."""
    if distributed.is_initialized():
        if sys.exc_info()[0] is None:
            distributed.barrier()
        distributed.destroy_process_group()
