"""One try of a run by one rank: where its rows and checkpoints go, and who may end it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core import checkpoint
from core.comm import Comm, StopFlag
from core.config import Recipe
from core.manifest import Position, retain
from core.metrics import MetricsLog
from core.stage import Stage
from core.storage import Store


@dataclass
class Attempt:
    recipe: Recipe
    identity: str  # fingerprint of the recipe
    run: Store
    number: int
    comm: Comm
    log: MetricsLog
    stop: StopFlag
    on_progress: Callable[[dict[str, Any]], None]
    should_stop: Callable[[], bool]

    def tell(self, row: dict[str, Any]) -> None:
        """Log a row, None values left out, and report it (rank 0)."""
        if self.comm.rank == 0:
            row = {k: v for k, v in row.items() if v is not None}
            self.log.write(row)
            self.on_progress(row)

    def stopping(self) -> bool:
        """Whether any rank wishes to stop: the same answer on all of them."""
        return self.stop.exchange(self.should_stop())

    def save(self, stage: Stage, position: Position) -> bool:
        """All ranks write a checkpoint, and old ones go; False when the state is not worth keeping."""
        saved = checkpoint.save(self.run, stage.engine, stage.method.state(), self.comm, position,
                                self.identity, self.number, self.recipe.zero.stage)  # fmt: skip
        if self.comm.rank == 0:
            self.log.flush()
            retain(self.run, self.recipe.checkpoint.keep)
            if not saved:
                print(f"warning: no checkpoint at step {position.step}: the state holds infinities or NaN", flush=True)
        self.comm.barrier()
        return saved
