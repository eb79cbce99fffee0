"""Nothing that is loaded runs, and no name or text out of a file runs, escapes its folder or takes a page apart."""

from __future__ import annotations

import ast
import html.parser
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from synthetic_comparison import BASE, synthetic_compare

from blockwise_lr.compare.tables import print_summary
from blockwise_lr.compare.write_report import render
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import prepare_data
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.presets import Setting
from support.commands import call

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for name in ("src", "examples", "benchmarks", "studies") for path in (ROOT / name).rglob("*.py")
)
RUNS_WHAT_IT_READS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# Reads torch's own pickled descriptions, with an allow-list of classes: tests/distributed/test_sharded_checkpoints.py.
ALLOWED = {"src/blockwise_lr/checkpoints/dcp_reader.py": ["pickle"]}
TEMPLATES = [
    ROOT / "src" / "blockwise_lr" / "compare" / name for name in ("report_macros.html.j2", "report.html.j2")
]
SCRIPT, IMAGE, MARKUP = "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "[/red][bold]x"


def unsafe(source: str) -> list[str]:
    """What in a piece of Python can run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in modules if name.partition(".")[0] in RUNS_WHAT_IT_READS]
            found += ["torch.load by another name"] if modules == ["torch"] and "load" in names else []
        elif isinstance(node, ast.Call):
            found += _unsafe_call(
                ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            )
        elif isinstance(node, ast.Dict):
            given = {
                ast.unparse(key): ast.unparse(value) for key, value in zip(node.keys, node.values) if key
            }
            found += [key for key in ("'trust_remote_code'", "'allow_pickle'") if given.get(key) == "True"]
    return found


def _unsafe_call(name: str, given: dict[str | None, str]) -> list[str]:
    found = (
        [name]
        if name
        in (
            "eval",
            "exec",
            "os.system",
            "yaml.load",
            "yaml.unsafe_load",
            "torch.jit.load",
            "FileSystemReader",
        )
        else []
    )
    if name == "torch.load" and given.get("weights_only") != "True":
        found.append(name)
    return found + [
        f"{flag}=True"
        for flag in ("allow_pickle", "trust_remote_code", "shell")
        if given.get(str(flag)) == "True"
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_run_what_it_reads(path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), [])
    assert unsafe(path.read_text(encoding="utf-8")) == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import joblib.memory as m",
        "from dill import loads",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=careful)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, **{'trust_remote_code': True})",
        "yaml.load(text)",
        "eval(text)",
        "FileSystemReader(folder).read_metadata()",
        "exec(text)",
        "subprocess.run(text, shell=True)",
        "def f():\n    return [torch.load(p) for p in paths]",
    ],
)
def test_that_walk_finds_what_it_looks_for(source: str) -> None:
    assert unsafe(source)


def test_that_walk_lets_pass_what_is_safe() -> None:
    safe = (
        "model.eval(); torch.load(p, weights_only=True); load(p); from_pretrained(n, trust_remote_code=asked)"
    )
    assert unsafe(safe) == []
    assert len(SOURCES) > 100


class Page(html.parser.HTMLParser):
    """The tags of a page, the attributes that could run or load something, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.active: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.active += [
            (name, value)
            for name, value in attributes
            if name.startswith("on") or (name in ("src", "href") and not str(value).startswith("data:image/"))
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison whose arms, preset and, in its runs' config.json, machine, versions and text are hostile."""
    above = tmp_path_factory.mktemp("above")
    out = above / "inner" / "out"
    base = replace(
        BASE, preset=SCRIPT, report_to=IMAGE, data=replace(BASE.data, text_field=IMAGE, hf_config=SCRIPT)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blockwise_lr.train.checks.report_names", lambda config: [])
        arms = [f"../../{MARKUP}=adamw:uniform", f"{IMAGE}=adamw:emb=2"]
        tuned = {f"adamw:{key}": Setting(2e-3) for key in ("uniform:N", "uniform:2N", "emb=2:N")}
        synthetic_compare(out, arms, base=base, tuned=tuned, command=f"compare {SCRIPT}")
    for path in out.glob("runs/*/config.json"):
        facts: dict[str, Any] = json.loads(path.read_text())
        facts |= {"hardware": {SCRIPT: IMAGE}, "versions": {IMAGE: SCRIPT}, "git_commit": SCRIPT}
        facts["data"] = {"source": SCRIPT, "tokenizer": IMAGE, "splits": {SCRIPT: {IMAGE: MARKUP}}}
        path.write_text(json.dumps(facts))
    render(out)
    return out


class TestComparison:
    def test_no_string_of_a_config_json_becomes_markup_on_the_page(self, hostile: Path) -> None:
        page = Page((hostile / "report.html").read_text())
        assert page.tags <= Page("".join(path.read_text(encoding="utf-8") for path in TEMPLATES)).tags | {
            "th",
            "td",
        }
        assert "script" not in page.tags
        assert page.active == []
        for text in (SCRIPT, IMAGE, MARKUP, f"../../{MARKUP}"):
            assert text in page.text

    def test_no_name_leads_out_of_the_folder(self, hostile: Path) -> None:
        above = hostile.parents[1]
        assert below(above) - below(hostile) == {hostile.parent, hostile}
        assert not [path for path in below(hostile) if set(path.name) & set("<>[]\"'")]

    def test_the_summary_shows_names_with_brackets_as_they_are(
        self, hostile: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        content = json.loads((hostile / "compare.json").read_text())
        print_summary(content, hostile, Console(width=400))
        assert MARKUP in capsys.readouterr().out


@pytest.fixture
def here(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory two folders deep, with a configuration on a text full of markup and special tokens."""
    folder = tmp_path / "a" / "b"
    texts = folder / MARKUP.replace("/", "")
    texts.mkdir(parents=True)
    for i in range(16):
        (texts / f"{i:02}.txt").write_text(f"<|endoftext|>{SCRIPT}{IMAGE}{MARKUP}\x1b[31m ../../x \0" * 9)
    config = replace(
        tiny, steps=2, save_every=0, eval_every=0, data=DataConfig(data=texts.name, cache="cache")
    )
    (folder / "tiny.json").write_text(json.dumps(config.to_dict()))
    monkeypatch.chdir(folder)
    return folder


def test_a_run_named_like_markup_on_such_a_text_stays_in_its_folder(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = below(here.parents[1])
    name = "[/red] <script>\n"
    for command in (
        ["train", "tiny.json", "--out", name],
        ["train", "tiny.json", "--out", name],
        ["generate", name, "--prompt", SCRIPT[:3], "--tokens", "3"],
        ["sharpness", name, "--batches", "2", "--out", "found"],
    ):
        code, _, err = call(capsys, *command)
        assert code == 0, err
        assert "\x1b" not in err
    new = below(here.parents[1]) - before
    assert {path.relative_to(here).parts[0] for path in new} == {Path(name).parts[0], "cache", "found"}


def test_a_text_is_cached_below_the_cache_whatever_it_is_called(here: Path) -> None:
    texts = here / MARKUP.replace("/", "")
    before = below(here.parents[1])
    for data in (f"../b/./{texts.name}", str(texts), f"{texts.name}/../{texts.name}"):
        prepare_data(DataConfig(data=data, cache="cache", text_field="../../x"), vocab_size=300, context=16)
    assert {path.relative_to(here).parts[0] for path in below(here.parents[1]) - before} == {"cache"}


def test_special_tokens_written_in_a_text_are_text(here: Path) -> None:
    data = prepare_data(DataConfig(data=MARKUP.replace("/", ""), cache="cache"), vocab_size=300, context=16)
    tokens = data.train.read(0, data.train.n_tokens)
    assert (tokens == 0).sum() == data.train.n_documents


@pytest.mark.parametrize("preset", ["../../x", "/tmp/x", "..", "", "a/b", SCRIPT, "a\nb"])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_configuration_does_not_choose_where_a_run_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], preset: str, command: str
) -> None:
    config = json.loads((here / "tiny.json").read_text())
    (here / "tiny.json").write_text(json.dumps(config | {"preset": preset}))
    before = below(here.parents[1])
    code, out, err = call(capsys, command, "tiny.json")
    assert (code, out) == (2, "")
    assert "as its preset; expected letters, digits" in err
    assert below(here.parents[1]) == before


@pytest.mark.parametrize(
    "command",
    ["train quickstart --data {} --out out", "eval {}", "inspect {}", "{}", "sharpness {}", "train {}.json"],
)
def test_no_escape_sequence_of_a_name_reaches_the_terminal(
    here: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    name = shlex.quote("./\x1b[31mred\x07\x9b2J\r\n.txt")
    code, _, err = call(capsys, *shlex.split(command.format(name)))
    assert code == 2
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()


def test_inspect_shows_patterns_with_brackets_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    code, out, err = call(
        capsys, "inspect", "quickstart", "--verbose", "--blocks", "[a-z]?model[./norm]+weight=norm"
    )
    assert code == 0, err
    assert "[a-z]?model[./norm]+weight" in out
