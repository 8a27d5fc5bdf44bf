"""What is read from the compilers' own output, on short samples of it, and the bounds that follow."""

import pytest

from benchmarks.aot import hlo, mosaic, ptxas
from llm_jax.errors import UserError
from llm_jax.parallel import absent
from llm_jax.parallel.absent import TARGETS

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'forward' for 'sm_80'
ptxas info    : Function properties for forward
    40 bytes stack frame, 36 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 40 bytes cumulative stack size, 392 bytes cmem[0]
ptxas info    : Compile time = 1746.323 ms
ptxas info    : Compiling entry function 'backward' for 'sm_80'
ptxas info    : Function properties for backward
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
THUNKS = """001: kCustomKernel [source | next=002] forward grid: [32, 1, 8] threads: [9]  shared_memory: 98304 bytes
002: kCustomKernel [prev=001 (1) | sink     ] backward grid: [1, 8, 64] threads: [128, 1, 1]  shared_memory: 256 bytes
003: kGemm [prev=002 (1) | sink     ] gemm
"""
LAUNCH = (
    "gpu.launch async [%0] blocks(%arg2, %arg3, %arg4) in (%arg8 = %c1, %arg9 = %c32, %arg10 = %c16_0) "
    "threads(%arg5, %arg6, %arg7) in (%arg11 = %c384, %arg12 = %c1_1, %arg13 = %c1_2) "
    "dynamic_shared_memory_size %c165976_i32 {"
)
PTX = """.target sm_90a
.visible .entry forward(
.reqntid 64, 2, 1
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
    wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%f1}, %rd1, %rd2, 1, 1, 1;
    wgmma.fence.sync.aligned;
"""
UTILIZATION = """== CAPACTIY:
MXU, XLU, VLOAD:FILL, VSTORE:SPILL
    4     3     3     1
== UTILIZATION:
4 0 1 0
2 1 0 1
0 0 2 0
"""
BUNDLES = """= control target key start
LH: loop header
     0   :  { %s1 = smov 0 } /* entry bundle */
   0x1   :  { %9306 = vpush %v12_v1 }
   0x2 LB: > { %v1 = vld [vmem:[%s1]] ;;  %10 = vmatmul.bf16.gmra.mxu0 %v1 ;;  %11 = vmatmul.bf16.gmra.mxu1 %v1 }
   0x3   : > { %12 = vmatmul.bf16.vlgmr.msrb.gmra.mxu2 %v2 }
   0x4   : > { %407 = sbr.rel (%p1) target = $region36 }
   0x5   : > { %v3 = vadd.f32 %v1, %v2 }
   0x6 PF: > { %13 = vmatmul.f32.gmra.mxu3 %v1 }
"""
HLO = """HloModule jit_forward

%inner (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %large = f32[999999]{0} broadcast(%p)
  ROOT %copy = f32[8]{0} copy(%p)
}

ENTRY %main (q: bf16[1,64,2,8]) -> bf16[1,64,2,8] {
  %q = bf16[1,64,2,8]{3,2,1,0} parameter(0)
  %scores = (f32[2,64,64]{2,1,0}, s32[4]{0}) custom-call(%q), custom_call_target="x", frontend_attributes={}
  %first = f32[2,64,64]{2,1,0} get-tuple-element(%scores), index=0
  ROOT %out = bf16[1,64,2,8]{3,2,1,0} fusion(%first, %q), kind=kLoop, calls=%inner
}
"""
TPU_HLO = """HloModule jit_forward

ENTRY %main (q: bf16[1024]) -> bf16[1024] {
  %q = bf16[1024]{0:T(1024)(128)(2,1)} parameter(0)
  %start = (bf16[1024]{0:T(1024)(128)(2,1)S(1)}, bf16[1024]{0:T(1024)(128)(2,1)}, u32[]{:S(2)}) copy-start(%q)
  %done = bf16[1024]{0:T(1024)(128)(2,1)S(1)} copy-done(%start)
  %twice = bf16[1024]{0:T(1024)(128)(2,1)S(1)} add(%done, %done)
  ROOT %out = bf16[1024]{0:T(1024)(128)(2,1)} negate(%twice)
}
"""
KERNEL = (
    '  %run.1 = bf16[4]{0} custom-call(%q), custom_call_target="tpu_custom_call", metadata={\n"a": 1\n},'
    ' backend_config={"x":[],'
    '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"3145728"}]}\n'
    '  %other = bf16[4]{0} copy(%q), backend_config={"used_scoped_memory_configs":[{"size":"7"}]}\n'
)


def test_registers_and_spills():
    forward, backward = ptxas.parse_ptxas(PTXAS)
    assert forward == ("forward", 255, 36, 32, 0)
    assert backward == ("backward", 168, 0, 0, 1)


def test_launches():
    assert ptxas.parse_thunks(THUNKS) == {"forward": ((32, 1, 8), 98304), "backward": ((1, 8, 64), 256)}
    assert ptxas.parse_mosaic_launch(LAUNCH) == ((1, 32, 16), 165976)
    assert ptxas.parse_mosaic_launch("no launch") is None


def test_tensor_instructions_and_threads():
    assert ptxas.tensor_instructions(PTX) == {"mma": 2, "wgmma": 1}
    assert ptxas.tensor_instructions("fma.rn.f32 %f1;") == {}
    assert ptxas.threads(PTX) == 128
    assert ptxas.threads(".maxntid 384, 1, 1") == 384


