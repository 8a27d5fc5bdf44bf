"""Attention by its definition, one pair of a query and a key at a time, and its gradients, in float64.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import numpy as np

from llm_jax.kernels.mask import AttentionMask


def sees(mask: AttentionMask, b: int, t: int, s: int) -> bool:
    """Whether query t of sequence b sees key s."""
    distance = offset(mask, b) + t - s
    window = None if mask.window is None else int(mask.window)
    limited = window is not None and window > 0
    if (mask.causal or window is not None) and distance < 0:
        return False
    if limited and distance >= window:
        return False
    if mask.query_segment_ids is not None:
        query, key = int(mask.query_segment_ids[b, t]), int(mask.key_segment_ids[b, s])
        if query == 0 or query != key:
            return False
    return mask.key_lengths is None or s < int(mask.key_lengths[b])


def offset(mask: AttentionMask, b: int) -> int:
    value = np.asarray(0 if mask.query_offset is None else mask.query_offset)
    return int(value if value.ndim == 0 else value[b])


def attention(q, k, v, mask, dout):
    """Output and the gradients of sum(output * dout) for q, k and v, all float64, keys that nobody sees ignored."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(B):
        visible = np.array([[sees(mask, b, t, s) for s in range(S)] for t in range(T)])
        for n in range(N):
            kv = n // (N // K)
            for t in range(T):
                keys = np.flatnonzero(visible[t])
                if keys.size == 0:
                    continue
                scale = (1.0 if mask.query_scale is None else float(mask.query_scale[b, t])) / np.sqrt(H)
                scores = k[b, keys, kv] @ q[b, t, n] * scale
                if mask.slopes is not None:
                    scores += float(mask.slopes[n]) * (keys - (offset(mask, b) + t))
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[b, t, n] = weights @ v[b, keys, kv]
                dweights = v[b, keys, kv] @ dout[b, t, n]
                dscores = weights * (dweights - weights @ dweights)
                dq[b, t, n] = dscores @ k[b, keys, kv] * scale
                dk[b, keys, kv] += np.outer(dscores, q[b, t, n]) * scale
                dv[b, keys, kv] += np.outer(weights, dout[b, t, n])
    return out, dq, dk, dv
