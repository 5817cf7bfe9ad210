"""Counts what the preparation of captioned pictures dropped and changed, and writes it as a table or as JSON.

Knows the names of steps only as they are given to it.
"""

from dataclasses import asdict, dataclass, field
from typing import Any


NUM_EXAMPLES = 3


@dataclass
class CaptionReport:
    """What the preparation did. Of a stream it grows as the stream is read, in the process that reads it.

    Args:
        reasons (`dict[str, str]`): What each step drops.
        num_rows_in (`int`): Rows looked at.
        dropped (`dict[str, int]`): Rows dropped by each step.
        examples (`dict[str, list[str]]`): The first few rows each step dropped, by `id` column or row number.
        changed (`dict[str, int]`): Rows whose text each clean-up changed.
    """

    reasons: dict[str, str]
    num_rows_in: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)

    @property
    def num_rows_out(self) -> int:
        """Rows kept."""
        return self.num_rows_in - sum(self.dropped.values())

    def drop(self, step: str, example: str) -> None:
        """Counts one dropped row."""
        self.dropped[step] = self.dropped.get(step, 0) + 1
        if len(self.examples.setdefault(step, [])) < NUM_EXAMPLES:
            self.examples[step].append(example)

    def change(self, names: list[str]) -> None:
        """Counts the clean-ups that changed one row."""
        for name in names:
            self.changed[name] = self.changed.get(name, 0) + 1

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {**asdict(self), "num_rows_out": self.num_rows_out}

    def to_markdown(self) -> str:
        """Returns a table of the steps in their order, and a line about the clean-up."""
        lines = ["| step | dropped | left | reason | examples |", "|---|---|---|---|---|"]
        left = self.num_rows_in
        lines.append(f"| rows in | | {left} | | |")
        for step, reason in self.reasons.items():
            if count := self.dropped.get(step, 0):
                left -= count
                examples = "; ".join(self.examples[step]).replace("|", "\\|")
                lines.append(f"| {step} | {count} | {left} | {reason} | {examples} |")
        changed = ", ".join(f"{name} {count}" for name, count in sorted(self.changed.items())) or "none"
        return "\n".join([*lines, "", f"Rows changed by the clean-up: {changed}."])

    def check_unreadable(self, max_share: float, min_rows: int = 1) -> None:
        """Stops if too many images were unreadable."""
        unreadable, later = self.dropped.get("unreadable_image", 0), list(self.reasons)
        opened = self.num_rows_in - sum(self.dropped.get(step, 0) for step in later[: later.index("unreadable_image")])
        if unreadable > max_share * max(opened, min_rows):
            raise ValueError(
                f"{unreadable} of {opened} images are unreadable, more than `max_unreadable_share`={max_share}. "
                f"First: {'; '.join(self.examples['unreadable_image'])}."
            )
