"""Megatron core 0.12 writes checkpoints with a PyTorch that wants the format of their items."""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties
from torch.distributed.checkpoint.planner import MetadataIndex, TensorWriteData, WriteItem, WriteItemType

from trainer.megatron.compat import WRITER, checkpoints_outlive_signals, name_the_format


@pytest.fixture
def core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with core's module, which imports the same function of PyTorch."""
    *packages, module = WRITER.split(".")
    folder = tmp_path
    for name in packages:
        folder = folder / name
        folder.mkdir()
        (folder / "__init__.py").touch()
    line = "from torch.distributed.checkpoint.filesystem import _write_item\n_results_queue = None\n"
    (folder / f"{module}.py").write_text(line, encoding="utf-8")
    forget()  # any folder of that name in sys.path is a package
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    forget()


def forget() -> None:
    """Make the next import of megatron a new one."""
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
        del sys.modules[name]


@pytest.mark.usefixtures("core")
def test_an_item_is_written_as_core_calls_it():
    writer = importlib.import_module(WRITER)
    value = torch.arange(6.0)
    index = MetadataIndex("weight", torch.Size([0]))
    chunk = ChunkStorageMetadata(offsets=torch.Size([0]), sizes=value.shape)
    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(value), value.shape)
    item = WriteItem(index, WriteItemType.SHARD, tensor_data=data)
    arguments = (_StorageWriterTransforms(), io.BytesIO(), value, item, "__0_0.distcp")
    with pytest.raises(TypeError, match="serialization_format"):  # what 0.12 runs into
        writer._write_item(*arguments)
    name_the_format()
    stream = io.BytesIO()
    result = writer._write_item(arguments[0], stream, *arguments[2:])
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=True), value) and result.size_in_bytes > 0
    # Newer ones name it themselves.
    writer._write_item(*arguments, serialization_format=SerializationFormat.TORCH_SAVE)


@pytest.mark.usefixtures("core")
def test_the_queue_of_results_outlives_a_stop_signal():
    handler = signal.getsignal(signal.SIGTERM)
    with checkpoints_outlive_signals():
        queue = importlib.import_module(WRITER)._results_queue
        (server,) = multiprocessing.active_children()
        assert server.pid is not None and signal.getsignal(signal.SIGTERM) == handler
        os.kill(server.pid, signal.SIGTERM)
        queue.put("written")
        assert queue.get(timeout=10) == "written"
    assert not server.is_alive()


def test_without_megatron_there_is_nothing_to_do():
    name_the_format()
    assert WRITER not in sys.modules
