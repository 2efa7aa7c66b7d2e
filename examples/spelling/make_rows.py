"""Training rows from data that others have gathered: misspelt words and what was meant, from the package codespell.

    pip install --no-deps codespell==2.4.3
    python examples/spelling/make_rows.py spelling.jsonl held-out.jsonl

codespell keeps about 65,000 common misspellings, found in the wild by its contributors (its dictionary is CC BY-SA
3.0). Entries with several corrections, or with a comment, are left out: a human has to decide there. The split is by
the right word, so that no word of the held-out rows was ever an answer in training: what is judged is spelling, not
memory.
"""

import argparse
import json
import random
from importlib.metadata import distribution
from pathlib import Path

PROMPT = "Correct the spelling of this word. Answer with the word only.\n\n"


def pairs() -> list[tuple[str, str]]:
    """(misspelt, right), one for each entry with exactly one correction."""
    file = next(f for f in distribution("codespell").files or [] if f.name == "dictionary.txt")
    lines = Path(str(file.locate())).read_text(encoding="utf-8").splitlines()
    entries = [line.split("->") for line in lines if line]
    return [(wrong, right) for wrong, right in entries if "," not in right]


def row(wrong: str, right: str) -> str:
    """One line of JSON in OpenAI's chat form."""
    messages = [{"role": "user", "content": PROMPT + wrong}, {"role": "assistant", "content": right}]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description="Training rows from codespell's dictionary.")
    parser.add_argument("train", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--held-out-rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    entries = pairs()
    random_ = random.Random(arguments.seed)
    words = sorted({right for _, right in entries})
    random_.shuffle(words)
    kept_back = set(words[: len(words) // 10])
    random_.shuffle(entries)
    train = [entry for entry in entries if entry[1] not in kept_back][: arguments.rows]
    held_out = [entry for entry in entries if entry[1] in kept_back][: arguments.held_out_rows]
    arguments.train.write_text("".join(row(*entry) for entry in train), encoding="utf-8")
    arguments.held_out.write_text("".join(row(*entry) for entry in held_out), encoding="utf-8")
    print(f"{len(train)} rows to train on, {len(held_out)} held out, of {len(entries)} in the dictionary")


if __name__ == "__main__":
    main()
