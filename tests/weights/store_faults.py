"""Run by test_packed_store_faults.py in its own process: it forks, kills its children, looks what is left.

python store_faults.py SCENARIO SOURCE STORE
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from hasten.cache import folders
from hasten.core import Recipe
from hasten.models.artifact import find_packed, keep_packed
from hasten.models.open import open_place
from hasten.models.source import locate
from hasten.weights.packed import PackedModel, checksum_of, pack_model
from hasten.weights.packed_store import Origin, PackedStore

KILLS = 200
RECIPE = Recipe.parse("w4")


def sums(packed: PackedModel) -> list[str]:
    return [checksum_of(linear) for _, linear in sorted(packed.linears.items())]


class Scene:
    """A tiny model, packed, and a store to keep it in."""

    def __init__(self, source: Path, store: Path) -> None:
        self.place = locate(source)
        self.source = open_place(self.place)
        self.packed = pack_model(self.source, RECIPE, 1)
        self.source.tokenizer()
        self.wanted = sums(self.packed)
        self.store = PackedStore(store)

    def keep(self) -> None:
        origin = Origin.of(self.place.files)
        assert origin is not None
        assert keep_packed(self.store, origin, RECIPE, self.packed, self.source) is not None

    def found(self) -> bool:
        """Whether the store has it; what it gives must be right to the bit."""
        artifact, _ = find_packed(self.store, self.place, RECIPE)
        if artifact is None:
            return False
        assert sums(artifact.packed) == self.wanted
        assert artifact.tokenizer.encode("the") == self.source.tokenizer().encode("the")
        return True


def child(action: Callable[[], object]) -> int:
    """Run in a forked process; its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:  # noqa: BLE001  shown, then the child ends
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def kills(scene: Scene) -> None:
    """kill -9 at random moments of keeping: what is found afterwards is right, and rubbish goes."""
    folders._YOUNG_S = 0.0
    began = time.perf_counter()
    scene.keep()
    whole = time.perf_counter() - began
    chance = random.Random(11)
    died = 0
    for _ in range(KILLS):
        for entry in scene.store.entries():
            scene.store.drop(entry)
        pid = child(scene.keep)
        time.sleep(chance.uniform(0, 1.1 * whole))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        died += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        for entry in scene.store.entries():
            assert scene.store.verify(entry) is None, "a torn entry became visible"
        scene.found()
    scene.keep()
    assert scene.found()
    left = [*scene.store.models.glob(".*"), *scene.store.index.folder.glob(".*")]
    print(died, len([p for p in left if p.is_dir()]))


def together(scene: Scene) -> None:
    """Six processes keep one model at once, ten times: all succeed, one entry."""
    for _ in range(10):
        pids = [child(scene.keep) for _ in range(6)]
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 6
        (entry,) = scene.store.entries()
        assert scene.store.verify(entry) is None and scene.found()
        assert not list(scene.store.models.glob(".*"))
        scene.store.drop(entry)
    print("ok")


def dropped_while_read(scene: Scene) -> None:
    """One process drops and keeps, others read: a miss or the right bits."""
    scene.keep()

    def read() -> None:
        until = time.perf_counter() + 1.0
        while time.perf_counter() < until:
            scene.found()

    pids = [child(read) for _ in range(2)]
    until = time.perf_counter() + 1.0
    while time.perf_counter() < until:
        for entry in scene.store.entries():
            scene.store.drop(entry)
        scene.keep()
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    print("ok")


if __name__ == "__main__":
    {"kills": kills, "together": together, "dropped_while_read": dropped_while_read}[sys.argv[1]](
        Scene(Path(sys.argv[2]), Path(sys.argv[3]))
    )
