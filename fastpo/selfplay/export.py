"""``fastpo eval-export``: responses in AlpacaEval's format, and the commands of the papers' benchmarks.

AlpacaEval 2 reads one JSON list of ``{"instruction", "output", "generator", "dataset"}`` and joins it with the
reference's outputs by ``instruction``, which therefore has to be the evaluation set's own text, to the letter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from fastpo.atomic_write import replaced

from .conversation import read_prompt, read_responses
from .rows import Row, check_readable, read_rows

# Tasks of lm-evaluation-harness, and how many worked examples stand before each question: the first version of
# the Open LLM Leaderboard, on which DNPO (arXiv 2502.05400) and SynPO (arXiv 2410.06961) report.
SHOTS = {
    "arc_challenge": 25,
    "truthfulqa_mc2": 0,
    "winogrande": 5,
    "gsm8k": 5,
    "hellaswag": 10,
    "mmlu": 5,
}


@dataclass
class ExportConfig:
    """Settings of ``fastpo eval-export``.

    Raises:
        ValueError: a setting that cannot be used; the message names it.
    """

    responses: str = field(
        metadata={"help": "JSONL or Parquet as fastpo generate writes it: prompt and responses"}
    )
    output: str = field(
        metadata={"help": "JSON file in AlpacaEval's format; of several responses the first"}
    )
    generator: str = field(metadata={"help": "the name of the model on the leaderboard"})
    model: str | None = field(
        default=None,
        metadata={"help": "its checkpoint or Hub name; set: print the benchmarks' commands for it"},
    )

    def __post_init__(self) -> None:
        if Path(self.output).suffix != ".json":
            raise ValueError(
                f"output: got {self.output!r}, expected a file that ends in .json (AlpacaEval reads one list)"
            )
        if Path(self.output).resolve() == Path(self.responses).resolve():
            raise ValueError(f"output: got {self.output!r}, expected another file than responses")
        if not self.generator.strip():
            raise ValueError(f"generator: got {self.generator!r}, expected a name")
        if self.model is not None:
            benchmark_commands(self.model)  # names a model that they cannot take


def export(config: ExportConfig) -> None:
    """Write the responses in AlpacaEval's format, row by row, and print what was done and what comes next.

    A conversation's last user's message is the instruction; what came before it (the system's message, earlier
    turns) goes along as ``context``, a list of messages that AlpacaEval neither reads nor shows to its judge. A
    row's own ``dataset`` (AlpacaEval's rows have one) is kept, else it is ``alpaca_eval``.

    Raises:
        FileNotFoundError: no such file of responses.
        ValueError: a row without prompt, user's message or response; it is named, and nothing is written.
    """
    responses, output = Path(config.responses), Path(config.output)
    check_readable(responses)
    output.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with replaced(output) as file:
        for entry in _entries(responses, config.generator):
            file.write(b",\n" if count else b"[\n")
            file.write(json.dumps(entry, ensure_ascii=False).encode())
            count += 1
        if not count:
            raise ValueError(f"responses: {responses} has no rows")
        file.write(b"\n]\n")
    print(f"{output}: {count} outputs of {config.generator}", flush=True)
    if config.model is not None:
        print(*benchmark_commands(config.model, output), sep="\n", flush=True)


def _entries(path: Path, generator: str) -> Iterator[Row]:
    for where, row in read_rows(path):
        responses = read_responses(row, where)
        if not responses:
            raise ValueError(f"{where}: no response")
        prompt, context = read_prompt(row, where), []
        if not isinstance(prompt, str):
            asked = [k for k, message in enumerate(prompt) if message["role"] == "user"]
            if not asked:
                raise ValueError(f"{where}: the prompt has no user's message")
            prompt, context = prompt[asked[-1]]["content"], prompt[: asked[-1]]
        dataset = row.get("dataset")
        yield {
            "instruction": prompt,
            "output": responses[0],
            "generator": generator,
            "dataset": dataset if isinstance(dataset, str) else "alpaca_eval",
            **({"context": context} if context else {}),
        }


def benchmark_commands(model: str, outputs: Path = Path("model_outputs.json")) -> list[str]:
    """Shell lines that run the papers' benchmarks on a model, comments among them.

    Args:
        model: checkpoint directory or Hub name.
        outputs: its answers to AlpacaEval's instructions, as :func:`export` writes them.

    Raises:
        ValueError: a model whose name lm-evaluation-harness would take apart.
    """
    if not model.strip() or "," in model:
        raise ValueError(
            f"model: got {model!r}, expected a directory or name without a comma (lm_eval splits it there)"
        )
    model = os.path.expanduser(model)  # a quoted ~ means nothing to the shell
    harness = [
        f"lm_eval --model hf --model_args {quote(f'pretrained={model}')} --tasks {task} --num_fewshot {shots}"
        " --batch_size auto --output_path lm_eval_results"
        for task, shots in SHOTS.items()
    ]
    return [
        "# Open LLM Leaderboard v1 (lm-evaluation-harness): acc_norm of arc_challenge and hellaswag,",
        "# exact_match (strict) of gsm8k, acc of the others",
        *harness,
        "# AlpacaEval 2: length_controlled_winrate and win_rate; asks OpenAI's GPT-4 Turbo",
        f"alpaca_eval --model_outputs {quote(str(outputs))}"
        " --annotators_config weighted_alpaca_eval_gpt4_turbo",
        "# Arena-Hard v0.1, in a checkout of github.com/lmarena/arena-hard-auto: the three files in config/",
        "# have to name the model, the second also bench_name: arena-hard-v0.1; the server keeps running",
        f"vllm serve {quote(model)}",
        "python gen_answer.py --config-file config/gen_answer_config.yaml"
        " --endpoint-file config/api_config.yaml",
        "python gen_judgment.py --setting-file config/arena-hard-v0.1.yaml"
        " --endpoint-file config/api_config.yaml",
        "python show_result.py --benchmark arena-hard-v0.1 --judge-names gpt-4-1106-preview"
        " --category arena-hard-v0.1",
    ]
