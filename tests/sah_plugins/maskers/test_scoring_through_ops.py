"""Maskers leave the work of scoring to ``inputs.ops``, where a backend can make it fast.

Read off the source: products of tensors, orders, sums along keys, and rows taken by index are
primitives. What a masker does itself, and why it may, is listed below.
"""

import ast
from pathlib import Path

import pytest

import sah_plugins.maskers

pytestmark = pytest.mark.unit

FOLDER = Path(sah_plugins.maskers.__file__).parent
PRIMITIVES = {
    *("matmul", "mm", "bmm", "baddbmm", "addmm", "mv", "dot", "einsum", "tensordot", "linear"),
    *("inner", "cdist", "cosine_similarity", "scaled_dot_product_attention"),
    *("softmax", "log_softmax", "logsumexp", "cumsum", "logcumsumexp", "cumprod"),
    *("topk", "sort", "argsort", "msort", "kthvalue", "searchsorted", "bucketize"),
    *("multinomial", "uniform", "uniform64", "normal", "bits", "rand", "randn", "popcount"),
    *("gather", "take_along_dim", "index_select", "take_rows", "norm", "vector_norm"),
}
PRODUCT = "@"

# files that run once for a model or a context, and not per query
BEFORE = {
    "double_sparsity/calibration.py",
    "double_sparsity/channels.py",
    "hash_attention/training.py",
    "pq_cache/clustering.py",
}
# functions that take sequences in another order, which is no scoring of keys
ORDER = {"reorder", "reordered"}
# by file and function: what is no scoring of keys
EXCUSED = {
    # a softmax over scores that are there
    ("pq_cache/__init__.py", "share"): {"softmax"},
    # the order and the places of keys that were selected
    ("twilight.py", "candidates"): {"sort", "gather"},
    ("twilight.py", "prune"): {"gather"},
    # which pages a foreign mask opens, and the copy of one page
    ("quest.py", "pages_with_a_key"): {"gather"},
    ("quest.py", "snapshot"): {"gather"},
    # the norm of a new value, one kernel as it is
    ("socket.py", "append"): {"vector_norm"},
    ("value_aware_top_k.py", "append"): {"vector_norm"},
    # the length of one vector per row
    ("adaptive_sampling/bounds.py", "numerator"): {"vector_norm"},
    # an example for the checks
    ("double_sparsity/__init__.py", "example"): {"rand", "argsort"},
}


def is_of_ops(called: ast.expr) -> bool:
    """Whether a function is called as ``ops.f``, ``inputs.ops.f`` or ``self.ops.f``."""
    if not isinstance(called, ast.Attribute):
        return False
    owner = called.value
    return "ops" in (getattr(owner, "id", None), getattr(owner, "attr", None))


def primitives(source: str) -> dict[str, set[str]]:
    """The primitives that each function of a file computes itself; '' is the module."""
    found: dict[str, set[str]] = {}

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        used = None
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
            used = PRODUCT
        elif isinstance(node, ast.Call) and not is_of_ops(node.func):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            used = name.rstrip("_") if name.rstrip("_") in PRIMITIVES else None
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                # a search space
                used = None if node.func.value.id == "Search" else used
        if used is not None:
            found.setdefault(function, set()).add(used)
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


def test_maskers_compute_no_scoring_primitive_themselves():
    found = {}
    for path in sorted(FOLDER.rglob("*.py")):
        name = path.relative_to(FOLDER).as_posix()
        if name not in BEFORE:
            used_by = primitives(path.read_text())
            found |= {(name, f): used for f, used in used_by.items() if f not in ORDER}
    assert found == EXCUSED


@pytest.mark.parametrize(
    "line",
    [
        "side = torch.matmul(query, planes)",
        "scores = query @ key.mT",
        "best = scores.topk(8)",
        "weights = torch.softmax(logits, -1)",
        "draw = inputs.random.uniform(heads, rows, keys)",
        "weights.softmax_(-1)",
        "rows @= key",
    ],
)
def test_a_primitive_is_found_wherever_it_stands(line):
    assert set(primitives(f"def add_mask(inputs):\n    {line}\n")) == {"add_mask"}


@pytest.mark.parametrize(
    "line",
    [
        "scores = inputs.ops.logits(query, key, 1.0)",
        "kept = ops.masked_topk(scores, 3)",
        "search = Search.uniform(0.5, 0.99)",
        "norms.cumulative(1)",
    ],
)
def test_what_ops_do_is_no_work_of_the_masker(line):
    assert primitives(f"def add_mask(inputs):\n    {line}\n") == {}
