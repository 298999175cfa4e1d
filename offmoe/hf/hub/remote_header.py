"""Read the header of a safetensors shard or a GGUF file on the Hub by range requests: 64 KiB of most, no weights.

`HfApi.get_safetensors_metadata` does not replace this (huggingface_hub 2.4.0). It returns tensor offsets relative to
the end of the header, but neither the header's length nor the file's size, so a tensor cannot be located in the file
and a shard that was cut short is not noticed. It reads a whole answer into memory, so a server that ignores ranges
sends it whole shards. It asks for every shard and the index again, also for those in the Hub cache, takes no cache_dir,
and does not retry.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from offmoe.errors import CheckpointError
from offmoe.storage.gguf import FIRST_READ, GgufHead, parse_gguf
from offmoe.storage.header import ShardHead, header_end

TIMEOUT_S = 10.0
"""How long to wait for an answer of the Hub. It is huggingface_hub's default for downloads; for API calls that has
none."""
HEAD_BYTES = 1 << 16
"""Size of the first request. Nearly all headers are smaller: 6 KB in Mixtral's shards, 85 KB in DeepSeek-V3's."""
RETRIES = 2
"""Repetitions of a failed request; with their waits, 3 s in all."""


def read_remote_head(name: str, commit: str, token: str | bool | None, file: str, path: Path) -> ShardHead:
    """The header of a shard on the Hub, and the shard's size.

    Args:
        name: the repository, "owner/name".
        commit: the commit to read from.
        token: as huggingface_hub takes it.
        file: the shard's name in the repository.
        path: where the shard would be in the Hub cache; for messages.

    Raises:
        CheckpointError: the server does not send parts of files, or the file is no safetensors file.
        Exception: whatever huggingface_hub and its transport raise.
    """
    data, size = _read_range(name, commit, token, file, 0, HEAD_BYTES)
    end = header_end(data, size, path)
    if end > len(data):
        data += _read_range(name, commit, token, file, len(data), end)[0]
    return ShardHead(data[:end], size)


def read_remote_gguf(name: str, commit: str, token: str | bool | None, file: str, path: Path) -> GgufHead:
    """The header of a GGUF file on the Hub, by growing ranges. Arguments as `read_remote_head`.

    Raises:
        OffmoeError: what `parse_gguf` raises, or the server does not send parts of files.
        Exception: whatever huggingface_hub and its transport raise.
    """
    first, size = _read_range(name, commit, token, file, 0, FIRST_READ)

    def read(offset: int, count: int) -> bytes:
        return first[:count] if offset == 0 else _read_range(name, commit, token, file, offset, offset + count)[0]

    return parse_gguf(read, size, path)


def _read_range(name: str, commit: str, token: str | bool | None, file: str, start: int, end: int) -> tuple[bytes, int]:
    """Bytes [start, end) of a file, fewer if it is shorter, and the size of the whole file."""
    headers = {
        **build_hf_headers(token=token),
        "Range": f"bytes={start}-{end - 1}",
        "Accept-Encoding": "identity",  # a range of a compressed answer counts compressed bytes
    }
    url = hf_hub_url(name, file, revision=commit)
    with http_stream_backoff("GET", url, headers=headers, timeout=TIMEOUT_S, max_retries=RETRIES) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:  # the body would be the whole file
            raise CheckpointError(
                f"model {name!r}: the server does not send parts of {file!r}; download the model with "
                "`hf download` and give the folder"
            )
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
        data = b"".join(response.iter_bytes())
    if not size.isdecimal() or len(data) != min(end, int(size)) - start:
        raise CheckpointError(f"model {name!r}: the server sent another part of {file!r}; try again")
    return data, int(size)
