"""Forward of the certified backward in Triton: log-probs, statistics, and the columns that gradients need.

Logits are looked at once, in the registers that hold a tile of them. From there go to memory, per row and
*panel* (half a tile's columns), the peak m = max z and the total Σ exp(z − m), which give lse and log-probs as
precisely as in ``linear_logprobs_forward_triton``; and per logit one byte, its *code*, 8 steps to the octave:

    code = min(round(S·(m − z)), 255)        S = 8/ln 2        z ≤ ẑ = m − (code − ½)/S

Codes only choose the nucleus, {v : ẑ_v ≥ t}. What that leaves out is bounded by the sum of exp(ẑ − lse) over
the entries below t in panels with m ≥ t, plus the exact mass of panels with m < t, whose codes are not read: on
language-model data that is most of them. The bound, 4 % above the truth on average, is what the forward reports
as dropped and keeps at or below tol.

    _codes_kernel    logits → codes and the table of panels                        one product of n×V×H
    _rows_kernel     table → log-probs, lse, statistics; bounds low ≤ t ≤ high from the table alone; the list of
                     the panels that reach low. In a shard of a vocabulary it runs twice: tol hangs on lse there
    _nuclei_kernel   a row per program: a few looks at those panels' codes narrow t down; the last pass writes
                     the bit mask of nucleus and label, and measures what it leaves out

Rows go through in chunks, whose codes are held, and in windows, whose masks are held and united into blocks.
Passes over memory: codes written once (a quarter of float32 logits) and read about once more altogether; masks,
V/8 bytes per row, cleared, written and read once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .chunking import spans
from .linear_logprobs_torch import ForwardResult
from .logit_transform import LogitTransform
from .logits_triton import (
    contiguous,
    local_labels,
    place,
    raw_tile,
    scale_factors,
    source_rows,
    tanh,
)
from .nucleus import Allowance, Nuclei, block_rows, words
from .nucleus_blocks_triton import gather_blocks
from .precision_triton import dot
from .tile_configs import (
    GROUP_ROWS,
    Target,
    TileConfig,
    aligned_tile_config,
    bulk_copies,
    tile_config,
)

MERGE_ROWS, MERGE_PANELS = 4, 256  # of a program of the rows kernel, per step
# Codes that a program of the nuclei kernel reads per step: 16 bytes per thread.
SEARCH_WARPS, SEARCH_COLUMNS = 8, 4096

# exp2 is one instruction, where exp takes four more to keep subnormal results.
_LOG2_E = tl.constexpr(math.log2(math.e))
_CODE_STEPS = tl.constexpr(8 / math.log(2))  # per nat
_CODE_OCTAVE = tl.constexpr(8.0)  # per factor of two
_LAST_CODE = tl.constexpr(255)
# Adding 2^23 rounds a float32 to an integer, which then is what its lowest bits hold.
_INTEGERS = tl.constexpr(2.0**23)
_MASK_BITS = tl.constexpr(16)  # masks are written as half words: 16 codes are one thread's load
_BOUND_STEPS = tl.constexpr(8)  # bisections of [log(tol/V), 0]: to less than 0.1 nats
_PROBES = tl.constexpr(8)  # most looks at the codes; on language-model data three are used
_CLOSE = tl.constexpr(0.9)  # a dropped mass of this share of tol is near enough
_AIM = tl.constexpr(0.95)
_NARROW = tl.constexpr(0.05)  # nats: half a code step
# What rounding may add to the mass of a panel: its total has the peak's 1.0 in it, which is subtracted again.
_SLACK = tl.constexpr(1.0 + 1e-6)


@triton.jit
def _panel_logits(
    z,
    bias,
    first,
    V,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PANEL: tl.constexpr,
):
    """Logits of raw products (ROWS, PANEL), columns from ``first`` on."""
    cols = first + tl.arange(0, PANEL)
    if HAS_BIAS:
        z += tl.load(bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        z = tanh(z * inner)
    return z * outer


@triton.jit
def write_panel(
    z, first, rows, kept, label, codes, table, plane, at, label_logits, rivals, V,
    STATS: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """From logits (ROWS, PANEL), columns from ``first`` on, to codes and entries ``at`` of the table."""
    cols = first + tl.arange(0, PANEL)
    inside = cols < V
    if STATS:
        total = tl.sum(tl.where(inside[None, :], z, 0.0), axis=1)
        tl.store(table + 3 * plane + at, total, mask=kept)
    z = tl.where(inside[None, :], z, float("-inf"))
    here = (label >= first) & (label < first + PANEL)
    if tl.max(here.to(tl.int32), axis=0) != 0:
        # The label's logit is taken from the very numbers that enter the sum, so log p ≤ 0.
        found = tl.where(cols[None, :] == label[:, None], z, 0.0)
        tl.store(label_logits + rows, tl.sum(found, axis=1), mask=here)
        if STATS:
            lower = tl.where(cols[None, :] < label[:, None], z, float("-inf"))
            tl.store(rivals + rows, tl.max(lower, axis=1), mask=here)
    peak = tl.max(z, axis=1)
    tl.store(table + at, peak, mask=kept)
    # Where all logits are −inf (a bias may forbid tokens), any finite reference gives exp = 0.
    z -= tl.where(peak == float("-inf"), 0.0, peak)[:, None]
    weights = tl.exp2(z * _LOG2_E)
    tl.store(table + plane + at, tl.sum(weights, axis=1), mask=kept)
    if STATS:
        moment = tl.sum(weights * tl.where(weights == 0.0, 0.0, z), axis=1)  # no 0·(−inf)
        tl.store(table + 2 * plane + at, moment, mask=kept)
    code = tl.minimum(tl.fma(z, -_CODE_STEPS, _INTEGERS), _INTEGERS + _LAST_CODE)
    tl.store(
        codes + at[:, None] * PANEL + tl.arange(0, PANEL)[None, :],
        code.to(tl.int32, bitcast=True).to(tl.uint8),
        mask=kept[:, None],
    )


@triton.jit
def _write_tile(
    z, row_block, col_block, bias, labels, codes, table, label_logits, rivals, n, V, tiles, inner, outer,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Panel by panel, as all of a tile and what is made of it would not fit into the registers."""
    PANEL: tl.constexpr = COLS // 2
    first = col_block * COLS
    rows = row_block * ROWS + tl.arange(0, ROWS)
    kept = rows < n
    label = local_labels(labels, rows, n, 0, V)
    panels = 2 * tiles
    plane = n.to(tl.int64) * panels
    at = rows.to(tl.int64) * panels + 2 * col_block
    left, right = z.reshape(ROWS, 2, PANEL).permute(0, 2, 1).split()
    left = _panel_logits(left, bias, first, V, inner, outer, HAS_BIAS, SOFTCAP, PANEL)
    write_panel(
        left,
        first,
        rows,
        kept,
        label,
        codes,
        table,
        plane,
        at,
        label_logits,
        rivals,
        V,
        STATS,
        PANEL,
    )
    first += PANEL
    right = _panel_logits(right, bias, first, V, inner, outer, HAS_BIAS, SOFTCAP, PANEL)
    write_panel(
        right,
        first,
        rows,
        kept,
        label,
        codes,
        table,
        plane,
        at + 1,
        label_logits,
        rivals,
        V,
        STATS,
        PANEL,
    )


