"""Without this the HiLo benchmark rots unseen; no figure is asserted, since a timed test fails on a busy machine."""

import json

import pytest
import torch

from densezoo.tools.benchmark import main
from densezoo.tools.benchmarks import hilo

# a stand-in for the authors' file: the same constructor and call
AUTHORS = """
from densezoo.backbones.litv2 import HiLo as Ours


class HiLo(Ours):
    def __init__(self, dim, num_heads, qkv_bias, window_size, alpha):
        super().__init__(dim=dim, num_heads=num_heads, qkv_bias=qkv_bias, window_size=window_size, alpha=alpha)

    def forward(self, x, H, W):
        return super().forward(x.unflatten(1, (H, W))).flatten(1, 2)
"""


def test_prints_all_peers(capsys, tmp_path):
    (tmp_path / 'hilo.py').write_text(AUTHORS)
    threads = torch.get_num_threads()
    assert main(['--json', 'hilo', '--repeats', '1', '--authors', str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(printed[printed.index('[\n') :])
    assert [row['peer_name'] for row in rows] == 2 * ['spatial reduction', 'window 7', "authors' HiLo"]
    assert all(row['ours'] > 0 and row['peer'] > 0 for row in rows)
    assert torch.get_num_threads() == threads


def test_a_folder_without_the_authors_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no such file: .*hilo\.py; --authors needs a checkout of'):
        hilo.authors_module(str(tmp_path))
