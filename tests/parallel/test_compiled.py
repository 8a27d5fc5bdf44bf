"""Reading compiled programs: hand-written ones in every notation, and one of known traffic that is compiled here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.config import MeshConfig
from llm_jax.errors import UserError
from llm_jax.parallel import compiled
from llm_jax.parallel import mesh as mesh_lib

SIZES = {"replica": 2, "data": 2, "tensor": 2}
HOSTS = [0, 0, 0, 0, 1, 1, 1, 1]

GPU = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%product (p0: bf16[4,6], p1: bf16[6,10]) -> bf16[4,10] {
  %p0 = bf16[4,6]{1,0} parameter(0)
  %p1 = bf16[6,10]{1,0} parameter(1)
  ROOT %dot.1 = bf16[4,10]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (carry: (s32[], bf16[4,6], bf16[3,10])) -> (s32[], bf16[4,6], bf16[3,10]) {
  %carry = (s32[], bf16[4,6]{1,0}, /*index=2*/bf16[3,10]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %a = bf16[4,6]{1,0} get-tuple-element(%carry), index=1
  %shard = bf16[3,10]{1,0} get-tuple-element(%carry), index=2
  %gather-start = (bf16[3,10]{1,0}, bf16[6,10]{1,0}) all-gather-start(%shard), channel_id=1,
    replica_groups=[4,2]<=[8], dimensions={0}, metadata={op_name="jit(step)/layers/while/body/gate"}
  %other-start = (bf16[3,10]{1,0}, bf16[6,10]{1,0}) all-gather-start(%shard), channel_id=2, replica_groups=[4,2]<=[8]
  %other-done = bf16[6,10]{1,0} all-gather-done(%other-start)
  %y = bf16[4,10]{1,0} fusion(%a, %other-done), kind=kCustom, calls=%product
  %gather-done = bf16[6,10]{1,0} all-gather-done(%gather-start)
  %sync-start = (f32[4,10]{1,0}, f32[2,10]{1,0}) reduce-scatter-start(%wide), channel_id=3, to_apply=%add,
      replica_groups={{0,4},{1,5},{2,6},{3,7}}, backend_config={"collective_backend_config":{"is_sync":true}}
  %wide = f32[4,10]{1,0} convert(%y)
  %sync-done = f32[2,10]{1,0} reduce-scatter-done(%sync-start)
  ROOT %next = (s32[], bf16[4,6]{1,0}, bf16[3,10]{1,0}) tuple(%i, %a, %shard)
}

%condition (carry: (s32[], bf16[4,6], bf16[3,10])) -> pred[] {
  %carry = (s32[], bf16[4,6]{1,0}, bf16[3,10]{1,0}) parameter(0)
  %limit = s32[] constant(5)
  %i = s32[] get-tuple-element(%carry), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %start = (s32[], bf16[4,6]{1,0}, bf16[3,10]{1,0}) tuple(%p)
  %loop = (s32[], bf16[4,6]{1,0}, bf16[3,10]{1,0}) while(%start), condition=%condition,
    body=%body, backend_config={KNOWN}
  ROOT %norm = f32[8]{0} all-reduce(%p), channel_id=4, replica_groups={}, to_apply=%add
}
"""


def read(text, visible_keys=1.0):
    return compiled.read(text, SIZES, HOSTS, visible_keys)


@pytest.mark.parametrize(("known", "times"), [('"known_trip_count":{"n":"7"}', 7), ("", 5)])
def test_a_loop_counts_as_often_as_it_runs(known, times):
    step = read(GPU.replace("KNOWN", known))
    assert step.flops == times * 2 * 4 * 6 * 10
    counts = {(found.kind, found.count) for found in step.collectives}
    assert counts == {("all-gather", times), ("reduce-scatter", times), ("all-reduce", 1)}


def test_bytes_axes_and_hosts_of_collectives():
    step = read(GPU.replace("KNOWN", ""))
    gather, _, scatter, norm = (entry.collective for entry in sorted(step.communication, key=lambda e: e.channel))
    assert (norm.kind, norm.size, norm.axes, norm.members, norm.in_host) == ("all-reduce", 32, tuple(SIZES), 8, 4)
    assert (gather.kind, gather.size, gather.axes, gather.in_host) == ("all-gather", 6 * 10 * 2, ("tensor",), 2)
    assert (scatter.kind, scatter.size, scatter.axes) == ("reduce-scatter", 4 * 10 * 4, ("replica",))
    assert (scatter.members, scatter.in_host) == (2, 1)
    assert gather.what == "jit(step)/layers/while/body/gate"


