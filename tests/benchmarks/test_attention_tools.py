"""The plumbing of the attention benchmarks: what is run, how rows are kept and shown, how candidates are ranked."""

import csv
import functools
import json
import re
import shlex
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention_aot, attention_device, tune_attention
from benchmarks.aot import compile as compiling
from benchmarks.aot import kernels, tiles
from benchmarks.aot.cases import CASES, Case
from llm_jax.errors import UserError
from llm_jax.parallel.absent import TARGETS
from tests.test_readme import DOCUMENTS, ROOT, lines_of_commands

TINY = Case("tiny", 32, 2, 1, 64, decode_batch=2)
HEAD = {"target": "a100", "case": "qwen_7b", "implementation": "pallas_gpu", "pass": "forward"}
KERNEL_ROW = HEAD | {
    "kernel": "attention_forward",
    "registers": 200,
    "spilled_bytes": [4, 8],
    "shared_bytes": 65536,
    "threads": 256,
    "occupancy": 0.125,
    "occupancy_limit": "registers",
    "tensor_instructions": {"mma": 64},
    "moved_bytes": 3e6,
    "flops": 1,
    "dense_flops": 4,
}
PASS_ROW = HEAD | {
    "moved_bytes": 3e6,
    "outside_bytes": 4e6,
    "least_bytes": 2e6,
    "flops": 3,
    "dense_flops": 12,
    "least_flops": 2,
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
    other = PASS_ROW | {"target": "v5p", "implementation": "pallas_tpu"}
    gone = [other | {"case": "renamed"}, other | {"implementation": "removed"}]
    old = [other, KERNEL_ROW | {"registers": 1}, KERNEL_ROW | {"pass": "backward"}, *gone]
    assert attention_aot.merge(old, [KERNEL_ROW, PASS_ROW]) == [KERNEL_ROW, PASS_ROW, other]


def test_a_process_that_dies_leaves_a_reason(monkeypatch):
    done = SimpleNamespace(returncode=-6, stdout=json.dumps(KERNEL_ROW) + "\n", stderr="a\nAborted\n")
    monkeypatch.setattr(attention_aot, "environment", lambda target, folder: {})
    monkeypatch.setattr(attention_aot.subprocess, "run", lambda *a, **k: done)
    forward, backward = attention_aot.run(("a100", "qwen_7b", "pallas_gpu"))
    assert forward == KERNEL_ROW
    assert (backward["pass"], "Aborted" in backward["reason"]) == ("backward", True)


def cells(text, *start):
    """The rows of tables whose first cells are these, as the list of their other cells."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()]
    return [row[len(start) :] for row in rows if row[: len(start)] == list(start)]


def test_tables(tmp_path):
    """A row for each kernel with its own bytes, one for the pass with those around kernels, one for each reason."""
    failed = HEAD | {"target": "v5p", "implementation": "splash", "reason": "a | b"}
    plain = {key: value for key, value in PASS_ROW.items() if key not in ("moved_bytes", "flops", "dense_flops")}
    xla = plain | {"implementation": "xla"}
    loop = xla | {"implementation": "chunked", "outside_bytes": None, "not_counted": "a loop"}
    lost = PASS_ROW | {"implementation": "stock_mha", "not_counted": "copies"}
    del lost["moved_bytes"]
    rows: list[attention_aot.Row] = [KERNEL_ROW, PASS_ROW, xla, loop, lost, failed]
    text = attention_aot.write(tmp_path, rows)
    kernel = ["attention_forward", "200", "4/8", "64", "256", "12.5% (registers)", "64 mma", "3", "25.0%"]
    rest = ["25.0%", "1", "bf16[8]"]
    assert cells(text, "a100", "qwen_7b", "forward", "pallas_gpu") == [kernel, ["7", "4", "2", "1.50", *rest]]
    assert cells(text, "a100", "qwen_7b", "forward", "xla") == [["4", "4", "2", "-", "-", "1", "bf16[8]"]]
    assert [row[0] for row in cells(text, "a100", "qwen_7b", "forward", "chunked")] == ["-", "a loop"]
    assert [row[0] for row in cells(text, "a100", "qwen_7b", "forward", "stock_mha")] == ["-", "copies"]
    assert "| v5p | qwen_7b | forward | splash | a \\| b |" in text
    assert [json.loads(line) for line in (tmp_path / "attention_aot.jsonl").read_text().splitlines()] == rows


def test_counts_go_to_the_kernel_of_their_name():
    counted = {"forward": {"moved_bytes": 1}, "keys": {"moved_bytes": 2}}
    entries = [{"kernel": "keys.1"}, {"kernel": "forward_mosaic_gpu_kernel"}]
    assert [entry["moved_bytes"] for entry in compiling._with_counts(entries, counted)] == [2, 1]
    twins = [{"kernel": "keys.1"}, {"kernel": "keys.2"}]  # which of the two moved what is not told
    assert compiling._with_counts(twins, counted) == twins
    (only,) = compiling._with_counts([{"kernel": "jvp_x.2"}], {"kernel_0": {"moved_bytes": 3}})
    assert only["moved_bytes"] == 3


def test_what_is_compiled_and_how_it_ends(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(attention_aot, "environment", lambda target, folder: {})
    flags = ["--targets", "a100", "--cases", "qwen_7b", f"--output={tmp_path}", "--kernels"]
    monkeypatch.setattr(attention_aot, "run", lambda job: [PASS_ROW | {"implementation": job[2]}])
    assert attention_aot.main([*flags, "pallas_gpu", "xla"]) == 0
    monkeypatch.setattr(attention_aot, "run", lambda job: [HEAD | {"implementation": job[2], "reason": "no"}])
    assert attention_aot.main([*flags, "pallas_gpu"]) == 1
    assert "Not compiled" in capsys.readouterr().out
    monkeypatch.undo()  # what was asked for is looked at before what is installed
    with pytest.raises(UserError, match="none of these kernels is written for any of these targets"):
        attention_aot.main([*flags, "pallas_tpu"])


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_count_that_is_none_is_one_line(number, capsys):
    for tool, flag in ((attention_aot, "--jobs"), (attention_device, "--rounds"), (tune_attention, "--most")):
        with pytest.raises(SystemExit):
            tool.parse([f"{flag}={number}", "--kernel=pallas_gpu"] if tool is tune_attention else [f"{flag}={number}"])
        assert f"argument {flag}: '{number}' is not a whole number from 1 on" in capsys.readouterr().err


def test_help_lists_what_can_be_asked_for(capsys):
    with pytest.raises(SystemExit):
        attention_aot.parse(["--help"])
    shown = capsys.readouterr().out.split("options:")[1]
    assert all(name in shown for name in (*TARGETS, *CASES, "stock_mha"))


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
    names = ["chunked", "pallas_gpu", "xla_decode", "pallas_gpu_decode"]
    assert [name for name, _ in measured] == [name for name in names for _ in range(2)]
    assert {which for _, which in measured} == set(attention_device.MEASURES)
    for row in rows:
        assert not row.get("reason")
        assert float(row["error"]) < 1e-2 and float(row["seconds"]) > 0
        if row["measure"] == "training":
            assert all(0 < float(row[f"error_d{which}"]) < 2e-2 for which in "qkv")
    assert "| tiny | training | pallas_gpu |" in (tmp_path / "attention_device.md").read_text()


def test_errors_and_inputs():
    """And codes with their scales are about normal, as other inputs are."""
    _, k, v, lengths, k_scale, v_scale = attention_device.draw_cache(TINY, "decode_int8", "bfloat16")
    assert k.dtype == v.dtype == jnp.int8 and lengths.tolist() == [32, 32]
    assert np.std(k * k_scale) == pytest.approx(1, rel=0.05) == np.std(v * v_scale)
    assert attention_device.error(jnp.asarray([3.0, 4.0]), jnp.asarray([3.0, 4.5])) == pytest.approx(0.1)
    with pytest.raises(UserError, match="no GPU or TPU here: --interpret"):
        attention_device.chosen(attention_device.parse([]))


def test_a_device_gets_the_kernels_of_its_generation(monkeypatch):
    def chosen(name, capability):
        monkeypatch.setattr(attention_device.choice, "device", lambda: ("gpu", name))
        monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
        return {kernel.name for kernel in attention_device.chosen(attention_device.parse([]))[0]}

    ampere, hopper = chosen("NVIDIA A100-SXM4-80GB", "8.0"), chosen("NVIDIA H100 80GB HBM3", "9.0")
    assert hopper - ampere == {"mosaic_gpu", "stock_mgpu", "stock_mgpu_f16_not_causal"}
    assert "pallas_gpu" in ampere and "pallas_tpu" not in hopper
    assert chosen("AMD Instinct MI300X", "gfx942") == ampere


def test_what_decoding_is_held_to_is_float32_on_every_device(monkeypatch):
    """Where a device has a faster product of float32 numbers, it is not taken."""
    seen = []

    def build(case):
        def run(q_B1NH, k_BKSH, v_BKSH, lengths_B, *scales):
            precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
            seen.append((precision, q_B1NH.dtype, k_BKSH.dtype))
            return q_B1NH

        return run

    monkeypatch.setattr(attention_device, "named", lambda name: SimpleNamespace(build=build))
    for which in ("decode", "decode_int8"):
        attention_device._exact_decoding(TINY, attention_device.draw_cache(TINY, which, "bfloat16"))
    assert seen == [("highest", jnp.float32, jnp.float32), ("highest", jnp.float32, jnp.int8)]


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kernel=pallas_gpu"], "pallas_gpu is not written for what is here (cpu): --aot=DEVICE"),
        (["--kernel=pallas_tpu", "--aot=a100"], "pallas_tpu is not written for --aot=a100"),
        (["--kernel=mosaic_gpu", "--aot=a100"], "mosaic_gpu is not written for --aot=a100"),
        (["--kernel=pallas_gpu", "--aot=a100", "--head_dim=100"], "not 100"),
        (["--kernel=mosaic_gpu", "--aot=h100", "--head_dim=96"], "not 96"),
        (["--kernel=pallas_tpu", "--interpret", "--head_dim=100"], "not 100"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(arguments, said):
    with pytest.raises(UserError) as mistake:
        tune_attention.main(arguments)
    assert said in str(mistake.value) and "\n" not in str(mistake.value)


class Process:
    """Stands for a compiler that ends at the candidate it does not survive."""

    def __init__(self, survives, status, command, **options):
        asked = [json.loads(word) for word in command[command.index("--blocks") + 1 :]]
        done = [blocks for blocks in asked if blocks in survives]
        dies = [number for number, blocks in enumerate(asked) if blocks not in survives]
        rows = [{"blocks": blocks, "kernel": "forward"} for blocks in (done if not dies else asked[: dies[0]])]
        self.stdout = iter([json.dumps(row) + "\n" for row in rows])
        self.returncode = status if dies else 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def test_a_compiler_that_dies_takes_one_candidate_with_it(monkeypatch):
    blocks = tiles.candidates("pallas_gpu", tiles.default_blocks("pallas_gpu", 64), "forward")[:4]
    sizes = [tiles.as_lists(block) for block in blocks]
    options = tune_attention.parse(["--kernel=pallas_gpu", "--aot=a100"])
    monkeypatch.setattr(tune_attention, "environment", lambda target, folder: {})

    def compiled(status):
        dying = functools.partial(Process, [sizes[0], sizes[2]], status)
        monkeypatch.setattr(tune_attention.subprocess, "Popen", dying)
        return tune_attention.compiled(kernels.named("pallas_gpu"), TINY, blocks, "forward", options)

    rows = compiled(-9)
    assert [(row["blocks"], "signal 9" in row.get("reason", "")) for row in rows] == [
        (sizes[0], False),
        (sizes[1], True),
        (sizes[2], False),
        (sizes[3], True),
    ]
    with pytest.raises(UserError, match="ended with status 1; the error is above"):
        compiled(1)


def test_candidates_are_ranked_by_what_they_cost():
    def row(blocks, kernel, **figures):
        return {"blocks": blocks, "kernel": kernel} | figures

    fast = {"occupancy": 0.25, "spilled_bytes": [0, 0], "moved_bytes": 5}
    rows = [
        {"blocks": [[4]], "least_bytes": 1, "moved_bytes": 0},  # of the whole pass
        row([[1]], "key_gradients", **fast | {"spilled_bytes": [8, 8]}),
        row([[1]], "query_gradients", **fast),
        row([[2]], "key_gradients", **fast | {"occupancy": 0.125}),
        row([[3]], "key_gradients", **fast | {"moved_bytes": 6}),
        row([[4]], "key_gradients", **fast),
        {"blocks": [[5]], "reason": "too much shared memory"},
        {"blocks": [[6]], "least_bytes": 1, "moved_bytes": 0},  # no kernel was found in what it compiled to
    ]
    assert tune_attention.rank(rows, "key_gradients") == [[[4]], [[2]], [[3]], [[1]], [[6]]]
    bundles = [row([[1]], "f", over_least=1.2, moved_bytes=1), row([[2]], "f", over_least=1.1, moved_bytes=9)]
    assert tune_attention.rank(bundles, "f") == [[[2]], [[1]]]


def test_blocks_survive_json():
    blocks = tiles.default_blocks("pallas_gpu", 128)
    assert tiles.from_lists("pallas_gpu", json.loads(json.dumps(tiles.as_lists(blocks)))) == blocks
    assert tiles.entry(blocks).startswith("Blocks(Pass(")


def test_decoding_masks_what_is_not_written():
    mask = TINY._replace(window=4).decode_mask(jnp.asarray([5, 2]))
    np.testing.assert_array_equal(np.asarray(mask.visible(1, 8))[:, 0, 0].sum(axis=1), [4, 2])


TOOLS = {"attention_aot": attention_aot, "attention_device": attention_device, "tune_attention": tune_attention}


def commands():
    """Every line of the documents, the Makefile and the tools' own docstrings that starts one of the tools."""
    texts = [*DOCUMENTS, ROOT / "Makefile", *(ROOT / "benchmarks" / f"{name}.py" for name in TOOLS)]
    lines = [line for text in texts for line in lines_of_commands(text)]
    found = [re.search(r"python -m benchmarks\.(\w+)([^#`]*)", line) for line in lines]
    return sorted({(match[1], match[2].strip()) for match in found if match and match[1] in TOOLS})


@pytest.mark.parametrize(("tool", "arguments"), commands())
def test_commands_that_people_are_told_to_type(tool, arguments):
    TOOLS[tool].parse(shlex.split(arguments))


def test_all_tools_are_in_the_documents():
    assert {tool for tool, _ in commands()} == set(TOOLS)
    with pytest.raises(SystemExit):
        attention_aot.parse(["--targets", "a101"])
