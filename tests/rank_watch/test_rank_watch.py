"""Three gloo processes of which one dies, raises, or is only slow: who ends, when, and with which words."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fastpo
from fastpo import rank_watch

SOON = 20.0  # seconds to start, to fail, to wait for GRACE = 1, and to end, on a busy machine
Results = dict[str, list[tuple[int | None, float, str]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """Scenario → (status, seconds, stderr) of each rank."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(fastpo.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("forked_ranks.py")
    subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=environment,
        check=True,
        timeout=150,
    )
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    ("scenario", "failing", "status", "reason"),
    [
        ("main_dies", 0, -9, "is gone: it ended without a Python error, as by a signal"),
        ("other_dies", 1, -9, "is gone: it ended without a Python error, as by a signal"),
        ("exits", 2, 0, "is gone: it ended without a Python error, as by a signal"),
        ("raises", 2, 1, "failed: ValueError: row 7 has no answer"),
        ("raises_and_stays", 1, None, "failed: OutOfMemoryError: tried to allocate 2 GiB"),
        ("forked_child_lives_on", 1, -9, "is gone: it ended without a Python error"),
    ],
)
def test_the_others_end_with_the_reason(
    results: Results, scenario: str, failing: int, status: int | None, reason: str
) -> None:
    for rank, (ended, seconds, stderr) in enumerate(results[scenario]):
        if rank == failing:
            assert ended == status
        else:
            assert ended == 1, stderr
            assert seconds < SOON
            assert f"rank {failing} (process " in stderr
            assert reason in stderr


def test_without_a_watch_they_wait(results: Results) -> None:
    assert [ended for ended, _, _ in results["unwatched"]] == [None] * 3


def test_an_ended_process_tells_its_launcher(results: Results, folder: Path) -> None:
    assert results["raises_and_stays"][0][0] == 1
    written = json.loads((folder / "raises_and_stays-0.json").read_text())["message"]
    assert written["message"].startswith("RankFailure: rank 1 (process ")
    assert "OutOfMemoryError" in written["message"]


@pytest.mark.parametrize("scenario", ["all_raise", "slow", "leaves_first", "inside_another"])
def test_no_false_alarm(results: Results, scenario: str) -> None:
    assert [(ended, stderr) for ended, _, stderr in results[scenario]] == [(0, "")] * 3
    assert results[scenario][1][1] > 1.0  # longer than the grace


def test_an_error_that_all_meet_is_everyones_own(results: Results) -> None:
    for ended, _, stderr in results["all_raise_alike"]:
        assert ended == 1
        assert stderr.strip().endswith("RuntimeError: no such operator")
        assert "RankFailure" not in stderr


def test_a_process_without_connection_warns_and_runs(results: Results) -> None:
    for rank, (ended, _, stderr) in enumerate(results["unreachable"]):
        assert ended == 0, stderr
        assert ("the death of another process will not end that of rank 1" in stderr) == (rank == 1)
    assert "Connection refused" in results["unreachable"][1][2]


def test_strangers_are_not_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "HELLO_TIMEOUT", 0.2)
    with rank_watch._listener(4) as listener:
        address = listener.getsockname()
        assert address[0] == "127.0.0.1"  # no launcher has named another host
        words = [
            b"GET / HTTP/1.1\r\n\r\n",
            b'{"token": "wrong", "rank": 1, "name": "x"}\n',
            b"[]\n",
        ]
        words.append(
            b'{"token": "right", "rank": 2, "name": "process 7 on host"}\n{"failed": "x"}\n'
        )
        clients = [socket.create_connection(address) for _ in words]
        for client, word in zip(clients, words, strict=True):
            client.sendall(word)
        peers = rank_watch._accepted(listener, "right", 1)
    assert [(peer.rank, peer.name) for peer in peers] == [(2, "process 7 on host")]
    assert peers[0].read() == ([{"failed": "x"}], None)  # said before it was known
    for file in (*clients, peers[0].connection):
        file.close()


def test_a_lost_host_is_found_within_a_minute() -> None:
    with rank_watch._listener(1) as listener, socket.create_connection(listener.getsockname()) as c:
        rank_watch._keep_alive(c)
        assert c.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, every, count = (
            c.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
        )
    assert idle + every * count + rank_watch.GRACE < 60


def test_one_process_is_not_watched() -> None:
    with rank_watch.watch_ranks():
        assert "fastpo-rank-watch" not in {thread.name for thread in threading.enumerate()}
