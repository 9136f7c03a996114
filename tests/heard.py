"""What cpcompile logs, as a test reads it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class Heard(logging.Handler):
    """Levels and texts of records, in order."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.told: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append((record.levelno, record.getMessage()))

    def lines(self) -> list[str]:
        return [line for _, line in self.told]

    def warnings(self) -> list[str]:
        return [line for level, line in self.told if level >= logging.WARNING]

    def rewritten(self) -> list[str]:
        """``"1 of 2"`` for each graph and interval of T."""
        return [line.rpartition(": ")[2].partition(" all-")[0] for line in self.lines() if "rewritten" in line]


@contextmanager
def hear() -> Iterator[Heard]:
    """What is logged from here on, without what INFO costs afterwards."""
    handler, logger = Heard(), logging.getLogger("cpcompile")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
