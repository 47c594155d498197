"""Run folders: whole or absent, never mixed."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from poise.errors import PoiseError
from poise.runtime import run_folder as runs
from poise.runtime.downloads import cache_folder, cached, package_file
from poise.runtime.run_folder import Run


@dataclass(frozen=True)
class Config:
    output: str = "x"
    size: int = 3
    names: tuple[str, ...] = ("a", "b")


def test_open_writes_what_repeats_the_run(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", Config())
    assert runs.load_config_file(run.folder / "config.yaml") == {"output": "x", "size": 3, "names": ["a", "b"]}
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["versions"]["torch"]
    assert run.results is None
    with pytest.raises(PoiseError, match="value is nan, not a number"):
        run.finish({"value": float("nan")})
    assert run.results is None
    run.finish({"value": None, "list": (1.5, 2)})
    assert Run.open(tmp_path / "run", Config()).results == {"value": None, "list": [1.5, 2]}


def test_another_config_is_refused_but_a_moved_folder_is_not(tmp_path: Path) -> None:
    Run.open(tmp_path, Config())
    (tmp_path / "checkpoint.safetensors").touch()
    Run.open(tmp_path, Config(output="elsewhere"))
    with pytest.raises(PoiseError, match="differs in size"):
        Run.open(tmp_path, Config(size=4))


def test_a_file_by_another_of_its_names_is_no_other_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    Run.open("run", Config())
    (tmp_path / "run" / "checkpoint.safetensors").touch()
    assert Run(Path("run")).differs(Config(names=("./a/", str(tmp_path / "b")))) == []
    for names in (("b", "a"), ("a",), ("a", "c"), ("a", "b\0")):
        assert Run(Path("run")).differs(Config(names=names)) == ["names"]


def test_a_folder_without_results_or_checkpoints_is_taken_over(tmp_path: Path) -> None:
    run = Run.open(tmp_path, Config())
    run.log(step=0)
    Run.open(tmp_path, Config(size=4))
    assert runs.load_config_file(tmp_path / "config.yaml")["size"] == 4
    assert run.metrics() == []
    run.finish({})
    with pytest.raises(PoiseError, match="differs in size"):
        Run.open(tmp_path, Config(size=5))


@dataclass(frozen=True)
class Growing(Config):
    GROWS = ("size", "names")


def test_a_value_of_another_type_in_an_edited_config_is_a_change(tmp_path: Path) -> None:
    run = Run.open(tmp_path, Growing())
    run.finish({})
    (tmp_path / "config.yaml").write_text("size: '3'\nnames: [a, b]\n")
    with pytest.raises(PoiseError, match="differs in size"):
        Run.open(tmp_path, Growing(size=4))


def test_a_folder_of_another_command_is_named_by_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("num_seeds: 3\nheads_kl_coef: 0.1\n")
    Run(tmp_path).check_command(Config())  # nothing was computed there
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(PoiseError, match=r"is a run of `poise toy`; choose another folder"):
        Run.open(tmp_path, Config())


def test_rows_out_of_order_are_refused(tmp_path: Path) -> None:
    rows = [{"step": step} for step in (-1, 0, 0, 1, 2)]
    runs.write_jsonl(tmp_path / "rows.jsonl", rows)
    runs.keep_rows_before(tmp_path / "rows.jsonl", 2)
    assert [row["step"] for row in runs.read_rows(tmp_path / "rows.jsonl")] == [-1, 0, 0, 1]
    runs.write_jsonl(tmp_path / "rows.jsonl", rows[::-1])
    with pytest.raises(PoiseError, match=r"rows\.jsonl:2: a row of step 1 after one of step 2; bring the file back"):
        runs.keep_rows_before(tmp_path / "rows.jsonl", 2)


def test_a_finished_run_may_grow_and_not_shrink(tmp_path: Path) -> None:
    Run.open(tmp_path, Growing()).finish({"steps": 3})
    (tmp_path / "checkpoint.safetensors").touch()
    with pytest.raises(PoiseError, match="differs in size"):
        Run.open(tmp_path, Growing(size=2))
    with pytest.raises(PoiseError, match="differs in names, size"):
        Run.open(tmp_path, Growing(size=4, names=()))
    assert Run(tmp_path).results == {"steps": 3}
    assert Run.open(tmp_path, Growing(size=4)).results is None
    assert Run(tmp_path).differs(Growing(size=4)) == []
    with pytest.raises(PoiseError, match="differs in size"):  # it has been extended
        Run.open(tmp_path, Growing())


def test_a_list_grows_at_its_end_only(tmp_path: Path) -> None:
    Run.open(tmp_path, Growing(names=("b", "c"))).finish({"steps": 3})
    (tmp_path / "checkpoint.safetensors").touch()
    for other in (("c", "d"), ("c", "b", "c"), ("b",), ("b", "d", "e")):
        with pytest.raises(PoiseError, match="differs in names"):
            Run.open(tmp_path, Growing(names=other))
    assert Run.open(tmp_path, Growing(names=("b", "c", "a"))).results is None


def test_a_setting_that_an_old_run_lacks_had_its_default(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Newer(Config):
        tasks: tuple[str, ...] = ("lambada",)
        limits: dict[str, float] = field(default_factory=lambda: {"kl": 1.0})

    @dataclass(frozen=True, kw_only=True)
    class Needier(Config):
        prompts: str

    Run.open(tmp_path, Config()).finish({})
    Run.open(tmp_path, Newer(output="elsewhere"))
    with pytest.raises(PoiseError, match=r"differs in tasks\)"):
        Run.open(tmp_path, Newer(tasks=("race",)))
    with pytest.raises(PoiseError, match=r"differs in limits\)"):
        Run.open(tmp_path, Newer(limits={}))
    with pytest.raises(PoiseError, match=r"differs in prompts\)"):
        Run.open(tmp_path, Needier(prompts="some"))
    Run.open(tmp_path / "new", Newer()).finish({})
    with pytest.raises(PoiseError, match=r"differs in limits, tasks\)"):  # settings that are no more still count
        Run.open(tmp_path / "new", Config())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    runs.write_atomic(path, "old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        runs.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder"

    def build(fail: bool) -> None:
        with runs.write_folder_atomic(target) as scratch:
            (scratch / "a").write_text("new")
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(fail=True)
    assert list(tmp_path.iterdir()) == []
    build(fail=False)
    assert (target / "a").read_text() == "new"


def test_cache_builds_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path))
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "x").touch()

    assert cached("thing", build) == cached("thing", build) == tmp_path / "thing"
    assert len(built) == 1


def test_rows_after_the_checkpoint_are_dropped_and_a_cut_line_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    runs.keep_rows_before(path, 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


@pytest.mark.parametrize(
    ("steps", "first", "gone"),
    [([0, 1, 1, 2], 0, 0), ([1, 2], 1, 0), ([2], 0, 2), ([0, 2], 0, 1), (None, 0, 3), (None, 1, 2), (None, None, 0)],
)
def test_steps_that_are_gone_are_said(
    steps: list[int] | None, first: int | None, gone: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    if steps is not None:
        runs.write_jsonl(path, [{"step": step} for step in steps])
    runs.keep_rows_before(path, 3, first)
    said = capsys.readouterr().err
    of = f"{3 - (first or 0)} steps that were made, and so will the page; bring the file back to have them"
    assert said == (f"warning: {path} lacks {gone} of the {of}\n" if gone else "")


def test_unreachable_registry_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the registry cannot be reached
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with (
        pytest.raises(PoiseError, match="cannot get no-such-thing==1") as caught,
        package_file("no-such-thing==1", "0" * 64),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_file_of_the_registry_is_there_until_the_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        folder, pins = Path(command[-1]), Path(command[-3])
        assert pins.read_text() == f"thing==1 --hash=sha256:{'0' * 64}\n"
        (folder / "thing-1.tar.gz").write_text("content")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with package_file("thing==1", "0" * 64, source=True) as file:
        assert file.read_text() == "content"
    assert not file.exists()
    assert "--require-hashes" in asked[0]
    assert asked[0][asked[0].index("--no-binary") + 1] == ":all:"


@pytest.mark.parametrize("found", ["~/.cache/poise-rlhf", RuntimeError("no home")], ids=str)
def test_a_user_without_a_home_is_told_of_the_variable(
    found: str | RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def user_cache_dir(_name: str) -> str:
        if isinstance(found, RuntimeError):
            raise found
        return found

    monkeypatch.delenv("POISE_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_dir", user_cache_dir)
    with pytest.raises(PoiseError, match=r"no home folder to keep a cache in; set POISE_CACHE to a folder"):
        cache_folder()


def test_the_device_of_a_run_without_torch_is_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = sys.modules["torch"].get_num_threads()
    assert runs.environment()["device"].endswith(f"{threads} threads") or sys.modules["torch"].cuda.is_available()
    monkeypatch.delitem(sys.modules, "torch")
    assert runs.environment()["device"] == "cpu"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"[" * 5000, "is nested too deeply"), (b"\xff\xfe\x00", "cannot read config"), (b"a: b\0c", "is not valid YAML")],
)
def test_a_config_file_of_any_bytes_is_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(PoiseError, match=reason) as caught:
        runs.load_config_file(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)
