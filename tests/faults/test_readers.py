"""What reads files: any bytes, any JSON, any damage gives the one error that is caught, or what was written."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwise_lr import DirectionalReport, SharpnessReport
from blockwise_lr.blocks import Block
from blockwise_lr.checkpoints.manifest import MANIFEST, problem_with, seal
from blockwise_lr.data.shards import HEADER, SPLITS, load_shards
from blockwise_lr.data.sources import FileSource
from blockwise_lr.data.tokenize import write_shards
from blockwise_lr.data.vocabulary import Encoder, train_bpe
from blockwise_lr.errors import UserError
from blockwise_lr.optim.ratios import resolve_ratios
from blockwise_lr.sharpness.histogram import Histogram
from blockwise_lr.sharpness.parameter_parts import Part
from blockwise_lr.train.config import TrainConfig, config_from_dict
from blockwise_lr.train.ratio_text import parse_ratios

T = TypeVar("T")

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -1])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
BYTES = st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 100_000)
FAST = settings(max_examples=150, deadline=None)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON value, the whole one left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


def one_replaced(value: Any) -> st.SearchStrategy[Any]:
    """The JSON value with one of the values in it replaced by any other."""

    def replaced(path: tuple[Any, ...], new: Any) -> Any:
        changed = inner = copy.deepcopy(value)
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = new
        return changed

    return st.builds(replaced, st.sampled_from(list(places(value))), JSON)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One bit the other way, or an end cut off."""
    where, bit = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(0, 7))
    if draw(st.booleans()):
        return lambda content: content[: int(where * len(content))]

    def flip(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[int(where * len(content))] ^= 1 << bit
        return bytes(changed)

    return flip


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three small files, one in a folder of its own."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint-3"
    (folder / "inner").mkdir(parents=True)
    for name, content in (("a.bin", bytes(range(99))), ("b.json", b'{"x": 1}'), ("inner/c", b"c")):
        (folder / name).write_bytes(content)
    seal(folder)
    assert problem_with(folder) is None
    return folder


class TestManifest:
    @FAST
    @given(content=BYTES)
    def test_of_anything_else_vouches_for_nothing(self, sealed: Path, content: bytes) -> None:
        whole = (sealed / MANIFEST).read_bytes()
        (sealed / MANIFEST).write_bytes(content)
        try:
            assert problem_with(sealed)
        finally:
            (sealed / MANIFEST).write_bytes(whole)

    @FAST
    @given(data=st.data())
    def test_with_a_value_replaced_is_never_an_exception(self, sealed: Path, data: st.DataObject) -> None:
        whole = (sealed / MANIFEST).read_text()
        changed = data.draw(one_replaced(json.loads(whole)))
        (sealed / MANIFEST).write_text(json.dumps(changed))
        try:
            untouched = changed["files"] == json.loads(whole)["files"]
            assert (problem_with(sealed) is None) == untouched
        finally:
            (sealed / MANIFEST).write_text(whole)

    @pytest.mark.parametrize("name", ["a.bin", "b.json", "inner/c"])
    @FAST
    @given(damage=damages())
    def test_notices_every_bit_and_every_cut(self, sealed: Path, name: str, damage: Any) -> None:
        whole = (sealed / name).read_bytes()
        (sealed / name).write_bytes(damage(whole))
        try:
            assert name in (problem_with(sealed) or "")
        finally:
            (sealed / name).write_bytes(whole)

    @FAST
    @given(damage=damages())
    def test_damaged_itself_is_a_problem_or_says_the_same_of_the_files(
        self, sealed: Path, damage: Any
    ) -> None:
        whole = (sealed / MANIFEST).read_bytes()
        (sealed / MANIFEST).write_bytes(damage(whole))
        try:
            if problem_with(sealed) is None:
                assert json.loads(damage(whole))["files"].items() <= json.loads(whole)["files"].items()
        finally:
            (sealed / MANIFEST).write_bytes(whole)

    def test_a_name_that_no_file_can_have_is_no_exception(self, sealed: Path, tmp_path: Path) -> None:
        copied = shutil.copytree(sealed, tmp_path / "checkpoint-3")
        for name in ("x" * 5000, "a\0b", "\udcff", "/", ""):
            (copied / MANIFEST).write_text(json.dumps({"files": {name: {"bytes": 1, "sha256": ""}}}))
            assert problem_with(copied)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small folder of shards, and the hash of its tokenizer."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "text.jsonl").write_text('{"text": "war and peace"}\n' * 32)
    encoder = Encoder(train_bpe(["war and peace"] * 9, 260), 0)
    write_shards(FileSource("text", [folder / "text.jsonl"]), encoder, folder / "built", 16)
    return folder / "built", encoder.sha256


class TestShards:
    @FAST
    @given(content=BYTES)
    def test_a_header_of_anything_else_is_a_user_error(
        self, shards: tuple[Path, str], content: bytes
    ) -> None:
        self.check(shards, HEADER, content)

    @FAST
    @given(data=st.data())
    def test_a_header_with_a_value_replaced_is_a_user_error_or_the_same_tokens(
        self, shards: tuple[Path, str], data: st.DataObject
    ) -> None:
        changed = data.draw(one_replaced(json.loads((shards[0] / HEADER).read_bytes())))
        self.check(shards, HEADER, json.dumps(changed).encode(), may_pass=True)

    @pytest.mark.parametrize("split", SPLITS)
    @FAST
    @given(damage=damages())
    def test_every_bit_and_every_cut_is_noticed(
        self, shards: tuple[Path, str], split: str, damage: Any
    ) -> None:
        name = f"{split}/shard-00000.bin"
        self.check(shards, name, damage((shards[0] / name).read_bytes()))

    @pytest.mark.parametrize("name", ["../text.jsonl", "/etc/passwd", "train/../../text.jsonl"])
    def test_no_file_outside_the_folder_is_read(self, shards: tuple[Path, str], name: str) -> None:
        header = json.loads((shards[0] / HEADER).read_bytes())
        header["splits"]["train"]["shards"][0]["file"] = name
        self.check(shards, HEADER, json.dumps(header).encode())

    def check(self, shards: tuple[Path, str], name: str, content: bytes, may_pass: bool = False) -> None:
        folder, tokenizer = shards
        before = {split: each.read(0, each.n_tokens) for split, each in load_shards(*shards)[0].items()}
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        try:
            after = load_shards(folder, tokenizer)[0]
            assert may_pass or content == whole
            assert all((after[split].read(0, len(old)) == old).all() for split, old in before.items())
        except UserError as error:
            assert str(folder) in str(error)  # noqa: PT017 (which files pass is not known beforehand)
        finally:
            (folder / name).write_bytes(whole)


def sharpness_report() -> SharpnessReport:
    return SharpnessReport.from_draws(
        [Part("layer.0.qk", Block.QK, "layer.0", 4), Part("layer.0.norm", Block.NORM, "layer.0", 2)],
        [torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 3.0]])],
        [3, 5],
        estimator="fisher",
        method="by hand",
        seed=0,
        step=7,
        histograms={Block.QK: Histogram(-3.0, 0.1, [1, 2], 1)},
    )


