"""The batch, checked position by position and from a file on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpo.data import PreferenceCollator, load_preferences, tokenize_preferences

ROWS: list[dict[str, Any]] = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6], "row": 11},
    {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9, 10, 12], "row": 3},
]


def test_numbers() -> None:
    batch = PreferenceCollator(pad_token_id=99)(ROWS)
    x = -100
    expected = {
        "input_ids": [[1, 2, 3, 4, 5], [7, 8, 99, 99, 99], [1, 2, 3, 6, 99], [7, 9, 10, 12, 99]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]],
        "completion_labels": [[x, x, 4, 5, x], [8, x, x, x, x], [x, x, 6, x, x], [9, 10, 12, x, x]],
        "rows": [11, 3],
    }
    assert {name: value.tolist() for name, value in batch.items()} == expected
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert "labels" not in batch  # the Trainer would count them


def test_pad_token_inside_an_answer_is_scored() -> None:
    """EOS is often the padding token too: masks come from lengths, never from ids."""
    row = {"prompt_ids": [2, 2], "chosen_ids": [5, 2], "rejected_ids": [2], "row": 0}
    batch = PreferenceCollator(pad_token_id=2)([row])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["completion_labels"].tolist() == [[-100, 5, 2, -100], [-100, 2, -100, -100]]


@pytest.mark.parametrize(("multiple", "width"), [(None, 5), (1, 5), (5, 5), (4, 8), (64, 64)])
def test_pad_to_multiple_of(multiple: int | None, width: int) -> None:
    batch = PreferenceCollator(0, pad_to_multiple_of=multiple)(ROWS)
    plain = PreferenceCollator(0)(ROWS)
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("completion_labels", -100)):
        assert batch[name].shape == (4, width)
        assert torch.equal(batch[name][:, :5], plain[name])
        assert (batch[name][:, 5:] == fill).all()


def test_reference_logps_stay_float64() -> None:
    values = {"chosen": [-1.0 - 2.0**-40, -2.0], "rejected": [-3.0, -4.0]}
    rows = [
        {
            **row,
            "ref_chosen_logps": values["chosen"][k],
            "ref_rejected_logps": values["rejected"][k],
        }
        for k, row in enumerate(ROWS)
    ]
    logps = PreferenceCollator(0)(rows)["ref_logps"]
    assert logps.dtype == torch.float64
    assert logps.tolist() == values["chosen"] + values["rejected"]


def test_bad_rows() -> None:
    with pytest.raises(
        ValueError, match=r"row 5: rejected has no token that a prompt or BOS precedes"
    ):
        PreferenceCollator(0)(
            [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [], "row": 5}]
        )
    with pytest.raises(ValueError, match=r"row 6: chosen has no token"):
        PreferenceCollator(0)(
            [{"prompt_ids": [], "chosen_ids": [2], "rejected_ids": [3, 4], "row": 6}]
        )
    with pytest.raises(ValueError, match="rows: got none"):
        PreferenceCollator(0)([])
    with pytest.raises(ValueError, match="pad_token_id: got None"):
        PreferenceCollator(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pad_to_multiple_of: got 0"):
        PreferenceCollator(0, pad_to_multiple_of=0)


def test_from_a_file_to_tensors(make_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("llama3", add_bos=True)
    path = tmp_path / "prefs.jsonl"
    with path.open("w") as file:
        for k in range(6):
            ask = {"role": "user", "content": f"{k} + 1 ="}
            answers = {"chosen": f"{k + 1}", "rejected": "5" if k != 4 else "5 ."}
            row = {n: [ask, {"role": "assistant", "content": a}] for n, a in answers.items()}
            row["rejected"] = row["chosen"] if k == 2 else row["rejected"]
            file.write(json.dumps({"prompt": ask["content"], **row, "score_chosen": k}) + "\n")
    dataset, report = tokenize_preferences(load_preferences(path), tokenizer, max_length=64)
    assert report.dropped["equal_answers"].first_rows == [2]
    batch = PreferenceCollator(tokenizer.eos_token_id)(list(dataset))
    assert batch["rows"].tolist() == [0, 1, 3, 4, 5]
    for k, (ids, mask, labels) in enumerate(
        zip(batch["input_ids"], batch["attention_mask"], batch["completion_labels"], strict=True)
    ):
        row = batch["rows"][k % 5].item()
        answer = f"{row + 1}" if k < 5 else ("5" if row != 4 else "5 .")
        head = f"<|start_header_id|>user<|end_header_id|>\n\n{row} + 1 =<|eot_id|>"
        text = f"<|begin_of_text|>{head}<|start_header_id|>assistant<|end_header_id|>\n\n{answer}<|eot_id|>"
        assert tokenizer.decode(ids[mask.bool()]) == text
        assert tokenizer.decode(labels[labels != -100]) == f"{answer}<|eot_id|>"
        scored = (labels != -100).nonzero().flatten()
        assert torch.equal(ids[scored + 1], labels[scored])
