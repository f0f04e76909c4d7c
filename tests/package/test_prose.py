"""Keeps the most frequent habits of translated English out of everything that a person reads."""

from __future__ import annotations

import re

from tests.package.allowances import HABITS as HABITS_LEFT
from tests.package.surface import PROJECT, over, places

NOUN = "(row|column|line|file|score|sample|batch|layer|loader|name|set|dataset|class|parameter|group|run|process|call)"
HABITS = (
    rf"an? {NOUN} an? {NOUN}",  # one row per sample
    r"by (itself|themselves)",  # automatically; alone
    r"of (its|their|one's) own",  # separate
    r"(say|says|said) so",  # warns
    r"so many(?! (that|as))",  # the number of
    r"(is|are|be) to be had",  # is available
    r"at hand",
    r"for ever",  # permanently
    r"(stand|stands|stood) (in|on|beside|for|twice|above|below|there)",  # is, means
    r"(lie|lies|lay) (in|on|below|above|before|beside|there)",  # is, are stored
    r"what (it|they) (is|are) (of|made)",
    r"that which",
    r"whoever",
    r"no harm",
    r"as (it is|it stands|they are)(?=[.,;:)])",  # unmodified
    r"takes the other way",
    r"the way of an?",
    r"everybody(?:'s)?",
    r"all alike",
    r"cannot be told",
    r"mispredictions?",  # misclassification
    r"the house",
    r"goes? on saying",
    r"made-up",  # synthetic
    r"another number",  # a different number
    r"passed over",  # skipped
    r"(tell|tells|told) apart",  # identify; separate
    r"anew",  # again
    r"has to (be|have|hold|define|require)",  # must
    r"neighbours in memory",  # adjacent
    r"whichever way",
    r"reads? off",  # determined from
    r"hands? (it|them|over|on)",  # passes
    r"at the most",
    r"is no (tensor|callable|text|word|score|float|image|index|module|label|class|leaf|bool)",  # is not a
    r"what (was|is) (kept|raised|scored|accumulated|found)",  # the retained rows, the error
)
"""What not to write; STYLE: subject, verb, object, and the standard term."""

BETWEEN_WORDS = r"[\s#*]+"  # a sentence of a comment goes on in the next line
PATTERN = re.compile(rf"\b({'|'.join(HABITS)})\b".replace(" ", BETWEEN_WORDS), re.IGNORECASE)
READ = (
    "*.md",
    "docs/**/*.md",
    "conf/**/*.yaml",
    "examples/*.py",
    "benchmarks/*.py",
    "lightning_gradmetrics/**/*.py",
    "lightning_gradmetrics/**/*.[ch]",
)


def test_prose_has_no_habits() -> None:
    paths = [path for pattern in READ for path in sorted(PROJECT.glob(pattern))]
    found = places(PATTERN, paths)
    counts = {room: float(len(rows)) for room, rows in found.items()}
    bad = over(counts, HABITS_LEFT, 0)
    rows = [row for room in bad for row in found[room.partition(":")[0]]]
    assert not bad, "\n".join([*bad, *rows])
