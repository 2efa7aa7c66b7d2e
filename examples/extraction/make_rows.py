"""Writes train.jsonl and held-out.jsonl: orders as people write them, and the fields in them as JSON.

    python examples/extraction/make_rows.py

Everything in it was written for this project. The held-out orders have items, cities and sentences that are in no
training row: what is judged is finding the fields, not remembering them. The same seed gives the same files.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SEED = 11
SYSTEM = "Extract the order as JSON: item, quantity, city, express."
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


class Words(NamedTuple):
    """What orders are made of."""

    items: Sequence[tuple[str, str]]
    """(one, several)"""
    cities: Sequence[str]
    sentences: Sequence[str]


TRAIN = Words(
    (
        ("desk lamp", "desk lamps"), ("office chair", "office chairs"), ("bookshelf", "bookshelves"),
        ("wall clock", "wall clocks"), ("coffee table", "coffee tables"), ("floor mat", "floor mats"),
        ("mirror", "mirrors"), ("wooden stool", "wooden stools"), ("umbrella stand", "umbrella stands"),
        ("picture frame", "picture frames"), ("blanket", "blankets"), ("bar stool", "bar stools"),
        ("paper basket", "paper baskets"), ("candle holder", "candle holders"), ("wine rack", "wine racks"),
        ("bedside table", "bedside tables"), ("garden bench", "garden benches"), ("flower pot", "flower pots"),
        ("shoe cabinet", "shoe cabinets"), ("coat hook", "coat hooks"), ("kitchen trolley", "kitchen trolleys"),
        ("cutting board", "cutting boards"), ("sofa cover", "sofa covers"), ("tea towel", "tea towels"),
    ),
    (
        "Leeds", "Oslo", "Porto", "Graz", "Lyon", "Ghent", "Cork", "Turin", "Malmo", "Brno", "Derby", "Seville",
        "Utrecht", "Gdansk", "Bergen", "Split", "Dresden", "Exeter", "Basel", "Nantes",
    ),
    (
        "Please send {what} to my house in {city}.",
        "I'd like to order {what}. My address is in {city}.",
        "Could you deliver {what} to our branch in {city}?",
        "Hello, we need {what} in {city}.",
        "My mother in {city} would like {what}.",
        "{what}, please, to be sent to {city}.",
        "We just moved to {city} and want to buy {what} from you.",
        "For the new flat in {city} I need {what}.",
        "Good morning! Do ship {what} to {city}, thanks.",
        "As discussed on the phone: {what} for the cafe in {city}.",
        "Can I get {what}? I live in {city}.",
        "Put me down for {what}; the parcel goes to {city}.",
    ),
)  # fmt: skip
HELD_OUT = Words(
    (
        ("rocking chair", "rocking chairs"), ("door bell", "door bells"), ("soap dish", "soap dishes"),
        ("night light", "night lights"), ("hammock", "hammocks"), ("magazine rack", "magazine racks"),
    ),
    ("York", "Vienna", "Aarhus", "Toulouse", "Poznan", "Galway"),
    (
        "Hi, our office in {city} is short of {what}.",
        "It would be great to have {what} brought to {city}.",
        "This is an order from {city}: {what}.",
        "I am setting up a guest house in {city} and will take {what}.",
    ),
)  # fmt: skip
EXPRESS = (
    "It has to be here tomorrow.", "Express delivery, please.", "I need it very fast.", "We pay extra for express.",
    "As quickly as you can!",
)  # fmt: skip
NO_HURRY = ("There is no hurry.", "Normal delivery is fine.", "", "Take your time.", "Thank you!")


def row(words: Words, random_: random.Random) -> str:
    """One line of JSON: an order and its fields."""
    quantity = random_.randint(1, len(NUMBERS))
    one, several = random_.choice(words.items)
    number = random_.choice((str(quantity), NUMBERS[quantity - 1]))
    what = f"{number} {one if quantity == 1 else several}"
    city, express = random_.choice(words.cities), random_.random() < 0.4
    said = random_.choice(words.sentences).format(what=what, city=city)
    said = f"{said[0].upper()}{said[1:]} {random_.choice(EXPRESS if express else NO_HURRY)}".strip()
    order = {"item": one, "quantity": quantity, "city": city, "express": express}
    turns = (("system", SYSTEM), ("user", said), ("assistant", json.dumps(order)))
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n"


def rows(words: Words, count: int, random_: random.Random) -> list[str]:
    """Return ``count`` different rows."""
    found: dict[str, None] = {}
    while len(found) < count:
        found.setdefault(row(words, random_))
    return list(found)


def main() -> None:
    """Write both files."""
    folder, random_ = Path(__file__).parent, random.Random(SEED)
    (folder / "train.jsonl").write_text("".join(rows(TRAIN, 96, random_)), encoding="utf-8")
    (folder / "held-out.jsonl").write_text("".join(rows(HELD_OUT, 16, random_)), encoding="utf-8")


if __name__ == "__main__":
    main()
