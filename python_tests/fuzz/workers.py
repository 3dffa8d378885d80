"""What the fuzzing machines share: a worker that is started anew, and a record that goes on."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
FIXED = 1000  # the seeds below belong to the tests


class Worker:
    """A process that is told a seed in a line, and answers in a line of JSON.

    Args:
        program: in this folder, with the arguments that make it work. It says "ready" first.
        seconds: of the processor, for one answer.
        wait: by the clock: the machine may have other work.
        cwd, env: of the process; one thread, and the project in its path.
    """

    def __init__(
        self,
        *program: str,
        seconds: float,
        wait: float,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.seconds, self.wait = seconds, wait
        whole = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
        paths = [str(HERE.parents[1]), whole.get("PYTHONPATH", "")]
        whole["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / program[0]), *program[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=cwd,
            env=whole,
            text=True,
            bufsize=1,
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{program[0]}: the worker did not start")

    def ask(self, seed: int) -> dict[str, Any]:
        """The outcome of a seed; a hang or a crash ends this worker."""
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        start, spent = time.monotonic(), self._processor_time()
        process.stdin.write(f"{seed}\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], 0.25)[0]:
            used = self._processor_time() - spent
            if used > self.seconds or time.monotonic() - start > self.wait:
                self.close()
                return {"seed": seed, "kind": "hang", "said": f"{used:.1f} s of the processor"}
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            self.close()
            return {"seed": seed, "kind": "crash", "said": f"exit code {code}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _processor_time(self) -> float:
        try:
            text = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii")
        except FileNotFoundError:
            return 0.0
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


def answers(
    seeds: Iterable[int],
    start: Callable[[], Worker],
    *,
    until: float = float("inf"),
    renew: int = 20_000,
) -> Iterator[dict[str, Any]]:
    """The outcomes of some seeds, until a time of the clock, by a worker that is started anew."""
    worker = start()
    try:
        for count, seed in enumerate(seeds, 1):
            if time.monotonic() > until:
                return
            if not worker.alive or count % renew == 0:
                worker.close()
                worker = start()
            yield worker.ask(seed)
    finally:
        worker.close()


class Record(NamedTuple):
    """The runs so far, in a file.

    Attributes:
        path: of the file.
        unit: what is counted, such as "calls".
        head: what an empty record begins with.
    """

    path: Path
    unit: str
    head: dict[str, Any]

    def read(self) -> dict[str, Any]:
        """The runs so far."""
        if self.path.exists():
            record: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            return record
        return {**self.head, "next_seed": FIXED, self.unit: 0, "outcomes": {}, "runs": []}

    def keep(self, first: int, counts: Counter[str], more: dict[str, Any]) -> None:
        """Adds a run from a seed, with what else is to be said of it."""
        record, n = self.read(), sum(counts.values())
        record["next_seed"] = max(record["next_seed"], first + n)
        record[self.unit] += n
        record["outcomes"] = dict(sorted((Counter(record["outcomes"]) + counts).items()))
        run = {"seeds": [first, first + n], "outcomes": dict(sorted(counts.items()))}
        record["runs"].append(run | more)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        new.replace(self.path)

    def tell(self, first: int, counts: Counter[str]) -> None:
        """Prints what a run gave, and all runs."""
        total = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
        print(f"{sum(counts.values())} {self.unit} from seed {first}: {total}")
        everything = self.read()
        print(f"{everything[self.unit]} {self.unit} in all runs: {everything['outcomes']}")
