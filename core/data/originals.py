"""Data sets as others publish them, for rewriting: splits side by side, and files that read well in order only."""

from __future__ import annotations

from itertools import islice

from core.data.source import DataError, Source, is_image, open_source
from core.data.splits import check_single, in_files, words
from core.data.tar_source import TarSource, find_tars
from core.data.tsv_source import LIST
from core.folder import FileStore
from core.storage import Store, open_object, open_store

_ORDERED = (".parquet", ".tar")
_GLANCE = 1000  # entries: a page of a listing


def open_original(uri: str, split: str = "") -> Source:
    """The samples at a URI, of one split where there are several: hub parquet files, else what `open_source` takes.

    A split is a folder of this name, or the files with this word in their names.  Raises DataError.
    """
    if uri.endswith((*_ORDERED, LIST)):
        store, name = open_object(uri)
        return open_source(store.uri) if name == LIST else _open_files(store, name, split)
    store = open_store(uri)
    if isinstance(store, FileStore) and not store.root.is_dir():
        return open_source(uri)  # which says what is wrong
    if split and next(store.list(f"{split}/"), None):
        return open_original(store.sub(split).uri)
    glance = list(islice(store.list(), _GLANCE))
    indexed = any(entry.key in ("index.json", "image.list") for entry in glance)
    if not indexed and not any(is_image(entry.key) for entry in glance):
        found = [suffix for suffix in _ORDERED if any(entry.key.endswith(suffix) for entry in glance)]
        if len(found) > 1:
            return _open_either(store, split)
        if found:
            return _open_files(store, found[0], split)
    if split:
        raise DataError(f"{uri}: no split {split!r}: neither a folder nor files of this name; correct SPLIT")
    return open_source(uri)


def _open_either(store: Store, split: str) -> Source:
    """Parquet files with images in them, else tars: beside these lie tables of what their makers noted."""
    from core.data.parquet_columns import NoImages

    try:
        return _open_files(store, ".parquet", split)
    except NoImages:
        return _open_files(store, ".tar", split)


def _open_files(store: Store, suffix: str, split: str) -> Source:
    """The files whose names end like this, or the one that has this name."""
    every = find_tars(store) if suffix.endswith(".tar") else store.list()
    one = suffix not in _ORDERED
    files = [entry for entry in every if (entry.key == suffix if one else entry.key.endswith(suffix))]
    if not files:
        raise DataError(f"{store.uri}/{suffix}: no such file")
    found = in_files((entry.key for entry in files), split)
    if split and split not in found:
        raise DataError(
            f"{store.uri}: no *{suffix} file is of split {split!r}; there is {', '.join(sorted(found)) or 'none'}"
        )
    if not split:
        check_single(store.uri, found)
    chosen = [entry for entry in files if not split or split in words(entry.key)]
    if suffix.endswith(".tar"):
        return TarSource(store, chosen)
    from core.data.parquet_source import ParquetSource  # a heavy import that the others do not need

    return ParquetSource(store, chosen)
