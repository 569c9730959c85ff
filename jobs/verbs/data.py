"""shards: a data set rewritten for streaming."""

from __future__ import annotations

from jobs.errors import OK, UserError
from jobs.settings import Settings, check_uri
from jobs.verbs.submit import say


def shards(settings: Settings) -> int:
    source_uri = check_uri(settings.need("src"), "SRC")
    target_uri = check_uri(settings.need("dst"), "DST")
    _check(settings, source_uri, target_uri)
    from core.data import reshard
    from core.data.originals import open_original
    from core.storage import open_store

    source = open_original(source_uri, settings.split)
    licence = settings.licence or source.licence
    wanted = reshard.Settings(settings.short, settings.quality, settings.split, licence)
    index = reshard.Reshard(source, wanted, say, settings.workers).write(open_store(target_uri))
    print(reshard.summary(index))
    print(f'next: make submit RECIPE=... SET="data.source={target_uri}"')
    return OK


def _check(settings: Settings, source_uri: str, target_uri: str) -> None:
    """Raises UserError."""
    if settings.short < 0:
        raise UserError(f"SHORT: must not be negative, got {settings.short}")
    if not 1 <= settings.quality <= 100:
        raise UserError(f"QUALITY: must be from 1 to 100, got {settings.quality}")
    if settings.workers < 0:
        raise UserError(f"WORKERS: must not be negative, got {settings.workers}")
    if _lies_in(target_uri, source_uri):
        raise UserError(f"DST: {target_uri} lies in SRC; choose another place, so that shards are no part of the data")


def _lies_in(inner: str, outer: str) -> bool:
    """Whether one place is, or is below, another: by where folders are, whichever way their addresses lead there."""
    from core.folder import FileStore
    from core.storage import open_store

    one, other = open_store(inner), open_store(outer)
    if isinstance(one, FileStore) and isinstance(other, FileStore):
        return one.root.resolve().is_relative_to(other.root.resolve())
    return f"{one.uri}/".startswith(f"{other.uri}/")