def test_what_runs_beside_a_collective():
    """Compute lies between the start and end of the first gather alone; the scatter is asynchronous in name only."""
    found = {entry.channel: (entry.is_async, entry.hidden) for entry in read(GPU.replace("KNOWN", "")).communication}
    assert found == {1: (True, True), 2: (True, False), 3: (False, False), 4: (False, False)}
    step = read(GPU.replace("KNOWN", ""))
    assert step.hidden_share("all-gather") == 0.5
    assert step.hidden_share("all-to-all") == 1.0


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(UserError, match="how often the loop loop"):
        read(GPU.replace("KNOWN", "").replace("constant(5)", "parameter(1)"))


def test_what_is_no_program_is_refused():
    with pytest.raises(UserError, match="no ENTRY"):
        read("HloModule nothing")


TPU = """HloModule jit_step, is_scheduled=true

%gathering (p0: bf16[3,10]) -> bf16[6,10] {
  %p0 = bf16[3,10]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.7 = bf16[6,10]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=9, GROUPS
}

%continued (p0: bf16[3,10], p1: bf16[4,6,1], p2: bf16[6,10,1]) -> bf16[4,10,1] {
  %p0 = bf16[3,10]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[4,6,1]{1,0,2} parameter(1)
  %p2 = bf16[6,10,1]{1,0,2} parameter(2)
  %all-gather.8 = bf16[6,10]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=9, GROUPS
  ROOT %convolution.1 = bf16[4,10,1]{1,0,2} convolution(%p1, %p2), window={size=1}, dim_labels=bf0_io0->bf0
}

ENTRY %main (p: bf16[3,10], a: bf16[4,6,1], b: bf16[6,10,1]) -> bf16[6,10] {
  %p = bf16[3,10]{1,0} parameter(0)
  %a = bf16[4,6,1]{1,0,2} parameter(1)
  %b = bf16[6,10,1]{1,0,2} parameter(2)
  %start = bf16[6,10]{1,0} fusion(%p), kind=kCustom, calls=%gathering
  %middle = bf16[4,10,1]{1,0,2} fusion(%p, %a, %b), kind=kCustom, calls=%continued
  ROOT %done = bf16[6,10]{1,0} fusion(%p), kind=kCustom, calls=%gathering
}
"""


def test_a_collective_in_several_fusions_is_one():
    step = read(TPU.replace("GROUPS", "replica_groups=[4,2]<=[2,2,2]T(0,2,1)"))
    (entry,) = step.communication
    assert (entry.is_async, entry.hidden) == (True, True)
    assert (entry.collective.size, entry.collective.axes) == (6 * 10 * 2, ("data",))
    assert step.flops == 2 * 4 * 6 * 10


SPARSE_CORES = """HloModule jit_step, is_scheduled=true

%called (p0: f32[64,10], p1: token[]) -> f32[8,10] {
  %p1 = token[] parameter(1)
  %p0 = f32[64,10]{1,0:T(8,128)} parameter(0)
  ROOT %reduce-scatter.7 = f32[8,10]{1,0:T(8,128)} reduce-scatter(%p0), channel_id=9, replica_groups={}, to_apply=%add
}, execution_thread="sparsecore"

%all-reduce-scatter.1 (p0: f32[64,10]) -> f32[8,10] {
  %p0 = f32[64,10]{1,0:T(8,128)} parameter(0)
  %all-reduce.3 = f32[64,10]{1,0:T(8,128)} all-reduce(%p0), channel_id=8, replica_groups={}, to_apply=%add
  ROOT %part = f32[8,10]{1,0:T(8,128)} dynamic-slice(%all-reduce.3)
}

ENTRY %main (p: f32[64,10], a: bf16[4,6]) -> f32[8,10] {
  %p = f32[64,10]{1,0} parameter(0)
  %a = bf16[4,6]{1,0} parameter(1)
  %ready = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"
  %start = ((f32[64,10]{1,0}, token[]), f32[8,10]{1,0}) call-start(%p, %ready), async_execution_thread="sparsecore",
    to_apply=%called
  %dot = bf16[4,4]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %waited = f32[8,10]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %done = f32[8,10]{1,0} call-done(%start)
}
"""


def test_scatters_on_a_tpus_two_kinds_of_cores():
    taken, waited = read(SPARSE_CORES).communication
    assert {entry.collective.kind for entry in (taken, waited)} == {"reduce-scatter"}
    assert {entry.collective.size for entry in (taken, waited)} == {64 * 10 * 4}
    assert (taken.is_async, taken.hidden) == (True, True)
    assert not waited.is_async


def convolution(out, left, right, attributes):
    lines = (
        f"%l = {left} parameter(0)",
        f"%r = {right} parameter(1)",
        f"ROOT %c = {out} convolution(%l, %r), {attributes}",
    )
    return "ENTRY %main (l: f32[]) -> f32[] {\n  " + "\n  ".join(lines) + "\n}\n"


