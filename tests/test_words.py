"""Words of the first edition that were retired in favour of the field's own stay out: of code, texts and file names."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tiny_model_server.settings import RENAMED

RETIRED = {
    "doors?": "protocol",
    "lanes?|short[ _-]?cuts?": "local transport, local connection",
    "inbox(es)?|outbox(es)?|lent": "shared buffers: request buffer, response buffer, caller-owned",
    "seats?|keepers?|bury|buried": "worker slot, supervisor",
    "shift": "worker slot",
    "packed|travels?|travelled": "encoded value, encode, serialize",
    "plain_json|plain JSON|(?:item|request|self)[.]plain|plain: bool": "JSON only (json_only)",
    "pictures?": "image, image file, PNG encoding",
    "awake": "busy polling, polls",
    "client[./]trust": "credentials",
    "tally|tallies": "custom metrics",
    "client[./]forks": "fork safety",
    "tails?|apart": "trailing bytes",
    "tells?|told|hears?|heard": "report, return, receive, notice",
    "(?:goes?|went|gone) away": "disconnect",
    "wait(?:s|ing)? for company": "wait for more",
}
ALLOWED = {
    "models/digits/train.py": "shift",  # of pixels
    "tests/test_models.py": "shift",  # of pixels
    "tiny_model_server/schemas.py": "packed",  # numbers of protobuf
    "tiny_model_server/access.py": "packed",  # bytes of an address
    "tiny_model_server/server/npy.py": "tell",  # a file's method
    "tiny_model_server/server/bodies.py": "tail",  # zlib's unconsumed_tail
}
"""What a file may say all the same, where a word has its everyday meaning."""
_WORD = re.compile("|".join(f"(?P<r{number}>{words})" for number, words in enumerate(RETIRED)))
_OLD_SETTINGS = re.compile("|".join(RENAMED))
_CAPITAL = re.compile("(?<=[a-z])(?=[A-Z])")


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def retired(text: str, allowed: str = "") -> list[str]:
    """The retired words in a text, each with its successor. The parts of ``some_name`` and ``SomeName`` are words."""
    spaced = _CAPITAL.sub(" ", _OLD_SETTINGS.sub("", text))
    found = re.finditer(f"(?<![a-z])(?:{_WORD.pattern})(?![a-z])", spaced, re.IGNORECASE)
    words = [(match[0], list(RETIRED.values())[int(str(match.lastgroup)[1:])]) for match in found]
    return [f"{word!r} is called {new} now" for word, new in words if word.lower() not in allowed.split()]


@pytest.mark.parametrize(
    ("text", "words"),
    [("a door", 1), ("doorway", 0), ("TMS_DOORS", 0), ("_SeatPool, in_lane", 2), ("Short cuts", 1), ("plain text", 0)],
)
def test_a_word_is_found_in_any_case_and_in_names(text: str, words: int) -> None:
    assert len(retired(text)) == words


def test_no_retired_word_is_used() -> None:
    found = []
    for path in tracked():
        name = str(path.relative_to(ROOT))
        if path == Path(__file__) or name == "CHANGELOG.md" or not path.exists():  # both speak of what was renamed
            continue
        try:
            lines = [name, *path.read_text().splitlines()]
        except UnicodeDecodeError:  # not a text
            continue
        for number, line in enumerate(lines):
            found += [f"{name}:{number}: {one}" for one in retired(line, ALLOWED.get(name, ""))]
    assert not found, "\n".join(found)
