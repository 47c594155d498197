"""The feature cache: what comes back is what went in, whatever happened to the files or the writers in between."""

import contextlib
import functools
import gc
import hashlib
import json
import multiprocessing
import os
import random
import signal
import struct
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
import torch

from forked import started
from poise.data.types import Sample
from poise.models import feature_cache as features
from poise.models.feature_cache import FeatureCache, row_keys, trunk_fingerprint
from poise.models.loading import HfModel
from poise.models.reward_model import HeadLayout, load_reward_model, load_trunk, save_reward_model
from poise.models.scorer import FeatureExtractor

HIDDEN = 3


def rows_of(texts: list[list[int]], hidden: int = HIDDEN) -> np.ndarray:
    """Features that say which text they belong to: (sum of ids, first id, 1/2, 1/3, …)."""
    rows = np.array([[1 / (j + 1) for j in range(hidden)] for _ in texts], np.float32)
    rows[:, 0], rows[:, 1] = [sum(ids) for ids in texts], [ids[0] for ids in texts]
    return rows


def filled(root: Path, texts: list[list[int]], **options: str) -> FeatureCache:
    with FeatureCache(root, "trunk", HIDDEN, **options) as cache:
        cache.insert(row_keys(texts), rows_of(texts))
    return cache


def segment_files(root: Path) -> list[Path]:
    return sorted(root.rglob("[!.]*.safetensors"))


TEXTS = [[7], [7, 1], [8, 2, 2], [70_000, 3]]


# ---- what goes in comes out ----


def test_keys_are_hashes_of_the_ids_as_32_bit_integers() -> None:
    keys = row_keys([[1, 2, 70_000], []])
    assert bytes(keys[0]) == hashlib.blake2b(struct.pack("<3i", 1, 2, 70_000), digest_size=16).digest()
    assert bytes(keys[1]) == hashlib.blake2b(b"", digest_size=16).digest()
    assert row_keys([]).shape == (0, 16)


def test_rows_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    filled(tmp_path, TEXTS[:2])
    filled(tmp_path, TEXTS[2:])  # a second segment
    asked = [TEXTS[2], TEXTS[0], [9, 9], TEXTS[2], TEXTS[3]]
    rows, found = FeatureCache(tmp_path, "trunk", HIDDEN).lookup(row_keys(asked))
    assert found.tolist() == [True, True, False, True, True]
    np.testing.assert_array_equal(rows[found], rows_of([asked[i] for i in (0, 1, 3, 4)]))
    assert np.isnan(rows[2]).all()


def test_rows_are_found_before_they_are_on_disk_and_after(tmp_path: Path) -> None:
    cache, reader = FeatureCache(tmp_path, "trunk", HIDDEN), FeatureCache(tmp_path, "trunk", HIDDEN)
    keys = row_keys(TEXTS)
    cache.insert(keys, rows_of(TEXTS))
    assert segment_files(tmp_path) == []
    np.testing.assert_array_equal(cache.lookup(keys)[0], rows_of(TEXTS))
    assert not reader.lookup(keys)[1].any()
    cache.flush()
    cache.flush()  # nothing left to write
    assert len(segment_files(tmp_path)) == 1
    for each in (cache, reader):  # a cache that was open sees what another wrote
        np.testing.assert_array_equal(each.lookup(keys)[0], rows_of(TEXTS))
        assert len(each) == 4


def test_what_was_inserted_is_a_copy(tmp_path: Path) -> None:
    cache, rows = FeatureCache(tmp_path, "trunk", HIDDEN), rows_of(TEXTS)
    cache.insert(row_keys(TEXTS), rows)
    rows[:] = 0
    np.testing.assert_array_equal(cache.lookup(row_keys(TEXTS))[0], rows_of(TEXTS))