@pytest.mark.parametrize(
    ("text", "flops"),
    [
        # x [5,7] times a weight [7,3 heads,2]: heads are places of a padded window, of which one tap each reads x.
        (
            convolution(
                "f32[5,3,2]{2,1,0}",
                "f32[5,7,1]{2,1,0}",
                "f32[7,3,2]{2,1,0}",
                "window={size=3 pad=2_2 rhs_reversal=1}, dim_labels=bf0_i0o->b0f",
            ),
            2 * 5 * 7 * 3 * 2,
        ),
        # The same back to 7 features: all three taps read, at the one place of the output.
        (
            convolution(
                "f32[5,7,1]{2,1,0}",
                "f32[5,3,2]{2,1,0}",
                "f32[3,2,7]{2,1,0}",
                "window={size=3}, dim_labels=b0f_0io->bf0",
            ),
            2 * 5 * 7 * 3 * 2,
        ),
        (convolution("f32[7,9]{1,0}", "f32[5,7]{1,0}", "f32[5,9]{1,0}", "dim_labels=fb_io->bf"), 2 * 5 * 7 * 9),
    ],
)
def test_products_written_as_convolutions(text, flops):
    assert read(text).flops == flops


def attention(kernel):
    call = (
        '%o = (bf16[1,16,4,8]{3,2,1,0}) custom-call(%q, %k), custom_call_target="__gpu$xla.gpu.triton", '
        f'metadata={{op_name="jit(step)/attention/attention_pallas_gpu/shard_map/{kernel}/pallas_call"}}, '
        'backend_config={ir = "(not ) balanced ((("}'
    )
    inputs = "%q = bf16[1,16,4,8]{3,2,1,0} parameter(0)", "%k = bf16[1,16,2,8]{3,2,1,0} parameter(1)"
    return "ENTRY %main (q: f32[]) -> f32[] {\n  " + "\n  ".join([*inputs, call]) + "\n}\n"


@pytest.mark.parametrize(
    ("kernel", "products"),
    [
        ("attention_forward", 2),
        ("jit(_call_by_keys)/attention_key_gradients", 4),
        ("query_gradients_kernel", 3),
        ("something_else", 0),
    ],
)
def test_kernels_of_attention_are_counted_by_their_names(kernel, products):
    assert read(attention(kernel), visible_keys=8.5).flops == products * 2 * 16 * 4 * 8 * 8.5


IOTA = np.arange(8)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true", IOTA.reshape(4, 2)),
        ("replica_groups=[4,2]<=[8], dimensions={0}", IOTA.reshape(4, 2)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups={}", [IOTA]),
        ("channel_id=3, to_apply=%add", [IOTA]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x={1}", IOTA.reshape(2, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [IOTA]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", IOTA.reshape(4, 2)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(7,6,5,4,3,2,1,0) {'b'}", [[7, 6, 5, 4], [3, 2, 1, 0]]),
        ("replica_groups=@mesh<a=2,b=4>(devices=[2,4]<=[4,2]T(1,0)) {b}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=@mesh<a=8>(devices=[8]1,0,3,2,5,4,7,6) {a:(4)2}", [[1, 0], [3, 2], [5, 4], [7, 6]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_of_devices_in_every_notation(text, groups):
    np.testing.assert_array_equal(compiled.replica_groups(text, 8), groups)


def test_an_unknown_notation_is_refused():
    with pytest.raises(UserError, match="cannot read the devices"):
        compiled.replica_groups("replica_groups=everyone", 8)


def test_a_program_compiled_here():
    """Weights gathered over two axes in a loop of six layers, and one sum over the tensor axis, in float32."""
    mesh = mesh_lib.build(MeshConfig(replica=2, data=2, tensor=2))
    weights = jax.ShapeDtypeStruct((6, 64, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, ("replica", "data"))))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P(("replica", "data"))))

    def step(weights_LDF, x_BD):
        def layer(x_BD, weight_DF):
            whole_DF = jax.lax.with_sharding_constraint(weight_DF, P(None, "tensor"))
            y_BD = jax.lax.with_sharding_constraint(jnp.tanh(x_BD @ whole_DF) @ whole_DF.T, P(("replica", "data")))
            return y_BD, None

        return jax.lax.scan(layer, x_BD, weights_LDF)[0]

    with jax.set_mesh(mesh):
        text = jax.jit(step).lower(weights, x).compile().as_text()
    found = compiled.read(text, dict(mesh.shape), HOSTS, 1.0)
    assert found.flops == 6 * 2 * (2 * 4 * 64 * 16)  # a device's rows and columns, two products a layer
    gathered = [entry for entry in found.collectives if entry.kind == "all-gather"]
    reduced = [entry for entry in found.collectives if entry.kind == "all-reduce"]
    # The tensor axis takes its half of the columns before anything moves.
    assert sum(entry.size * entry.count for entry in gathered) == 6 * 64 * 16 * 4
    assert {entry.axes for entry in gathered} == {("replica", "data")}
    assert {(entry.members, entry.in_host) for entry in gathered} == {(4, 2)}
    assert [(entry.axes, entry.size, entry.count) for entry in reduced] == [(("tensor",), 4 * 64 * 4, 6)]
