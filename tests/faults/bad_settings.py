"""Wrong command lines and wrong configurations."""

from __future__ import annotations

from faults.bad_inputs import Bad, field, file

TINY = "train tiny.json --out out"
COMPARE = "compare tiny.json --out out --arms adamw:uniform"
BLOCKS = "the blocks are emb, qk, vo, ffn, norm, head"
ABOVE_0 = "expected a finite number above 0"


def flags(given: str, *says: str, what: str = "", needs_no_gpu: bool = False) -> Bad:
    """`train` on good files with these flags."""
    return Bad(what or given, f"{TINY} {given}", says, needs_no_gpu=needs_no_gpu)


def config(what: str, content: str | bytes, *says: str) -> Bad:
    """`train` by a configuration with this content."""
    return Bad(f"config.json: {what}", "train bad.json --out out", says, file("bad.json", content))


def ratios(what: str, content: str | bytes, *says: str) -> Bad:
    """`train` by ratios out of a file with this content."""
    return Bad(f"ratios: {what}", f"{TINY} --ratios r.json", says, file("r.json", content))


def compare(given: str, *says: str) -> Bad:
    """`compare` of a uniform baseline with these further arms and flags."""
    return Bad(f"compare {given}", f"{COMPARE} {given}", says)


# fmt: off
COMMANDS = [
    Bad("a command misspelled", "trian", ("no command 'trian'", "the commands are train, compare, tune")),
    Bad("a command in capitals", "Train", ("no command 'Train'",)),
    Bad("train alone", "train", ("train needs the name of a preset first", "blockwise-lr train quickstart")),
    Bad("flags before the preset", "train --steps 3", ("train needs the name of a preset first",)),
    Bad("compare alone", "compare", ("compare needs the name of a preset first",)),
    Bad("no such preset", "train quikstart", ("no preset named 'quikstart'",
        "there are quickstart, and gpt2-small")),
    Bad("no such configuration", "train missing.json", ("cannot read the configuration missing.json",
        "No such file")),
    Bad("presets of what", "presets all", ("presets takes no arguments; got all",)),
    flags("--stps 3", "blockwise-lr: Unrecognized options: --stps, 3 Perhaps you meant: --steps"),
    flags("extra", "Unrecognized options: extra"),
    flags("--steps many", "Error parsing --steps: invalid literal for int()", "'many'"),
    flags("--steps 3.5", "Error parsing --steps", "'3.5'"),
    flags("--steps", "Missing value for argument '--steps'", what="a flag without its value"),
    flags("--schedule linear", "invalid choice 'linear'", "('cosine', 'wsd')"),
    flags("--precision fp16", "invalid choice 'fp16'", "('auto', 'fp32', 'bf16')"),
    flags("--device tpu", "invalid choice 'tpu'", "('auto', 'cpu', 'cuda')"),
    flags("--device cuda", "torch sees no GPU here; use --device cpu", needs_no_gpu=True),
    flags("--on-nonfinite ignore", "invalid choice 'ignore'", "('stop', 'skip')"),
]

