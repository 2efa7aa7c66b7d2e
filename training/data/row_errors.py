"""Rows that cannot be trained on: all of them are counted, and the first are told."""

from training.data.conversation import DataError

MAX_LISTED = 20
"""Rows that are named; there may be a hundred thousand more."""
LEFT_OUT = "bad (--skip-bad)"
"""How a report counts them, where they are left out."""


class RowErrors:
    """Takes the reasons, one for each row, while files are read."""

    def __init__(self) -> None:
        self.count = 0
        self.told: list[str] = []
        """``rows.jsonl:12: reason`` of the first of them."""
        self._last: str | None = None

    def add(self, error: DataError) -> None:
        """One row more, unless it is the row of the last reason: of one row several examples may be made."""
        if error.source is not None and error.source == self._last:
            return
        self._last = error.source
        self.count += 1
        if len(self.told) < MAX_LISTED:
            self.told.append(str(error))

    def lines(self) -> list[str]:
        """The first of them, and how many more there are."""
        more = self.count - len(self.told)
        return [*self.told, *([f"and {more:,} more"] if more else [])]

    def check(self) -> None:
        """Raises DataError where there are any."""
        if not self.count:
            return
        rows = "1 row" if self.count == 1 else f"{self.count:,} rows"
        told = "\n".join(f"  {line}" for line in self.lines())
        raise DataError(
            f"{rows} cannot be trained on:\n{told}\nNothing was trained. Mend them, or leave them out with --skip-bad."
        )
