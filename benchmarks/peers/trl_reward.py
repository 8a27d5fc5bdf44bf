"""TRL's RewardTrainer on pairs of responses that are tokens already."""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import trl

from benchmarks.peers.trl_turns import serve_trainer, settings, tokenizer


def main(path: str, layout: str) -> None:
    """Serve the steps of a layout, "padded" or "grouped", in a folder of `fine_tuning_data.prepare`."""
    folder = Path(path)
    plan = json.loads((folder / "plan.json").read_text())
    lines = (folder / f"reward_{layout}.jsonl").read_text().splitlines()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "model", dtype="float32", num_labels=1, pad_token_id=plan["pad"]
    )
    model.score.weight.data = torch.from_numpy(np.load(folder / "reward_head.npy"))[None]
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(**settings(per_device_train_batch_size=plan["pairs"]), max_length=plan["length"]),
        train_dataset=datasets.Dataset.from_list([json.loads(line) for line in lines]),
        processing_class=tokenizer(plan["pad"]),
    )

    def pairs(inputs: Any) -> int:
        return len(inputs["input_ids"]) // 2

    serve_trainer(trainer, pairs)


if __name__ == "__main__":
    main(*sys.argv[1:])
