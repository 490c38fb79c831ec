"""Attention by torch's scaled_dot_product_attention over keys and values that are gathered by block table.

Runs wherever torch does. Pieces of the step with as many queries and about as many keys are one call: a
table is filled up to at most twice its length, or by two blocks. The query heads that share a key head stand
below one another as further rows of the same product: so keys are never repeated, and every kernel that takes
a mask will do. A prompt's beginning needs no mask, and goes to the kernels for causal attention.

S: pieces of a group; Q: queries of each; n: blocks of a table; L = n B: keys; G = H / K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from treadle_worker.batch import ScheduledChunk
from treadle_worker.cuda.attention import Attend, Planned
from treadle_worker.cuda.kv_cache import CudaKVCache
from treadle_worker.cuda.step import HostRows, RowBuffers, Staging

MAX_KEYS = 1 << 17
"""Keys that are gathered at once, unless one piece has more: with 8 heads of 128 in bfloat16, 512 MiB."""
MAX_SCORES = 1 << 25
"""Elements of a mask."""
NARROW = 2
"""Blocks of padding that are always allowed."""


class SdpaBackend:
    """See `AttentionBackend`."""

    name = "sdpa"
    gathers = True

    def step(self, cache: CudaKVCache, chunks: Sequence[ScheduledChunk], staging: Staging) -> Planned:
        """Groups for each of the model's windows."""
        config = cache.config
        group_size = config.num_attention_heads // config.num_key_value_heads
        staged = {
            window: [
                _stage(group, cache, staging)
                for group in group_pieces(
                    split(chunks, window, cache.block_size, group_size), cache.block_size, group_size
                )
            ]
            for window in dict.fromkeys(config.sliding_windows)
        }

        def planned(sent: Tensor) -> Attend:
            groups = {
                window: [one.ready(sent, window, cache, group_size) for one in each]
                for window, each in staged.items()
            }

            def attend(layer: int, q_THD: Tensor) -> Tensor:
                out_THD = torch.empty_like(q_THD)
                for group in groups[config.window(layer)]:
                    group.attend(layer, q_THD, cache, out_THD)
                return out_THD

            return attend

        return planned

    def rows(self, cache: CudaKVCache, buffers: RowBuffers) -> SdpaRows:
        """All rows are one group, as wide as the buffers' tables."""
        return SdpaRows(cache, buffers)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of a chunk's queries, and the blocks that they see."""

    row: int
    """Of the step: its first query's."""
    start: int
    """Its first query's position."""
    length: int
    first_block: int
    """The index in the table of the first of `blocks`."""
    blocks: Sequence[int]
    causal: bool
    """Whether its keys are its own queries' and no more, all in their windows: then it needs no mask."""


