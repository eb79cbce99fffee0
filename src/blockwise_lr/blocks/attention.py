"""Find the attention modules of a model, and which parts each of their parameters makes.

The parts are q, k, v, the output, and the output's gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations

from torch import nn

from blockwise_lr.blocks.attention_names import ATTENTION_NAMES, INDEXER, STACKED, role_of
from blockwise_lr.blocks.known_layouts import known_layout
from blockwise_lr.blocks.layout import Layout, Projection
from blockwise_lr.blocks.topology import Tree, has_heads, output_dim

_Layouts = dict[str, Layout]


def find_projections(tree: Tree) -> dict[tuple[str, str], Projection]:
    """Return the parameters of all attention modules: (path of the owner, attribute name) -> Projection.

    A module is an attention if one of these holds:

    - it is torch's nn.MultiheadAttention;
    - it has linear layers named as the queries and as what they attend to;
    - it has exactly two linear layers: the outputs of one are q, k and v, and the other takes as many inputs as there
      are queries.

    The output projection may lie outside: it is then the one other linear layer of the parent module. A module that
    only resembles an attention is left out; its parameters are reported as unknown.
    """
    found: dict[tuple[str, str], Projection] = {}
    for path, module in tree.modules.items():
        if isinstance(module, nn.MultiheadAttention):
            found.update(_torch_attention(path, module))
            continue
        matrices = tree.matrices(path)
        if (stacked := _stacked(tree, path, matrices)) is not None:
            found.update(stacked)
            continue
        if not matrices or INDEXER.fullmatch(type(module).__name__):
            continue
        layouts = _named(tree, path, matrices) or _by_shape(tree, path, matrices)
        for child, layout in layouts.items():
            inner = tree.linear(child)
            found.update(_of_linear(path, inner, tree.modules[inner], layout))
    return found


def _stacked(
    tree: Tree, path: str, matrices: Mapping[str, tuple[int, int]]
) -> dict[tuple[str, str], Projection] | None:
    """Return the projections of an attention with all matrices stacked in one parameter; None for another module."""
    for leaf, (rows, *others) in _own_shapes(tree.modules[path]):
        stacked = STACKED.fullmatch(leaf)
        if stacked is None or not others:
            continue
        parts = tuple(stacked[1])
        size, rest = divmod(rows, len(parts))
        in_rows = size == 1 if len(others) > 1 else size == others[0] or parts[-1] == "o"
        in_rows = in_rows and rest == 0
        found = {
            (path, leaf): Projection(path, Layout(tuple((p, size) for p in parts), 1 if in_rows else None), 0)
        }
        for child in (child for child in matrices if role_of(child) == "o"):
            inner, output = tree.linear(child), Layout((("o", matrices[child][1]),))
            found |= _of_linear(path, inner, tree.modules[inner], output)
        return found
    return None


def _own_shapes(module: nn.Module) -> Iterator[tuple[str, list[int]]]:
    """Yield the module's own parameters with their shapes. A split parameter has the shape of the whole weight."""
    for leaf, parameter in module._parameters.items():
        if parameter is not None and parameter.ndim:
            yield leaf, list(parameter.shape)
    for leaf, split in getattr(module, "parametrizations", {}).items():
        parts = [parameter.shape for parameter in split.parameters()]
        if parts and parts[0]:
            yield leaf, [sum(shape[0] for shape in parts), *parts[0][1:]]


def _named(tree: Tree, path: str, matrices: Mapping[str, tuple[int, int]]) -> _Layouts:
    """Return the layouts of an attention whose linear layers are named by their roles.

    If none is named as the output, the one layer without a known name is the output.
    """
    module = tree.modules[path]
    roles = {child: role for child in matrices if (role := role_of(child))}
    if "q" in roles.values():  # in cross-attention, the layer named as fused makes k and v only
        roles = {child: "kv" if role == "qkv" else role for child, role in roles.items()}
    if not _is_complete(set(roles.values()), module, tree, path):
        return {}
    layouts: _Layouts = {}
    for child, role in roles.items():
        outputs = [c for c, r in roles.items() if r == "o"] or _outside(tree, path)
        queries = tree.shape(outputs[0])[0] if outputs else 0
        layouts[child] = _layout(module, child, role, matrices[child][1], roles, queries)
    rest = [child for child in matrices if child not in roles]
    made = {width for layout in layouts.values() for part, width in layout.parts if part in ("q", "v")}
    made.add(_widths(layouts).get("v", 0))
    if "o" not in roles.values():
        candidates = rest if len(rest) == 1 else _outside(tree, path) if not rest else []
        fitting = [c for c in candidates if _input_width(tree, c) in made]
        layouts |= {child: Layout((("o", _output_width(tree, child)),)) for child in fitting}
    return _with_gate(module, layouts, matrices)


def _is_complete(roles: set[str], module: nn.Module, tree: Tree, path: str) -> bool:
    """Return whether these roles make an attention: queries, and something to attend to."""
    if "q" in roles and (roles & {"v", "latent", "kv"}):
        return True
    named = any(ATTENTION_NAMES.search(name) for name in (type(module).__name__, path.rpartition(".")[2]))
    # Keys and values come from another layer, or keys and values are one.
    if named and (("q" in roles and "o" in roles) or roles == {"kv"}):
        return True
    if named and roles == {"qkv"}:  # the output projection lies outside
        return bool(_outside(tree, path))
    # An attention with only these two plain matrices is found by shape instead.
    return named and {"qkv", "o"} <= roles and (len(tree.matrices(path)) > 2 or not tree.is_plain(path))


