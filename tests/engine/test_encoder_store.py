"""The folder of embeddings: never wrong data, never an error for the caller, never above its bound."""

import errno
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjudge_fast.engine.encoder_cache import EncoderCache
from flexjudge_fast.engine.encoder_store import EncoderStore
from flexjudge_fast.errors import InvalidArgumentError

ROOT = Path(__file__).parents[2]
SALT = b"model"
PLENTY = 1 << 20
HEADER = 56


def numbers(seed: int, num_tokens: int = 3, hidden: int = 8, dtype: torch.dtype = torch.float32):
    return torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def file_bytes(embeddings: torch.Tensor) -> int:
    return HEADER + embeddings.nbytes


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.embeddings"))


def entry_of(store: EncoderStore, key: bytes) -> Path:
    return Path(store._locate(key)[0])


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.fixture
def store(tmp_path):
    return EncoderStore(tmp_path / "cache", PLENTY, SALT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_survive_a_restart(tmp_path, dtype):
    item = numbers(0, dtype=dtype)
    item[0, :5] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40])
    with torch.inference_mode():
        EncoderStore(tmp_path, PLENTY, SALT).put(b"a", item + 0)
        back = EncoderStore(tmp_path, PLENTY, SALT).get(b"a")
    assert back.dtype == dtype and back.shape == item.shape
    assert torch.equal(back.view(torch.uint8), (item + 0).view(torch.uint8))


def test_a_layout_in_memory_does_not_matter(store):
    item = numbers(0).T.requires_grad_()
    store.put(b"a", item)
    assert torch.equal(store.get(b"a"), item)


def test_a_full_folder_survives_a_restart(tmp_path):
    bound = 3 * file_bytes(numbers(0))
    for _ in range(2):
        store = EncoderStore(tmp_path, bound, SALT)
        for seed in range(3):
            store.put(bytes([seed]), numbers(seed))
    store = EncoderStore(tmp_path, bound, SALT)
    assert all(torch.equal(store.get(bytes([seed])), numbers(seed)) for seed in range(3))


def test_another_salt_finds_nothing(tmp_path):
    EncoderStore(tmp_path, PLENTY, b"ab").put(b"c", numbers(0))
    for salt, key in [(b"a", b"bc"), (b"abc", b""), (b"", b"abc"), (b"other", b"c")]:
        assert EncoderStore(tmp_path, PLENTY, salt).get(key) is None
    assert len(entries(tmp_path)) == 1


def test_only_the_user_may_look_in(tmp_path):
    store = EncoderStore(tmp_path / "a" / "b", PLENTY, SALT)
    store.put(b"a", numbers(0))
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert entries(store.folder)[0].stat().st_mode & 0o777 == 0o600


def test_a_flipped_bit_is_a_miss(store):
    store.put(b"a", numbers(0))
    path = entry_of(store, b"a")
    good = path.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        path.write_bytes(bad)
        assert store.get(b"a") is None, position
        assert not path.exists()
    path.write_bytes(good)
    assert torch.equal(store.get(b"a"), numbers(0))


def test_another_length_is_a_miss(store):
    store.put(b"a", numbers(0))
    path = entry_of(store, b"a")
    good = path.read_bytes()
    for bad in [*(good[:n] for n in range(len(good))), good + b"\0", good + good]:
        path.write_bytes(bad)
        assert store.get(b"a") is None
        assert not path.exists()


def test_swapped_files_are_misses(tmp_path):
    store, other = EncoderStore(tmp_path, PLENTY, SALT), EncoderStore(tmp_path, PLENTY, b"other")
    for owner, source in [(store, b"b"), (other, b"a")]:  # another key's, and another salt's
        owner.put(source, numbers(1))
        path = entry_of(store, b"a")
        shutil.copy(entry_of(owner, source), path)
        assert store.get(b"a") is None and not path.exists()
        assert torch.equal(owner.get(source), numbers(1))


def test_what_is_no_plain_file_is_a_miss(store, tmp_path):
    store.put(b"a", numbers(0))
    path, outside = entry_of(store, b"a"), tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    assert store.get(b"a") is None and not path.is_symlink() and outside.exists()
    os.mkfifo(path)  # would block an ordinary open
    assert store.get(b"a") is None and not path.exists()
    path.mkdir()
    assert store.get(b"a") is None and path.is_dir()


def test_a_link_is_replaced_and_its_target_left_alone(store, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    entry_of(store, b"a").symlink_to(outside)
    store.put(b"a", numbers(0))
    assert outside.read_bytes() == b"mine" and torch.equal(store.get(b"a"), numbers(0))


def test_the_folder_forgets_the_least_recently_used(tmp_path):
    store = EncoderStore(tmp_path, 3 * file_bytes(numbers(0)), SALT)
    for seed, key in enumerate((b"a", b"b", b"c")):
        store.put(key, numbers(seed))
        age(entry_of(store, key), 100 - seed)
    assert store.get(b"a") is not None
    store.put(b"d", numbers(3))
    assert [store.get(key) is not None for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), max_size=40), bound=st.integers(0, 4000))
def test_the_folder_stays_within_its_bound(tmp_path_factory, sizes, bound):
    folder = tmp_path_factory.mktemp("cache")
    store = EncoderStore(folder, bound, SALT)
    for seed, num_tokens in enumerate(sizes):
        item = numbers(seed, num_tokens)
        store.put(seed.to_bytes(2), item)
        assert sum(path.stat().st_size for path in folder.iterdir()) <= bound
        kept = store.get(seed.to_bytes(2))
        assert (kept is not None and torch.equal(kept, item)) == (file_bytes(item) <= bound)