def test_keys_that_hold_or_end_in_zero_bytes_are_keys_like_others(tmp_path: Path) -> None:
    keys = np.zeros((4, 16), np.uint8)
    keys[1, 0], keys[2, 7], keys[3, 15] = 1, 1, 1
    with FeatureCache(tmp_path, "trunk", HIDDEN) as cache:
        cache.insert(keys, rows_of([[1], [2], [3], [4]]))
    rows, found = FeatureCache(tmp_path, "trunk", HIDDEN).lookup(keys[::-1])
    assert found.all()
    assert rows[:, 1].tolist() == [4, 3, 2, 1]


def test_another_trunk_width_or_dtype_has_another_address(tmp_path: Path) -> None:
    keys = row_keys(TEXTS)
    filled(tmp_path, TEXTS)
    assert FeatureCache(tmp_path, "trunk", HIDDEN).lookup(keys)[1].all()
    others = [
        FeatureCache(tmp_path, "other", HIDDEN),
        FeatureCache(tmp_path, "trunk", HIDDEN + 1),
        FeatureCache(tmp_path, "trunk", HIDDEN, "float64"),
    ]
    for other in others:
        assert not other.lookup(keys)[1].any()
    assert len({cache.folder for cache in others}) == 3


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_features_come_back_in_the_dtype_they_went_in(tmp_path: Path, dtype: str) -> None:
    rows = np.array([[1 / 3, 1e-4, 2.0]], dtype)
    with FeatureCache(tmp_path, "trunk", HIDDEN, dtype) as cache:
        cache.insert(row_keys([[1]]), rows)
    got, _ = FeatureCache(tmp_path, "trunk", HIDDEN, dtype).lookup(row_keys([[1]]))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, rows)


def test_segments_are_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    filled(tmp_path, TEXTS)
    stored = load_file(segment_files(tmp_path)[0])
    np.testing.assert_array_equal(stored["keys"], row_keys(TEXTS))
    np.testing.assert_array_equal(stored["features"], rows_of(TEXTS))


# ---- when rows reach the disk ----


def test_segments_are_written_by_size_and_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "FLUSH_BYTES", 2 * HIDDEN * 4)
    cache = FeatureCache(tmp_path, "trunk", HIDDEN)
    written = []
    for text in TEXTS:
        cache.insert(row_keys([text]), rows_of([text]))
        written.append(len(segment_files(tmp_path)))
    assert written == [0, 1, 1, 2]
    monkeypatch.setattr(features, "FLUSH_SECONDS", 0.0)
    cache.insert(row_keys([[5]]), rows_of([[5]]))
    assert len(segment_files(tmp_path)) == 3


def test_a_forgotten_cache_is_written_all_the_same(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "trunk", HIDDEN)
    cache.insert(row_keys(TEXTS), rows_of(TEXTS))
    del cache
    gc.collect()
    assert FeatureCache(tmp_path, "trunk", HIDDEN).lookup(row_keys(TEXTS))[1].all()


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with FeatureCache(tmp_path / "file", "trunk", HIDDEN) as cache:
        cache.insert(row_keys(TEXTS), rows_of(TEXTS))
    assert "4 rows are not kept" in capsys.readouterr().err


def test_only_old_temporary_files_are_removed(tmp_path: Path) -> None:
    folder = filled(tmp_path, TEXTS).folder
    old, young = folder / ".old.safetensors", folder / ".young.safetensors"
    old.touch()
    young.touch()
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    assert FeatureCache(tmp_path, "trunk", HIDDEN).lookup(row_keys(TEXTS))[1].all()
    assert not old.exists()
    assert young.exists()


# ---- fetch ----