def _layout(
    module: nn.Module, path: str, role: str, width: int, roles: Mapping[str, str], queries: int
) -> Layout:
    """Return the layout of a linear layer in an attention.

    Args:
        module: the attention.
        path: path of the linear layer.
        role: what the layer makes, a value of `ROLES`.
        width: its number of outputs.
        roles: the roles of all linear layers of the attention.
        queries: the number of query outputs, 0 if unknown.
    """
    child = path.rpartition(".")[2]
    if role == "latent":
        return known_layout(module, child, width) or Layout((("latent", width),))
    if role == "qkv":
        rest = (width - queries) // 2
        known = 0 < queries < width and width == queries + 2 * rest
        plain = Layout((("q", queries), ("k", rest), ("v", rest)), 1 if known else None)
        return known_layout(module, child, width) or plain
    if role == "kv":
        halves = Layout((("k", width // 2), ("v", width // 2)))
        return (known_layout(module, child, width) if role_of(child) == "kv" else None) or halves
    if child == "q_gate_proj":
        return known_layout(module, child, width) or Layout((("q", width),))
    if role == "k" and not {"v", "latent", "kv"} & set(roles.values()):
        return Layout((("kv", width),))
    return Layout(((role, width),))


def _with_gate(module: nn.Module, layouts: _Layouts, matrices: Mapping[str, tuple[int, int]]) -> _Layouts:
    """Add the output's gate to the query layer if that is twice as wide as keys and output require.

    Returns no layouts if the widths fit neither a query nor a query with a gate.
    """
    widths, of = _widths(layouts), {child: layout.parts[0][0] for child, layout in layouts.items()}
    queries = [child for child, part in of.items() if part == "q" and len(layouts[child].parts) == 1]
    outputs = [child for child, part in of.items() if part == "o" and child in matrices]
    whole = len(queries) == len(outputs) == 1 and {"k", "v"} <= set(widths) and "latent" not in widths
    if not whole:
        return layouts
    width, values = matrices[queries[0]][1], matrices[outputs[0]][0]
    if width * widths["v"] == values * widths["k"]:
        return layouts
    if width * widths["v"] != 2 * values * widths["k"]:
        return {}
    child = queries[0].rpartition(".")[2]
    unknown = Layout((("q", width - values), ("gate", values)), None)
    return layouts | {queries[0]: known_layout(module, child, width) or unknown}


def _widths(layouts: _Layouts) -> dict[str, int]:
    """Return the number of outputs of each part, over all weights that make it."""
    widths: dict[str, int] = {}
    for layout in layouts.values():
        for part, width in layout.parts:
            widths[part] = widths.get(part, 0) + width
    return widths


def _outside(tree: Tree, path: str) -> list[str]:
    """Return the linear layer that lies next to the attention in its parent module, if there is exactly one."""
    linear = [p for p in tree.inside(path.rpartition(".")[0], without=path) if tree.is_matrix(p)]
    return linear if path and len(linear) == 1 else []


def _input_width(tree: Tree, path: str) -> int:
    return tree.shape(path)[0]


def _output_width(tree: Tree, path: str) -> int:
    return tree.shape(path)[1]


def _by_shape(tree: Tree, path: str, matrices: Mapping[str, tuple[int, int]]) -> _Layouts:
    """Return the layouts of an attention with two linear layers, by their shapes.

    The outputs of one layer are the queries, as many as the other layer has inputs, and an even rest for k and v.
    """
    if len(matrices) != 2 or not tree.is_plain(path):
        return {}
    module = tree.modules[path]
    is_attention = has_heads(module) or ATTENTION_NAMES.search(type(module).__name__)
    for fused, output in permutations(matrices):
        name = fused.rpartition(".")[2]
        if not is_attention and not ATTENTION_NAMES.search(name):
            continue
        (width_in, total), (queries, width_out) = matrices[fused], matrices[output]
        rest = total - queries
        names = (role_of(fused), role_of(output))
        # This layer also changes the width, from that of one stage of the model to that of the next.
        widens = names == ("qkv", "o") and total == 3 * queries
        if (width_in == width_out or widens) and 0 < rest <= 2 * queries and rest % 2 == 0:
            plain = Layout((("q", queries), ("k", rest // 2), ("v", rest // 2)))
            return {fused: known_layout(module, name, total) or plain, output: Layout((("o", width_out),))}
    return {}


def _of_linear(
    attention: str, child: str, module: nn.Module, layout: Layout
) -> dict[tuple[str, str], Projection]:
    """Return the projections of a linear layer's weight and bias, which share a layout."""
    return {
        (child, "weight"): Projection(attention, layout, output_dim(module)),
        (child, "bias"): Projection(attention, layout, 0),
    }


def _torch_attention(path: str, module: nn.MultiheadAttention) -> dict[tuple[str, str], Projection]:
    """Return the projections of an nn.MultiheadAttention."""
    width = module.embed_dim
    qkv = Layout((("q", width), ("k", width), ("v", width)))
    output = f"{path}.out_proj" if path else "out_proj"
    found = {(path, leaf): Projection(path, qkv, 0) for leaf in ("in_proj_weight", "in_proj_bias")}
    # bias_k and bias_v (1, 1, width) are a key and a value that are appended to the sequence.
    singles = {"q_proj_weight": "q", "k_proj_weight": "k", "v_proj_weight": "v", "bias_k": "k", "bias_v": "v"}
    found |= {(path, leaf): Projection(path, Layout(((part, width),)), 0) for leaf, part in singles.items()}
    found |= _of_linear(path, output, module.out_proj, Layout((("o", width),)))
    return found
