"""The plumbing of the attention benchmarks: what is run, how rows are kept and shown, how candidates are ranked."""

import csv
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention_aot, attention_device, tune_attention
from benchmarks.aot import compile as compiling
from benchmarks.aot import kernels, table, tiles
from benchmarks.aot.cases import CASES, Case
from benchmarks.aot.targets import TARGETS
from llm_jax.errors import UserError

TINY = Case("tiny", 32, 2, 1, 64, decode_batch=2)
GPU_ROW = {
    "target": "a100",
    "case": "qwen_7b",
    "implementation": "pallas_gpu",
    "pass": "forward",
    "kernel": "attention_forward",
    "registers": 200,
    "spilled_bytes": [4, 8],
    "shared_bytes": 65536,
    "threads": 256,
    "occupancy": 0.125,
    "occupancy_limit": "registers",
    "tensor_instructions": {"mma": 64},
    "moved_bytes": 3e6,
    "program_bytes": 9e6,
    "least_bytes": 2e6,
    "flops": 3.0,
    "least_flops": 2.0,
    "tiles_visited": 0.25,
    "temporary_bytes": 1e6,
    "largest_array": "bf16[8]",
    "has_scores": False,
}


def test_jobs_are_those_that_suit_the_device():
    names = [kernel.name for kernel in kernels.KERNELS]
    found = {name: {job[2] for job in attention_aot.jobs([name], ["qwen_7b"], names)} for name in TARGETS}
    assert "pallas_gpu" in found["a100"] and "pallas_tpu" not in found["a100"]
    assert "mosaic_gpu" in found["h100"] and "mosaic_gpu" not in found["a100"]
    assert "stock_splash_512" in found["v5p"] and "stock_mha" not in found["v5p"]
    assert all("xla" in found[name] for name in TARGETS)
    assert attention_aot.jobs(["a100"], ["qwen_7b"], ["xla"]) == [("a100", "qwen_7b", "xla")]


def test_rows_of_a_new_run_replace_the_old_ones():
    other = GPU_ROW | {"target": "v5p", "implementation": "pallas_tpu"}
    old = [other, GPU_ROW | {"registers": 1}, GPU_ROW | {"pass": "backward"}]
    assert attention_aot.merge(old, [GPU_ROW]) == [GPU_ROW, other]


def test_a_process_that_dies_leaves_a_reason(monkeypatch):
    done = SimpleNamespace(returncode=-6, stdout=json.dumps(GPU_ROW) + "\n", stderr="a\nAborted\n")
    monkeypatch.setattr(attention_aot, "environment", lambda target, folder: {})
    monkeypatch.setattr(attention_aot.subprocess, "run", lambda *a, **k: done)
    forward, backward = attention_aot.run(("a100", "qwen_7b", "pallas_gpu"))
    assert forward == GPU_ROW
    assert (backward["pass"], "Aborted" in backward["reason"]) == ("backward", True)


def test_tables(tmp_path):
    failed = {"target": "v5p", "case": "qwen_7b", "implementation": "splash", "pass": "forward", "reason": "a | b"}
    text = attention_aot.write(tmp_path, [GPU_ROW, failed])
    assert (
        "| a100 | qwen_7b | forward | pallas_gpu | attention_forward | 200 | 4/8 | 64 | 256 | 12.5% (registers) "
        "| 64 mma | 3 | 2 | 1.50 | 25.0% | 1 | bf16[8] |"
    ) in text
    assert "| v5p | qwen_7b | forward | splash | a \\| b |" in text
    assert [json.loads(line) for line in (tmp_path / "attention_aot.jsonl").read_text().splitlines()][1] == failed
    program = {key: value for key, value in GPU_ROW.items() if key in ("target", "case", "pass", "program_bytes")}
    line = table.markdown(table.HEAD | table.GPU_COLUMNS | table.COMMON, [program]).splitlines()[2]
    assert "| - | 9 | - |" in line  # no kernel of Pallas in it: what XLA's operations move


def test_xla_and_ours_are_the_same_function():
    """Scales, layouts, windows and slopes are as they should be."""
    case = TINY._replace(alibi=True, window=20)
    arguments = attention_device.draw(compiling.program(kernels.named("xla"), case, "forward")[1])
    out = kernels.named("xla").build(case)(*arguments)
    expected = kernels.named("chunked").build(case)(*(x.astype(jnp.float32) for x in arguments))
    assert attention_device.error(expected, out) < 1e-2


