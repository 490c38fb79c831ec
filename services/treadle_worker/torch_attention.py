"""Attention over the paged cache in plain torch operations, for one step of many sequences.

A query's result has the same bits however the step is put together: alone or in a batch, in one chunk or
in many, over shuffled blocks. Keys are taken in tiles of one block, which stand at fixed positions; every
product has fixed inner sizes and rows in multiples of ROWS; the maximum is exact in any order; and the
sums over tiles are taken one after another, so that tiles that a query does not see add exact zeros.

Only the blocks that a sequence has, and that its window reaches, are read. All single-token chunks of a
step are one batch of (sequence, tile) pairs; longer chunks go one by one, in pieces. Everything that
depends on the step alone is worked out once for all layers.

S: sequences; T: tokens; R: rows of a product; H, K: query and key heads; G = H / K; N: (sequence, tile)
pairs; B: block size; L: keys of the tiles read; D: size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.nn.attention import heads_of
from treadle.nn.linear import RMSNorm
from treadle.nn.rope import rotate
from treadle_worker.batch import ScheduledChunk, opened_blocks
from treadle_worker.torch_kv_cache import LayerCache, TorchKVCache

ROWS = 8
_MAX_SCORES = 1 << 20
"""Elements of a piece's score matrix: 4 MiB, which stay in the cache from one pass to the next."""
_TILE_BYTES = 1 << 20
"""Of float32 keys or values that are gathered at once: they stay in a core's cache until they are read."""


