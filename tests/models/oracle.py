"""The decoder once more, in float64 numpy, token by token and head by head: slow, and nothing like the library."""

import math

import numpy as np


def rms_norm(x, scale, eps):
    return x / math.sqrt(float(np.mean(x * x)) + eps) * scale


def frequency(config, theta, i):
    """Radians a position turns pair i by."""
    plain = theta ** (-2 * i / config.head_dim)
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    wavelength = 2 * math.pi / plain
    if wavelength > scaling.original_length / scaling.low_frequency_factor:
        return plain / scaling.factor
    if wavelength < scaling.original_length / scaling.high_frequency_factor:
        return plain
    smooth = scaling.original_length / wavelength - scaling.low_frequency_factor
    smooth /= scaling.high_frequency_factor - scaling.low_frequency_factor
    return (1 - smooth) * plain / scaling.factor + smooth * plain


def base(config, length):
    """The rotary base for a text of `length` tokens."""
    if not config.dynamic_ntk:
        return config.rope_theta
    alpha = max(2 ** math.ceil(math.log2(length / config.max_length) + 1) - 1, 1)
    return config.rope_theta * alpha ** (config.head_dim / (config.head_dim - 2))


def rope(config, vector, position, theta):
    half = len(vector) // 2
    out = np.empty_like(vector)
    for i in range(half):
        angle = position * frequency(config, theta, i)
        a, b = vector[i], vector[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def slope(head, heads):
    base = 2 ** int(math.log2(heads))
    if head < base:
        return 2 ** (-8 * (head + 1) / base)
    return 2 ** (-4 * (2 * (head - base) + 1) / base)


def layer(params, config, x, positions, segments, window, thetas):
    """x [T, D] -> [T, D] for one sequence."""
    attention, groups = params["attention"], config.num_heads // config.num_kv_heads
    normed = [rms_norm(v, params["attention_norm"]["scale"], config.norm_eps) for v in x]

    def project(name, t, head):
        out = normed[t] @ attention[name]["kernel"][:, head]
        return out + attention[name]["bias"][head] if config.qkv_bias else out

    outputs = np.zeros((len(x), config.num_heads, config.head_dim))
    for head in range(config.num_heads):
        kv_head = head // groups
        queries = [project("query", t, head) for t in range(len(x))]
        keys = [project("key", t, kv_head) for t in range(len(x))]
        values = [project("value", t, kv_head) for t in range(len(x))]
        if config.position == "rope":
            queries = [rope(config, q, p, theta) for q, p, theta in zip(queries, positions, thetas)]
            keys = [rope(config, k, p, theta) for k, p, theta in zip(keys, positions, thetas)]
        for i in range(len(x)):
            seen = [j for j in range(i + 1) if segments[i] == segments[j] != 0 and (not window or i - j < window)]
            if not seen:
                continue
            scale = max(1.0, math.log(positions[i] + 1) / math.log(config.max_length)) if config.log_n else 1.0
            scores = [scale * float(queries[i] @ keys[j]) / math.sqrt(config.head_dim) for j in seen]
            if config.position == "alibi":
                scores = [s + slope(head, config.num_heads) * (j - i) for s, j in zip(scores, seen)]
            weights = np.exp(np.array(scores) - max(scores))
            outputs[i, head] = sum(w * values[j] for w, j in zip(weights / weights.sum(), seen))
    x = x + np.einsum("tnh,nhd->td", outputs, attention["output"]["kernel"])
    out = []
    for row in x:
        normed_row = rms_norm(row, params["ffn_norm"]["scale"], config.norm_eps)
        gate = normed_row @ params["ffn"]["gate"]["kernel"]
        up = normed_row @ params["ffn"]["up"]["kernel"]
        out.append(row + (gate / (1 + np.exp(-gate)) * up) @ params["ffn"]["down"]["kernel"])
    return np.array(out)


def logits(params, config, tokens, positions=None, segments=None, context_length=None):
    """Logits [T, V] of one sequence of ids, in float64; dynamic NTK goes by `context_length`, else by each segment."""
    positions = range(len(tokens)) if positions is None else positions
    segments = [1] * len(tokens) if segments is None else segments
    lengths = {segment: max(p for p, s in zip(positions, segments) if s == segment) + 1 for segment in segments}
    thetas = [base(config, context_length or lengths[segment]) for segment in segments]
    x = np.array([params["embedding"]["embedding"][token] for token in tokens])
    for index in range(config.num_layers):
        layer_params = _index(params["layers"], index)
        window = config.window_sizes[index] if config.window_sizes else 0
        x = layer(layer_params, config, x, list(positions), list(segments), window, thetas)
    x = np.array([rms_norm(row, params["final_norm"]["scale"], config.norm_eps) for row in x])
    matrix = params["embedding"]["embedding"] if config.tie_embeddings else params["head"]["kernel"]
    if config.norm_head:
        matrix = np.array([row / max(np.linalg.norm(row), 1e-12) for row in matrix])
    return x @ matrix.T


def _index(tree, index):
    return {k: _index(v, index) for k, v in tree.items()} if isinstance(tree, dict) else tree[index]