def test_what_exceeds_the_bound_evicts_nobody(tmp_path):
    store = EncoderStore(tmp_path, file_bytes(numbers(0)), SALT)
    store.put(b"a", numbers(0))
    store.put(b"large", numbers(1, 4))
    assert store.get(b"large") is None and torch.equal(store.get(b"a"), numbers(0))


def test_a_smaller_bound_holds_from_the_start(store):
    for seed in range(10):
        store.put(bytes([seed]), numbers(seed))
        age(entry_of(store, bytes([seed])), 100 - seed)
    smaller = EncoderStore(store.folder, 4 * file_bytes(numbers(0)), SALT)
    assert [seed for seed in range(10) if smaller.get(bytes([seed])) is not None] == [6, 7, 8, 9]


def test_other_files_are_left_alone(tmp_path):
    others = [tmp_path / name for name in ("notes.tmp", "model.embeddings", "flexjudge-notes.txt")]
    for path in others:
        path.write_bytes(bytes(10_000))
        age(path, 10**6)
    store = EncoderStore(tmp_path, file_bytes(numbers(0)), SALT)
    for seed in range(3):
        store.put(bytes([seed]), numbers(seed))
    assert all(path.exists() for path in others)
    assert torch.equal(store.get(bytes([2])), numbers(2))


def test_leftovers_of_dead_processes_go(tmp_path):
    old, fresh = (tmp_path / f"flexjudge-{name}.embeddings.tmp" for name in ("old", "fresh"))
    for path in (old, fresh):
        path.write_bytes(b"half")
    age(old, 3700)
    EncoderStore(tmp_path, PLENTY, SALT)
    assert not old.exists() and fresh.exists()


def test_no_room_beside_a_file_being_written(tmp_path):
    (tmp_path / "flexjudge-x.embeddings.tmp").write_bytes(bytes(file_bytes(numbers(0))))
    store = EncoderStore(tmp_path, file_bytes(numbers(0)), SALT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.put(b"a", numbers(0))
    assert entries(tmp_path) == []


# A failing disk


@pytest.mark.parametrize("call", ["mkstemp", "replace", "scandir"])
def test_a_failing_disk_warns_once(store, monkeypatch, call):
    store.put(b"kept", numbers(0))
    store._unlisted_bytes = 0  # so that the next put lists

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = "tempfile.mkstemp" if call == "mkstemp" else f"os.{call}"
    monkeypatch.setattr(target, fail)
    cache = EncoderCache(PLENTY, store)
    with pytest.warns(RuntimeWarning, match="encoder_cache_dir=.*No space left"):
        cache.put(b"a", numbers(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put(b"b", numbers(2))
    assert cache.get(b"a") is not None and cache.get(b"b") is not None
    assert torch.equal(store.get(b"kept"), numbers(0)) and store.get(b"a") is None
    assert len(list(store.folder.iterdir())) == 1  # no temporary file is left


def test_an_interrupted_write_leaves_nothing(store, monkeypatch):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.put(b"a", numbers(0))
    assert list(store.folder.iterdir()) == []


def test_an_unreadable_file_is_a_miss_and_stays(store, monkeypatch):
    store.put(b"a", numbers(0))

    def fail(*args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fail)
        assert store.get(b"a") is None
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", fail)  # another user's file: only its age suffers
        assert torch.equal(store.get(b"a"), numbers(0))


def test_a_folder_that_vanishes(store):
    shutil.rmtree(store.folder)
    assert store.get(b"a") is None
    with pytest.warns(RuntimeWarning, match="encoder_cache_dir"):
        store.put(b"a", numbers(0))
    assert store.get(b"a") is None


@pytest.mark.parametrize("name", ["file", "file/below", "nul\0"])
def test_a_folder_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidArgumentError, match="encoder_cache_dir"):
        EncoderStore(tmp_path / name, PLENTY, SALT)


# Processes side by side

HAMMER = """
import os, random, sys
from pathlib import Path
import torch
from flexjudge_fast.engine.encoder_store import EncoderStore

torch.set_num_threads(1)
folder = Path(sys.argv[1])
child = os.fork()  # importing torch once is enough
rng = random.Random(child == 0)
items = [torch.full((4 + n, 256), float(n)) for n in range(16)]
store = EncoderStore(folder, sum(item.nbytes for item in items) // 2, b"salt")
hits = 0
for _ in range(800):
    n = rng.randrange(16)
    found = store.get(bytes([n]))
    if found is None:
        store.put(bytes([n]), items[n])
    else:
        assert torch.equal(found, items[n]), n
        hits += 1
    if rng.random() < 0.05:  # a neighbour that damages files
        path = rng.choice([*folder.iterdir(), folder / "none"])
        try:
            with open(path, "r+b") as file:
                file.seek(rng.randrange(4096))
                file.write(b"broken")
        except FileNotFoundError:
            pass
assert store._is_writable and hits > 100, hits
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_two_processes_share_a_folder(tmp_path):
    run = [sys.executable, "-W", "error::RuntimeWarning", "-c", HAMMER, str(tmp_path)]
    done = subprocess.run(run, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    bound = sum((4 + n) * 256 * 4 for n in range(16)) // 2
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= bound + 2 * 20 * 256 * 4
    assert all(path.suffix == ".embeddings" for path in tmp_path.iterdir())
