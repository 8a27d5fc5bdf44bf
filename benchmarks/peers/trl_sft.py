"""TRL's SFTTrainer on conversations that are tokens already, with the loss of their replies alone."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import transformers
import trl

from benchmarks.peers.trl_turns import serve_trainer, settings, tokenizer


def batching(layout: str, plan: Mapping[str, int]) -> dict[str, Any]:
    """How rows become batches: TRL packs a batch's rows into one, or takes row after row and adds up the gradients."""
    if layout == "packed":
        return {"packing": True, "per_device_train_batch_size": plan["rows"]}
    if layout == "packed_rows":
        return {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": plan["rows"]}
    return {"per_device_train_batch_size": plan["conversations"]}


def main(path: str, layout: str) -> None:
    """Serve the steps of a layout, "packed", "packed_rows", "padded" or "grouped", in a folder of `prepare`."""
    folder = Path(path)
    plan = json.loads((folder / "plan.json").read_text())
    file = folder / f"sft_{layout.removesuffix('_rows')}.jsonl"
    rows = datasets.Dataset.from_list([json.loads(line) for line in file.read_text().splitlines()])
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32"),
        args=trl.SFTConfig(
            **settings(**batching(layout, plan)),
            max_length=plan["length"],
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=rows,
        processing_class=tokenizer(plan["pad"]),
    )

    def learned(inputs: Any) -> int:
        return int((inputs["labels"] >= 0).sum())

    serve_trainer(trainer, learned)


if __name__ == "__main__":
    main(*sys.argv[1:])
