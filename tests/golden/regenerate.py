"""Scores the rows of this folder with lm-evaluation-harness, on a tiny seeded model.

Run:  pip install lm-eval==0.4.13 && python tests/golden/regenerate.py
Writes tokenizer.json, a small byte-level BPE trained on the rows that puts <bos> in front, and
scores.jsonl, a line a row and BOS policy; carry.py adds the weights and the token ids. Nothing but
this script and bench.py needs lm-eval.
"""
import json
import sys
import tempfile
from pathlib import Path

import datasets
import lm_eval
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent)]
import carry  # noqa: E402
from conftest import make_golden_model  # noqa: E402  (which also finds hub)

import hub  # noqa: E402

def train_tokenizer() -> Tokenizer:
    """Byte-level BPE of 400 tokens, digits one by one, <bos> in front by its own habit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<bos>", "<eos>"],
                                  initial_alphabet=alphabet, show_progress=False)
    texts = [(HERE / f"{task}.jsonl").read_text(encoding="utf-8") for task in hub.HUB_TASKS]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)])
    return tokenizer


def read_rows_from(folder: Path, limit: int | None = None) -> None:
    """Makes the harness's own tasks read folder/<task>.jsonl where they ask for the hub."""
    tasks = {(path, name): task for task, (path, name, _) in hub.HUB_TASKS.items()}

    def load_dataset(path: str, name: str | None = None, **_) -> datasets.DatasetDict:
        lines = (folder / f"{tasks[path, name]}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = datasets.Dataset.from_list([json.loads(line) for line in lines[:limit]])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    datasets.load_dataset = load_dataset


def main() -> None:
    """Rewrites tokenizer.json and scores.jsonl."""
    tokenizer = train_tokenizer()
    tokenizer.save(str(HERE / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        wrapped = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json",
                                          bos_token="<bos>", eos_token="<eos>")
    read_rows_from(HERE)
    lines = []
    for bos, add in (("auto", None), ("off", False)):
        lm = HFLM(pretrained=make_golden_model(), tokenizer=wrapped, add_bos_token=add,
                  batch_size=7, device="cpu")
        done = lm_eval.simple_evaluate(lm, tasks=list(hub.HUB_TASKS), log_samples=True,
                                       bootstrap_iters=1)  # 0: no errors
        for task in hub.HUB_TASKS:
            for sample in sorted(done["samples"][task], key=lambda x: x["doc_id"]):
                scores = [round(float(resp[0]), 5) for resp in sample["filtered_resps"]]
                acc_norm = int(sample["acc_norm"]) if "acc_norm" in sample else None
                lines.append({"task": task, "row": sample["doc_id"], "bos": bos,
                              "loglikelihood": scores, "acc": int(sample["acc"]),
                              "acc_norm": acc_norm})
            result = done["results"][task]
            lines.append({"task": task, "bos": bos, **{
                key: result.get(f"{key},none") for key in
                ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")}})
    (HERE / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    carry.main()


if __name__ == "__main__":
    main()
