"""What streaming costs: shards from an S3 server cold and warm, and rows of tables, beside bare clients and files.

Shards of random bytes lie in a Ceph gateway on this machine (moto where its packages are missing). Every arm is
measured once a round, and rounds begin with different arms. Nothing is decoded. The cache and the other files that are
written lie in memory, so that they do not share the server's disk, as they never do on a cluster.
"""

from __future__ import annotations

import base64
import gc
import importlib.util
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import numpy as np
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from core.bucket_client import S3Options
from core.cache import ShardCache
from core.data.order import Order
from core.data.prefetch import Prefetch
from core.data.shard_source import ShardSource
from core.data.shards import write_shards
from core.data.source import Source, open_source
from core.data.tsv import Table, write_index
from core.folder import FileStore
from core.storage import Store, open_store
from jobs.table import table
from tests.perf.checkpoint import server

ROUNDS, WARM, READERS = 3, 1, (1, 2, 4)
SHARDS, SHARD, IMAGE = 8, 64 << 20, 110_000  # bytes: images as large as ImageNet's
BLOCK, AHEAD, THREADS, RANGE = 256, 6, S3Options().threads, S3Options().range_bytes
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
ROWS, REOPENED, PAYLOAD = (1_000, 100_000), 5, 3072  # bytes of a row's payload: a vector of 768 numbers


