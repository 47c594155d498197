"""Trunk features on disk: computed once per text, then shared by every head, seed, loss and objective.

A cache belongs to one trunk: its folder is named by a hash of the trunk's weights, dtype and pooling. In it a row is
addressed by a hash of the token ids that enter the trunk, which hold the text, the chat template and the truncation.

Segments are safetensors files of `keys` (N, 16), `checksums` (N,) and `features` (N, hidden), written whole under a
temporary name, renamed, and never changed. So a killed writer leaves nothing half written, and any number of
processes may write at once without a lock; a row that two of them wrote is the same row twice. Nothing is evicted: to
make room, `rm -r` the folder that `default_root` names, whenever no run is writing.

A cached row may differ from one computed anew in its last bits, as any two batches do (1e-5 in float32).
"""

import hashlib
import json
import os
import time
import uuid
import weakref
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8, UInt32
from safetensors.numpy import save
from torch import Tensor

from poise.models.families import feature_size
from poise.models.loading import HfModel
from poise.runtime.downloads import cache_folder
from poise.runtime.progress import console

POOLING = "hidden state of the last token"
FORMAT = 1
FLUSH_BYTES = 64 * 2**20  # a segment is about this large where rows come fast,
FLUSH_SECONDS = 20.0  # and this much work at most is lost to a kill where they come slowly
ROWS_PER_INSERT = 512

# Fields of a model's config that do not change the trunk's features: labels, provenance, what only generation reads,
# and the dtype, which the weights carry themselves. An unknown field counts: at worst features are computed again.
_IRRELEVANT = {
    "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "initializer_range", "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "poise",
    "problem_type", "return_dict", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64"}  # as safetensors calls them

Text = TypeVar("Text", bound=Any)
Keys = UInt8[np.ndarray, "rows 16"]
Rows = Float[np.ndarray, "rows hidden"]


def default_root() -> Path:
    """Where caches live unless told otherwise: `features` in Poise's cache folder ($POISE_CACHE)."""
    return cache_folder() / "features"


def trunk_fingerprint(classifier: HfModel) -> str:
    """A hash of all that makes a trunk's features: its weights and buffers, and its config; not the `score` layer."""
    trunk = classifier.base_model
    tensors = sorted([*trunk.named_parameters(), *trunk.named_buffers()], key=lambda entry: entry[0])

    def digest(entry: tuple[str, Tensor]) -> bytes:
        name, tensor = entry
        state = hashlib.blake2b(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return state.digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib works outside the interpreter's lock
        digests = list(pool.map(digest, tensors))
    config = {name: value for name, value in classifier.config.to_dict().items() if name not in _IRRELEVANT}
    return hashlib.blake2b(
        json.dumps(config, sort_keys=True, default=str).encode() + b"".join(digests), digest_size=16
    ).hexdigest()


def row_keys(tokens: Sequence[Sequence[int]]) -> Keys:
    """BLAKE2b of each row's token ids as 32-bit integers."""
    digests = (hashlib.blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=16).digest() for ids in tokens)
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)


