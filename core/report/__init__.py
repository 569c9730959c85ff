"""The report of a run: one HTML file that says what was made, how good it is, how it went and what it was made from.

Everything is read from the run folder; what is not there yet becomes a sentence with the command that makes it.
"""

from __future__ import annotations

import time

from core.report import lineage, results, summary
from core.report.facts import Facts, gather
from core.report.page import page
from core.storage import Store

FILE = "report.html"
SECTIONS = (
    summary.header, summary.tiles, results.evaluation, results.training, lineage.export, lineage.origins,
    lineage.attempt_table, lineage.checkpoint_table, lineage.recipe, lineage.footer,
)  # fmt: skip


def write(run: Store, root: str) -> str:
    """Render the report of a run into its folder.  Returns its address.  Raises StoreError."""
    run.put(FILE, render(gather(run, root, time.time())).encode())
    return f"{run.uri}/{FILE}"


def render(facts: Facts) -> str:
    """The whole page.  Pure: the same facts give the same text."""
    return page(f"{facts.name}: {facts.state}", *(section(facts) for section in SECTIONS))