NUMBERS = [
    flags("--steps 0", "--steps is 0; expected 1 or more"),
    flags("--steps 99999999999999999999", "--steps is 99999999999999999999", "2147483647 at most"),
    flags("--batch-size -1", "--batch-size is -1; expected 1 or more"),
    flags("--accumulation 0", "--accumulation is 0; expected 1 or more"),
    flags("--log-every 0", "--log-every is 0; expected 1 or more"),
    flags("--save-every 3", "--save-every is 3; expected 0 or a multiple of --log-every (2)"),
    flags("--eval-every -2", "--eval-every is -2; expected 0 or a multiple of --log-every"),
    flags("--keep-checkpoints 0", "--keep-checkpoints is 0; expected 1 or more"),
    flags("--eval-tokens -1", "--eval-tokens is -1; expected 0 or more"),
    flags("--seed -1", "--seed is -1; expected 0 or more"),
    flags("--init-seed -1", "--init-seed is -1; expected 0 or more"),
    flags("--data-seed 4294967296", "--data-seed is 4294967296; expected 0 or more, 4294967295 at most"),
    flags("--context 1", "--context is 1; expected 2 or more, so that there is a token to predict"),
    flags("--context 5000", "too little text", "one window needs 5000", "a shorter context"),
    flags("--vocab-size 0", "--vocab-size is 0; expected 1 or more"),
    flags("--vocab-size 256", "needs at least 257 tokens, --vocab-size is 256"),
    flags("--vocab-size 99999999", "at most 1048576 tokens", "--vocab-size is 99999999"),
    flags("--heads 3", "hidden size 8 is not a multiple of 3 heads: change --hidden-size or --heads"),
    flags("--hidden-size 6", "6 channels in 2 heads are 3 a head", "change --hidden-size or --heads"),
    flags("--hidden-size 2147483646 --heads 1", "a model of these sizes cannot be built",
        what="a model beyond int64"),
    flags("--kv-heads 3", "2 heads cannot share 3 key/value heads: --kv-heads must divide --heads"),
    flags("--kv-heads 0", "--kv-heads is 0; expected 1 or more"),
    flags("--family gpt2 --kv-heads 1", "GPT-2 has as many key/value heads as heads: leave out --kv-heads"),
    flags("--ffn-size 0", "--ffn-size is 0; expected 1 or more"),
    flags("--layers 0", "--layers is 0; expected 1 or more"),
]

