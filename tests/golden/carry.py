"""Writes what scores.jsonl was made with: model/, the weights, and requests.jsonl, the token ids.

Run:  python tests/golden/carry.py    (regenerate.py does so too)
With both, scores.jsonl checks an implementation that has neither transformers nor a tokenizer. A
line of requests.jsonl belongs to the line of scores.jsonl with its task, row and bos: groups of
[context ids, [continuation ids, ...]], each choice's code points, null where there is no acc_norm,
and which choice is right.
"""
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import evaluate  # noqa: E402
import hub  # noqa: E402


def requests() -> list:
    """requests.jsonl, a dict a line."""
    tokenizer, lines = hub.load_tokenizer(HERE), []
    for bos in ("auto", "off"):
        for task in evaluate.FIELDS:
            rows = (HERE / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
            for i, row in enumerate(rows):
                question = evaluate.read_row(task, json.loads(row))
                alike = len(set(question.contexts)) == 1
                lines.append({
                    "task": task, "row": i, "bos": bos,
                    "groups": evaluate.choice_ids(question, tokenizer, bos),
                    "characters": [*map(len, question.choices)] if alike else None,
                    "gold": question.gold,
                })
    return lines


def main() -> None:
    """Rewrites model/ and requests.jsonl."""
    from conftest import make_golden_model
    with tempfile.TemporaryDirectory() as folder:
        make_golden_model().save_pretrained(folder)
        (HERE / "model").mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (HERE / "model" / name).write_bytes((Path(folder) / name).read_bytes())
    text = "".join(json.dumps(line) + "\n" for line in requests())
    (HERE / "requests.jsonl").write_text(text)


if __name__ == "__main__":
    main()
