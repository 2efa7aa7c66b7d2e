"""Collects the errors of rows that cannot be trained on: counts all of them and lists the first."""

from training.data.conversation import DataError

MAX_LISTED = 20
"""Maximum number of rows that are listed."""
LEFT_OUT = "bad (--skip-bad)"
"""The reason under which a report counts these rows if they are left out."""


class RowErrors:
    """Errors of rows, collected while files are read."""

    def __init__(self) -> None:
        self.count = 0
        """Number of rows with an error."""
        self.listed: list[str] = []
        """``rows.jsonl:12: reason`` of the first MAX_LISTED of them."""
        self._last_source: str | None = None

    def add(self, error: DataError) -> None:
        """Count a row, unless it is the last one again: a row may become several examples."""
        if error.source is not None and error.source == self._last_source:
            return
        self._last_source = error.source
        self.count += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(str(error))

    def lines(self) -> list[str]:
        """Return the first errors, and a line with the number of the others."""
        more = self.count - len(self.listed)
        return [*self.listed, *([f"and {more:,} more"] if more else [])]

    def check(self) -> None:
        """Raise DataError if there is any error."""
        if not self.count:
            return
        rows = "1 row" if self.count == 1 else f"{self.count:,} rows"
        listed = "\n".join(f"  {line}" for line in self.lines())
        raise DataError(
            f"{rows} cannot be trained on:\n{listed}\nNothing was trained. Correct them, or skip them with --skip-bad."
        )