def test_fetch_computes_each_distinct_text_once_in_sort_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "ROWS_PER_INSERT", 2)
    filled(tmp_path, [[8, 2, 2]])
    computed: list[list[list[int]]] = []
    told: list[int] = []

    def compute(texts: list[list[int]]) -> torch.Tensor:
        computed.append(texts)
        return torch.from_numpy(rows_of(texts))

    asked = [[9, 1], [8, 2, 2], [3], [9, 1], [3, 4], [3]]
    with FeatureCache(tmp_path, "trunk", HIDDEN) as cache:
        got = cache.fetch(asked, row_keys(asked), compute, told.append)
    np.testing.assert_array_equal(got.numpy(), rows_of(asked))
    assert computed == [[[3], [3, 4]], [[9, 1]]]
    assert told == [3]  # one from the cache, two told twice

    again = FeatureCache(tmp_path, "trunk", HIDDEN).fetch(asked, row_keys(asked), compute)
    np.testing.assert_array_equal(again.numpy(), rows_of(asked))
    assert len(computed) == 2


def test_after_a_kill_the_rest_is_computed_in_the_same_company(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text's last bits depend on its batch: the batches of a run that was stopped are those of one that was not."""
    monkeypatch.setattr(features, "ROWS_PER_INSERT", 3)
    asked = [[i] for i in range(9)]

    def companies(folder: Path, stop_at: int | None) -> list[list[list[int]]]:
        seen: list[list[list[int]]] = []

        def compute(texts: list[list[int]]) -> torch.Tensor:
            if stop_at is not None and [stop_at] in texts:
                raise KeyboardInterrupt
            seen.append(texts)
            return torch.from_numpy(rows_of(texts))

        with contextlib.suppress(KeyboardInterrupt), FeatureCache(folder, "trunk", HIDDEN) as cache:
            cache.fetch(asked, row_keys(asked), compute)
        return seen

    for name in ("whole", "stopped"):
        filled(tmp_path / name, [[1], [4]])
    whole = companies(tmp_path / "whole", None)
    assert whole == [[[0], [2]], [[3], [5]], [[6], [7], [8]]]
    assert companies(tmp_path / "stopped", 5) + companies(tmp_path / "stopped", None) == whole


def test_fetch_keeps_what_was_computed_before_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "ROWS_PER_INSERT", 2)
    asked = [[1], [2], [3], [4]]

    def compute(texts: list[list[int]]) -> torch.Tensor:
        if [3] in texts:
            raise KeyboardInterrupt
        return torch.from_numpy(rows_of(texts))

    with pytest.raises(KeyboardInterrupt), FeatureCache(tmp_path, "trunk", HIDDEN) as cache:
        cache.fetch(asked, row_keys(asked), compute)
    found = FeatureCache(tmp_path, "trunk", HIDDEN).lookup(row_keys(asked))[1]
    assert found.tolist() == [True, True, False, False]


# ---- damage ----


def test_no_flipped_byte_anywhere_changes_a_row_that_is_returned(tmp_path: Path) -> None:
    path = next(iter(filled(tmp_path, TEXTS).folder.iterdir()))
    intact, keys, rows = path.read_bytes(), row_keys(TEXTS), rows_of(TEXTS)
    start = 8 + struct.unpack("<Q", intact[:8])[0]
    spans = {name: entry["data_offsets"] for name, entry in json.loads(intact[8:start]).items()}
    assert spans.keys() == {"keys", "checksums", "features"}
    refused = 0
    for position in range(len(intact)):
        flipped = bytearray(intact)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        cache = FeatureCache(tmp_path, "trunk", HIDDEN)
        got, found = cache.lookup(keys)
        np.testing.assert_array_equal(got[found], rows[found])
        where = next((name for name, (a, b) in spans.items() if a <= position - start < b), "header")
        if where == "header":
            assert found.all() or not found.any()
            refused += not found.any()
        else:
            assert found.sum() == 3
            assert cache.num_damaged == (0 if where == "keys" else 1)
            assert cache.num_damaged_files == 0
    assert refused > 50  # most of a header's bytes matter


