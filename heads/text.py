"""Class names as text: CLIP's byte-pair tokens and causal transformer (Radford et al. 2021, arXiv:2103.00020), as
OneFormer uses them. Needed in training alone.

Tokens: text is lower-cased and split into words, a word into UTF-8 bytes, and pairs of neighbours are merged in the
order of a table of merges. CLIP's table is a file that is not part of densezoo: bpe_simple_vocab_16e6.txt.gz, in
github.com/openai/CLIP, in OneFormer's repository and inside the package open_clip_torch (all MIT). Without a table
nothing is merged, which is the same scheme with zero merges:

    ids 0..255           bytes inside a word, in CLIP's order
    ids 256..511         bytes that end a word
    ids 512..511 + M     merges (M = 48894 in CLIP's, none without a table)
    512 + M, 513 + M     start and end of the text

So a head trained without a table is a smaller vocabulary (514 rows), and published weights (49408 rows) want the file.

Written from the papers and from facts of openai/CLIP and SHI-Labs/OneFormer (MIT).
"""

import gzip
import html
import itertools
import os
import pathlib
import re
from collections.abc import Sequence

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

# B texts, N tokens, C width

_CLIP_MERGES = 49152 - 256 - 2  # of the file's lines CLIP uses so many, after a headline
_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")


def _byte_letters() -> dict[int, str]:
    """The character that stands for each byte in the file of merges, in the order of CLIP's ids: printable bytes first,
    as themselves, then the others as characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_LETTERS = _byte_letters()


class Tokenizer:
    """Text -> rows of token ids.

    Args:
        merges: CLIP's file, plain or .gz; None for bytes alone.
        length: N; longer texts are cut, and still end with the end token.
    """

    def __init__(self, merges: str | os.PathLike[str] | None = None, *, length: int = 77):
        if length < 3:
            raise ValueError(f'length must be at least 3 (start, one token, end), got {length}')
        self.length = length
        self._ranks: dict[tuple[str, str], int] = {}
        letters = list(_LETTERS.values())
        self._ids = {letter: number for number, letter in enumerate([*letters, *(f'{x}</w>' for x in letters)])}
        for pair in _read_merges(merges) if merges is not None else ():
            self._ranks[pair] = len(self._ranks)
            self._ids[''.join(pair)] = len(self._ids)
        self.start = len(self._ids)
        self.end = self.start + 1
        self._known: dict[str, list[int]] = {}

    @property
    def size(self) -> int:
        """Rows that a table of embeddings needs."""
        return self.end + 1

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, length) int64: start, tokens, end, zeros."""
        rows = torch.zeros(len(texts), self.length, dtype=torch.int64)
        for row, text in zip(rows, texts):
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > self.length:
                ids = [*ids[: self.length - 1], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text: str) -> list[int]:
        """Ids of the text's tokens, without start and end."""
        text = ' '.join(html.unescape(html.unescape(text)).split()).lower()
        ids = []
        for word in _WORDS.findall(text):
            if word not in self._known:
                self._known[word] = [self._ids[part] for part in self._merge(word)]
            ids += self._known[word]
        return ids

    def _merge(self, word: str) -> list[str]:
        parts = [_LETTERS[byte] for byte in word.encode()]
        parts[-1] += '</w>'
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                together = tuple(parts[i : i + 2]) == best
                merged.append(''.join(best) if together else parts[i])
                i += 2 if together else 1
            parts = merged
        return parts


def _read_merges(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f'merges: no file {file}; CLIP publishes bpe_simple_vocab_16e6.txt.gz (see densezoo.heads.text)'
        )
    content = gzip.decompress(file.read_bytes()) if file.suffix == '.gz' else file.read_bytes()
    pairs = []
    for line in content.decode().split('\n')[1 : _CLIP_MERGES + 1]:
        words = line.split()
        if len(words) == 2:
            pairs.append((words[0], words[1]))
        elif words:
            raise ValueError(f'merges: a line of {file} must be two parts, got {line!r}')
    return pairs


class TextBlock(nn.Module):
    """Causal self-attention and an MLP with quick GELU, norms before; (B, N, C) -> (B, N, C)."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(channels)
        self.c_fc = nn.Linear(channels, 4 * channels)
        self.c_proj = nn.Linear(4 * channels, channels)
        self.ln_2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=hidden)[0]
        y = self.c_fc(self.ln_2(x))
        return x + self.c_proj(y * torch.sigmoid(1.702 * y))


class TextTransformer(nn.Module):
    """Token ids -> one vector per text, that of its end token.

    Args:
        vocabulary: rows of the table; the end token is the largest id.
        channels: C; heads are 64 wide.
        num_layers, length: blocks, and tokens of a text at most.
    """

    def __init__(self, *, vocabulary: int, channels: int = 256, num_layers: int = 6, length: int = 77):
        super().__init__()
        if channels % 64:
            raise ValueError(f'the width of the text transformer must be a multiple of 64, got {channels}')
        self.token_embedding = nn.Embedding(vocabulary, channels)
        self.positional_embedding = nn.Parameter(torch.empty(length, channels))
        self.blocks = nn.ModuleList(TextBlock(channels, channels // 64) for _ in range(num_layers))
        self.ln_final = nn.LayerNorm(channels)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for module in self.blocks:
            assert isinstance(module, TextBlock)
            nn.init.normal_(module.attn.in_proj_weight, std=channels**-0.5)
            nn.init.normal_(module.attn.out_proj.weight, std=channels**-0.5 * (2 * num_layers) ** -0.5)
            nn.init.normal_(module.c_fc.weight, std=(2 * channels) ** -0.5)
            nn.init.normal_(module.c_proj.weight, std=channels**-0.5 * (2 * num_layers) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N) int64 -> (B, C)."""
        end = tokens.argmax(1)
        # Attention is causal: nothing behind the last end token is ever seen.
        count = int(end.max()) + 1
        x = self.token_embedding(tokens[:, :count]) + self.positional_embedding[:count]
        hidden = torch.ones(count, count, dtype=torch.bool, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, hidden)
        return self.ln_final(x)[torch.arange(len(x), device=x.device), end]


def contrastive_loss(queries: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Query-text contrast: each picture's queries (B, Q, C), flattened, against the texts (B, Q, C) of all pictures of
    all ranks, and the reverse; the sum of both cross-entropies. `scale` is the log of the inverse temperature."""
    queries, texts = F.normalize(queries.flatten(1), dim=1), F.normalize(texts.flatten(1), dim=1)
    all_queries, all_texts, first = _everywhere(queries), _everywhere(texts), 0
    if len(all_texts) > len(texts):
        first = torch.distributed.get_rank() * len(texts)
    labels = torch.arange(first, first + len(texts), device=texts.device)
    factor = scale.exp().clamp(max=100)
    return F.cross_entropy(factor * queries @ all_texts.T, labels) + F.cross_entropy(
        factor * texts @ all_queries.T, labels
    )


def _everywhere(x: Tensor) -> Tensor:
    """The rows of all ranks, those of this one with their gradient; each rank must have as many."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.detach().contiguous())
    parts[torch.distributed.get_rank()] = x
    return torch.cat(parts)
