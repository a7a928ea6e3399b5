"""Writes small classification tasks that are far from English web text, to see whether a mask from such text fits them.

    python examples/far_tasks.py [--output DIR] [--count N]

Each is a file NAME.jsonl with the fields ``text`` and ``label``. The program prints the options that read it, for
example for `meerkat-engine mask --model MODEL --mask MASK --check parity`.
"""

import argparse
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from random import Random

Row = tuple[str, int]

OPTIONS = {
    "parity": ("The number {text} is", "even,odd"),
    "sums": ("{text} This sum is", "wrong,right"),
    "counts": ("{text} The most frequent letter is", "a,b"),
    "lines": ("{text}\nThis line is written in", "English,Python"),
    "german": ("{text} Es war", "schlecht,gut"),
}

_SUBJECTS = ("Der Film", "Das Buch", "Das Essen", "Das Hotel", "Der Kurs", "Die Reise", "Das Konzert", "Der Kaffee")
_DEGREES = ("", "sehr", "wirklich", "ziemlich", "ganz", "eher")
_WORDS = (
    ("langweilig", "kalt", "schmutzig", "teuer und schwach", "enttäuschend", "laut", "misslungen", "zäh"),
    ("spannend", "warm", "sauber", "günstig und stark", "bezaubernd", "angenehm", "gelungen", "frisch"),
)  # fmt: skip
_ENDS = (
    ("Ich gehe nie wieder hin.", "Das Geld war verloren.", "Wir sind früh gegangen."),
    ("Ich komme gern wieder.", "Das hat sich gelohnt.", "Wir sind lange geblieben."),
)


def parity(random: Random) -> Row:
    """A number of one to six digits: is it odd?"""
    number = random.randrange(10 ** random.randint(1, 6))
    return str(number), number % 2


def sums(random: Random) -> Row:
    """A sum of two numbers below 100: is it right?"""
    a, b, label = random.randrange(100), random.randrange(100), random.randrange(2)
    return f"{a} + {b} = {a + b + (1 - label) * random.choice((-10, -2, -1, 1, 2, 10))}.", label


def counts(random: Random) -> Row:
    """Fifteen letters a and b: which are more?"""
    letters = [random.choice("ab") for _ in range(15)]
    return " ".join(letters), int(letters.count("b") > 7)


def german(random: Random) -> Row:
    """A review in German: is it good?"""
    label = random.randrange(2)
    degree, word = random.choice(_DEGREES), random.choice(_WORDS[label])
    first = f"{random.choice(_SUBJECTS)} war {degree} {word}.".replace("  ", " ")
    return f"{first} {random.choice(_ENDS[label])}", label


def lines(random: Random, count: int) -> Iterator[Row]:
    """Lines of Python's standard library: code, or English in a docstring."""
    found: list[list[str]] = [[], []]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        inside = False
        for line in path.read_text(encoding="utf-8").splitlines():
            text, quotes = line.strip(), line.count('"""')
            if not quotes and len(text) >= 30 and not text.startswith("#"):
                found[not inside].append(text)
            inside ^= quotes % 2 == 1
    for i in range(count):
        yield random.choice(found[i % 2]), i % 2


def main(output: Path, count: int) -> None:
    """Writes the tasks, and prints their options."""
    output.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Row]] = {"lines": list(lines(Random(1), count))}
    for make in (parity, sums, counts, german):
        random = Random(1)
        rows[make.__name__] = [make(random) for _ in range(count)]
    for name, (template, labels) in OPTIONS.items():
        path = output / f"{name}.jsonl"
        text = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows[name])
        path.write_text(text, encoding="utf-8")
        print(f"--data {path} --template {template!r} --labels {labels}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("far-tasks"))
    parser.add_argument("--count", type=int, default=1000)
    arguments = parser.parse_args()
    main(arguments.output, arguments.count)
