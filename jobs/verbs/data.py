"""shards: a data set rewritten for streaming."""

from __future__ import annotations

from jobs.errors import OK, UserError
from jobs.settings import Settings, check_uri
from jobs.verbs.submit import say


def shards(settings: Settings) -> int:
    source_uri = check_uri(settings.need("src"), "SRC")
    target_uri = check_uri(settings.need("dst"), "DST")
    if settings.short_side < 0:
        raise UserError(f"SHORT_SIDE: must not be negative, got {settings.short_side}")
    from core.data.source import open_source
    from core.storage import open_store
    from jobs.reshard import Reshard, summary

    target = open_store(target_uri)
    if target.size("index.json") is not None:
        raise UserError(f"DST: {target_uri} holds shards already; choose another place or remove them first")
    rewriting = Reshard(open_source(source_uri), settings.short_side, say)
    index = rewriting.write(target)
    print(summary(index, rewriting.bad))
    print(f'next: make submit RECIPE=... SET="data.source={target_uri}"')
    return OK
