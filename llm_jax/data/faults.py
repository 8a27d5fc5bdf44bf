"""What was wrong with the files of a corpus: what was repaired, what was left out, how often, and where first."""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

ENCODING = "read in another encoding than UTF-8"
CHARACTERS = "characters that could not be decoded, now U+FFFD"
NULLS = "null characters, taken out"
MARKS = "byte-order marks, taken out"
SURROGATES = "lone surrogates, now U+FFFD"
REFERENCES = "HTML's character references, now characters"
REPAIRED = (ENCODING, CHARACTERS, NULLS, MARKS, SURROGATES, REFERENCES)

UNREADABLE = "file that cannot be read"
DAMAGED = "damaged from here on"
NO_TEXT = "bytes that are text in no known encoding"
TOO_LONG = "record that is too long"
INVALID = "invalid JSON"
NO_OBJECT = "no JSON object"
NO_FIELD = "no such field"
NOT_TEXT = "field that holds no text"
NO_PAGE = "record that holds no page"
BLANK = "blank text"

SHOWN = 10  # warnings of one kind
LISTED = 1000  # places in the facts


class Place(NamedTuple):
    """One kind of fault in one file."""

    kind: str
    file: str
    times: int
    first: str  # where in the file it was first found, and what was found


class Faults:
    """Counts faults while files are read."""

    def __init__(self, places: Iterable[Place] = ()) -> None:
        self._times: Counter[tuple[str, str]] = Counter()
        self._first: dict[tuple[str, str], str] = {}
        self.extend(places)

    def add(self, kind: str, file: str, where: str, times: int = 1) -> None:
        """Count a fault `times` times; `where` matters the first time."""
        self._times[kind, file] += times
        self._first.setdefault((kind, file), where)

    def extend(self, places: Iterable[Place]) -> None:
        """Count what was counted elsewhere, after what is counted here."""
        for place in places:
            self.add(place.kind, place.file, place.first, place.times)

    def places(self) -> list[Place]:
        """Every kind in every file, in the order in which they were found."""
        return [Place(kind, file, times, self._first[kind, file]) for (kind, file), times in self._times.items()]

    def warn(self) -> None:
        """One line for each kind in each file, or as many as anybody reads."""
        shown: Counter[str] = Counter()
        for kind, file, times, first in self.places():
            shown[kind] += 1
            if shown[kind] <= SHOWN:
                verb = "repaired" if kind in REPAIRED else "left out"
                level = logging.INFO if kind == BLANK else logging.WARNING  # an empty file is nothing to look into
                logger.log(level, "%s: %s: %s (%d times; first: %s)", file, verb, kind, times, first)
        for kind, files in shown.items():
            if files > SHOWN and kind != BLANK:
                logger.warning("%s: in %d more files", kind, files - SHOWN)

    def facts(self) -> dict[str, Any]:
        """For a report: how often each kind was found, and where."""
        totals: Counter[str] = Counter()
        for place in self.places():
            totals[place.kind] += place.times
        return {
            "repaired": {kind: times for kind, times in totals.items() if kind in REPAIRED},
            "left_out": {kind: times for kind, times in totals.items() if kind not in REPAIRED},
            "places": [place._asdict() for place in self.places()[:LISTED]],
        }
