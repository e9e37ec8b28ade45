"""A Parquet file of the reference's log-probs, keyed by what each row says and not by where it stands.

One row per distinct pair, sorted by ``row_hash``; any Parquet reader opens it:

- ``row_hash`` (string): SHA-256, in 64 hex digits, of little-endian int32 numbers: how many ids the prompt,
  the chosen and the rejected answer have, then the ids of the three;
- ``ref_chosen_logps``, ``ref_rejected_logps`` (float64): log-probability of the answer after the prompt, a sum
  over its tokens, in nats;
- ``chosen_tokens``, ``rejected_tokens`` (int32): how many tokens that sum has.

The key is made of token ids, not of text: they are all that a log-prob depends on beside the model. Texts that
are written differently but tokenised alike share their row, and a file that was made with another tokenizer,
chat template or length has no row for a pair that these changed, so that wrong numbers are never found.

The schema's metadata has one entry ``fastpo``, a JSON object with the fields of :class:`Origin` and ``sha256``,
a digest of the columns.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from fastpo.atomic_write import replaced
from fastpo.version import __version__

from .reference import COLUMNS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .config import PreferenceConfig

COUNTS = ("chosen_tokens", "rejected_tokens")
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_METADATA = b"fastpo"
_ROWS_AT_ONCE = 16_384  # that are hashed, in memory beside the data set
_ROWS_NAMED = 5

# Why rows may be missing: what a message says of a file that differs from the run in one of these.
_TOKENISATION = {
    "tokenizer_hash": "another tokenizer",
    "chat_template_hash": "another chat template",
    "max_length": "max_length",
    "max_prompt_length": "max_prompt_length",
}


@dataclass(frozen=True)
class Origin:
    """What the numbers of a file come from.

    Attributes:
        model_hash: :func:`fastpo.trainer.reference.model_hash` of the reference.
        tokenizer_hash: of the tokenizer's vocabulary, rules and special tokens.
        chat_template_hash: of its chat template; None where it has none.
        max_length, max_prompt_length: in tokens, as in the configuration.
        precision: autocast's, ``no``, ``bf16`` or ``fp16``; the weights' own dtype is part of their hash.
        fastpo_version: that wrote the file.
    """

    model_hash: str
    tokenizer_hash: str
    chat_template_hash: str | None
    max_length: int | None
    max_prompt_length: int | None
    precision: str
    fastpo_version: str = __version__

    @classmethod
    def of(
        cls,
        config: PreferenceConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model_hash: str,
        precision: str,
    ) -> Origin:
        """That of a run."""
        return cls(
            model_hash,
            tokenizer_hash(tokenizer),
            chat_template_hash(tokenizer),
            config.max_length,
            config.max_prompt_length,
            precision,
        )


@dataclass(frozen=True)
class ReferenceFile:
    """What a file holds.

    Attributes:
        path: where it lies, for messages.
        hashes: (n,) ``S64``, sorted, each once.
        logps: (2, n) float64, nats: chosen, rejected.
        origin: what they come from.
    """

    path: Path
    hashes: np.ndarray
    logps: np.ndarray
    origin: Origin


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides how a tokenizer reads text; how it last padded or cut is no part of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = [type(tokenizer).__name__, tokenizer.get_vocab()]
    else:
        rules = json.loads(backend.to_str())
        rules.pop("padding", None)
        rules.pop("truncation", None)
    return _json_hash([rules, tokenizer.bos_token_id, tokenizer.eos_token_id])


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the chat template; None where there is none."""
    return None if tokenizer.chat_template is None else _json_hash(tokenizer.chat_template)


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def row_hashes(dataset: datasets.Dataset) -> np.ndarray:
    """The key of every row, (rows,) ``S64``.

    Args:
        dataset: tokenised rows, with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.
    """
    digests: list[str] = []
    for table in dataset.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        columns = [_lists(table[name]) for name in _IDS]
        for parts in zip(*columns, strict=True):
            lengths = np.array([len(part) for part in parts], dtype="<i4")
            numbers = b"".join(part.tobytes() for part in (lengths, *parts))
            digests.append(hashlib.sha256(numbers).hexdigest())
    return np.array(digests, dtype="S64")