def test_a_row_under_the_key_of_another_is_not_returned(tmp_path: Path) -> None:
    path = next(iter(filled(tmp_path, TEXTS).folder.iterdir()))
    keys = row_keys(TEXTS)
    first, second = keys[0].tobytes(), keys[1].tobytes()
    path.write_bytes(path.read_bytes().replace(first, b"?" * 16).replace(second, first).replace(b"?" * 16, second))
    cache = FeatureCache(tmp_path, "trunk", HIDDEN)
    assert cache.lookup(keys)[1].tolist() == [False, False, True, True]
    assert cache.num_damaged == 2


def test_a_file_cut_off_anywhere_is_deleted_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(iter(filled(tmp_path, TEXTS).folder.iterdir()))
    intact = path.read_bytes()
    for length in range(len(intact)):
        path.write_bytes(intact[:length])
        cache = FeatureCache(tmp_path, "trunk", HIDDEN)
        assert not cache.lookup(row_keys(TEXTS))[1].any()
        assert cache.num_damaged_files == 1
        assert not path.exists()
    assert "damaged file" in capsys.readouterr().err


def test_damaged_rows_are_computed_anew_and_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(iter(filled(tmp_path, TEXTS).folder.iterdir()))
    damaged = bytearray(path.read_bytes())
    whole = rows_of(TEXTS)
    for row in (1, 3):
        damaged[damaged.index(whole[row].tobytes())] ^= 0x10
    path.unlink()
    path.with_name(f"{0:032}.safetensors").write_bytes(damaged)  # the first copy that a reader meets

    computed: list[list[int]] = []

    def compute(texts: list[list[int]]) -> torch.Tensor:
        computed.extend(texts)
        return torch.from_numpy(rows_of(texts))

    asked = [*TEXTS, TEXTS[1]]
    with FeatureCache(tmp_path, "trunk", HIDDEN) as cache:
        np.testing.assert_array_equal(cache.fetch(asked, row_keys(asked), compute).numpy(), rows_of(asked))
        cache.lookup(row_keys(asked))
    assert computed == [TEXTS[1], TEXTS[3]]
    assert cache.num_damaged == 2
    assert capsys.readouterr().err == "feature cache: 2 damaged rows are computed anew\n"

    later = FeatureCache(tmp_path, "trunk", HIDDEN)  # has the damaged copy and the good one
    rows, found = later.lookup(row_keys(TEXTS))
    assert found.all()
    np.testing.assert_array_equal(rows, whole)
    assert later.num_damaged == 0
    assert capsys.readouterr().err == ""


# ---- several writers, and writers that are killed ----


WIDTH = 4000  # a segment takes long enough to write that kills come in the middle of one


def written(number: int) -> list[list[int]]:
    return [[number, i] for i in range(100)]


def write_some(root: Path, numbers: list[int], start: Event) -> None:
    start.wait()
    cache = FeatureCache(root, "trunk", WIDTH)
    for number in numbers:
        cache.insert(row_keys(written(number)), rows_of(written(number), WIDTH))
        cache.flush()


def test_a_segment_is_not_seen_before_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_first(file: int) -> None:
        reader = FeatureCache(tmp_path, "trunk", HIDDEN)
        looks.append((os.fstat(file).st_size > 0, len(reader), reader.num_damaged_files))

    looks: list[tuple[bool, int, int]] = []
    monkeypatch.setattr(features.os, "fsync", look_first)
    filled(tmp_path, TEXTS)
    assert looks == [(True, 0, 0)]
    assert len(FeatureCache(tmp_path, "trunk", HIDDEN)) == 4


@pytest.mark.slow
def test_two_processes_write_at_once(tmp_path: Path) -> None:
    start = multiprocessing.get_context("fork").Event()
    shares = [list(range(20)), list(range(10, 30))]
    writers = [started(functools.partial(write_some, tmp_path, share, start)) for share in shares]
    start.set()
    assert [writer.ended() for writer in writers] == [0, 0]
    assert len(segment_files(tmp_path)) == 40
    cache = FeatureCache(tmp_path, "trunk", WIDTH)
    for number in range(30):
        rows, found = cache.lookup(row_keys(written(number)))
        assert found.all()
        np.testing.assert_array_equal(rows, rows_of(written(number), WIDTH))


