"""Functions of the user's as scorers: found beside them, called with what was promised, mistakes named."""

from __future__ import annotations

import importlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastpo.config_folder import config_folder, known_config_folder
from fastpo.selfplay.scorers import Candidates, ScorerError, ScorerSettings, make_scorer
from fastpo.selfplay.scorers.checks import check_scores
from fastpo.selfplay.scorers.function import FunctionScorer

ROWS = [
    Candidates(3, "data.jsonl, line 4", "prompt", ["ab", "a"], {"gold": "ab"}),
    Candidates(5, "data.jsonl, line 6", [{"role": "user", "content": "q"}], [], {}),
]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """``module(source)``: its name; it lies in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".")])
    before = set(sys.modules)

    def write(source: str) -> str:
        name = f"scoring_{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def scored(scorer: Any) -> dict[int, list[float]]:
    return dict(scorer.score(iter([ROWS[:1], ROWS[1:]]), Counter()))


def test_the_function_sees_prompt_response_and_row(module: Callable[[str], str]) -> None:
    name = module(
        "def score(prompt, response, row):\n"
        "    assert prompt == 'prompt' and row == {'gold': 'ab'}, (prompt, row)\n"
        "    return response == row['gold']\n"
    )
    scorer = make_scorer(ScorerSettings(kind="callable", function=f"{name}:score"))
    assert scorer.batch_rows == 1
    found = scored(scorer)
    assert found == {3: [1.0, 0.0], 5: []}
    assert [type(score) for score in found[3]] == [float, float]


def test_identity_changes_with_the_source(module: Callable[[str], str]) -> None:
    source = "def score(p, r, row): return 1\n"
    first = FunctionScorer(f"{module(source)}:score").identity()
    same = FunctionScorer(f"{module(source)}:score").identity()
    other = FunctionScorer(f"{module(source + '# changed')}:score").identity()
    assert first["source_sha256"] == same["source_sha256"] != other["source_sha256"]
    assert first["function"].endswith(":score")
    assert FunctionScorer("math:dist").identity()["kind"] == "callable"


def test_what_the_function_imports_later_is_found_and_shadows_nothing(
    module: Callable[[str], str], tmp_path: Path
) -> None:
    (tmp_path / "wave.py").write_text("raise RuntimeError('not this one')\n")  # of the stdlib too
    inner = module("VALUE = 4\n")
    name = module(
        f"def score(p, r, row):\n    import wave\n    import {inner}\n    return {inner}.VALUE\n"
    )
    sys.modules.pop("wave", None)
    assert scored(FunctionScorer(f"{name}:score"))[3] == [4.0, 4.0]


def test_modules_and_functions_that_are_not_there(module: Callable[[str], str]) -> None:
    with pytest.raises(
        ImportError,
        match=r"'nowhere' could not be imported: ModuleNotFoundError.*\(looked in /.* and among installed",
    ):
        FunctionScorer("nowhere:score")
    name = module("import missing_dependency\n")
    with pytest.raises(ImportError, match=f"{name!r} could not be imported: .*missing_dependency"):
        FunctionScorer(f"{name}:score")
    with pytest.raises(ImportError, match="could not be imported: SyntaxError"):
        FunctionScorer(f"{module('def score(:')}:score")
    name = module("score = 3\n")
    for function in ("other", "score"):
        with pytest.raises(ImportError, match=f"module {name!r} has no function {function!r}"):
            FunctionScorer(f"{name}:{function}")


@pytest.mark.parametrize("function", ["module", "module:", ":f", "module:f:g", "module:a b"])
def test_another_form_is_refused(function: str) -> None:
    with pytest.raises(ValueError, match="expected module:function"):
        FunctionScorer(function)


def test_an_error_in_the_function_names_row_and_response(module: Callable[[str], str]) -> None:
    name = module("def score(p, r, row):\n    return {'ab': 1}[r]\n")
    with pytest.raises(
        ScorerError, match=rf"line 4: {name}:score failed on response 1 \(from 0\): KeyError: 'a'"
    ) as caught:
        scored(FunctionScorer(f"{name}:score"))
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("value", ["'0.5'", "None", "[1]", "1j"])
def test_what_is_no_number_is_named(module: Callable[[str], str], value: str) -> None:
    name = module(f"def score(p, r, row): return {value}\n")
    with pytest.raises(ScorerError) as caught:
        scored(FunctionScorer(f"{name}:score"))
    shown = eval(value)
    assert f"line 4: {name}:score returned {shown!r} ({type(shown).__name__})" in str(caught.value)


def test_numbers_of_numpy_are_numbers(module: Callable[[str], str]) -> None:
    name = module(
        "import numpy as np\ndef score(p, r, row): return np.float32(len(r)) + np.int64(1)\n"
    )
    assert scored(FunctionScorer(f"{name}:score"))[3] == [3.0, 2.0]


def test_nan_names_the_response(module: Callable[[str], str]) -> None:
    name = module("def score(p, r, row): return 1.0 if r == 'ab' else float('nan')\n")
    with pytest.raises(
        ScorerError,
        match=r"line 4: score of response 1 \(from 0\) is nan, expected a finite number",
    ):
        scored(FunctionScorer(f"{name}:score"))


def test_check_scores() -> None:
    assert check_scores("row 1", [1, 2.5], 2) == [1.0, 2.5]
    with pytest.raises(ScorerError, match=r"row 1: score of response 0 \(from 0\) is -inf"):
        check_scores("row 1", [-math.inf, 0.0], 2)
    with pytest.raises(ScorerError, match="row 1: got 1 scores, expected 2"):
        check_scores("row 1", [0.0], 2)


def test_the_configurations_folder_is_searched_after_the_current_directory(
    module: Callable[[str], str], tmp_path: Path
) -> None:
    beside = tmp_path / "recipes"
    beside.mkdir()
    here = module("def score(p, r, row): return 1\n")
    (beside / f"{here}.py").write_text("def score(p, r, row): return 2\n")
    (beside / "only_beside.py").write_text("def score(p, r, row): return 3\n")
    (beside / "wave.py").write_text("raise RuntimeError('not this one')\n")
    with known_config_folder(beside / "score.yaml"):
        assert scored(FunctionScorer(f"{here}:score"))[3] == [1, 1]
        assert scored(FunctionScorer("only_beside:score"))[3] == [3, 3]
        with pytest.raises(
            ImportError, match=rf"looked in {tmp_path}, {beside} and among installed"
        ):
            FunctionScorer("nowhere:score")
        sys.modules.pop("wave", None)
        importlib.import_module("wave")  # the library's own
        with known_config_folder(tmp_path / "iteration-1/written-by-fastpo.yaml"):
            assert config_folder() == str(beside)  # as in a process that a command starts
    assert config_folder() is None
    with known_config_folder(None):
        assert config_folder() is None
