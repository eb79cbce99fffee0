"""Models and reports that cannot be used, and the commands on models with wrong arguments."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

from faults.bad_files import seal_again
from faults.bad_inputs import Bad, Make, both, cut, field, file, remove

EVAL, GENERATE = "eval plain --data text", "generate run"
CODE = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
MINE = """\
def broken():
    raise RuntimeError("no luck")
def number():
    return 3
"""


def plain(what: str, *says: str, make: Make) -> Bad:
    """`eval` of a Hugging Face folder that is broken so."""
    return Bad(f"model: {what}", EVAL, says, make)


def model_field(name: str, value: object) -> Make:
    """Replaces one field of the Hugging Face model's config.json."""
    return field(name, value, "plain/config.json")


def not_finite() -> None:
    """One weight of the Hugging Face model is NaN."""
    weights = load_file("plain/model.safetensors")
    next(tensor for tensor in weights.values() if tensor.ndim == 2)[0, 0] = float("nan")
    save_file(weights, "plain/model.safetensors", metadata={"format": "pt"})


def pickled(path: str) -> Make:
    """A file that torch wrote, with a function in it, which only unpickling without care would load."""
    return lambda: torch.save({"weight": print}, path)


def optimizer(what: str, *says: str, make: Make) -> Bad:
    """`sharpness --directional` of a checkpoint whose optimizer was saved so."""
    command = "sharpness run/checkpoint-4 --directional --batches 2"
    return Bad(f"optimizer.pt: {what}", command, says, both(make, seal_again))


OPTIMIZER = "run/checkpoint-4/optimizer.pt"
# fmt: off
FOLDERS = [
    plain("no config.json", "plain holds neither a run nor a model (no config.json)",
        make=remove("plain/config.json")),
    plain("config.json is not JSON", "config.json cannot be read", make=file("plain/config.json", "{")),
    plain("config.json is a list", "Unrecognized model", make=file("plain/config.json", "[]")),
    plain("an unknown kind", "cannot be loaded: ValueError", "`unheard-of`", make=model_field("model_type",
        "unheard-of")),
    plain("remote code", "contains custom code which must be executed", make=both(
        model_field("model_type", "mine"), model_field("auto_map", CODE), file("plain/mine.py",
        "raise SystemExit('it ran')"))),
    plain("a classifier", "is a BertForSequenceClassification: expected a causal or a masked language model",
          make=model_field("architectures", ["BertForSequenceClassification"])),
    plain("architectures of a number", "cannot be loaded: TypeError", make=model_field("architectures", 3)),
    plain("a width of text",
        "Validation error for field 'hidden_size': TypeError: Field 'hidden_size' expected int",
          make=model_field("hidden_size", "x")),
    plain("another width", "has shape", "in the file and", "by config.json: they are of two models",
          make=model_field("hidden_size", 16)),
    plain("more layers", "has no weights for model.layers.1.", make=model_field("num_hidden_layers", 2)),
    plain("no weights", "cannot be loaded: OSError: Error no file named model.safetensors",
        make=remove("plain/model.safetensors")),
    plain("truncated weights", "cannot be loaded: SafetensorError", make=cut("plain/model.safetensors")),
    plain("weights that are none", "cannot be loaded: SafetensorError", make=file("plain/model.safetensors",
        b"\xff" * 99)),
    plain("pickled code", "cannot be loaded: UnpicklingError: Weights only load failed",
          make=both(remove("plain/model.safetensors"), pickled("plain/pytorch_model.bin"))),
    plain("a weight that is NaN", "the loss of plain is not finite (NaN or inf): the model diverged",
        make=not_finite),
    plain("no tokenizer",
        "plain comes without a tokenizer (tokenizer.json): name the one it was trained with, --tokenizer",
          make=remove("plain/tokenizer.json", "plain/tokenizer_config.json")),
]

EVALUATING = [
    Bad("eval of nothing", "eval", ("Missing from blockwise-lr eval: PATH Folder of a run",)),
    Bad("eval of no folder", "eval nowhere", ("no folder nowhere: expected a run's folder (train --out)",)),
    Bad("eval of a folder of texts", "eval text", ("text holds neither a run nor a model (no config.json)",)),
    Bad("eval of a masked model", "eval bert --data text",
        ("bert predicts masked tokens; expected a causal language model",)),
    Bad("eval of a model without a text", "eval plain", ("name the text, --data PATH-or-id",)),
    Bad("eval in empty batches", "eval run --batch-size 0", ("--batch-size is 0; expected 1 or more",)),
    Bad("eval with another context", "eval run --context 8",
        ("--context, --overlap and --tokenizer are for --data",)),
    Bad("eval beyond the context", "eval run --data text --context 17",
        ("--context is 17; run takes 1 to 16 tokens",)),
    Bad("eval with all overlap", "eval run --data text --overlap 16",
        ("--overlap is 16; expected 0 or more and less than",)),
    Bad("eval of no text", "eval plain --data e.txt", ("no text in any of the documents",), file("e.txt")),
    Bad("generate no tokens", f"{GENERATE} --tokens 0", ("--tokens is 0; expected 1 or more",)),
    Bad("generate a word", f"{GENERATE} --tokens x", ("Error parsing --tokens", "'x'")),
    Bad("generate beyond the context", f"{GENERATE} --tokens 16",
        ("run takes 16 in all; shorten --prompt or lower --tokens",)),
    Bad("generate behind a long prompt", f"{GENERATE} --prompt '{'+ ' * 40}'", ("the prompt has 80 tokens",)),
    Bad("generate behind bytes", f"{GENERATE} --prompt '\udcff'", ("--prompt '\\udcff' is not UTF-8 text",)),
    Bad("generate of negative top-k", f"{GENERATE} --top-k -1", ("--top-k is -1; expected 0 or more",)),
    Bad("generate too cold", f"{GENERATE} --temperature 1e-300", ("--temperature is 1e-300; expected 0",
        "1e-06 or more")),
    Bad("generate at no temperature", f"{GENERATE} --temperature nan",
        ("--temperature is nan; expected a finite number",)),
    Bad("generate of a huge seed", f"{GENERATE} --seed 99999999999999999999",
        ("--seed is 99999999999999999999", "at most")),
    Bad("generate by a NaN", "generate plain --tokens 3", ("is not finite (NaN or inf): the model diverged",),
        not_finite),
    Bad("export nowhere", "export run",
        ("export --to huggingface needs a folder to write: add --out DIR", "add --to torchtitan")),
    Bad("export to a full folder", "export run --out text",
        ("the folder text has files already: choose another --out",)),
    Bad("export to a file", "export run --out tiny.json",
        ("tiny.json is a file; expected the name of a new folder",)),
    Bad("export below a file", "export run --out tiny.json/x", ("the folder tiny.json cannot be made",
        "choose another --out")),
    Bad("export no run", "export text --out out", ("no complete checkpoint in text",)),
    Bad("export to what", "export run --out out --to onnx", ("invalid choice 'onnx'", "huggingface")),
    Bad("export no weights", "export run/checkpoint-4 --out out",
        ("has no weights (model.safetensors): choose another",),
        both(remove("run/checkpoint-4/model.safetensors"), seal_again)),
]

