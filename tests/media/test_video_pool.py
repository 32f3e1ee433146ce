"""The processes that decode: crashes, hangs, nonsense, forks and threads; nothing is left behind."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flexjudge_fast.errors import EngineStateError, MediaError
from flexjudge_fast.media import video_pool, worker_pool, worker_wire
from flexjudge_fast.media.items import MediaItem, MediaOptions
from flexjudge_fast.media.video import DecodedVideo, VideoDecoder, decode_video
from flexjudge_fast.media.video_limits import VideoLimits
from flexjudge_fast.media.video_sampling import FrameBudget
from flexjudge_fast.media.worker_pool import DecodingProcess
from tests.media.videos import make_video

BUDGET = FrameBudget(min_pixels=16 * 28 * 28, max_pixels=64 * 28 * 28)
ROOT = str(Path(video_pool.__file__).parents[2])


def read(decoder: VideoDecoder, source: object) -> DecodedVideo:
    def no_images(item: MediaItem) -> Any:
        raise AssertionError(item)

    return decode_video(MediaItem("video", source, "a.video"), MediaOptions(), BUDGET, decoder, no_images)


def worker_of(decoder: VideoDecoder) -> DecodingProcess:
    (worker,) = decoder._all
    return worker


def is_gone(pid: int) -> bool:
    """Not even a zombie."""
    return not Path(f"/proc/{pid}").exists()


def while_decoding(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], object]) -> None:
    """Calls `act` with the worker's id once, while it has a request that it cannot answer yet."""
    take = video_pool._Reply.take
    decode = DecodingProcess.decode
    current: list[int] = []

    def stopped(self: DecodingProcess, *args: Any) -> DecodedVideo:
        os.kill(self.process.pid, signal.SIGSTOP)
        current.append(self.process.pid)
        return decode(self, *args)

    def acted(self: video_pool._Reply, peer: socket.socket, deadline: float) -> None:
        if current:
            act(current.pop())
        take(self, peer, deadline)

    monkeypatch.setattr(DecodingProcess, "decode", stopped)
    monkeypatch.setattr(video_pool._Reply, "take", acted)


@pytest.mark.parametrize("fatal", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_crash_is_an_error_and_the_next_video_works(fatal: signal.Signals) -> None:
    data = make_video()
    with VideoDecoder() as decoder:
        expected = read(decoder, data)
        pid = worker_of(decoder).process.pid
        with pytest.MonkeyPatch.context() as patch:
            while_decoding(patch, lambda pid: [os.kill(pid, s) for s in (fatal, signal.SIGCONT)])
            with pytest.raises(MediaError, match=rf"^a\.video: \d+ bytes: .*crashed \({fatal.name}\)"):
                read(decoder, data)
        assert is_gone(pid)
        assert read(decoder, data).digest == expected.digest


def test_a_worker_that_died_while_idle_is_replaced() -> None:
    data = make_video()
    with VideoDecoder() as decoder:
        expected = read(decoder, data)
        process = worker_of(decoder).process
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert read(decoder, data).digest == expected.digest
        assert is_gone(process.pid)


def test_a_hang_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "_GRACE", 0.1)
    with VideoDecoder(VideoLimits(timeout=0.2)) as decoder:
        with pytest.MonkeyPatch.context() as patch:
            while_decoding(patch, lambda pid: None)  # it stays stopped
            with pytest.raises(MediaError, match=r"takes longer than 0\.2 s"):
                read(decoder, make_video())
        assert not decoder._all


FRAME = {"frame": 56 * 56 * 3}
START = {"start": {"num_frames": 1, "size": [56, 56]}}
END = {
    "digest": "00" * 32,
    "size": [1, 1],
    "mode": "x",
    "indices": [0],
    "times": [0.0],
    "fps": 1,
    "sample_fps": 1,
}
PIXELS = bytes(56 * 56 * 3)


def take_all(reply: video_pool._Reply, peer: socket.socket, count: int) -> None:
    for _ in range(count):
        reply.take(peer, time.monotonic() + 30)


