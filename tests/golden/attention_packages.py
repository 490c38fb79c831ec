"""Stand-ins for flash-attn and flashinfer, which need a GPU: what their documentation says of the functions
that the worker calls, in float64, on any device. They show that lengths, tables and windows are given as
documented; of speed and of rounding they say nothing.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor


def attend(q_THD: Tensor, k_LKD: Tensor, v_LKD: Tensor, causal: bool, window: tuple[int, int]) -> Tensor:
    """The last query stands at the last key; `window`: keys before and after, -1 for all."""
    T, L, group = len(q_THD), len(k_LKD), q_THD.shape[1] // k_LKD.shape[1]
    keys = k_LKD.double().repeat_interleave(group, 1)
    values = v_LKD.double().repeat_interleave(group, 1)
    keys_L = torch.arange(L, device=q_THD.device)
    distance = keys_L[L - T :, None] - keys_L
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window[0] >= 0:
        seen &= distance <= window[0]
    if window[1] >= 0:
        seen &= -distance <= window[1]
    scores = torch.einsum("thd,lhd->htl", q_THD.double(), keys) / q_THD.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("htl,lhd->thd", weights, values).to(q_THD.dtype)


def gathered(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The keys or values of a table of blocks [blocks, B, K, D]."""
    return cache[table.long()].flatten(0, 1)[:length]


class FlashAttn(SimpleNamespace):
    """The module `flash_attn`; counts its calls."""

    def __init__(self) -> None:
        super().__init__(num_varlen=0, num_with_kvcache=0)

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        *,
        block_table,
    ):
        self.num_varlen += 1
        assert {x.dtype for x in (cu_seqlens_q, cu_seqlens_k, block_table)} == {torch.int32}
        assert (dropout_p, softmax_scale, k.dtype) == (0.0, None, q.dtype)
        starts, ends = cu_seqlens_q.tolist(), cu_seqlens_k.diff().tolist()
        assert max_seqlen_q == max(cu_seqlens_q.diff().tolist())
        assert max_seqlen_k == max(ends)
        assert starts[-1] == len(q)
        return torch.cat(
            [
                attend(
                    q[start:stop],
                    gathered(k, table, length),
                    gathered(v, table, length),
                    causal,
                    window_size,
                )
                for start, stop, length, table in zip(starts, starts[1:], ends, block_table, strict=False)
            ]
        )

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, k=None, v=None, *, cache_seqlens, block_table, causal, window_size
    ):
        self.num_with_kvcache += 1
        assert (k, v) == (None, None)
        assert (cache_seqlens.dtype, block_table.dtype) == (torch.int32, torch.int32)
        return torch.stack(
            [
                attend(
                    row,
                    gathered(k_cache, table, length),
                    gathered(v_cache, table, length),
                    causal,
                    window_size,
                )
                for row, table, length in zip(q, block_table, cache_seqlens.tolist(), strict=True)
            ]
        )


class _Wrapper:
    """What both wrappers do: plan once, run every layer."""

    plan_count = 0

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert (float_workspace_buffer.dtype, kv_layout) == (torch.uint8, "NHD")

    def _plan(
        self, qo_indptr, indptr, indices, last_page_len, heads, kv_heads, head_dim, page_size, window_left
    ):
        assert {x.dtype for x in (qo_indptr, indptr, indices, last_page_len)} == {torch.int32}
        assert 1 <= int(last_page_len.min()) <= int(last_page_len.max()) <= page_size
        assert len(indices) == int(indptr[-1])
        assert len(qo_indptr) == len(indptr) == len(last_page_len) + 1
        self._shape, self._page_size, self._window = (heads, head_dim, kv_heads), page_size, window_left
        type(self).plan_count += 1

    def _run(self, q, paged_kv_cache, qo_indptr, indptr, indices, last_page_len):
        k, v = paged_kv_cache
        assert (q.shape[1], q.shape[2], k.shape[2], k.shape[1]) == (*self._shape, self._page_size)
        out, starts, pages = [], qo_indptr.tolist(), indptr.tolist()
        for row, last in enumerate(last_page_len.tolist()):
            table = indices[pages[row] : pages[row + 1]]
            length = (len(table) - 1) * self._page_size + last
            out.append(
                attend(
                    q[starts[row] : starts[row + 1]],
                    gathered(k, table, length),
                    gathered(v, table, length),
                    True,
                    (self._window, -1),
                )
            )
        return torch.cat(out)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        *,
        causal,
        window_left,
        q_data_type,
        kv_data_type,
    ):
        assert causal
        self._planned = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self._types = q_data_type, kv_data_type
        self._plan(*self._planned, num_qo_heads, num_kv_heads, head_dim_qk, page_size, window_left)

    def run(self, q, paged_kv_cache):
        assert (q.dtype, paged_kv_cache[0].dtype) == self._types
        return self._run(q, paged_kv_cache, *self._planned)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
    ):
        super().__init__(float_workspace_buffer, kv_layout)
        assert use_cuda_graph
        self._indptr, self._indices = paged_kv_indptr_buffer, paged_kv_indices_buffer
        self._last_page_len = paged_kv_last_page_len_buffer

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        window_left,
        q_data_type,
        kv_data_type,
    ):
        assert len(last_page_len) == len(self._last_page_len), "the batch size cannot change"
        assert len(indices) <= len(self._indices)
        self._rows = torch.arange(len(indptr), dtype=torch.int32)
        self._plan(
            self._rows,
            indptr,
            indices,
            last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            window_left,
        )
        self._indptr.copy_(indptr)
        self._indices[: len(indices)].copy_(indices)
        self._last_page_len.copy_(last_page_len)

    def run(self, q, paged_kv_cache):
        return self._run(q, paged_kv_cache, self._rows, self._indptr, self._indices, self._last_page_len)


FLASHINFER = SimpleNamespace(
    BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper,
    BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
)
"""The module `flashinfer`."""
