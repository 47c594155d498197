"""`poise ensemble`: what it refuses before a model is loaded, and that it may be made again."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from poise.errors import PoiseError
from poise.reward import ensemble
from poise.reward.config import EnsembleConfig


def test_one_member_is_no_ensemble() -> None:
    with pytest.raises(PoiseError, match=r"^an ensemble needs at least two reward models$"):
        EnsembleConfig(("a",), "x.jsonl").check()


def test_only_an_earlier_ensemble_is_written_over(
    preferences_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[tuple[Path, list[str]]] = []
    made = SimpleNamespace(layout=SimpleNamespace(num_heads=10), save=lambda *given: saved.append(given))
    monkeypatch.setattr(ensemble.Ensemble, "fit", lambda *_: made)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    members, target = (str(tmp_path / "a"), str(tmp_path / "b")), tmp_path / "both"
    config = EnsembleConfig(members, str(preferences_file), str(target))
    for earlier in ((), ("ensemble.json",), ("ensemble.json", ".ensemble.json.poise-host-1")):
        for name in earlier:
            target.mkdir(exist_ok=True)
            (target / name).touch()
        assert ensemble.run(config) == target
    assert saved == [(target, ["../a", "../b"])] * 3
    (target / "notes.txt").write_text("mine")
    with pytest.raises(PoiseError, match=r"both exists and is no earlier ensemble; choose another folder or delete it"):
        ensemble.run(config)
    (tmp_path / "file").touch()
    with pytest.raises(PoiseError, match=r"file exists and is no earlier ensemble"):
        ensemble.run(EnsembleConfig(members, str(preferences_file), str(tmp_path / "file")))