@pytest.mark.slow
def test_a_killed_writer_leaves_a_cache_that_can_be_read(tmp_path: Path) -> None:
    clock = random.Random(0)
    for _ in range(6):
        before = len(segment_files(tmp_path))
        start = multiprocessing.get_context("fork").Event()
        start.set()
        writer = started(functools.partial(write_some, tmp_path, list(range(5000)), start))
        while len(segment_files(tmp_path)) <= before:
            time.sleep(0.001)
        time.sleep(clock.uniform(0, 0.02))
        assert writer.killed() == -signal.SIGKILL
        cache = FeatureCache(tmp_path, "trunk", WIDTH)
        assert len(cache) == 100 * len(segment_files(tmp_path))
        for number in range(10):
            rows, found = cache.lookup(row_keys(written(number)))
            np.testing.assert_array_equal(rows[found], rows_of(written(number), WIDTH)[found])
            assert found.all() or (number > 0 and not found.any())  # each segment is there or not
        assert cache.num_damaged == cache.num_damaged_files == 0


# ---- trunks ----


def trunk(model: str, num_layers: int = 2) -> HfModel:
    return load_trunk(model, num_layers)[0]


def test_fingerprint_knows_the_trunk_and_not_its_heads(any_model: str, tmp_path: Path) -> None:
    classifier, tokenizer, *_ = load_trunk(any_model, 2)
    fingerprint = trunk_fingerprint(classifier)
    save_reward_model(tmp_path, classifier, tokenizer, torch.randn(4, 32), HeadLayout(2, "gaussian", (0.0,) * 4))
    assert trunk_fingerprint(classifier) == fingerprint
    assert trunk_fingerprint(load_reward_model(str(tmp_path))[0]) == fingerprint
    assert trunk_fingerprint(trunk(any_model)) == fingerprint


def test_fingerprint_changes_with_all_that_changes_features(tiny_model: str) -> None:
    seen = {trunk_fingerprint(trunk(tiny_model)), trunk_fingerprint(trunk(tiny_model, 3))}
    assert trunk_fingerprint(trunk(tiny_model).to(torch.bfloat16)) not in seen

    def changed() -> str:
        return trunk_fingerprint(classifier)

    classifier = trunk(tiny_model)
    weight = classifier.base_model.layers[1].mlp.down_proj.weight.data
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(torch.inf))
    seen.add(changed())
    classifier = trunk(tiny_model)
    classifier.base_model.rotary_emb.inv_freq *= 2
    seen.add(changed())
    classifier = trunk(tiny_model)
    classifier.config.rms_norm_eps = 1e-3
    seen.add(changed())
    classifier = trunk(tiny_model)
    layer = classifier.base_model.layers[0].self_attn
    layer.k_proj.weight.data, layer.v_proj.weight.data = layer.v_proj.weight.data, layer.k_proj.weight.data
    seen.add(changed())
    assert len(seen) == 6


def test_cached_features_are_those_of_the_trunk(tiny_model: str, tmp_path: Path) -> None:
    classifier, tokenizer, *_ = load_trunk(tiny_model, 2)
    extract = FeatureExtractor(classifier, tokenizer)
    samples = [Sample("Review a film.", "good"), Sample("Review a pan.", "bad pan"), Sample("Review a film.", "fine")]
    texts = [extract.encode(sample) for sample in samples]
    keys = row_keys([text.prompt + text.completion for text in texts])
    with FeatureCache.of(classifier, tmp_path) as cache:
        first = cache.fetch(texts[:2], keys[:2], extract.forward)
    cached = FeatureCache.of(trunk(tiny_model), tmp_path).fetch(texts, keys, extract.forward)
    torch.testing.assert_close(cached, extract(samples).cpu(), atol=1e-5, rtol=1e-5)
    assert torch.equal(cached[:2], first)
