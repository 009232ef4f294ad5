"""Fuzzes each parser that reads what a stranger sends, with coverage as the guide (atheris, Python 3.11 to 3.13).

``python tests/fuzz_parsers.py [--minutes M] [TARGET ...]`` gives each target, by default all, so many minutes.
Inputs that reach new code are kept in build/fuzz/TARGET/corpus, and a later run goes on from them. A finding does not
end the run: the smallest input of each kind lies in build/fuzz/TARGET/findings, with a traceback beside it. At the end,
a table says how many inputs were tried, and which lines of each parser's files they reach.
``--replay FILE`` gives a target one input; ``--report`` prints the table alone; ``--smoke`` tries each target's seeds
and a few inputs made of them, the same each time, and needs no atheris.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BUILD = ROOT / "build" / "fuzz"
LONGEST_INPUT = 1 << 16
_SMOKE = 60
_INSTRUMENTED = ["tiny_model_server", "h11", "email", "zipfile", "json"]


def signature(error: BaseException) -> str:
    """What findings of one kind have in common: the class, and where in the project it was raised."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "tiny_model_server" in frame.filename] or frames[-1:]
    text = re.sub(r"[\W\d]+", "_", str(error))[:40] if type(error).__name__ == "Finding" else ""
    places = "-".join(f"{Path(frame.filename).stem}_{frame.lineno}" for frame in ours[-1:])
    return f"{type(error).__name__}-{places}-{text}"


class Findings:
    """Keeps the smallest input of each kind of finding."""

    def __init__(self, target: str) -> None:
        self._folder = BUILD / target / "findings"
        self._folder.mkdir(parents=True, exist_ok=True)

    def add(self, data: bytes, error: BaseException) -> None:
        path = self._folder / signature(error)
        if not path.exists() or path.stat().st_size > len(data):
            path.write_bytes(data)
            path.with_name(f"{path.name}.txt").write_text("".join(traceback.format_exception(error)))

    def take_crashes(self) -> None:
        """Takes the inputs that ended a run: libFuzzer leaves those that crash, or take too long or too much memory."""
        for path in self._folder.parent.glob("*-" + "[0-9a-f]" * 40):
            path.rename(self._folder / path.name)

    def names(self) -> list[str]:
        return sorted(path.name for path in self._folder.iterdir() if path.suffix != ".txt")


def fuzz(name: str, seconds: int) -> None:
    """Fuzzes one target in this process, which ends after so many seconds."""
    import atheris

    with atheris.instrument_imports(include=_INSTRUMENTED):
        from tests.fuzzing import all_targets, oracle
    target, findings = all_targets()[name], Findings(name)
    oracle.listen()
    corpus = BUILD / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds:
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)

    def once(data: bytes) -> None:
        try:
            oracle.check(target, data)
        except Exception as error:
            findings.add(data, error)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        def leaf(part: bytes) -> bytes:
            return bytes(atheris.Mutate(part, min(longest, max(len(part) * 2, 64)))) if part else b"0"

        assert target.mutate
        return target.mutate(data, Random(seed), leaf)[:longest]

    words = BUILD / name / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in _words()))
    options = [f"-max_total_time={seconds}", f"-max_len={LONGEST_INPUT}", "-timeout=1000000", "-rss_limit_mb=4000"]
    options += ["-print_final_stats=1", f"-dict={words}", f"-artifact_prefix={BUILD / name}/", "-len_control=0"]
    more: dict[str, Any] = {"custom_mutator": mutate} if target.mutate else {}
    atheris.Setup([sys.argv[0], *options, str(corpus)], once, **more)
    atheris.Fuzz()


def _words() -> list[bytes]:
    from tests.fuzzing.mutators import WORDS

    return [word.encode(errors="surrogatepass") for word in WORDS if 0 < len(word) < 60]


def _escaped(word: bytes) -> str:
    return "".join(chr(one) if 32 <= one < 127 and one not in b'"\\' else f"\\x{one:02x}" for one in word)


def start(name: str, seconds: int) -> subprocess.Popen[bytes]:
    """A process that fuzzes one target; what it prints goes to build/fuzz/TARGET/log."""
    (BUILD / name).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--one", name, str(seconds)]
    with (BUILD / name / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)


