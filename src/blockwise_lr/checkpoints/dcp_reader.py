"""Read torch.distributed.checkpoint's folders without executing code that a malicious one may contain."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from blockwise_lr.errors import UserError

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"},
}


class _Unpickler(pickle.Unpickler):
    """Unpickles only the classes that describe tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the description of tensors")


class SafeReader(FileSystemReader):
    """torch's reader of a checkpoint folder, restricted to unpickle only the classes that describe tensors.

    torch's own reader unpickles any class in the description. It reads the tensors themselves with
    ``torch.load(weights_only=True)``, which is safe.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the description of the tensors in the folder.

        Raises:
            UserError: the description is damaged, or contains other classes.
        """
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        try:
            with path.open("rb") as file:
                found = _Unpickler(file).load()
            if not isinstance(found, Metadata):
                raise pickle.UnpicklingError(f"it holds {type(found).__name__}")
        except Exception as error:  # pickle raises errors of many classes
            raise UserError(
                f"{path} is not a description of tensors ({error}): choose another checkpoint"
            ) from None
        if found.storage_meta is not None:
            found.storage_meta.load_id = self.load_id
        return found