def split(
    chunks: Sequence[ScheduledChunk], window: int | None, block_size: int, group_size: int
) -> list[Piece]:
    """Each chunk whole where it needs no mask, else in pieces whose masks are not too large."""
    pieces, row = [], 0
    for chunk in chunks:
        length = len(chunk.token_ids)
        causal = length > 1 and chunk.start == 0 and (window is None or length <= window)
        step = length if causal else max(1, MAX_SCORES // (group_size * (chunk.start + length + block_size)))
        if window is not None:
            step = min(step, max(window, block_size))
        for offset in range(0, length, step):
            count, start = min(step, length - offset), chunk.start + offset
            first = 0 if window is None else max(0, start - window + 1) // block_size
            blocks = chunk.block_table[first : (start + count - 1) // block_size + 1]
            pieces.append(Piece(row + offset, start, count, first, blocks, causal))
        row += length
    return pieces


def group_pieces(pieces: Sequence[Piece], block_size: int, group_size: int) -> list[list[Piece]]:
    """Pieces with the same number of queries, and tables of about the same length."""
    groups: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda one: (one.causal, one.length, len(one.blocks))):
        width = len(piece.blocks)
        if groups and _fits(groups[-1], piece, width * block_size, group_size):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _fits(group: list[Piece], piece: Piece, num_keys: int, group_size: int) -> bool:
    first, count = group[0], len(group) + 1
    return (
        (first.causal, first.length) == (piece.causal, piece.length)
        and len(piece.blocks) <= max(2 * len(first.blocks), len(first.blocks) + NARROW)
        and count * num_keys <= MAX_KEYS
        and count * num_keys * piece.length * group_size <= MAX_SCORES
    )


@dataclass(frozen=True, slots=True)
class _Staged:
    """A group whose numbers are on their way to the device."""

    num_pieces: int
    num_queries: int
    causal: bool
    rows: slice
    tables: slice
    starts: slice
    first_keys: slice

    def ready(self, sent: Tensor, window: int | None, cache: CudaKVCache, group_size: int) -> _Group:
        tables_Sn = sent[self.tables].view(self.num_pieces, -1)
        mask = None
        if not self.causal:
            queries_SQ = sent[self.starts, None] + torch.arange(self.num_queries, device=sent.device)
            keys = torch.arange(tables_Sn.shape[1] * cache.block_size, device=sent.device)
            keys_SL = sent[self.first_keys, None] + keys
            mask = _mask(queries_SQ, keys_SL, window, group_size, cache.keys.dtype)
        return _Group(sent[self.rows], tables_Sn, self.num_queries, mask)


def _stage(group: list[Piece], cache: CudaKVCache, staging: Staging) -> _Staged:
    count, width, length = len(group), max(len(piece.blocks) for piece in group), group[0].length
    tables_Sn = np.full((count, width), cache.zero_block, np.int64)
    for table_n, piece in zip(tables_Sn, group, strict=True):
        table_n[: len(piece.blocks)] = piece.blocks
    first_rows = np.array([piece.row for piece in group], np.int64)
    return _Staged(
        num_pieces=count,
        num_queries=length,
        causal=group[0].causal,
        rows=staging.add((first_rows[:, None] + np.arange(length)).ravel()),
        tables=staging.add(tables_Sn.ravel()),
        starts=staging.add(np.array([piece.start for piece in group], np.int64)),
        first_keys=staging.add(np.array([piece.first_block * cache.block_size for piece in group], np.int64)),
    )


@dataclass(frozen=True, slots=True)
class _Group:
    """Pieces on the device."""

    rows_N: Tensor
    """[S Q] rows of the step."""
    tables_Sn: Tensor
    num_queries: int
    mask: Tensor | None
    """[S, 1, Q G, L], see `_mask`; None: causal, as many keys as queries."""

    def attend(self, layer: int, q_THD: Tensor, cache: CudaKVCache, out_THD: Tensor) -> None:
        """Reads and fills the rows of the group."""
        k_SKLD, v_SKLD = cache.gather(layer, self.tables_Sn)
        q_SQHD = q_THD[self.rows_N].unflatten(0, (-1, self.num_queries))
        if self.mask is not None:
            mixed = _attend_masked(q_SQHD, k_SKLD, v_SKLD, self.mask)
        else:
            Q = self.num_queries
            mixed = F.scaled_dot_product_attention(
                q_SQHD.transpose(1, 2),
                k_SKLD[:, :, :Q],
                v_SKLD[:, :, :Q],
                is_causal=True,
                enable_gqa=q_SQHD.shape[2] != k_SKLD.shape[1],
            ).transpose(1, 2)
        out_THD[self.rows_N] = mixed.flatten(0, 1)


class SdpaRows:
    """See `RowAttention`: one query a row; what lies behind it is masked."""

    def __init__(self, cache: CudaKVCache, buffers: RowBuffers) -> None:
        self._cache, self._buffers = cache, buffers

    def plan(self, rows: HostRows) -> None:
        """Nothing: the masks are made within the graph."""

    def begin(self) -> Attend:
        """One mask a window."""
        cache, buffers, config = self._cache, self._buffers, self._cache.config
        group_size = config.num_attention_heads // config.num_key_value_heads
        keys = torch.arange(buffers.tables_Rn.shape[1] * cache.block_size, device=buffers.flat.device)
        masks = {
            window: _mask(buffers.positions_R[:, None], keys[None], window, group_size, cache.keys.dtype)
            for window in dict.fromkeys(config.sliding_windows)
        }

        def attend(layer: int, q_RHD: Tensor) -> Tensor:
            k_RKLD, v_RKLD = cache.gather(layer, buffers.tables_Rn)
            mask = masks[config.window(layer)]
            return _attend_masked(q_RHD.unsqueeze(1), k_RKLD, v_RKLD, mask).squeeze(1)

        return attend


def _mask(
    queries_SQ: Tensor, keys_SL: Tensor, window: int | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """[S, 1, Q G, L], 0 where a query sees a key, by their positions, else -inf: what torch makes of a mask
    of booleans, layer by layer."""
    queries, keys = queries_SQ[:, :, None], keys_SL[:, None]
    seen_SQL = keys <= queries
    if window is not None:
        seen_SQL &= keys > queries - window
    mask_SQL = torch.zeros_like(seen_SQL, dtype=dtype).masked_fill_(~seen_SQL, -torch.inf)
    return mask_SQL.repeat_interleave(group_size, dim=1).unsqueeze(1)


def _attend_masked(q_SQHD: Tensor, k_SKLD: Tensor, v_SKLD: Tensor, mask: Tensor) -> Tensor:
    """[S, Q, H, D]; the G query heads of a key head are rows of one product."""
    kv_heads, Q = k_SKLD.shape[1], q_SQHD.shape[1]
    q_SKRD = q_SQHD.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)
    mixed_SKRD = F.scaled_dot_product_attention(q_SKRD, k_SKLD, v_SKLD, attn_mask=mask)
    mixed_SQHD: Tensor = mixed_SKRD.unflatten(2, (Q, -1)).transpose(1, 2).flatten(2, 3)
    return mixed_SQHD