OPTIMIZATION = [
    flags("--base-lr 0", f"--base-lr is 0.0; {ABOVE_0}"),
    flags("--base-lr nan", f"--base-lr is nan; {ABOVE_0}"),
    flags("--base-lr 1e400", f"--base-lr is inf; {ABOVE_0}"),
    flags("--base-lr 1e300 --ratios emb=1e300", "--base-lr 1e+300 times a ratio of 1e+300 is inf",
        "lower one of them"),
    flags("--ratios papper", "'papper' is no file and none of uniform, half, paper, measured",
        'pairs such as "emb=4,vo=0.5"'),
    flags("--ratios emb=0", f"ratios: emb is 0.0; {ABOVE_0}"),
    flags("--ratios emb=-1", f"ratios: emb is -1.0; {ABOVE_0}"),
    flags("--ratios emb=nan", f"ratios: emb is nan; {ABOVE_0}"),
    flags("--ratios emb=inf", f"ratios: emb is inf; {ABOVE_0}"),
    flags("--ratios emb=four", "could not convert string to float: 'four'", 'expected pairs such as "emb=4"'),
    flags("--ratios emb=4,", "'' is no pair such as \"emb=4\" (in 'emb=4,')"),
    flags("--ratios emb=4,emb=5", "emb is there twice", "expected every block once"),
    flags("--ratios embedding=4", "'embedding' is not a block", BLOCKS),
    flags("--ratios auto:speed=3", "auto: no option 'speed'; there are begin, gain"),
    flags("--ratios auto --optimizer sgd", "--optimizer is sgd: give it ratios that do not move"),
    flags("--re-measure 5", "--re-measure is 5 with --ratios half", "with --ratios auto"),
    flags("--optimizer adamm", "no optimizer named 'adamm'; there are adamw, nadamw", "module:Class"),
    flags("--optimizer torch.optim:NoSuch", "has no attribute 'NoSuch'; expected module:Class"),
    flags("--optimizer torch.nn:Linear", "is the class Linear; expected a subclass of torch.optim.Optimizer"),
    flags("--optimizer .:x", "--optimizer .:x: ", "expected module:Class, such as torch.optim:RAdam"),
    Bad("an optimizer whose module raises", f"{TINY} --optimizer raises:Mine", ("no luck",
        "expected module:Class"),
        file("raises.py", "raise RuntimeError('no luck')")),
    flags("--optimizer torch.optim:LBFGS", "LBFGS on this model: LBFGS doesn't support per-parameter options"),
    flags("--optimizer torch.optim:SparseAdam",
        "cannot step: RuntimeError: SparseAdam does not support dense gradients"),
    flags("--optimizer sophia", "--optimizer sophia cannot be trained by this command", "call build_optimizer"),
    flags("--optimizer sgd --beta2 0.9", "--optimizer sgd takes no beta2 (it is 0.9): leave it out"),
    flags("--beta1 1", "--beta1 is 1.0; expected 0 or more and below 1"),
    flags("--eps 0", f"--eps is 0.0; {ABOVE_0}"),
    flags("--weight-decay -1", "--weight-decay is -1.0; expected a finite number, 0 or above"),
    flags("--weight-decay-by-block emb=nan", "--weight-decay-by-block: emb is nan; expected a finite number"),
    flags("--weight-decay-by-block top=1", "'top' is not a block", BLOCKS),
    flags("--no-decay bias", "--no-decay: 'bias' is not a valid Block", BLOCKS),
    flags("--clip -1", "--clip is -1.0; expected 0 or more"),
    flags("--clip-by-block emb=0", "--clip-by-block: emb is 0.0; expected a number above 0"),
    flags("--clip-by-block all", "--clip-by-block: 'all' is no pair such as \"emb=4\""),
    flags("--warmup-fraction 1", "--warmup-fraction is 1.0; expected 0 or more and below 1"),
    flags("--warmup-steps 4", "warm-up takes 4 steps, but the run has total_steps=4", "shorten the warm-up"),
    flags("--floor-fraction 2", "--floor-fraction is 2.0; expected 0 to 1"),
    flags("--report-to nowhere", "cannot report to 'nowhere'; it knows", "tensorboard"),
    flags("--report-to dagshub", "--report-to dagshub: ", "install"),
    flags("--sharpness-at 99", "--sharpness-at names step 99; expected 0 to 4"),
    flags("--sharpness-every -1", "--sharpness-every is -1; expected 0 or more"),
    flags("--sharpness-estimators fisher fisher", "fisher fisher; expected one or more, each once"),
    flags("--sharpness-at 2 --sharpness-batches 999", "999 batches of 2 windows", "measure on fewer batches"),
    flags("--sharpness-at 2 --sharpness-estimators optimizer --optimizer sgd",
          "reads Adam's second moment (exp_avg_sq), which --optimizer sgd does not keep", "choose fisher"),
]

CONFIGURATIONS = [
    config("not JSON", "{", "cannot read the configuration bad.json: "),
    config("not UTF-8", b"\xff{}", "cannot read the configuration bad.json: ", "utf-8"),
    config("nested without end", "[" * 100_000, "cannot read the configuration bad.json: ", "recursion"),
    config("a list", "[]", "holds list; expected an object of fields"),
    config("an unknown field", '{"stepz": 1}', "no field named stepz; the fields are preset, steps"),
    config("an escape sequence", '{"\\u001b[31m": 1}', "no field named '\\x1b[31m'"),
    config("text for a number", '{"steps": "many"}', "steps is 'many'; expected int"),
    config("true for a number", '{"steps": true}', "steps is True; expected int"),
    config("text for a learning rate", '{"optim": {"base_lr": "1e-3"}}',
        "optim.base_lr is '1e-3'; expected float"),
    config("a number no float holds", '{"optim": {"base_lr": 1' + "0" * 400 + "}}", "optim.base_lr is 1",
        "expected float"),
    config("nested wrong", '{"model": {"kv_heads": 1.5}}', "model.kv_heads is 1.5; expected int | None"),
    config("a number for a part", '{"optim": 3}', "optim is 3; expected an object of fields"),
    config("no choice of ours", '{"optim": {"schedule": "linear"}}', "'linear'; expected 'cosine' or 'wsd'"),
    config("a list of text", '{"sharpness_at": ["x"]}', "sharpness_at is ['x']; expected a list of int"),
    config("of a run, damaged", '{"train": 3}', 'has int as its "train"; expected an object of fields'),
    Bad("config.json: no text", TINY, ("--data is empty", "a folder or a glob"), field("data.data", "")),
]