def test_what_stock_kernels_cannot_do_is_said():
    with pytest.raises(UserError, match="has no window"):
        kernels.named("stock_mha").build(CASES["qwen_7b"])
    with pytest.raises(UserError, match="has no ALiBi"):
        kernels.named("stock_splash_512").build(CASES["baichuan2_13b"])


def test_a_backward_pass_starts_from_what_the_forward_saved():
    function, arguments = compiling.program(kernels.named("chunked"), TINY, "backward")
    shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(function, *arguments))]
    assert shapes == [(1, 32, 2, 64), (1, 32, 1, 64), (1, 32, 1, 64)]


def test_times_and_errors_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(attention_device, "TINY", {"tiny": TINY})
    flags = ["--interpret", "--rounds=1", "--calls=1", f"--output={tmp_path}"]
    attention_device.main([*flags, "--kernels", "chunked", "pallas_gpu", "xla_decode", "pallas_gpu_decode"])
    with open(tmp_path / "attention_device.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [(row["implementation"], row["measure"]) for row in rows]
    names = ["pallas_gpu", "pallas_gpu", "pallas_gpu_decode", "chunked", "chunked", "xla_decode"]
    assert [name for name, _ in measured] == names
    assert {which for _, which in measured} == set(attention_device.MEASURES)
    for row in rows:
        assert not row.get("reason")
        assert float(row["error"]) < 1e-2 and float(row["seconds"]) > 0
        if row["measure"] == "training":
            assert all(0 < float(row[f"error_d{which}"]) < 2e-2 for which in "qkv")
    assert "| tiny | training | pallas_gpu |" in (tmp_path / "attention_device.md").read_text()


def test_errors_and_rates():
    assert attention_device.error(jnp.asarray([3.0, 4.0]), jnp.asarray([3.0, 4.5])) == pytest.approx(0.1)
    assert attention_device.peak("NVIDIA A800-SXM4-80GB") == 312e12
    assert attention_device.peak("TPU v5 lite") == 197e12
    assert attention_device.peak("cpu") is None
    with pytest.raises(UserError, match="no GPU or TPU here: --interpret"):
        attention_device.chosen(attention_device.parse([]))


def test_the_tuner_takes_the_fastest(monkeypatch, capsys):
    times = iter([3.0, 1.0, 2.0] * 3)
    monkeypatch.setattr(attention_device, "seconds", lambda *a: next(times))
    tune_attention.main(["--kernel=pallas_gpu", "--interpret", "--most=3"])
    start = tiles.default_blocks("pallas_gpu", 64)
    best = start
    for field in tiles.PASSES_OF:
        best = tiles.candidates("pallas_gpu", best, field)[1]
    assert capsys.readouterr().out == f"head dim 64, bfloat16: {tiles.entry(best)}\n"
    assert best != start


def test_candidates_are_ranked_by_what_they_cost():
    def row(blocks, kernel, **figures):
        return {"blocks": blocks, "kernel": kernel} | figures

    fast = {"occupancy": 0.25, "spilled_bytes": [0, 0], "moved_bytes": 5}
    rows = [
        row([[1]], "key_gradients", **fast | {"spilled_bytes": [8, 8]}),
        row([[1]], "query_gradients", **fast),
        row([[2]], "key_gradients", **fast | {"occupancy": 0.125}),
        row([[3]], "key_gradients", **fast | {"moved_bytes": 6}),
        row([[4]], "key_gradients", **fast),
        {"blocks": [[5]], "reason": "too much shared memory"},
    ]
    assert tune_attention.rank(rows, "key_gradients") == [[[4]], [[2]], [[3]], [[1]]]
    bundles = [row([[1]], "f", over_least=1.2, moved_bytes=1), row([[2]], "f", over_least=1.1, moved_bytes=9)]
    assert tune_attention.rank(bundles, "f") == [[[2]], [[1]]]


def test_blocks_survive_json():
    blocks = tiles.default_blocks("pallas_gpu", 128)
    assert tiles.from_lists("pallas_gpu", json.loads(json.dumps(tiles.as_lists(blocks)))) == blocks
    assert tiles.entry(blocks).startswith("Blocks(Pass(")


def test_decoding_masks_what_is_not_written():
    mask = TINY._replace(window=4).decode_mask(jnp.asarray([5, 2]))
    np.testing.assert_array_equal(np.asarray(mask.visible(1, 8))[:, 0, 0].sum(axis=1), [4, 2])
