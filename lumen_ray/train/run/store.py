"""Shards of checkpoints in any store: `torch.distributed.checkpoint` over local folders and buckets."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, Any

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, LoadPlan
from torch.distributed.checkpoint.filesystem import FileSystemBase

from lumen_ray.data import files, urls

#: bytes of a bucket's file that are read ahead
READ_AHEAD = 16 << 20


class _Bucket(FileSystemBase):
    """A bucket in place of torch's file system; locations are URLs. Raises `StoreError`."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if mode == "wb":
            with files.open_output(path) as stream:
                yield stream
            return
        with files.open_input(path) as stream, io.BufferedReader(stream, READ_AHEAD) as buffered:
            yield buffered

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return urls.join(path, suffix)

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return str(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        files.move(path, new_path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        pass  # buckets have no folders

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return urls.is_url(checkpoint_id)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return files.exists(path)

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        files.remove(path)


class _BucketReader(FileSystemReader):
    """Reads each file forward and each tensor at once: torch makes several small reads for one, in a bucket a request
    each."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        plan = super().prepare_local_plan(plan)
        return replace(plan, items=sorted(plan.items, key=lambda item: self.storage_data[item.storage_index].offset))

    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        file.seek(sinfo.offset)
        return io.BytesIO(file.read(sinfo.length))


def writer(folder: urls.Location) -> FileSystemWriter:
    """Writes the shards of each rank to a folder or bucket, flushed to the disk."""
    # `sync_files` flushes all disks of the machine where a stream is no file
    return _moved(FileSystemWriter("", sync_files=False), folder) if urls.is_url(folder) else FileSystemWriter(folder)


def reader(folder: urls.Location) -> FileSystemReader:
    """Reads shards that `writer` wrote, of any number of ranks."""
    return _moved(_BucketReader(""), folder) if urls.is_url(folder) else FileSystemReader(folder)


def _moved(store: Any, bucket: urls.Location) -> Any:
    """A writer or reader of torch's over a bucket, as its own one for fsspec's file systems is made."""
    store.fs = _Bucket()
    store.path = store.fs.init_path(bucket)
    return store