def samples() -> Any:
    random = np.random.default_rng(0)
    return ((f"{i:06d}", random.bytes(IMAGE), "jpg", i % 10) for i in range(SHARDS * (SHARD // IMAGE)))


# ---- what a reading process does; all return the bytes that it has read


def epoch(source: Source, reader: int, readers: int) -> int:
    """As the loader reads: a stream of the order, and what comes next fetched ahead."""
    order, size = Order(source.shard_sizes, 1, readers, BLOCK), 0
    ahead = Prefetch(source, order, range(reader, reader + 1))
    for first in range(0, order.per_stream, 64):
        ahead.at(0, first)
        positions = np.arange(first, min(first + 64, order.per_stream))
        size += sum(len(source.read(i).data) for i in order.index(0, reader, positions).tolist())
    return size


def bare(bucket: str, sizes: dict[str, int], reader: int, readers: int, folder: Path) -> int:
    """boto3's ranged GETs into memory, thrown away."""
    client = boto3.client("s3", config=Config(max_pool_connections=THREADS))
    ranges = [(key, first) for key, size in sizes.items() for first in range(0, size, RANGE)][reader::readers]

    def get(part: tuple[str, int]) -> int:
        span = f"bytes={part[1]}-{part[1] + RANGE - 1}"
        return len(client.get_object(Bucket=bucket, Key=part[0], Range=span)["Body"].read())

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(get, ranges))


def whole(bucket: str, sizes: dict[str, int], reader: int, readers: int, folder: Path) -> int:
    """boto3's download_file, one file after the other."""
    client, own = boto3.client("s3"), list(sizes)[reader::readers]
    config = TransferConfig(multipart_chunksize=RANGE, max_concurrency=THREADS, preferred_transfer_client="classic")
    for key in own:
        client.download_file(bucket, key, str(folder / f"whole-{reader}"), Config=config)
    return sum(sizes[key] for key in own)


def through_crt(bucket: str, sizes: dict[str, int], reader: int, readers: int, folder: Path) -> int:
    """The same by the CRT's client, made here because boto3 gives it no server without TLS."""
    from s3transfer import crt

    session, own = botocore.session.Session(), list(sizes)[reader::readers]
    credentials = crt.BotocoreCRTCredentialsWrapper(session.get_credentials()).to_crt_credentials_provider()
    region, where = os.environ["AWS_DEFAULT_REGION"], os.environ["AWS_ENDPOINT_URL"]
    client = crt.create_s3_crt_client(region, credentials, part_size=RANGE, use_ssl=where.startswith("https"))
    requests = crt.BotocoreCRTRequestSerializer(session, {"region_name": region, "endpoint_url": where})
    with crt.CRTTransferManager(client, requests) as manager:
        for key in own:
            manager.download(bucket, key, str(folder / f"crt-{reader}")).result()
    return sum(sizes[key] for key in own)


def together(readers: int, work: Callable[[int], int], store: Store) -> float:
    """MB/s of processes that begin together, from the moment that all are connected to the server."""
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(readers + 1), context.SimpleQueue()

    def run(reader: int) -> None:
        store.size("index.json")
        boto3.client("s3").list_buckets()
        ready.wait(120)
        try:
            results.put(work(reader))
        except BaseException as error:
            results.put(error)

    processes = [context.Process(target=run, args=(reader,)) for reader in range(readers)]
    for process in processes:
        process.start()
    ready.wait(120)
    began = time.monotonic()
    sizes = [results.get() for _ in processes]
    taken = time.monotonic() - began
    for process in processes:
        process.join()
    for size in sizes:
        if isinstance(size, BaseException):
            raise size
    return sum(sizes) / 1e6 / taken


class Streaming:
    """One bucket of shards, and the arms that read it."""

    def __init__(self, bucket: str, folder: Path) -> None:
        self.bucket, self.folder = bucket, folder
        index = write_shards(samples(), open_store(f"s3://{bucket}"), "set", SHARD, [str(i) for i in range(10)])
        self.sizes = {f"set/{shard['name']}.tar": shard["bytes"] for shard in index["shards"]}
        copy, self.store, self.index = FileStore(folder / "local"), open_store(f"s3://{bucket}/set"), index
        for entry in self.store.list():
            self.store.get_file(entry.key, copy.root / entry.key)
        self.local, self.found = open_source(copy.uri), defaultdict[str, list[float]](list)

    def source(self) -> Source:
        return ShardSource(self.store, self.index, ShardCache(self.folder / "cache", 1 << 40, AHEAD))

    def arms(self, readers: int) -> dict[str, Callable[[], float]]:
        def cold() -> float:
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
            source = self.source()
            return together(readers, lambda r: epoch(source, r, readers), self.store)

        def warm() -> float:
            source = self.source()
            return together(readers, lambda r: epoch(source, r, readers), self.store)

        def download(work: Callable[..., int]) -> float:
            return together(readers, lambda r: work(self.bucket, self.sizes, r, readers, self.folder), self.store)

        def both() -> float:  # always behind each other, so that the cache is warm
            self.found[f"cold cache, {readers} readers"].append(cold())
            return warm()

        arms = {
            f"bare ranged GETs, {readers} readers": lambda: download(bare),
            f"warm cache, {readers} readers": both,
            f"local files, {readers} readers": lambda: together(
                readers, lambda r: epoch(self.local, r, readers), self.store
            ),
            f"download_file, {readers} readers": lambda: download(whole),
        }
        if importlib.util.find_spec("awscrt"):
            arms[f"download_file with the CRT, {readers} readers"] = lambda: download(through_crt)
        return arms

    def measure(self) -> dict[str, list[float]]:
        """MB/s of every round."""
        for readers in READERS:
            arms = list(self.arms(readers).items())
            for number in range(WARM + ROUNDS):
                for name, arm in arms[number % len(arms) :] + arms[: number % len(arms)]:
                    self.found[name].append(arm())
        return {name: values[WARM:] for name, values in self.found.items()}


# ---- tables


class Reopening:
    """A reader of rows as released: for each row it opens the table, reads the whole index, and collects garbage."""

    def __init__(self, tsv: Path, index: Path) -> None:
        self.tsv, self.index = tsv, index

    def row(self, i: int) -> list[str]:
        with self.index.open() as file:
            offsets = [int(line.strip()) for line in file]
        row = self.at(offsets[i])
        gc.collect()
        return row

    def at(self, offset: int) -> list[str]:
        """With the index in memory: what is left is to open the table."""
        with self.tsv.open() as file:
            file.seek(offset)
            return [cell.strip() for cell in file.readline().split("\t")]


def write_table(store: Store, rows: int) -> Table:
    payload = base64.b64encode(bytes(PAYLOAD)).decode()
    store.put(f"{rows}.tsv", "".join(f"{i:08d}\t{payload}\n" for i in range(rows)).encode())
    write_index(store, f"{rows}.tsv")
    return Table(store, f"{rows}.tsv")


def rows_per_s(read: Callable[[int], object], order: list[int]) -> float:
    began = time.perf_counter()
    for i in order:
        read(i)
    return len(order) / (time.perf_counter() - began)


def tables(folder: Path) -> dict[str, list[float]]:
    """Rows per second of every round, in an order drawn anew."""
    store, found = FileStore(folder / "tables"), defaultdict[str, list[float]](list)
    for rows in ROWS:
        own = write_table(store, rows)
        plain = Reopening(store.root / f"{rows}.tsv", store.root / f"{rows}.lineidx")
        assert own.pair(7) == tuple(plain.row(7))
        for number in range(WARM + ROUNDS):
            order = np.random.default_rng(number).permutation(rows).tolist()
            found[f"row by row, {rows} rows"].append(rows_per_s(own.pair, order[:10_000]))
            found[f"reopened for each row, {rows} rows"].append(rows_per_s(plain.row, order[:REOPENED]))
            offsets = [int(own._ends[row]) for row in order[:1000]]
            found[f"index kept and table reopened, {rows} rows"].append(rows_per_s(plain.at, offsets))
    return {name: values[WARM:] for name, values in found.items()}


def ratios(found: dict[str, list[float]], above: str, below: str) -> dict[str, list[float]]:
    """Round by round, wherever both names come with the same addition."""
    ends = [name.removeprefix(above) for name in found if name.startswith(f"{above},")]
    pairs = {f"{above} / {below}{end}": (found[above + end], found[below + end]) for end in ends}
    return {name: [a / b for a, b in zip(*both, strict=True)] for name, both in pairs.items()}


def measure() -> dict[str, Any]:
    """Medians and rounds: MB/s, rows/s, and ratios."""
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="stream-"))
        memory = stack.enter_context(tempfile.TemporaryDirectory(prefix="stream-", dir=MEMORY))
        kind, bucket = stack.enter_context(server(Path(name) / "s3"))
        streams = Streaming(bucket, Path(memory)).measure()
        rows = tables(Path(memory))
    if not importlib.util.find_spec("awscrt"):
        print("awscrt is not installed (pip install awscrt): no download_file with the CRT")
    for above, below in (("cold cache", "bare ranged GETs"), ("cold cache", "download_file"),
                         ("warm cache", "local files")):  # fmt: skip
        streams |= ratios(streams, above, below)
    rows |= ratios(rows, "row by row", "reopened for each row")
    rows |= ratios(rows, "row by row", "index kept and table reopened")
    medians = {what: statistics.median(values) for what, values in (streams | rows).items()}
    return {"server": kind, "cores": os.cpu_count(), "threads": THREADS, "range_bytes": RANGE, "shard_bytes": SHARD,
            "shards": SHARDS, "medians": medians, "rounds": streams | rows}  # fmt: skip


def main() -> None:
    found = measure()
    print(
        f"S3 from {found['server']} on the same {found['cores']} cores, {SHARDS} shards of {SHARD >> 20} MiB, "
        f"{THREADS} threads a reader, ranges of {RANGE >> 20} MiB; {ROUNDS} rounds: MB/s, rows/s or ratios; "
        f"load average {os.getloadavg()[0]:.0f} at the end\n"
    )
    rows = [[what, f"{found['medians'][what]:.4g}", f"{min(values):.4g}..{max(values):.4g}"]
            for what, values in found["rounds"].items()]  # fmt: skip
    print(table(["what", "median", "range"], rows))


if __name__ == "__main__":
    main()