def _lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Each row of a column of lists, as little-endian int32."""
    ends = np.cumsum(pc.list_value_length(column).to_numpy())
    # Flattened, a part of a table is copied alone; its lists' own values would be those of the whole table.
    values = pc.list_flatten(column).to_numpy().astype("<i4", copy=False)
    return [values[a:b] for a, b in itertools.pairwise([0, *ends])]


def answer_tokens(dataset: datasets.Dataset) -> np.ndarray:
    """(2, rows) int32: tokens of the chosen and of the rejected answer of tokenised rows."""
    table = dataset.with_format("arrow")[:]
    lengths = [pc.list_value_length(table[name]) for name in _IDS[1:]]
    return np.stack([part.to_numpy().astype(np.int32) for part in lengths])


def write_reference_file(
    path: Path,
    hashes: np.ndarray,  # (n,) S64, each once
    logps: np.ndarray,  # (2, n) float64
    tokens: np.ndarray,  # (2, n) int32
    origin: Origin,
) -> None:
    """Write the file whole or not at all, its rows in the order of their keys."""
    order = np.argsort(hashes)
    hashes, logps, tokens = hashes[order], logps[:, order], tokens[:, order]
    metadata = {**asdict(origin), "sha256": _digest(hashes, logps, tokens)}
    schema = pa.schema(
        [
            ("row_hash", pa.string()),
            *((name, pa.float64()) for name in COLUMNS),
            *((name, pa.int32()) for name in COUNTS),
        ],
        metadata={_METADATA: json.dumps(metadata).encode()},
    )
    text = pa.array(hashes, type=pa.binary()).cast(pa.string())
    table = pa.table([text, *map(pa.array, logps), *map(pa.array, tokens)], schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
        pq.write_table(table, file)


def _digest(hashes: np.ndarray, logps: np.ndarray, tokens: np.ndarray) -> str:
    digest = hashlib.sha256()
    for part, dtype in ((hashes, "S64"), (logps, "<f8"), (tokens, "<i4")):
        digest.update(np.ascontiguousarray(part, dtype=dtype).tobytes())
    return digest.hexdigest()


def read_reference_file(path: str | Path) -> ReferenceFile:
    """Read and check what :func:`write_reference_file` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no Parquet file, was not written by ``fastpo ref-logps``, or is damaged.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"ref_logps: no file {str(path)!r}; `fastpo ref-logps` writes one")
    try:
        metadata = (pq.read_schema(path).metadata or {}).get(_METADATA)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"ref_logps: {path}: not a readable Parquet file: {error}") from error
    if metadata is None:
        raise ValueError(
            f"ref_logps: {path} has no entry 'fastpo' in its metadata, expected a file that "
            "`fastpo ref-logps` wrote"
        )
    try:
        said = json.loads(metadata)
        origin = Origin(**{f.name: said[f.name] for f in fields(Origin)})
        table = pq.read_table(path, columns=["row_hash", *COLUMNS, *COUNTS])
        hashes = np.array(table["row_hash"].cast(pa.binary()).to_numpy(), dtype="S64")
        logps = np.stack([table[name].to_numpy() for name in COLUMNS])
        tokens = np.stack([table[name].to_numpy() for name in COUNTS])
        intact = said["sha256"] == _digest(hashes, logps, tokens)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"ref_logps: {path} is damaged: {error}") from error
    if not intact or not np.isfinite(logps).all() or (hashes[:-1] >= hashes[1:]).any():
        raise ValueError(
            f"ref_logps: {path} is damaged: its columns are not those that were written; make it anew "
            "with `fastpo ref-logps`"
        )
    return ReferenceFile(path, hashes, logps, origin)


def with_file_logps(
    dataset: datasets.Dataset, name: str, file: ReferenceFile, origin: Origin
) -> datasets.Dataset:
    """The data set with the columns ``ref_chosen_logps`` and ``ref_rejected_logps`` of its rows' keys.

    Args:
        dataset: tokenised rows, in any order.
        name: of the data set, for messages.
        file: what was read.
        origin: that of this run, which explains rows that are missing.

    Raises:
        ValueError: the data set has such columns already, or a row that the file has not.
    """
    if set(COLUMNS) & set(dataset.column_names):
        raise ValueError(
            f"ref_logps: got {str(file.path)!r}, expected None: the data set {name!r} holds reference "
            "log-probs itself"
        )
    wanted = row_hashes(dataset)
    if len(file.hashes):
        places = np.searchsorted(file.hashes, wanted).clip(max=len(file.hashes) - 1)
        missing = np.flatnonzero(file.hashes[places] != wanted)
    else:
        places, missing = np.zeros(0, dtype=np.int64), np.arange(len(wanted))
    if len(missing):
        rows = [dataset[int(k)]["row"] for k in missing[:_ROWS_NAMED]]
        more = ", …" if len(missing) > len(rows) else ""
        raise ValueError(
            f"ref_logps: {file.path} lacks {len(missing)} of the {len(dataset)} rows of the data set "
            f"{name!r}, the first: {', '.join(map(str, rows))}{more} (from 0){_why(file.origin, origin)}"
        )
    for column, values in zip(COLUMNS, file.logps, strict=True):
        dataset = dataset.add_column(column, values[places])
    return dataset


def _why(made: Origin, here: Origin) -> str:
    """How the tokenisation of a file differs from this run's, for a message."""
    found = []
    for name, words in _TOKENISATION.items():
        before, now = getattr(made, name), getattr(here, name)
        if before != now:
            hashed = name.endswith("_hash")
            found.append(f"with {words}" if hashed else f"with {words} {before}, here it is {now}")
    return f"; the file was made {' and '.join(found)}" if found else ""