def note(name: str, seconds: float) -> None:
    """Adds a run to what is known of a target."""
    found = re.search(r"stat::number_of_executed_units:\s*(\d+)", (BUILD / name / "log").read_text(errors="replace"))
    Findings(name).take_crashes()
    path = BUILD / name / "runs.json"
    runs = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*runs, {"inputs": int(found[1]) if found else 0, "seconds": round(seconds)}]))


def report(names: list[str]) -> int:
    """Prints what the runs came to; returns how many kinds of findings there are."""
    kinds = 0
    for name in names:
        path = BUILD / name / "runs.json"
        runs = json.loads(path.read_text()) if path.exists() else []
        inputs, minutes = sum(one["inputs"] for one in runs), sum(one["seconds"] for one in runs) / 60
        found = Findings(name).names()
        kinds += len(found)
        print(f"{name}: {inputs} inputs in {minutes:.1f} min, {len(found)} kinds of findings {' '.join(found)}")
        print(subprocess.run([sys.executable, __file__, "--coverage", name], capture_output=True, text=True).stdout)
    return kinds


def coverage_of(name: str) -> None:
    """Prints the lines of a target's files that its corpus reaches."""
    import coverage

    measured = coverage.Coverage(data_file=None, source=[str(ROOT / "tiny_model_server")])
    measured.start()
    from tests.fuzzing import all_targets, oracle

    target = all_targets()[name]
    oracle.listen()
    kept = [path.read_bytes() for path in (BUILD / name / "corpus").glob("*")] + target.seeds
    for data in kept:
        try:
            oracle.check(target, data)
        except Exception as error:
            Findings(name).add(data, error)
    measured.stop()
    for module in target.modules:
        _, lines, _, missing, text = measured.analysis2(str(ROOT / "tiny_model_server" / module))
        print(f"  {module}: {len(lines) - len(missing)} of {len(lines)} lines; missing {text or 'none'}")
    print(f"  from {len(kept)} inputs")


def replay(name: str, path: str) -> None:
    """Gives a target one input; its finding is raised."""
    from tests.fuzzing import all_targets, oracle

    oracle.listen()
    oracle.check(all_targets()[name], Path(path).read_bytes())


def smoke(names: list[str]) -> int:
    """Tries the seeds, what was found before, and a few inputs made of them. Returns how many targets fail."""
    from tests.fuzzing import all_targets, found, mutators, oracle

    oracle.listen()
    failed = 0
    for name in names:
        target, rng = all_targets()[name], Random(1)
        leaf = partial(mutators.change, rng)
        made = [
            one for seed in target.seeds[:_SMOKE] for one in (seed, mutators.mutated(target.mutate, seed, rng, leaf))
        ]
        made += [mutators.mutated(target.mutate, rng.choice(made), rng, leaf) for _ in range(_SMOKE)]
        try:
            for data in [*found.INPUTS.get(name, []), *made]:
                oracle.check(target, data)
        except Exception as error:
            failed += 1
            print(f"{name}: {data[:500]!r}\n{''.join(traceback.format_exception(error)[-8:])}")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="by default all")
    parser.add_argument("--minutes", type=float, default=1.0, help="for each target")
    parser.add_argument("--at-once", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="processes")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--replay", metavar="FILE")
    given = parser.parse_args()
    from tests.fuzzing import all_targets

    names = given.targets or list(all_targets())
    if given.smoke:
        return smoke(names)
    if given.replay:
        replay(names[0], given.replay)
        return 0
    waiting, running = [] if given.report else list(names), dict[str, tuple[subprocess.Popen[bytes], float]]()
    while waiting or running:
        while waiting and len(running) < given.at_once:
            name = waiting.pop(0)
            running[name] = start(name, int(60 * given.minutes)), time.monotonic()
        for name, (process, begun) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                note(name, time.monotonic() - begun)
        time.sleep(0.2)
    return min(1, report(names))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        fuzz(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ["--coverage"]:
        coverage_of(sys.argv[2])
    else:
        sys.exit(main())