@triton.jit(do_not_specialize=["n", "V", "row_blocks", "tiles", "programs"])
def _codes_kernel(
    hidden, weight, bias, labels, codes, table, label_logits, rivals,
    n, V, H, hidden_row, hidden_col, weight_row, weight_col, inner, outer, row_blocks, tiles, programs,
    BULK: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """With BULK, hidden and weight are tensor descriptors, for bulk copies that read zeros past the edges.

    Each program then goes through many tiles, and fetches the next tile's operands while it writes one.
    """
    if BULK:
        tl.assume(H > 0)  # else the body is compiled a second time for H = 0
        for tile in tl.range(tl.program_id(0), row_blocks * tiles, programs, flatten=True):
            row_block, col_block = place(tile, row_blocks, tiles, GROUP)
            z = tl.zeros([ROWS, COLS], tl.float32)
            for start in range(0, H, DEPTH):
                h = hidden.load([row_block * ROWS, start])
                w = weight.load([col_block * COLS, start])
                z = dot(h, w.T, z)
            _write_tile(
                z, row_block, col_block, bias, labels, codes, table, label_logits, rivals,
                n, V, tiles, inner, outer, HAS_BIAS, SOFTCAP, STATS, ROWS, COLS,
            )  # fmt: skip
    else:
        row_block, col_block = place(tl.program_id(0), row_blocks, tiles, GROUP)
        rows = source_rows(None, row_block * ROWS + tl.arange(0, ROWS), n, False)
        z = raw_tile(
            hidden, weight, None, rows, col_block * COLS + tl.arange(0, COLS), V, H,
            hidden_row, hidden_col, weight_row, weight_col, False, ROWS, COLS, DEPTH,
        )  # fmt: skip
        _write_tile(
            z, row_block, col_block, bias, labels, codes, table, label_logits, rivals,
            n, V, tiles, inner, outer, HAS_BIAS, SOFTCAP, STATS, ROWS, COLS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n", "V", "panels"])
def _rows_kernel(
    table, labels, label_logits, rivals, logps, lse, entropy, top1, logit_mean, peaks,
    lists, shares, counts, bounds, n, V, panels, tol, tols,
    STATS: tl.constexpr, PER_ROW: tl.constexpr, PANEL: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    kept = rows < n
    label = local_labels(labels, rows, n, 0, V)
    label_panel = tl.where(label >= 0, label // PANEL, -1)
    plane = n.to(tl.int64) * panels
    start = table + rows.to(tl.int64) * panels
    items = tl.arange(0, STEP)[None, :]

    # Sums and maxima run element by element and are joined after each sweep.
    peak = tl.full([ROWS, STEP], float("-inf"), tl.float32)
    rival = tl.full([ROWS, STEP], float("-inf"), tl.float32)
    for first in range(0, panels, STEP):
        item = first + items
        m = tl.load(start + item, mask=kept & (item < panels), other=float("-inf"))
        peak = tl.maximum(peak, m)
        if STATS:
            rival = tl.maximum(rival, tl.where(item < label_panel, m, float("-inf")))
    peak = tl.max(peak, axis=1)[:, None]
    rival = tl.max(rival, axis=1)[:, None]
    reference = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([ROWS, STEP], tl.float32)
    moment = tl.zeros([ROWS, STEP], tl.float32)
    logit_sum = tl.zeros([ROWS, STEP], tl.float32)
    for first in range(0, panels, STEP):
        item = first + items
        inside = kept & (item < panels)
        drop = tl.load(start + item, mask=inside, other=float("-inf")) - reference
        panel_total = tl.load(start + plane + item, mask=inside, other=0.0)
        scale = tl.exp(drop)
        total += scale * panel_total
        if STATS:
            panel_moment = tl.load(start + 2 * plane + item, mask=inside, other=0.0)
            moment += scale * (panel_moment + panel_total * tl.where(scale == 0.0, 0.0, drop))
            logit_sum += tl.load(start + 3 * plane + item, mask=inside, other=0.0)
    total = tl.sum(total, axis=1)[:, None]
    log_total = tl.log(total)
    label_logit = tl.load(label_logits + rows, mask=kept & (label >= 0), other=float("nan"))
    logp = (label_logit - peak) - log_total
    # label_logit ≤ peak and total ≥ 1; only the hardware's approximate log could leave a rounding above 0.
    tl.store(logps + rows, tl.where(logp > 0.0, 0.0, logp), mask=kept)
    tl.store(lse + rows, peak + log_total, mask=kept)
    if STATS:
        rival = tl.maximum(rival, tl.load(rivals + rows, mask=kept & (label >= 0), other=0.0))
        spread = log_total - tl.sum(moment, axis=1)[:, None] / total
        tl.store(entropy + rows, tl.where(spread < 0.0, 0.0, spread), mask=kept)
        tl.store(top1 + rows, (label_logit == peak) & (rival < peak), mask=kept)
        tl.store(logit_mean + rows, tl.sum(logit_sum, axis=1)[:, None] / V, mask=kept)
        tl.store(peaks + rows, peak, mask=kept)

    # From here on thresholds and peaks are relative to lse. At ``low`` the dropped mass is at most tol whatever
    # lies within the panels: of one whose peak stays, at most PANEL − 1 entries, each below the threshold.
    # Below ``high`` the panels whose peak goes do not weigh more than tol.
    top = -log_total
    allowed = tol
    if PER_ROW:
        allowed = tl.load(tols + rows, mask=kept, other=0.5)
    low = tl.minimum(
        tl.zeros_like(top) + (tl.log(allowed) - tl.log(panels * PANEL * 1.0) - 0.01), top
    )
    low_end, high, high_end = top, low, top
    for _ in range(_BOUND_STEPS):
        low_try, high_try = 0.5 * (low + low_end), 0.5 * (high + high_end)
        most = tl.zeros([ROWS, STEP], tl.float32)
        least = tl.zeros([ROWS, STEP], tl.float32)
        for first in range(0, panels, STEP):
            item = first + items
            inside = kept & (item < panels)
            x = tl.load(start + item, mask=inside, other=float("-inf")) - reference - log_total
            share = tl.exp(x)
            mass = share * tl.load(start + plane + item, mask=inside, other=0.0)
            below = tl.minimum(mass * _SLACK - share, (PANEL - 1) * tl.exp(low_try))
            most += tl.where(x < low_try, mass, below)
            least += tl.where(x < high_try, mass, 0.0)
        # The sums of the nuclei kernel are rounded in another order.
        fits = tl.sum(most, axis=1)[:, None] <= allowed * (1.0 - 1e-5)
        low, low_end = tl.where(fits, low_try, low), tl.where(fits, low_end, low_try)
        fits = tl.sum(least, axis=1)[:, None] <= allowed
        high, high_end = tl.where(fits, high_try, high), tl.where(fits, high_end, high_try)
    if PER_ROW:
        low = tl.where(allowed >= 1.0, float("inf"), low)  # nothing has to stay

    count = tl.zeros([ROWS, 1], tl.int32)
    rest = tl.zeros([ROWS, STEP], tl.float32)
    for first in range(0, panels, STEP):
        item = first + items
        inside = kept & (item < panels)
        x = tl.load(start + item, mask=inside, other=float("-inf")) - reference - log_total
        mass = tl.exp(x) * tl.load(start + plane + item, mask=inside, other=0.0)
        listed = (inside & ((x >= low) | (item == label_panel))).to(tl.int32)
        position = rows.to(tl.int64) * panels + (count + tl.cumsum(listed, axis=1) - listed)
        tl.store(lists + position, tl.zeros_like(listed) + item, mask=listed != 0)
        tl.store(shares + position, x, mask=listed != 0)
        tl.store(shares + plane + position, mass, mask=listed != 0)
        count += tl.sum(listed, axis=1)[:, None]
        rest += tl.where(listed != 0, 0.0, mass)
    tl.store(counts + rows, count, mask=kept)
    tl.store(bounds + rows, low, mask=kept)
    tl.store(bounds + n + rows, high_end, mask=kept)
    tl.store(bounds + 2 * n + rows, tl.sum(rest, axis=1)[:, None], mask=kept)


@triton.jit
def _listed_panels(
    codes, lists, peaks, masses, first, count, threshold, PANEL: tl.constexpr, STEP: tl.constexpr
):
    """STEP panels of a row's list: numbers, which of them exist, peaks, masses, codes (if not all below)."""
    item = first + tl.arange(0, STEP)
    there = item < count
    panel = tl.load(lists + item, mask=there, other=0)
    x = tl.load(peaks + item, mask=there, other=float("-inf"))
    mass = tl.load(masses + item, mask=there, other=0.0)
    code = tl.load(
        codes + panel[:, None] * PANEL + tl.arange(0, PANEL)[None, :],
        mask=(x >= threshold)[:, None],
        other=_LAST_CODE,
    ).to(tl.float32)
    return panel, there, x, mass, code


@triton.jit
def _dropped(x, mass, code, out, threshold):
    """At most so much of each panel's mass lies in the entries that are ``out``."""
    bound = tl.sum(tl.where(out, tl.exp2(code * (-1.0 / _CODE_OCTAVE)), 0.0), axis=1)
    share = tl.exp(x)
    below = tl.minimum(bound * 2.0 ** (0.5 / _CODE_OCTAVE) * share, mass * _SLACK - share)
    return tl.where(x >= threshold, below, mass)


@triton.jit(
    do_not_specialize=["n", "V", "panels", "words"], do_not_specialize_on_alignment=["masks"]
)
def _nuclei_kernel(
    codes, labels, lists, shares, counts, bounds, masks, sizes, dropped,
    n, V, panels, words, tol, tols, PER_ROW: tl.constexpr, PANEL: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    codes += row * panels * PANEL
    lists += row * panels
    peaks = shares + row * panels
    masses = peaks + n.to(tl.int64) * panels
    count = tl.load(counts + row)
    low, high = tl.load(bounds + row), tl.load(bounds + n + row)
    rest = tl.load(bounds + 2 * n + row)

    # The logarithm of the dropped mass over tol, at ``low`` and at ``high``: first a guess, then as measured.
    low_log, high_log = -2.0, 1.0
    probes = tl.where(count > 0, _PROBES, 0)
    allowed = tol
    if PER_ROW:
        allowed = tl.load(tols + row)
        probes = tl.where(low == float("inf"), 0, probes)
    while probes > 0:
        share = (tl.log(_AIM) - low_log) / (high_log - low_log)
        threshold = low + tl.minimum(tl.maximum(share, 0.2), 0.8) * (high - low)
        parts = tl.zeros([STEP], tl.float32)
        for first in range(0, count, STEP):
            panel, there, x, mass, code = _listed_panels(
                codes, lists, peaks, masses, first, count, threshold, PANEL, STEP
            )
            out = code > ((x - threshold) * _CODE_STEPS + 0.5)[:, None]
            parts += tl.where(there, _dropped(x, mass, code, out, threshold), 0.0)
        mass = rest + tl.sum(parts, axis=0)
        log_mass = tl.log(tl.maximum(mass / allowed, 1e-6))
        fits = mass <= allowed
        low, low_log = tl.where(fits, threshold, low), tl.where(fits, log_mass, low_log)
        high, high_log = tl.where(fits, high, threshold), tl.where(fits, high_log, log_mass)
        found = (fits & (mass >= allowed * _CLOSE)) | (high - low < _NARROW)
        probes = tl.where(found, 0, probes - 1)

    label = local_labels(labels, row, n, 0, V)
    parts = tl.zeros([STEP], tl.float32)
    size = tl.zeros([STEP], tl.int32)
    col = tl.arange(0, PANEL)[None, :]
    bit = (1 << tl.arange(0, _MASK_BITS))[None, None, :]
    half = tl.arange(0, PANEL // _MASK_BITS)[None, :]
    for first in range(0, count, STEP):
        panel, there, x, mass, code = _listed_panels(
            codes, lists, peaks, masses, first, count, low, PANEL, STEP
        )
        cols = panel[:, None] * PANEL + col
        inside = (code <= ((x - low) * _CODE_STEPS + 0.5)[:, None]) & (x >= low)[:, None]
        inside = (inside | (cols == label)) & (cols < V) & there[:, None]
        parts += tl.where(there, _dropped(x, mass, code, inside == 0, low), 0.0)
        size += tl.sum(inside.to(tl.int32), axis=1)
        bits = inside.to(tl.int32).reshape(STEP, PANEL // _MASK_BITS, _MASK_BITS)
        at = panel[:, None] * (PANEL // _MASK_BITS) + half
        tl.store(
            masks + row * words * 2 + at,
            tl.sum(bits * bit, axis=2).to(tl.int16),
            mask=there[:, None] & (at < words * 2),
        )
    tl.store(dropped + row, rest + tl.sum(parts, axis=0))
    tl.store(sizes + row, tl.sum(size, axis=0))


class Plan(NamedTuple):
    """How many rows go through together."""

    window: int  # whose masks are held: whole blocks, or all rows
    chunk: int  # whose codes are held: whole tiles, or a window


def plan_rows(
    n: int, vocab: int, width: int, dtype: torch.dtype, height: int, config: TileConfig, budget: int
) -> Plan:
    """A quarter of ``budget`` bytes for the masks of a window, enough rows to sort well, the rest for a chunk.

    A block and a tile of rows are the least, so a tiny budget can be exceeded by that much.
    """
    panels = 2 * triton.cdiv(vocab, config.cols)
    per_mask = 4 * words(vocab)
    n = max(n, 1)
    blocks = min(max(1, budget // (4 * per_mask * height)), triton.cdiv(n, height))
    window = blocks * height
    # Codes; the table, at most four planes, and the list, three; the gathered rows of hidden.
    per_row = panels * (config.cols // 2) + 7 * 4 * panels + width * dtype.itemsize
    most = max(1, (budget - window * per_mask) // (per_row * config.rows)) * config.rows
    window = min(window, n)
    parts = triton.cdiv(window, most)
    chunk = triton.cdiv(triton.cdiv(window, parts), config.rows) * config.rows
    return Plan(window, min(chunk, window))


def launch_forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64
    rows: Tensor | None,  # (n,) int64
    transform: LogitTransform,
    want_stats: bool,
    tol: float,  # > 0
    target: Target,
    budget: int,  # bytes of workspace
    allowance: Allowance | None = None,
) -> tuple[ForwardResult, Nuclei]:
    """Run the kernels chunk by chunk; a label outside [0, V) makes its row's log-prob NaN.

    ``allowance``, where ``weight`` is a shard of a vocabulary, takes the place of ``tol``.

    A row with a NaN or +inf logit has NaN for its dropped mass, and no nucleus but its label.
    """
    n, (vocab, width) = labels.numel(), weight.shape
    bias, rows = contiguous(bias), contiguous(rows)
    # Gathered rows lie next to each other, wherever they come from.
    like = hidden if rows is None else hidden.new_empty(1, width)
    config = tile_config("certified", target, like, weight)
    bulk = bulk_copies(target, like, weight)
    height = block_rows(hidden.device)
    if allowance is None:
        plan = plan_rows(n, vocab, width, hidden.dtype, height, config, budget)
    else:  # the same in all shards, however each of them lies in memory
        common = aligned_tile_config("certified", target, hidden.dtype)
        plan = plan_rows(n, allowance.widest, width, hidden.dtype, height, common, budget)
    tiles = triton.cdiv(vocab, config.cols)
    gathered = None if rows is None else hidden.new_empty(plan.chunk, width)
    columns = TensorDescriptor.from_tensor(weight, [config.cols, config.depth]) if bulk else weight
    inner, outer = scale_factors(transform)

    def write_codes(r: slice, labels: Tensor, out: Codes) -> None:
        count = len(labels)
        if gathered is None or rows is None:
            states = hidden[r]
        else:
            states = torch.index_select(hidden, 0, rows[r], out=gathered[:count])
        row_blocks = triton.cdiv(count, config.rows)
        programs = min(row_blocks * tiles, target.processors) if bulk else row_blocks * tiles
        _codes_kernel[(programs,)](
            TensorDescriptor.from_tensor(states, [config.rows, config.depth]) if bulk else states,
            columns, bias, labels, *out,
            count, vocab, width, *states.stride(), *weight.stride(), inner, outer,
            row_blocks, tiles, programs,
            BULK=bulk, HAS_BIAS=bias is not None, SOFTCAP=transform.softcap is not None, STATS=want_stats,
            ROWS=config.rows, COLS=config.cols, DEPTH=config.depth, GROUP=GROUP_ROWS,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    planes = 4 if want_stats else 2
    return choose_columns(
        labels, vocab, want_stats, tol, plan, config, planes, write_codes, allowance
    )


class Codes(NamedTuple):
    """What is written of the logits of a chunk of rows."""

    codes: Tensor  # (rows, panels·PANEL) uint8
    table: Tensor  # (planes, rows, panels) float32: peak, total, and with statistics moment and sum
    label_logits: Tensor  # (rows,) float32
    rivals: Tensor  # (rows,) float32


def choose_columns(
    labels: Tensor,  # (n,) int64
    vocab: int,
    want_stats: bool,
    tol: float,
    plan: Plan,
    config: TileConfig,
    planes: int,
    write_codes: Callable[[slice, Tensor, Codes], None],
    allowance: Allowance | None = None,
) -> tuple[ForwardResult, Nuclei]:
    """Results and nuclei of n rows: ``write_codes`` fills the codes of some of them, with these labels."""
    n, device, height = labels.numel(), labels.device, block_rows(labels.device)
    labels, mask_words = labels.contiguous(), words(vocab)
    blocks = triton.cdiv(n, height)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    result = ForwardResult(
        logps=new(n),
        lse=new(n),
        entropy=new(n) if want_stats else None,
        top1=new(n, dtype=torch.bool) if want_stats else None,
        logit_mean=new(n) if want_stats else None,
        peak=new(n) if want_stats else None,
    )
    nuclei = Nuclei(
        order=new(n, dtype=torch.int64),
        columns=new(blocks, mask_words, dtype=torch.int32),
        counts=new(blocks, dtype=torch.int32),
        dropped=new(n),
    )
    panels, panel = 2 * triton.cdiv(vocab, config.cols), config.cols // 2
    codes = new(plan.chunk, panels * panel, dtype=torch.uint8)
    table = new(planes, plan.chunk, panels)
    lists, shares = new(plan.chunk, panels, dtype=torch.int32), new(2, plan.chunk, panels)
    masks = new(plan.window, mask_words, dtype=torch.int32)
    halves = masks.view(torch.int16)
    sizes, counts = new(plan.window, dtype=torch.int32), new(plan.chunk, dtype=torch.int32)
    label_logits, rivals, bounds = new(plan.chunk), new(plan.chunk), new(3, plan.chunk)
    of_chunk = Codes(codes, table, label_logits, rivals)
    for window in spans(n, plan.window):
        masks.zero_()
        for chunk in spans(window.stop - window.start, plan.chunk):
            r = slice(window.start + chunk.start, window.start + chunk.stop)
            count = r.stop - r.start
            write_codes(r, labels[r], of_chunk)
            of_rows = [None if values is None else values[r] for values in result]
            tols = None
            for asked in (False, True) if allowance is not None else (False,):
                if (
                    asked and allowance is not None
                ):  # lse is known: once more, with what hangs on it
                    tols = allowance.of_rows(r, result.lse[r]).contiguous()
                _rows_kernel[(triton.cdiv(count, MERGE_ROWS),)](
                    table, labels[r], label_logits, rivals, *of_rows, lists, shares, counts, bounds,
                    count, vocab, panels, tol, tols, STATS=want_stats, PER_ROW=tols is not None,
                    PANEL=panel, ROWS=MERGE_ROWS, STEP=MERGE_PANELS, num_warps=4,
                )  # fmt: skip
            _nuclei_kernel[(count,)](
                codes, labels[r], lists, shares, counts, bounds, halves[chunk.start :], sizes[chunk.start :],
                nuclei.dropped[r], count, vocab, panels, mask_words, tol, tols, PER_ROW=tols is not None,
                PANEL=panel, STEP=SEARCH_COLUMNS // panel, num_warps=SEARCH_WARPS,
            )  # fmt: skip
        length = window.stop - window.start
        b = slice(window.start // height, triton.cdiv(window.stop, height))
        order, nuclei.columns[b], nuclei.counts[b] = gather_blocks(
            masks[:length], sizes[:length], height, vocab
        )
        torch.add(order, window.start, out=nuclei.order[window])
    return result, nuclei