class TorchAttention:
    """Attention of one step; see `treadle.nn.attention.Attention`."""

    def __init__(self, cache: TorchKVCache, chunks: Sequence[ScheduledChunk]) -> None:
        self._cache, self._config = cache, cache.config
        config, device, size = cache.config, cache.keys.device, cache.block_size
        tables = [torch.tensor(chunk.block_table, dtype=torch.int64) for chunk in chunks]
        positions = [torch.arange(chunk.start, chunk.start + len(chunk.token_ids)) for chunk in chunks]
        positions_T = torch.cat(positions).to(device)
        cos, sin = cache.rotary.at(positions_T)
        self._turn = partial(rotate, cos=cos, sin=sin)
        blocks_T = torch.cat([table[place // size] for table, place in zip(tables, positions, strict=True)])
        self._blocks_T, self._offsets_T = blocks_T.to(device), positions_T % size
        cache.clear(torch.tensor(opened_blocks(chunks, size), dtype=torch.int64, device=device))

        starts = [0]
        for chunk in chunks:
            starts.append(starts[-1] + len(chunk.token_ids))
        spans = list(zip(chunks, tables, starts[:-1], strict=True))
        decodes = [span for span in spans if len(span[0].token_ids) == 1]
        prefills = [span for span in spans if len(span[0].token_ids) > 1]
        self._decodes: dict[int | None, _Decodes] = {}
        self._prefills: dict[int | None, list[_Prefill]] = {}
        heads = config.num_attention_heads
        for window in dict.fromkeys(config.sliding_windows):
            if decodes:
                self._decodes[window] = _Decodes.plan(decodes, window, size, device)
            self._prefills[window] = [
                _Prefill.plan(chunk, table.to(device), start, window, size, heads)
                for chunk, table, start in prefills
            ]

    def __call__(self, layer: int, qkv_TX: Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> Tensor:
        """[T, H D]."""
        q_THD, k_TKD, v_TKD = heads_of(qkv_TX, self._config, self._turn, q_norm, k_norm)
        return self.attend(layer, q_THD, k_TKD, v_TKD).flatten(1)

    def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """[T, H, D]; writes the layer's keys and values first."""
        cached = self._cache.layer(layer)
        cached.write(self._blocks_T, self._offsets_T, k_TKD, v_TKD)
        window = self._config.window(layer)
        grouped = q_THD.float().unflatten(1, (k_TKD.shape[1], -1)) * q_THD.shape[-1] ** -0.5
        out = torch.empty_like(grouped)
        if (decodes := self._decodes.get(window)) is not None:
            out[decodes.rows] = decodes.attend(grouped[decodes.rows], cached)
        for prefill in self._prefills[window]:
            prefill.attend(grouped, cached, out)
        return out.flatten(1, 2).to(q_THD.dtype)


@dataclass(frozen=True, slots=True)
class _Decodes:
    """One token of each of S sequences. Pairs stand tile by tile, sequences with most tiles first."""

    rows: Tensor
    """[S] rows of the step, in the order of the pairs."""
    blocks_N: Tensor
    sequence_N: Tensor
    bias_N1B: Tensor
    """0 where the query sees the key, else minus infinity."""
    pairs_per_tile: list[int]

    @classmethod
    def plan(
        cls,
        spans: Sequence[tuple[ScheduledChunk, Tensor, int]],
        window: int | None,
        size: int,
        device: torch.device,
    ) -> _Decodes:
        first = [_first_tile(chunk.start, window, size) for chunk, _, _ in spans]
        count = [
            chunk.start // size + 1 - skipped for (chunk, _, _), skipped in zip(spans, first, strict=True)
        ]
        order = sorted(range(len(spans)), key=lambda place: -count[place])
        pairs_per_tile, sequence, blocks, tile_starts, queries = [], [], [], [], []
        for tile in range(count[order[0]]):
            held = 0
            for rank, place in enumerate(order):
                if count[place] <= tile:
                    break
                chunk = spans[place][0]
                sequence.append(rank)
                blocks.append(chunk.block_table[first[place] + tile])
                tile_starts.append((first[place] + tile) * size)
                queries.append(chunk.start)
                held += 1
            pairs_per_tile.append(held)
        keys_NB = torch.tensor(tile_starts)[:, None] + torch.arange(size)
        return cls(
            rows=torch.tensor([spans[place][2] for place in order], device=device),
            blocks_N=torch.tensor(blocks, device=device),
            sequence_N=torch.tensor(sequence, device=device),
            bias_N1B=_bias(torch.tensor(queries)[:, None], keys_NB, window).unsqueeze(1).to(device),
            pairs_per_tile=pairs_per_tile,
        )

    def attend(self, q_SKGD: Tensor, cached: LayerCache) -> Tensor:
        S, K, G, D = q_SKGD.shape
        N, B = len(self.blocks_N), self.bias_N1B.shape[-1]
        q_SKRD = F.pad(q_SKGD, (0, 0, 0, -G % ROWS))
        few = max(1, _TILE_BYTES // (4 * K * B * D))
        parts = [slice(begin, begin + few) for begin in range(0, N, few)]
        scores = q_SKRD.new_empty((N * K, q_SKRD.shape[2], B))
        mixed = q_SKRD.new_empty((N * K, q_SKRD.shape[2], D))
        for part in parts:
            q, k = q_SKRD[self.sequence_N[part]], cached.keys_of(self.blocks_N[part])
            torch.bmm(q.flatten(0, 1), k.flatten(0, 1), out=scores[part.start * K : part.stop * K])
        scores = scores.view(N, -1, B)  # [N, K R, B]
        scores += self.bias_N1B
        top = self._reduce(scores.amax(-1), torch.maximum)  # [S, K R]
        scores -= top[self.sequence_N].unsqueeze(-1)
        weights = scores.exp_()
        sums = self._reduce(weights.sum(-1), torch.add)
        weights = weights.view(N * K, -1, B)
        for part in parts:
            place, v = slice(part.start * K, part.stop * K), cached.values_of(self.blocks_N[part])
            torch.bmm(weights[place], v.flatten(0, 1), out=mixed[place])
        mixed = self._reduce(mixed.view(N, -1, D), torch.add)
        return (mixed / sums.unsqueeze(-1)).view(S, K, -1, D)[:, :, :G]

    def _reduce(self, parts: Tensor, combine: Callable[..., Tensor]) -> Tensor:
        """Combines a sequence's tiles in their order: [N, …] to [S, …]."""
        tiles: Sequence[Tensor] = parts.split(self.pairs_per_tile)
        total = tiles[0].clone()
        for tile in tiles[1:]:
            combine(total[: len(tile)], tile, out=total[: len(tile)])
        return total


@dataclass(frozen=True, slots=True)
class _Prefill:
    """Consecutive tokens of one sequence: their tiles are gathered once, their queries go piece by piece."""

    blocks: Tensor
    pieces: list[_Piece]

    @classmethod
    def plan(
        cls, chunk: ScheduledChunk, table: Tensor, row: int, window: int | None, size: int, heads: int
    ) -> _Prefill:
        """Cuts the chunk so that a piece's scores are not too many at once."""
        end = chunk.start + len(chunk.token_ids)
        gathered = _first_tile(chunk.start, window, size)
        step = max(ROWS, _MAX_SCORES // (heads * (end + size)))
        pieces = []
        for begin in range(chunk.start, end, step):
            stop = min(begin + step, end)
            first, last = _first_tile(begin, window, size), (stop - 1) // size + 1
            queries = torch.arange(begin, stop, device=table.device)
            keys = torch.arange(first * size, last * size, device=table.device)
            bias = _bias(queries[:, None], keys, window).unsqueeze(1)
            offset = row + begin - chunk.start
            rows = slice(offset, offset + stop - begin)
            pieces.append(_Piece(rows, range(first - gathered, last - gathered), bias))
        return cls(table[gathered : (end - 1) // size + 1], pieces)

    def attend(self, q_TKGD: Tensor, cached: LayerCache, out_TKGD: Tensor) -> None:
        """Reads and fills the rows of the chunk's tokens."""
        k_nKDB, v_nKBD = cached.keys_of(self.blocks), cached.values_of(self.blocks)
        k_KDL = k_nKDB.permute(1, 2, 0, 3).flatten(2, 3)
        for piece in self.pieces:
            out_TKGD[piece.rows] = piece.attend(q_TKGD[piece.rows], k_KDL, v_nKBD)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some of a chunk's tokens."""

    rows: slice
    """Rows of the step."""
    tiles: range
    """Those of the gathered tiles that the tokens see."""
    bias_T1L: Tensor

    def attend(self, q_TKGD: Tensor, k_KDL: Tensor, v_nKBD: Tensor) -> Tensor:
        T, K, G, D = q_TKGD.shape
        size = v_nKBD.shape[2]
        q_KRD = F.pad(q_TKGD.transpose(0, 1).flatten(1, 2), (0, 0, 0, -(T * G) % ROWS))
        scores = torch.bmm(q_KRD, k_KDL[:, :, self.tiles.start * size : self.tiles.stop * size])
        seen = scores[:, : T * G].unflatten(1, (T, G))  # [K, T, G, L], a view
        seen += self.bias_T1L
        scores -= scores.amax(-1, keepdim=True)
        weights_KRnB = scores.exp_().unflatten(2, (-1, size))
        sums_KRn = weights_KRnB.sum(-1)
        mixed = torch.bmm(weights_KRnB[:, :, 0], v_nKBD[self.tiles.start])
        sums = sums_KRn[:, :, 0].clone()
        for number, tile in enumerate(self.tiles[1:], start=1):
            mixed += torch.bmm(weights_KRnB[:, :, number], v_nKBD[tile])
            sums += sums_KRn[:, :, number]
        mixed /= sums.unsqueeze(-1)
        out_TKGD: Tensor = mixed[:, : T * G].unflatten(1, (T, G)).transpose(0, 1)
        return out_TKGD


def _first_tile(query: int, window: int | None, size: int) -> int:
    """The first tile that holds a key which the query sees."""
    return 0 if window is None else max(0, query - window + 1) // size


def _bias(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Float32, broadcast: 0 where query and key positions may meet, else minus infinity."""
    hidden = keys > queries
    if window is not None:
        hidden = hidden | (keys <= queries - window)
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))
