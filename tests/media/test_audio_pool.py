"""The processes that decode sound: crashes, nonsense and what they load; nothing is left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from flexjudge_fast.errors import EngineStateError, MediaError
from flexjudge_fast.media import audio_decode, audio_pool, worker_wire
from flexjudge_fast.media.audio_limits import AudioLimits
from flexjudge_fast.media.audio_pool import AudioDecoder
from tests.media.sounds import load, make_sound, tones


def take_all(reply: audio_pool._Reply, peer: socket.socket, count: int) -> None:
    for _ in range(count):
        reply.take(peer, time.monotonic() + 30)


@pytest.mark.parametrize(
    "messages",
    [
        [{"block": 4}],
        [{"end": True}],
        [{"start": {"rate": 16_000, "channels": 1, "mode": "x" * 65}}],
        [{"start": {"rate": 16_000, "channels": 1}}],
        [{"start": {"rate": 16_000, "channels": 2, "mode": "x"}}] * 2,
        [{"start": {"rate": 16_000, "channels": 2, "mode": "x"}}, {"block": 12}],
        [{"start": {"rate": 16_000, "channels": 2, "mode": "x"}}, {"block": 1 << 30}],
        [{"start": {"rate": 16_000, "channels": 2, "mode": "x"}}, {"block": 0}],
        [{"start": {"rate": 16_000, "channels": 2, "mode": "x"}}, {"block": 8}],  # and nothing follows
        [{"start": {"rate": 10**40, "channels": 1, "mode": "x"}}],
        [{"start": {"rate": 16_000, "channels": 10**9, "mode": "x"}}],
        [{"start": {"rate": 16_000, "channels": 1, "mode": "x"}}, {"end": True}],
        [{}],
    ],
)
def test_nonsense_from_a_worker_is_not_believed(messages: list[dict[str, Any]]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for header in messages:
            worker_wire.send(theirs, header)
        theirs.shutdown(socket.SHUT_WR)
        reply = audio_pool._Reply(16_000, AudioLimits())
        with pytest.raises((worker_wire.WireError, MediaError)):
            take_all(reply, ours, len(messages))
        assert not reply.done


def test_a_crash_is_an_error_and_the_next_sound_works(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_sound("ogg", tones(8000, 16_000), 16_000)
    with AudioDecoder() as decoder:
        expected = load(decoder, data).digest
        (worker,) = decoder._all
        take = audio_pool._Reply.take

        def killed(self: Any, peer: socket.socket, deadline: float) -> None:
            for number in (signal.SIGSEGV, signal.SIGCONT):
                os.kill(worker.process.pid, number)
            take(self, peer, deadline)

        os.kill(worker.process.pid, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(audio_pool._Reply, "take", killed)
            with pytest.raises(MediaError, match=r"^sounds\[0\]: \d+ bytes: .*crashed \(SIGSEGV\)"):
                load(decoder, data)
        assert load(decoder, data).digest == expected
    with pytest.raises(EngineStateError, match="closed"):
        load(decoder, data)


def copied(file: Any) -> list[Any]:
    """All that a file is decoded to; blocks are good until the next only."""
    parts = audio_decode.decode(file, AudioLimits())
    return [part.copy() if isinstance(part, np.ndarray) else part for part in parts]


def test_the_library_that_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """FFmpeg reads what libsndfile cannot; where both can, they give the same."""
    samples = tones(5000, 16_000, 2)
    path = tmp_path / "a.wav"
    path.write_bytes(make_sound("wav", samples, 16_000))

    def refused(*_: Any) -> Iterator[Any]:
        raise soundfile.LibsndfileError(1)

    with path.open("rb", buffering=0) as file:
        start, *blocks = copied(file)
        monkeypatch.setattr(audio_decode, "_with_soundfile", refused)
        other, *others = copied(file)
    assert (start.mode, other.mode) == ("WAV PCM_16", "pcm_s16le")
    assert np.array_equal(np.concatenate(blocks), np.concatenate(others))


def test_videos_do_not_load_soundfile() -> None:
    code = "import sys, flexjudge_fast.media.video_decode; print('soundfile' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"False\n"