RATIO_FILES = [
    ratios("not JSON", "{", 'r.json is not JSON', 'expected {"emb": 4, "qk": 2, ...}'),
    ratios("nested without end", "[" * 100_000, "r.json is not JSON"),
    ratios("a list", "[]", 'r.json holds list; expected {"emb": 4'),
    ratios("a number no float holds", '{"emb": 1' + "0" * 400 + "}", "ratios: emb is 1", ABOVE_0),
    ratios("true", '{"emb": true}', f"ratios: emb is True; {ABOVE_0}"),
    ratios("a report of another format", '{"estimator": "fisher", "format": 2}', "its format is 2; expected 1"),
    ratios("half a report", '{"estimator": "fisher", "format": 1}', "not a sharpness report, or a damaged one"),
    ratios("half a directional report", '{"kind": "directional", "format": 1}',
        "not a directional report, or a damaged"),
    ratios("no list of reports", '{"kind": "directional", "format": 1, "earlier": 3}',
        '"earlier" is int; expected a list'),
]

COMPARISONS = [
    compare("adamw", "cannot read the arm 'adamw': expected OPTIMIZER:RATIOS or NAME=OPTIMIZER:RATIOS"),
    compare("=adamw:paper", "cannot read the arm '=adamw:paper'"),
    compare("'x\ny=adamw:paper'", "cannot read the arm 'x\\ny=adamw:paper'"),
    compare("", "a comparison needs a baseline and at least one other arm; got 1", "such as adamw:half"),
    compare("adamw:uniform", "each arm name may be given once; given more than once: adamw:uniform"),
    compare("adamw:emb=1", "two arms are both adamw:uniform; leave one out"),
    compare("adamm:paper", "arm 'adamm:paper': no optimizer named 'adamm'"),
    compare("x=adamw:emb=0", f"arm 'x': ratios: emb is 0.0; {ABOVE_0}"),
    compare("sgd:auto", "arm 'sgd:auto': --ratios auto reads the last update"),
    compare("torch.optim:LBFGS:paper", "arm 'torch.optim:LBFGS:paper': ", "per-parameter options"),
    compare("adamw:paper --seeds 0 0", "each seed may be given once; given more than once: 0"),
    compare("adamw:paper --seeds -1", "a seed in --seeds is -1; expected 0 or more"),
    compare("adamw:paper --seeds", "no seeds were given; give at least one, such as --seeds 0 1 2"),
    compare("adamw:paper --seed 5", "--seed 5 belongs to train; compare takes it as --seeds 0 1 2"),
    compare("adamw:paper --base-lrs 0", "a base learning rate must be a positive number; got 0"),
    compare("adamw:paper --base-lrs 1e-3 1e-3", "each base learning rate may be given once", "0.001"),
    compare("adamw:paper --refine",
        "--refine is part of the tuning: give the grid too, such as --base-lrs 1e-3"),
    compare("adamw:paper --base-lrs 1e-3 --warmups 1", "from 0 to below 1; got 1 in --warmups"),
    compare("adamw:paper --jobs -1", "--jobs must be at least 1; got -1"),
    compare("adamw:paper --steps 1", "a comparison needs at least 2 steps; got 1: raise --steps"),
    compare("adamw:paper --data nowhere.txt", "there is no file or folder nowhere.txt"),
    Bad("compare into a file", "compare tiny.json --out tiny.json/x --arms adamw:uniform adamw:paper",
        ("cannot be made (Not a directory): choose another --out",)),
]
# fmt: on

SETTINGS = [*COMMANDS, *NUMBERS, *OPTIMIZATION, *CONFIGURATIONS, *RATIO_FILES, *COMPARISONS]
