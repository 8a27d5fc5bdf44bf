"""The implementations that are compared: this project's and those that come with JAX, all behind one call.

`build(case)` gives `f(q_BTNH, k_BSKH, v_BSKH)` for training and `f(q_B1NH, k_BKSH, v_BKSH, lengths_B)` for decoding,
with the scales of keys and of values after that where the cache has codes.
Stock kernels get what they want of layouts and scales here, so that all compute the same; what one cannot do is a
`UserError` with the reason, which becomes its row in the table.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.aot.cases import DECODING, Case
from llm_jax.errors import require
from llm_jax.models.positions import alibi_slopes


class Kernel(NamedTuple):
    """An implementation. `build(case, blocks=...)` takes its own block sizes, None for its defaults."""

    name: str
    platforms: tuple[str, ...]
    passes: tuple[str, ...]
    build: Callable[..., Callable[..., jax.Array]]
    architectures: tuple[tuple[int, int], ...] = ()  # compute capabilities; () = all
    interprets: bool = False  # runs on a CPU within seconds, by `build(case, interpret=True)`
    module: str = ""  # of a fused kernel of this project, where its block sizes are
    dtype: str = "bfloat16"


TRAINING = ("forward", "backward")


def _ours_gpu(case: Case, **options: Any) -> Callable[..., jax.Array]:
    from llm_jax.kernels.pallas_gpu import gpu_attention

    return functools.partial(gpu_attention, mask=case.mask(), **options)


def _ours_hopper(case: Case, **options: Any) -> Callable[..., jax.Array]:
    from llm_jax.kernels.mosaic_gpu import mosaic_gpu_attention

    return functools.partial(mosaic_gpu_attention, mask=case.mask(), **options)


def _ours_tpu(case: Case, **options: Any) -> Callable[..., jax.Array]:
    from llm_jax.kernels.pallas_tpu import tpu_attention

    return functools.partial(tpu_attention, mask=case.mask(), **options)


def _ours_splash(case: Case, **options: Any) -> Callable[..., jax.Array]:
    from llm_jax.kernels.splash import splash_attention

    _plain(case, "the kernel", window=True)
    return functools.partial(splash_attention, mask=case.mask(), **options)


def _ours_gpu_decode(case: Case, **options: Any) -> Callable[..., jax.Array]:
    from llm_jax.kernels import pallas_gpu_decode
    from llm_jax.kernels.flash_decoding import Slots

    def run(
        q_B1NH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, lengths_B: jax.Array, *scales_BKS1: jax.Array
    ) -> jax.Array:
        slots = Slots(k_BKSH, v_BKSH, *scales_BKS1)
        return pallas_gpu_decode.decode(q_B1NH, slots, case.decode_mask(lengths_B), **options)

    return run


def _ours_tpu_decode(case: Case, **options: Any) -> Callable[..., jax.Array]:
    from llm_jax.kernels import pallas_tpu_decode
    from llm_jax.kernels.flash_decoding import Slots

    def run(
        q_B1NH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, lengths_B: jax.Array, *scales_BKS1: jax.Array
    ) -> jax.Array:
        slots = Slots(k_BKSH, v_BKSH, *scales_BKS1)
        return pallas_tpu_decode.decode(q_B1NH, slots, case.decode_mask(lengths_B), **options)

    return run


def _chunked(case: Case, **options: Any) -> Callable[..., jax.Array]:
    from llm_jax.kernels.chunked import chunked_attention

    return functools.partial(chunked_attention, mask=case.mask())


def _jax(implementation: Literal["xla", "cudnn"], case: Case, **options: Any) -> Callable[..., jax.Array]:
    """JAX's own attention, as XLA makes it of plain operations or by NVIDIA's library."""

    def run(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
        bias = None
        if case.alibi:
            index = jnp.arange(case.length)
            slopes_N11 = jnp.asarray(alibi_slopes(case.num_heads))[:, None, None]
            bias = (slopes_N11 * (index[None, :] - index[:, None])).astype(q_BTNH.dtype)[None]
        window = (case.window - 1, 0) if case.window else None
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, bias, is_causal=case.causal, local_window_size=window, implementation=implementation
        )

    return run


def _xla_decode(case: Case, **options: Any) -> Callable[..., jax.Array]:
    from llm_jax.kernels.decode import decode_attention
    from llm_jax.kernels.flash_decoding import Slots

    def run(
        q_B1NH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, lengths_B: jax.Array, *scales_BKS1: jax.Array
    ) -> jax.Array:
        slots = Slots(k_BKSH, v_BKSH, *scales_BKS1)
        return decode_attention(q_B1NH, slots, case.decode_mask(lengths_B), implementation="reference")

    return run


def _plain(case: Case, name: str, *, window: bool = False, alibi: bool = False) -> None:
    """Raise for what the stock kernel lacks."""
    require(window or case.window is None, f"{name} has no window")
    require(alibi or not case.alibi, f"{name} has no ALiBi and takes no bias")


def _triton_mha(case: Case, blocks: Any = None) -> Callable[..., jax.Array]:
    from jax.experimental.pallas.ops.gpu import attention

    _plain(case, "the kernel")
    sizes = blocks or attention.BlockSizes.get_default()

    def run(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
        # It has as many key heads as query heads.
        repeats = case.num_heads // case.num_kv_heads
        k_BSNH, v_BSNH = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k_BSKH, v_BSKH))
        scale = case.head_dim**-0.5
        return attention.mha(q_BTNH, k_BSNH, v_BSNH, None, scale, case.causal, sizes)

    return run


def _mosaic_mgpu(case: Case, blocks: Any = None, causal: bool | None = None) -> Callable[..., jax.Array]:
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    _plain(case, "the kernel")
    causal = case.causal if causal is None else causal
    sizes = blocks or attention_mgpu.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2, causal=causal,
        block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64,
    )  # fmt: skip

    def run(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
        return attention_mgpu.attention(q_BTNH * case.head_dim**-0.5, k_BSKH, v_BSKH, sizes)

    return run


def _triton_decode(case: Case, blocks: Any = None) -> Callable[..., jax.Array]:
    from jax.experimental.pallas.ops.gpu import decode_attention

    require(not case.alibi, "the kernel has no ALiBi and takes no bias")

    def run(q_B1NH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, lengths_B: jax.Array) -> jax.Array:
        start_B = jnp.maximum(lengths_B - case.window, 0) if case.window else None
        keys, values = (jnp.swapaxes(x, 1, 2) for x in (k_BKSH, v_BKSH))
        return decode_attention.gqa(q_B1NH[:, 0], keys, values, start_B, lengths_B)[:, None]

    return run


def _flash_tpu(size: int, case: Case, blocks: Any = None) -> Callable[..., jax.Array]:
    from jax.experimental.pallas.ops.tpu import flash_attention

    _plain(case, "the kernel", alibi=True)
    sizes = blocks or flash_attention.BlockSizes(*[size] * 3, 1, *[size] * 7)  # type: ignore[call-arg]

    def run(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
        repeats = case.num_heads // case.num_kv_heads
        q_BNTH, k_BNSH, v_BNSH = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
        if repeats > 1:
            k_BNSH, v_BNSH = jnp.repeat(k_BNSH, repeats, axis=1), jnp.repeat(v_BNSH, repeats, axis=1)
        bias = None
        if case.alibi:  # a number for each pair, in memory
            index = jnp.arange(case.length)
            slopes_N11 = jnp.asarray(alibi_slopes(case.num_heads))[:, None, None]
            bias = (slopes_N11 * (index[None, :] - index[:, None]).astype(jnp.float32))[None]
            bias = jax.lax.stop_gradient(jnp.broadcast_to(bias, (case.batch, *bias.shape[1:])))
        out_BNTH = flash_attention.flash_attention(
            q_BNTH, k_BNSH, v_BNSH, bias, causal=case.causal, sm_scale=case.head_dim**-0.5, block_sizes=sizes
        )
        return jnp.swapaxes(out_BNTH, 1, 2)

    return run


def _splash_tpu(size: int, case: Case, blocks: Any = None) -> Callable[..., jax.Array]:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _plain(case, "the kernel", window=True)
    shape = (case.length, case.length)
    if case.window:
        one: Any = splash.LocalMask(shape, (case.window - 1, 0), 0)
    else:
        one = splash.CausalMask(shape) if case.causal else splash.FullMask(shape)
    sizes = blocks or splash.BlockSizes(*[size] * 8)  # type: ignore[arg-type]
    group = case.num_heads // case.num_kv_heads
    make = splash.make_splash_mqa if group > 1 else splash.make_splash_mha
    heads = group if group > 1 else case.num_heads
    kernel = make(splash.MultiHeadMask([one] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def run(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
        q_BNTH, k_BKSH, v_BKSH = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH * case.head_dim**-0.5, k_BSKH, v_BSKH))
        if group > 1:
            q_BKGTH = q_BNTH.reshape(case.batch, case.num_kv_heads, group, case.length, case.head_dim)
            out = jax.vmap(jax.vmap(kernel))(q_BKGTH, k_BKSH, v_BKSH).reshape(q_BNTH.shape)
        else:
            out = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH)
        return jnp.swapaxes(out, 1, 2)

    return run


def _paged_tpu(case: Case, blocks: Any = None, page: int = 128) -> Callable[..., jax.Array]:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    _plain(case, "the kernel")

    def run(q_B1NH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, lengths_B: jax.Array) -> jax.Array:
        B, K, S, H = k_BKSH.shape
        pages = S // page
        keys, values = (jnp.swapaxes(x, 0, 1).reshape(K, B * pages, page, H) for x in (k_BKSH, v_BKSH))
        places = jnp.arange(B * pages, dtype=jnp.int32).reshape(B, pages)
        queries = q_B1NH[:, 0] * case.head_dim**-0.5
        return paged_attention(queries, keys, values, lengths_B, places, pages_per_compute_block=4)[:, None]

    return run


def named(name: str) -> Kernel:
    """The implementation of that name."""
    return next(kernel for kernel in KERNELS if kernel.name == name)


def fits(kernel: Kernel, platform: str, compute: tuple[int, int]) -> bool:
    """Whether the kernel is written for a device of that platform and, if it is an NVIDIA GPU, compute capability."""
    return platform in kernel.platforms and (not kernel.architectures or compute in kernel.architectures)


HOPPER = ((9, 0),)
KERNELS = (
    Kernel("pallas_gpu", ("gpu",), TRAINING, _ours_gpu, interprets=True, module="pallas_gpu"),
    Kernel("mosaic_gpu", ("gpu",), TRAINING, _ours_hopper, HOPPER, module="mosaic_gpu"),
    Kernel("pallas_gpu_decode", ("gpu",), DECODING, _ours_gpu_decode, interprets=True),
    Kernel("pallas_tpu", ("tpu",), TRAINING, _ours_tpu, interprets=True, module="pallas_tpu"),
    Kernel("splash", ("tpu",), TRAINING, _ours_splash),
    Kernel("pallas_tpu_decode", ("tpu",), DECODING, _ours_tpu_decode, interprets=True),
    Kernel("stock_mha", ("gpu",), TRAINING, _triton_mha),
    Kernel("stock_mgpu", ("gpu",), TRAINING, _mosaic_mgpu, HOPPER),
    # The nearest to our cases that it does, for its registers and shared memory.
    Kernel(
        "stock_mgpu_f16_not_causal",
        ("gpu",),
        TRAINING,
        functools.partial(_mosaic_mgpu, causal=False),
        HOPPER,
        dtype="float16",
    ),
    Kernel("stock_decode", ("gpu",), ("decode",), _triton_decode),
    Kernel("stock_splash_128", ("tpu",), TRAINING, functools.partial(_splash_tpu, 128)),
    Kernel("stock_splash_512", ("tpu",), TRAINING, functools.partial(_splash_tpu, 512)),
    Kernel("stock_flash_128", ("tpu",), TRAINING, functools.partial(_flash_tpu, 128)),
    Kernel("stock_flash_512", ("tpu",), TRAINING, functools.partial(_flash_tpu, 512)),
    Kernel("stock_paged", ("tpu",), ("decode",), _paged_tpu),
    Kernel("chunked", ("gpu", "tpu"), TRAINING, _chunked),
    Kernel("cudnn", ("gpu",), TRAINING, functools.partial(_jax, "cudnn")),
    Kernel("xla", ("gpu", "tpu"), TRAINING, functools.partial(_jax, "xla")),
    Kernel("xla_decode", ("gpu", "tpu"), DECODING, _xla_decode),
)