def directional_report() -> DirectionalReport:
    numbers = torch.tensor([[1.0, 2.0], [2.0, 3.0]], dtype=torch.float64)
    return DirectionalReport.from_draws(
        [Block.QK, Block.FFN],
        signals=numbers,
        curvatures=torch.stack([torch.diag(row) for row in numbers]),
        noise=numbers * 1e-3,
        samples=[3, 5],
        hessians=None,
        lrs=[1e-3, 2e-3],
        ratios=[1.0, 2.0],
        numels=[4, 8],
        step=7,
    )


SHARPNESS, DIRECTIONAL = (
    json.loads(json.dumps(report().to_dict())) for report in (sharpness_report, directional_report)
)
READERS = {"sharpness": SharpnessReport.from_json, "directional": DirectionalReport.from_json}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report") / "report.json"


def read_or_refused(read: Callable[[Path], T], path: Path, content: dict[str, Any]) -> T | None:
    """The report; None if it is refused with the path, since which files pass is not known beforehand."""
    path.write_text(json.dumps(content))
    try:
        return read(path)
    except ValueError as error:
        assert "report.json: " in str(error)  # noqa: PT017
        return None


class TestReports:
    @pytest.mark.parametrize("kind", READERS)
    @FAST
    @given(content=BYTES)
    def test_of_anything_else_is_a_value_error_with_the_path(
        self, path: Path, kind: str, content: bytes
    ) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="report.json: "):
            READERS[kind](path)

    @FAST
    @given(content=one_replaced(SHARPNESS))
    def test_of_sharpness_with_a_value_replaced(self, path: Path, content: dict[str, Any]) -> None:
        report = read_or_refused(SharpnessReport.from_json, path, content)
        if report is None:
            return
        report.to_json(path)
        assert SharpnessReport.from_json(path).to_dict() == report.to_dict()
        assert report.table().row_count

    @FAST
    @given(content=one_replaced(DIRECTIONAL))
    def test_directional_with_a_value_replaced(self, path: Path, content: dict[str, Any]) -> None:
        report = read_or_refused(DirectionalReport.from_json, path, content)
        if report is None:
            return
        assert all(slope.verdict for slope in report.values())
        assert len(report.matrix) == len(report)

    @FAST
    @given(
        content=BYTES
        | (one_replaced(SHARPNESS) | one_replaced(DIRECTIONAL)).map(lambda v: json.dumps(v).encode())
    )
    def test_as_ratios_is_a_value_error_or_ratios_that_a_run_can_have(
        self, path: Path, content: bytes
    ) -> None:
        path.write_bytes(content)
        try:
            ratios = resolve_ratios(parse_ratios(str(path)))
        except ValueError as error:
            assert str(error)  # noqa: PT017 (which files pass is not known beforehand)
            return
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios.values())


class TestConfiguration:
    @FAST
    @given(values=JSON)
    def test_of_anything_else_is_a_user_error(self, values: Any) -> None:
        if values == {}:
            assert config_from_dict(values) == TrainConfig()
            return
        with pytest.raises(UserError, match="^configuration: "):
            config_from_dict(values)

    @FAST
    @given(values=one_replaced(TrainConfig().to_dict()))
    def test_with_a_value_replaced_is_a_user_error_or_what_it_says(self, values: dict[str, Any]) -> None:
        try:
            config = config_from_dict(values)
        except UserError as error:
            assert str(error).startswith("configuration: ")  # noqa: PT017 (which pass is not known beforehand)
            return
        again = config_from_dict(json.loads(json.dumps(config.to_dict())))
        assert json.dumps(again.to_dict()) == json.dumps(config.to_dict())
