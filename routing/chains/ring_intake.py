"""What a session's engine was given and what it made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from routing.chains.ring_log import Rows


@dataclass(slots=True)
class Intake:
    """The engine is given rows in order and tells of each that it is computed. A feed that voids rows which it
    still works on waits until they are done (`limit` is set): what is told then is never of two kinds.

    `fed`: rows given. `done`: rows told. `limit`: rows from here on are void. `held`: rows that wait.
    """

    fed: int = 0
    done: int = 0
    limit: int | None = None
    held: list[Rows] = field(default_factory=list[Rows])
    held_bytes: int = 0
    turns: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """(position, turn): rows from there on are of that turn."""

    @property
    def end(self) -> int:
        """The row that comes next."""
        if self.held:
            return self.held[-1].end
        return self.fed if self.limit is None else self.limit

    @property
    def have(self) -> int:
        """Valid rows that are computed."""
        return self.done if self.limit is None else min(self.done, self.limit)

    def accept(self, rows: Rows) -> Rows | None:
        """Rows at `end`. Returned: what goes to the engine now."""
        if not self.turns or self.turns[-1][1] != rows.turn:
            self.turns.append((rows.position, rows.turn))
        if self.limit is not None:
            self.held.append(rows)
            self.held_bytes += len(rows.payload)
            return None
        self.fed = rows.end
        return rows

    def truncate(self, position: int) -> bool:
        """Rows from `position` on are void. Whether the engine still works on some."""
        while self.held and self.held[-1].end > position:
            # One that reaches beyond is not cut; it is asked for again, as a whole, from where it starts.
            self.held_bytes -= len(self.held.pop().payload)
        while self.turns and self.turns[-1][0] >= position:
            self.turns.pop()
        if self.fed <= position:
            return self.limit is not None
        if self.fed == self.done and self.limit is None:
            self.fed = self.done = position
            return False
        self.limit = position if self.limit is None else min(self.limit, position)
        return True

    def drop(self, position: int) -> None:
        """Like `truncate` for a head, whose engine itself decided so: it tells nothing more of those rows."""
        while self.turns and self.turns[-1][0] >= position:
            self.turns.pop()
        self.fed = min(self.fed, position)
        self.done = min(self.done, position)

    def told(self, position: int, rows: int) -> int | None:
        """The engine computed these. Returned: how many of them, from the first, are valid; None if they
        are not what it was given.
        """
        if position != self.done or rows < 1 or position + rows > self.fed:
            return None
        self.done += rows
        if self.limit is None:
            return rows
        return max(0, min(self.limit - position, rows))

    def settle(self) -> list[Rows]:
        """What may go to the engine now that all void rows are done; nothing before."""
        if self.limit is None or self.done < self.fed:
            return []
        self.fed = self.done = min(self.fed, self.limit)
        self.limit = None
        ready, self.held, self.held_bytes = self.held, [], 0
        if ready:
            self.fed = ready[-1].end
        return ready

    def turns_of(self, position: int, rows: int) -> list[tuple[int, int, int]]:
        """(start, stop, turn) within these rows, of one turn each."""
        end = position + rows
        parts = list[tuple[int, int, int]]()
        for at in range(len(self.turns) - 1, -1, -1):
            start, turn = self.turns[at]
            if start < end:
                parts.append((max(start, position), end, turn))
                end = max(start, position)
            if end <= position:
                break
        if end > position:
            parts.append((position, end, 0))
        return parts[::-1]

    def lost(self) -> None:
        """The engine has nothing any more."""
        self.fed = self.done = self.held_bytes = 0
        self.limit = None
        self.held.clear()
        self.turns.clear()