@pytest.mark.parametrize(
    "messages",
    [
        [({}, b"")],
        [({"frame": 3}, b"abc")],
        [({"end": {}}, b"")],
        [({"start": {"num_frames": 10**9, "size": [1, 1]}}, b"")],
        [({"start": {"num_frames": 4, "size": [10**6, 10**6]}}, b"")],
        [({"start": {"num_frames": -1, "size": [28, 28]}}, b"")],
        [({"start": {"num_frames": "4", "size": [28, 28]}}, b"")],
        [(START, b""), (START, b""), (START, b"")],
        [(START, b""), ({"frame": 10**12}, b"")],
        [(START, b""), ({"end": END}, b"")],
        [(START, b""), (FRAME, PIXELS), (FRAME, PIXELS)],
        [(START, b""), (FRAME, PIXELS), ({"end": END | {"digest": "00"}}, b"")],
        [(START, b""), (FRAME, PIXELS), ({"end": END | {"indices": [0, 1]}}, b"")],
        [(START, b""), (FRAME, PIXELS), ({"end": END | {"sample_fps": 0}}, b"")],
        [(START, b""), (FRAME, PIXELS), ({"end": END | {"times": 3}}, b"")],
        [(START, b""), (FRAME, PIXELS), ({"end": [END]}, b"")],
    ],
)
def test_nonsense_from_a_worker_is_not_believed(messages: list[tuple[dict[str, Any], bytes]]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for header, payload in messages:
            worker_wire.send(theirs, header, payload)
        theirs.shutdown(socket.SHUT_WR)
        reply = video_pool._Reply(BUDGET, VideoLimits())
        with pytest.raises(worker_wire.WireError):
            take_all(reply, ours, len(messages))
        assert reply.video is None


@pytest.mark.parametrize(
    "data", [b"", b"\x01", b"\xff" * 8, b"\x02\0\0\0{]", b"\x02\0\0\0[]", b"\x09\0\0\0{}"]
)
def test_broken_messages(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(worker_wire.WireError):
            worker_wire.receive(ours)


def test_threads_share_a_decoder() -> None:
    videos = [make_video(num_frames=n) for n in range(4, 16)]
    with VideoDecoder(num_workers=2) as decoder:
        expected = [read(decoder, data).digest for data in videos]
        with ThreadPoolExecutor(6) as threads:
            assert [v.digest for v in threads.map(lambda data: read(decoder, data), videos)] == expected
        assert 1 <= len(decoder._all) <= 2


def test_closing_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = VideoDecoder()
    read(decoder, make_video())
    idle = worker_of(decoder).process.pid
    decoder.close()
    decoder.close()
    assert is_gone(idle)
    with pytest.raises(EngineStateError, match="closed"):
        read(decoder, make_video())


def test_closing_ends_a_decoding() -> None:
    decoder = VideoDecoder()
    reached, failures = threading.Event(), []
    with pytest.MonkeyPatch.context() as patch:
        while_decoding(patch, lambda pid: reached.set())

        def run() -> None:
            try:
                read(decoder, make_video())
            except MediaError as error:
                failures.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        assert reached.wait(30)
        pid = worker_of(decoder).process.pid
        decoder.close()
        thread.join(30)
    assert "crashed (SIGKILL)" in failures[0]
    assert is_gone(pid)


def test_a_forgotten_decoder_leaves_nothing() -> None:
    decoder = VideoDecoder()
    read(decoder, make_video())
    pid = worker_of(decoder).process.pid
    del decoder
    assert is_gone(pid)


def test_the_worker_is_limited_and_knows_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with VideoDecoder() as decoder:
        read(decoder, make_video())
        pid = worker_of(decoder).process.pid
        limits = Path(f"/proc/{pid}/limits").read_text()
        rows = {line[:25].strip(): line[26:].split()[0] for line in limits.splitlines()}
        assert rows["Max open files"] == "4"
        assert rows["Max core file size"] == rows["Max file size"] == "0"
        assert int(rows["Max address space"]) < 512 << 20
        assert rows["Max cpu time"] != "unlimited"
        assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert os.getsid(pid) == pid  # Ctrl-C does not reach it


def script(text: str, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
    prelude = """
import os, signal, sys
from flexjudge_fast.media.video import VideoDecoder
from flexjudge_fast.media.video_sampling import FrameBudget
decoder = VideoDecoder()
data = sys.stdin.buffer.read()
digest = decoder.decode(data, FrameBudget()).digest
(worker,) = decoder._all
"""
    env = {**os.environ, "PYTHONPATH": ROOT, "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-c", prelude + text], input=make_video(), env=env, capture_output=True, timeout=60
    )


def test_a_forked_child_decodes_with_processes_of_its_own() -> None:
    done = script("""
child = os.fork()
same = decoder.decode(data, FrameBudget()).digest == digest
if not child:
    sys.exit(0 if same else 1)  # runs exit handlers, which must not touch the parent's worker
_, status = os.waitpid(child, 0)
same = same and decoder.decode(data, FrameBudget()).digest == digest and decoder._all == {worker}
print(same and status == 0)
""")
    assert (done.stdout, done.stderr) == (b"True\n", b"")


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)", "sys.exit()"])
def test_the_worker_ends_with_its_parent(end: str) -> None:
    text = f"""
print(worker.process.pid, flush=True)
{end}
"""
    done = script(text)
    assert done.stderr == b""
    pid = int(done.stdout)
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([watch], [], [], 30)[0], "the worker outlives its parent"


def test_the_worker_starts_light() -> None:
    code = """
import sys
from flexjudge_fast.media import video_decode, worker
video_decode.warm_up()
print({"torch", "numpy", "transformers"} & set(sys.modules))
"""
    env = {**os.environ, "PYTHONPATH": ROOT, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=60)
    assert done.stdout == b"set()\n"


def test_bytes_travel_without_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with VideoDecoder() as decoder:
        assert len(read(decoder, make_video()).frames) == 4


def test_a_worker_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with VideoDecoder() as decoder:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/bin/false")
            with pytest.raises(MediaError, match="does not start: it ends at once"):
                read(decoder, make_video())
            patch.setattr(sys, "executable", "/none/python")
            with pytest.raises(MediaError, match="cannot be started"):
                read(decoder, make_video())
        assert len(read(decoder, make_video()).frames) == 4


def test_a_4k_video_fits_the_memory() -> None:
    with VideoDecoder() as decoder:
        video = decoder.decode(make_video("mp4-h264", 3, (3840, 2160)), FrameBudget())
        assert video.frames.shape == (2, 560, 1008, 3)
        status = Path(f"/proc/{worker_of(decoder).process.pid}/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        assert peak < 256e6


def test_too_little_memory_is_an_error_and_the_next_video_works() -> None:
    with VideoDecoder(VideoLimits(max_memory_bytes=100 << 20)) as decoder:
        with pytest.raises(MediaError, match=r"memory|crashed|cannot be decoded"):
            decoder.decode(make_video("mp4-h264", 3, (3840, 2160)), FrameBudget())
        assert len(decoder.decode(make_video(), FrameBudget()).frames) == 4