MEASURING = [
    Bad("sharpness of nothing", "sharpness", ("Missing from blockwise-lr sharpness: MODEL",)),
    Bad("sharpness of no folder", "sharpness no/such/folder",
        ("no folder no/such/folder: expected the folder of a run",)),
    Bad("sharpness of a preset misspelled", "sharpness quikstart",
        ("is no folder and no preset (`blockwise-lr presets`",)),
    Bad("sharpness on no batches", "sharpness run --batches 0", ("--batches is 0; expected 1 or more",)),
    Bad("sharpness on too many batches", "sharpness run --batches 999",
        ("measure on fewer batches, or give more text",)),
    Bad("sharpness beyond the context", "sharpness run --context 17",
        ("--context is 17; run takes windows of at most 16",)),
    Bad("sharpness by what", "sharpness run --estimator trace", ("invalid choice 'trace'", "fisher")),
    Bad("sharpness of no block", "sharpness run --blocks x=top",
        ("names 'top', which is no block; the blocks are emb",)),
    Bad("sharpness into a file", "sharpness run --batches 1 --out tiny.json/x", ("cannot be made",
        "choose another --out")),
    Bad("directional of a preset", "sharpness quickstart --directional",
        ("has no optimizer: expected the folder of a run",)),
    Bad("directional of an unknown estimator", "sharpness run --directional --probes 2",
        ("--probes 2 is about average",)),
    optimizer("gone", "holds no optimizer (optimizer.pt): choose another checkpoint", make=remove(OPTIMIZER)),
    optimizer("text", "is not this model's optimizer: UnpicklingError", make=file(OPTIMIZER, "xx")),
    optimizer("code", "is not this model's optimizer: UnpicklingError: Weights only load failed",
        make=pickled(OPTIMIZER)),
    optimizer("a list", "is not this model's optimizer: TypeError", make=lambda: torch.save([1], OPTIMIZER)),
    optimizer("half of it", "is not this model's optimizer: ", make=cut(OPTIMIZER)),
]

INSPECTING = [
    Bad("inspect nothing", "inspect", ("inspect needs a model first: a preset, a folder or id",)),
    Bad("inspect no module", "inspect nowhere_at_all:f",
        ("No module named 'nowhere_at_all'; expected module:function",)),
    Bad("inspect a function that raises", "inspect mine:broken",
        ("mine:broken() raised RuntimeError: no luck",),
        file("mine.py", MINE)),
    Bad("inspect a number", "inspect mine:number", ("returned a int; expected a torch.nn.Module",),
        file("mine.py", MINE)),
    Bad("inspect a module that raises", "inspect raising:f",
        ("raising:f: at import; expected module:function",),
        file("raising.py", "raise RuntimeError('at import')")),
    Bad("inspect a module that is none", "inspect syntax:f", ("syntax:f: invalid syntax",), file("syntax.py",
        "def (")),
    Bad("inspect a module that exits", "inspect exits:f", ("exits:f: 3; expected module:function",),
        file("exits.py", "raise SystemExit(3)")),
    Bad("inspect by no ratio", "inspect quickstart --ratios emb=-1",
        ("--ratios: emb is -1.0; expected a finite number",)),
    Bad("inspect by no pattern", "inspect quickstart --blocks '(=vo'",
        ('override r"(" is not a valid regular expression',)),
    Bad("inspect without matches", "inspect quickstart --blocks nowhere=vo",
        ('r"nowhere" matches no trainable parameter',)),
    Bad("inspect by a deep file", "inspect quickstart --blocks b.json",
        ("cannot read the overrides in b.json",),
        file("b.json", "[" * 100_000)),
    Bad("inspect a run without heads", "inspect run", ("--heads is 0; expected 1 or more",),
        file("run/config.json", '{"train": {"model": {"heads": 0}}}')),
    Bad("inspect a damaged run", "inspect run", ("it is int; expected an object",), file("run/config.json",
        '{"train": 3}')),
    Bad("inspect remote code", "inspect plain", ("contains custom code which must be executed",), both(
        model_field("model_type", "mine"), model_field("auto_map", CODE), file("plain/mine.py",
        "raise SystemExit('it ran')"))),
]
# fmt: on

MODELS = [*FOLDERS, *EVALUATING, *MEASURING, *INSPECTING]