class FeatureCache:
    """The rows of one trunk. Use it as a context manager, or call `flush`; the end of the process flushes too.

    num_damaged: rows found damaged and not to be had elsewhere, so far; they count as not found.
    num_damaged_files: segments that could not be read at all; they are deleted.
    """

    def __init__(self, root: Path, fingerprint: str, hidden: int, dtype: str = "float32"):
        """fingerprint: of the trunk, from `trunk_fingerprint`. hidden: numbers per row. dtype: as NumPy names it."""
        self.hidden, self.dtype = hidden, np.dtype(dtype)
        address = f"{FORMAT} {fingerprint} {hidden} {self.dtype.name} {POOLING}"
        self.folder = root / hashlib.blake2b(address.encode(), digest_size=16).hexdigest()
        self.num_damaged = self.num_damaged_files = 0
        self._said = False
        self._known: set[str] = set()
        self._segments: list[_Segment] = []
        # The index: every row's key, sorted, and where its row is. 16-byte strings sort fast and as one number.
        self._keys = np.empty(0, "S16")
        self._segment_of, self._row_of = np.empty(0, np.int32), np.empty(0, np.int32)
        self._pending: dict[bytes, np.ndarray] = {}
        self._pending_since = 0.0
        self._at_exit = weakref.finalize(self, _flush, self.folder, self._pending)
        _remove_abandoned(self.folder)
        self._refresh()

    @classmethod
    def of(cls, classifier: HfModel, root: Path | None = None) -> "FeatureCache":
        """The cache of a classifier's trunk, in `default_root` unless told otherwise."""
        return cls(root or default_root(), trunk_fingerprint(classifier), feature_size(classifier))

    def __enter__(self) -> "FeatureCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()

    def __len__(self) -> int:
        """Rows on disk that this process knows of, twice where two processes wrote them."""
        return len(self._keys)

    def fetch(
        self,
        texts: Sequence[Text],
        keys: Keys,
        compute: Callable[[list[Text]], Float[Tensor, "part hidden"]],
        progress: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "rows hidden"]:
        """Features in the order of `texts`, on the CPU: from the cache, else computed once per distinct key and kept.

        texts: what `compute` reads. Those to be computed reach it in their sort order, some hundred at a time, so
        that tokens which begin alike come together.
        keys: of the texts, from `row_keys`.
        compute: features of some of the texts; it reports its own progress.
        progress: told how many texts need no computing.
        """
        rows, found = self.lookup(keys)
        _, first, same = np.unique(_as_strings(keys), return_index=True, return_inverse=True)
        if progress:
            progress(len(keys) - int((~found[first]).sum()))
        ordered = sorted(first.tolist(), key=lambda i: texts[i])
        # The parts are cut before it is asked what is missing: after a kill the rest is computed in the same company
        # as it would have been, to the same last bit.
        for start in range(0, len(ordered), ROWS_PER_INSERT):
            part = [i for i in ordered[start : start + ROWS_PER_INSERT] if not found[i]]
            if part:
                rows[part] = compute([texts[i] for i in part]).cpu().numpy()
                self.insert(keys[part], rows[part])
        rows[~found] = rows[first[same[~found]]]
        return torch.from_numpy(rows)

    def lookup(self, keys: Keys) -> tuple[Rows, Bool[np.ndarray, " rows"]]:
        """(rows in the order of `keys`, which of them were found); a row that was not found is all NaN.

        What other processes have written since is seen. Every row is checked against its checksum.
        """
        rows = np.full((len(keys), self.hidden), np.nan, self.dtype)
        found = np.zeros(len(keys), bool)
        damaged = self._read(keys, rows, found)
        if self._pending:
            for i in np.flatnonzero(~found):
                if (row := self._pending.get(keys[i].tobytes())) is not None:
                    rows[i], found[i] = row, True
        if not found.all() and self._refresh():
            damaged |= self._read(keys, rows, found)
        self.num_damaged += len(np.unique(_as_strings(keys[damaged & ~found])))
        if self.num_damaged and not self._said:
            self._said = True
            console.print(f"feature cache: {self.num_damaged} damaged rows are computed anew")
        return rows, found

    def insert(self, keys: Keys, rows: Rows) -> None:
        """Keep rows; they reach the disk by FLUSH_BYTES, FLUSH_SECONDS, `flush` or the end of the process."""
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending.update(zip(map(bytes, keys), np.array(rows, self.dtype), strict=True))
        full = len(self._pending) * self.hidden * self.dtype.itemsize >= FLUSH_BYTES
        if full or time.monotonic() - self._pending_since >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is still in memory."""
        _flush(self.folder, self._pending)

    def _read(self, keys: Keys, rows: Rows, found: Bool[np.ndarray, " rows"]) -> Bool[np.ndarray, " rows"]:
        """Fill in those rows not yet found that the index has; returns which of them met a damaged copy.

        Damaged copies leave the index.
        """
        wanted, damaged = _as_strings(keys), np.zeros(len(keys), bool)
        pending = np.flatnonzero(~found)
        place = np.searchsorted(self._keys, wanted[pending])
        bad_places: list[np.ndarray] = []
        while True:  # once, and once more for each copy that turns out damaged
            here = place < len(self._keys)
            here[here] = self._keys[place[here]] == wanted[pending[here]]
            pending, place = pending[here], place[here]
            if not len(pending):
                break
            segments = self._segment_of[place]
            for number in np.unique(segments):
                mine = segments == number
                at, into = self._row_of[place[mine]], pending[mine]
                segment = self._segments[number]
                copies = segment.features[at]  # what is checked is what is returned, not the disk's next answer
                good = _checksums(keys[into], copies) == segment.checksums[at]
                rows[into[good]], found[into[good]] = copies[good], True
            bad = ~found[pending]
            damaged[pending[bad]] = True
            bad_places.append(place[bad])
            pending, place = pending[bad], place[bad] + 1
        if damaged.any():
            drop = np.unique(np.concatenate(bad_places))
            self._keys, self._segment_of, self._row_of = (
                np.delete(column, drop) for column in (self._keys, self._segment_of, self._row_of)
            )
        return damaged

    def _refresh(self) -> bool:
        """Take in the segments that were written since, by anyone; were there any?"""
        names = sorted(path.name for path in self.folder.glob("[!.]*.safetensors") if path.name not in self._known)
        parts = [(self._keys, self._segment_of, self._row_of)]
        for name in names:
            self._known.add(name)
            try:
                segment = _open_segment(self.folder / name, self.hidden, self.dtype)
            except OSError:  # gone, or not ours to read
                continue
            except (ValueError, TypeError, LookupError):
                self._discard(self.folder / name)
                continue
            count = len(segment.keys)
            where = np.full(count, len(self._segments), np.int32)
            parts.append((segment.keys, where, np.arange(count, dtype=np.int32)))
            self._segments.append(segment)
        if len(parts) == 1:
            return False
        joined, segment_of, row_of = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = np.argsort(joined, kind="stable")
        self._keys, self._segment_of, self._row_of = joined[order], segment_of[order], row_of[order]
        return True

    def _discard(self, path: Path) -> None:
        self.num_damaged_files += 1
        console.print("feature cache: a damaged file is deleted, its rows are computed anew")
        path.unlink(missing_ok=True)


# ---- segments ----


class _Segment(NamedTuple):
    """One file, mapped into memory: nothing is read before it is asked for."""

    keys: np.ndarray  # (N,) 16-byte strings
    checksums: UInt32[np.ndarray, " rows"]
    features: Rows


def _open_segment(path: Path, hidden: int, dtype: np.dtype) -> _Segment:
    """Raises ValueError, TypeError or LookupError if the file is not what `_write_segment` wrote."""
    whole = np.asarray(np.memmap(path, np.uint8, "r"))
    start = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    header = json.loads(whole[8:start].tobytes())
    count = header["keys"]["shape"][0]

    def tensor(name: str, code: str, kind: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        entry = header[name]
        begin, end = entry["data_offsets"]
        if entry["dtype"] != code or tuple(entry["shape"]) != shape or not 0 <= begin <= end <= len(whole) - start:
            raise ValueError(f"{name} is not as it was written")
        return whole[start + begin : start + end].view(kind).reshape(shape)

    return _Segment(
        _as_strings(tensor("keys", "U8", np.dtype(np.uint8), (count, 16))),
        tensor("checksums", "U32", np.dtype(np.uint32), (count,)),
        tensor("features", _DTYPES[dtype.name], dtype, (count, hidden)),
    )


def _write_segment(folder: Path, keys: Keys, rows: Rows) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{uuid.uuid4().hex}.safetensors"
    partial = folder / f".{name}"
    try:
        with partial.open("wb") as file:
            file.write(save({"keys": keys, "checksums": _checksums(keys, rows), "features": rows}))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / name)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _flush(folder: Path, pending: dict[bytes, np.ndarray]) -> None:
    """Write and forget. A cache that cannot be written costs time later; it is no reason to lose this run."""
    if not pending:
        return
    keys = np.frombuffer(b"".join(pending), np.uint8).reshape(-1, 16)
    try:
        _write_segment(folder, keys, np.stack(list(pending.values())))
    except OSError as error:
        console.print(
            f"feature cache: {len(pending)} rows are not kept, the folder cannot be written ({error.strerror})"
        )
    pending.clear()


def _remove_abandoned(folder: Path) -> None:
    """Delete what killed writers left under temporary names; a living writer needs seconds, not an hour."""
    for path in folder.glob(".*.safetensors"):
        try:
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()
        except OSError:  # another process was quicker
            continue


def _checksums(keys: Keys, rows: Rows) -> UInt32[np.ndarray, " rows"]:
    """CRC-32 of each row's key and numbers: sure to see any damage within four bytes, 1 us for 4 KB."""
    sums = (zlib.crc32(row, zlib.crc32(key)) for key, row in zip(keys, rows, strict=True))
    return np.fromiter(sums, np.uint32, len(keys))


def _as_strings(keys: Keys) -> np.ndarray:
    return np.ascontiguousarray(keys).view("S16").reshape(-1)