@pytest.mark.parametrize(
    ("target", "registers", "shared", "threads", "expected"),
    [
        ("a100", 255, 98304, 256, (1, 0.125, "registers")),  # 256 registers for each of 256 threads: all of 65,536
        ("a100", 128, 0, 256, (2, 0.25, "registers")),
        ("a100", 32, 80 * 1024, 128, (2, 0.125, "shared memory")),  # 81 of 164 KiB
        ("h100", 32, 80 * 1024, 128, (2, 0.125, "shared memory")),  # 81 of 228 KiB
        ("h100", 32, 75 * 1024, 128, (3, 0.1875, "shared memory")),
        ("a100", 16, 0, 32, (32, 0.5, "threads")),  # no more than 32 blocks
        ("a100", 16, 0, 1024, (2, 1.0, "threads")),
    ],
)
def test_occupancy(target, registers, shared, threads, expected):
    assert ptxas.occupancy(TARGETS[target], registers, shared, threads) == expected


def test_bundles():
    assert mosaic.parse_utilization(UTILIZATION) == {
        "bundles": 3,
        "MXU": 6,
        "XLU": 1,
        "VLOAD:FILL": 3,
        "VSTORE:SPILL": 1,
    }
    # The loop up to its branch, three bundles with three products of 16 rows; then one of 8 rows in float32.
    assert mosaic.parse_blocks(BUNDLES) == [(3, 48), (1, 8)]
    assert mosaic.scoped_memory(KERNEL) == {"run.1": 3145728}


def test_a_tpu_kernel_from_its_files(tmp_path):
    (tmp_path / "1-run.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(UTILIZATION)
    (tmp_path / "1-run.1-72-final_bundles.txt").write_text(BUNDLES)
    (tmp_path / "1-other-72-final_bundles.txt").write_text(BUNDLES)
    (row,) = mosaic.kernels(TARGETS["v5p"], sorted(tmp_path.iterdir()), KERNEL)
    assert row["kernel"] == "run.1"
    assert (row["spills"], row["fills"], row["vmem_bytes"]) == (1, 3, 3145728)
    assert (row["matrix_instructions"], row["matrix_least"]) == (4, 14)
    assert row["over_least"] == pytest.approx(4 / 14)


def test_a_gpu_kernel_from_its_files(tmp_path, monkeypatch):
    (tmp_path / "m.thunk_sequence.txt").write_text(THUNKS)
    (tmp_path / "m.1.ptx").write_text(PTX)
    (tmp_path / "m.2.ptx").write_text("")
    monkeypatch.setattr(ptxas, "_run_ptxas", lambda target, file: PTXAS)
    program = 'custom-call(), custom_call_target="__gpu$xla.gpu.triton", backend_config={ir = "ML", name = "forward"}'
    (row,) = ptxas.kernels(TARGETS["a100"], sorted(tmp_path.iterdir()), program)
    assert row["kernel"] == "forward"  # "backward" is no kernel of Pallas in that program
    assert (row["registers"], row["spilled_bytes"], row["shared_bytes"], row["grid"]) == (
        255,
        [36, 32],
        98304,
        (32, 1, 8),
    )
    assert row["tensor_instructions"] == {"mma": 2, "wgmma": 1}


def test_arrays_of_a_program():
    assert hlo.largest(HLO)[0] == "f32[999999]"
    assert hlo.largest(hlo.in_memory(HLO)) == ("f32[2,64,64]", 2 * 64 * 64 * 4)
    assert hlo.has_scores(HLO, 64, 64)
    assert not hlo.has_scores(HLO, 65, 65)
    assert [hlo.size(*array) for array in hlo.arrays("s8[3] pred[] f8e4m3fn[2,2] u64[2]")] == [3, 1, 4, 16]


def test_what_operations_move():
    q, scores = 64 * 2 * 8 * 2, 2 * 64 * 64 * 4 + 4 * 4
    # The call reads q and writes the scores; the fusion reads them and q and writes the result. The rest is views.
    assert hlo.moved(HLO) == (q + scores) + (scores - 16 + q + q)
    for target in ("__gpu$xla.gpu.triton", "mosaic_gpu_v2", "tpu_custom_call"):  # a Pallas kernel's own is not in it
        assert hlo.moved(HLO.replace('target="x"', f'target="{target}"')) == scores - 16 + q + q
    assert hlo.moved(HLO.replace("fusion(", "while(")) is None


def test_a_tpus_own_memories_move_nothing():
    array = 1024 * 2
    assert hlo.moved(TPU_HLO) == array + array  # the copy into vector memory reads, and the negation writes


def test_a_missing_wheel_is_named_with_the_way_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(absent.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu is not installed: `make aot`"):
        absent.environment(TARGETS["v5p"], tmp_path)
    monkeypatch.setattr(absent.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(absent.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    with pytest.raises(UserError, match=r"nvidia-cuda-nvcc-cu12 is not installed"):
        absent.environment(TARGETS["a100"], tmp_path)


def test_the_environment_of_a_compilation(monkeypatch, tmp_path):
    monkeypatch.setattr(absent.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(absent.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    for folder, _, needed in absent.GPU_WHEELS:
        (tmp_path / "nvidia" / folder / needed).mkdir(parents=True)
    variables = absent.environment(TARGETS["h100"], tmp_path / "dump")
    assert variables["PATH"].startswith(str(tmp_path / "nvidia/cuda_nvcc/bin"))
    assert str(tmp_path / "nvidia/nvjitlink/lib") in variables["LD_LIBRARY_PATH"]
    assert f"--xla_dump_to={tmp_path / 'dump'}" in variables["XLA_FLAGS"]
    assert TARGETS["h100"].architecture == "sm_90a"
    assert TARGETS["a100"].architecture == "sm_80"
    assert "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES" in absent.description(TARGETS["h100"])
