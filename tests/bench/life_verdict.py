"""What a play found: printed line by line, and whether all of it was within bounds."""

from __future__ import annotations


class Verdict:
    """Collects; nothing is hidden behind the first thing that is out of bounds."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.is_over = False
        """The play came to its end."""

    def note(self, text: str) -> None:
        """A figure without a bound."""
        print(f"         {text}", flush=True)

    def must(self, is_so: bool, text: str, detail: str = "") -> None:
        """A figure with one; `detail` is shown when it is broken."""
        print(f"  {'ok    ' if is_so else 'FAILED'} {text}", flush=True)
        if not is_so:
            self.faults.append(text)
            if detail:
                print(f"         {detail}", flush=True)

    def code(self) -> int:
        """Of the process."""
        if not self.is_over:
            self.faults.append("the play was ended before its end")
        print(f"{len(self.faults)} out of bounds" if self.faults else "all within bounds", flush=True)
        return 1 if self.faults else 0
